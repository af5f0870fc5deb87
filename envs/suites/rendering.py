"""The choice of the OpenGL backend that MuJoCo draws with, made before dm_control is imported and reads it.

dm_control takes the backend from the environment variable `MUJOCO_GL` at its first import. Without it, it takes GLFW,
which needs a display and fails at the first picture where there is none. Nothing is imported here but the standard
library, so that worker processes can choose a backend before anything else.
"""

from __future__ import annotations

import ctypes
import os
import sys

from worldflux.errors import ConfigurationError, MissingDependencyError

# PyOpenGL finds functions in one of these, beside libEGL. On Debian, libegl1 alone installs none of them.
_GL_LIBRARIES = ("libOpenGL.so.0", "libGL.so.1", "libGLESv2.so.2")
_OSMESA_LIBRARIES = ("libOSMesa.so", "libOSMesa.so.8", "libOSMesa.so.6")

_PACKAGES = (
    "On Debian and Ubuntu: apt-get install libegl1 libgl1 libgl1-mesa-dri (for EGL), "
    "or apt-get install libosmesa6 (for OSMesa)."
)

# Constants of the EGL headers that the probe needs.
_EGL_PLATFORM_DEVICE = 0x313F
_EGL_VENDOR = 0x3053
_EGL_DESKTOP_GL_CONFIG = (0x3040, 0x0008, 0x3033, 0x0001, 0x3025, 24, 0x3038)
"""Renderable as OpenGL, drawn off screen, 24 bits of depth: what dm_control will ask for."""

_drawing_pid: int | None = None


def choose_backend() -> str:
    """Chooses the backend that MuJoCo draws with, and sets `MUJOCO_GL` for this process and its children.

    A value that is set already stays, and so does what an imported dm_control has chosen. On Linux EGL comes first
    (it uses a graphics card where there is one), then OSMesa, then GLFW where a display is there. Where none of them
    works, drawing is switched off; observations of the state work nevertheless. Other systems keep their default.

    Returns:
        `"egl"`, `"osmesa"`, `"glfw"`, `"off"`, whatever `MUJOCO_GL` says, or `""` for the system's default.
    """
    loaded = sys.modules.get("dm_control._render")
    if loaded is not None:
        return str(getattr(loaded, "BACKEND", None) or "off")
    if os.environ.get("MUJOCO_GL"):
        return os.environ["MUJOCO_GL"]
    if not sys.platform.startswith("linux"):
        return ""
    # dm_control refuses a backend that contradicts this variable.
    pyopengl = os.environ.get("PYOPENGL_PLATFORM")
    if pyopengl in (None, "", "egl") and _egl_works():
        backend = "egl"
    elif pyopengl in (None, "", "osmesa") and _loads(_OSMESA_LIBRARIES):
        backend = "osmesa"
    else:
        backend = "glfw" if has_display() else "off"
    os.environ["MUJOCO_GL"] = backend
    return backend


def check_backend() -> None:
    """Makes sure that the backend that dm_control has loaded can draw on this machine.

    Raises:
        MissingDependencyError: If there is no backend; the message names the system packages.
        ConfigurationError: If it is GLFW and there is no display.
    """
    backend = choose_backend()
    if backend == "off":
        raise MissingDependencyError(
            f"Pictures need EGL or OSMesa, and neither was found (MUJOCO_GL is {os.environ.get('MUJOCO_GL')!r}). "
            f"{_PACKAGES} Then start Python again, without MUJOCO_GL. Observations of the state work without them."
        )
    if backend == "glfw" and sys.platform.startswith("linux") and not has_display():
        raise ConfigurationError(
            "dm_control was imported with GLFW as its OpenGL backend, which needs a display, and there is none. "
            "Make the environment before anything imports dm_control, or start Python with MUJOCO_GL=egl (or osmesa)."
        )


def check_process() -> None:
    """Makes sure that this process may draw: drawing hangs in a process forked from one that has drawn.

    Raises:
        ConfigurationError: If it was forked after its parent had drawn.
    """
    if drawn_before_fork():
        raise ConfigurationError(
            "This process was forked from one that had drawn with MuJoCo, and drawing would hang in it. Start workers "
            "with context='spawn' or 'forkserver' (AsyncVectorEnv; SubprocVecEnv calls it start_method)."
        )


def drawn_before_fork() -> bool:
    """Whether this process was forked from one that had drawn; contexts it inherited must not be touched."""
    return _drawing_pid not in (None, os.getpid())


def mark_drawing() -> None:
    """Notes that this process draws, for the processes that are forked from it."""
    global _drawing_pid
    _drawing_pid = os.getpid()


def explain(problem: str, error: BaseException) -> ConfigurationError:
    """An error for a failure inside dm_control or MuJoCo when they load or set up their backend."""
    return ConfigurationError(
        f"{problem} with MUJOCO_GL={os.environ.get('MUJOCO_GL', '')!r}: {type(error).__name__}: {error} "
        f"Without MUJOCO_GL the backend is chosen by what works here. {_PACKAGES}"
    )


def has_display() -> bool:
    """Whether this process can open windows."""
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def _loads(libraries: tuple[str, ...]) -> bool:
    """Whether one of several shared libraries can be loaded."""
    for library in libraries:
        try:
            ctypes.CDLL(library)
            return True
        except OSError:
            continue
    return False


def _egl_works() -> bool:
    """Whether EGL can draw without a display: one of its devices starts and has a configuration for desktop OpenGL.

    libEGL is only a dispatcher, so its presence says little. The devices are those that dm_control will try.
    """
    if not _loads(_GL_LIBRARIES):
        return False
    try:
        egl = ctypes.CDLL("libEGL.so.1")
        egl.eglGetProcAddress.restype = ctypes.c_void_p
        egl.eglQueryString.restype = ctypes.c_char_p
        query_devices = egl.eglGetProcAddress(b"eglQueryDevicesEXT")
        get_display = egl.eglGetProcAddress(b"eglGetPlatformDisplayEXT")
    except (OSError, AttributeError):
        return False
    if not query_devices or not get_display:
        return False
    pointer, integer, number = ctypes.c_void_p, ctypes.c_int, ctypes.c_uint
    devices, count = (pointer * 10)(), integer()
    query = ctypes.CFUNCTYPE(number, integer, pointer, pointer)(query_devices)
    if not query(len(devices), ctypes.addressof(devices), ctypes.addressof(count)):
        return False
    candidates = list(devices[: count.value])
    selected = os.environ.get("MUJOCO_EGL_DEVICE_ID", "")
    if selected.isdecimal():
        candidates = candidates[int(selected) : int(selected) + 1]
    display_of = ctypes.CFUNCTYPE(pointer, number, pointer, pointer)(get_display)
    try:
        return any(_display_works(egl, display_of(_EGL_PLATFORM_DEVICE, device, None)) for device in candidates)
    finally:
        egl.eglGetError()  # reading the error clears it; dm_control would take it for its own


def _display_works(egl: ctypes.CDLL, display: int | None) -> bool:
    """Whether an EGL display starts and can draw with OpenGL. It is left as it was found."""
    if not display:
        return False
    handle = ctypes.c_void_p(display)
    # Only an initialised display has a vendor. Somebody uses it, and its contexts would die with it.
    in_use = egl.eglQueryString(handle, _EGL_VENDOR) is not None
    if not in_use and not egl.eglInitialize(handle, None, None):
        return False
    attributes = (ctypes.c_int * len(_EGL_DESKTOP_GL_CONFIG))(*_EGL_DESKTOP_GL_CONFIG)
    config, found = ctypes.c_void_p(), ctypes.c_int()
    chosen = egl.eglChooseConfig(handle, attributes, ctypes.byref(config), 1, ctypes.byref(found))
    if not in_use:
        egl.eglTerminate(handle)
    return bool(chosen) and found.value > 0
