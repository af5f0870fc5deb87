"""The OpenGL backend is one that works, is chosen before dm_control is imported, and never hangs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from worldflux.envs.suites import rendering
from worldflux.errors import ConfigurationError, MissingDependencyError

needs_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux has a choice of backends")

# libEGL finds no driver in there, as on a machine where only the dispatcher is installed.
NO_EGL = {"__EGL_VENDOR_LIBRARY_DIRS": "/nonexistent", "__EGL_VENDOR_LIBRARY_FILENAMES": "/nonexistent"}


@pytest.fixture
def undecided(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Makes the process look as if it had chosen no backend and drawn nothing; its choices are undone afterwards."""
    for variable in ("MUJOCO_GL", "PYOPENGL_PLATFORM", "DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)
    monkeypatch.delitem(sys.modules, "dm_control._render", raising=False)
    monkeypatch.setattr(rendering, "_drawing_pid", None)
    monkeypatch.setattr(sys, "platform", "linux")
    return monkeypatch


def python(code: str, **variables: str) -> tuple[str, str]:
    """The output and the errors of a program, run in a process without a display or a chosen backend."""
    chosen = ("MUJOCO_GL", "PYOPENGL_PLATFORM", "DISPLAY", "WAYLAND_DISPLAY")
    environment = {name: value for name, value in os.environ.items() if name not in chosen}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env={**environment, **variables}
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip(), result.stderr.strip()


@pytest.mark.parametrize(
    ("egl", "osmesa", "display", "chosen"),
    [
        (True, True, True, "egl"),
        (True, False, False, "egl"),
        (False, True, True, "osmesa"),
        (False, False, True, "glfw"),
        (False, False, False, "off"),
    ],
)
def test_the_first_backend_that_works_is_chosen_for_this_process_and_its_children(
    undecided: pytest.MonkeyPatch, egl: bool, osmesa: bool, display: bool, chosen: str
) -> None:
    undecided.setattr(rendering, "_egl_works", lambda: egl)
    undecided.setattr(rendering, "_loads", lambda libraries: osmesa)
    if display:
        undecided.setenv("WAYLAND_DISPLAY", "wayland-0")

    assert rendering.choose_backend() == chosen
    assert os.environ["MUJOCO_GL"] == chosen


def test_a_backend_that_was_chosen_before_stays(undecided: pytest.MonkeyPatch) -> None:
    undecided.setattr(rendering, "_egl_works", lambda: pytest.fail("was asked"))

    undecided.setenv("MUJOCO_GL", "osmesa")
    assert rendering.choose_backend() == "osmesa"

    class Loaded:
        BACKEND = "glfw"

    undecided.setitem(sys.modules, "dm_control._render", Loaded)  # it has read the variable and reads it no more
    assert rendering.choose_backend() == "glfw"
    assert os.environ["MUJOCO_GL"] == "osmesa"


@pytest.mark.parametrize(("platform", "chosen"), [("egl", "egl"), ("osmesa", "osmesa"), ("glx", "off")])
def test_the_choice_agrees_with_pyopengls_own_variable(
    undecided: pytest.MonkeyPatch, platform: str, chosen: str
) -> None:
    undecided.setattr(rendering, "_egl_works", lambda: True)
    undecided.setattr(rendering, "_loads", lambda libraries: True)
    undecided.setenv("PYOPENGL_PLATFORM", platform)

    assert rendering.choose_backend() == chosen


def test_other_systems_keep_their_default(undecided: pytest.MonkeyPatch) -> None:
    undecided.setattr(sys, "platform", "darwin")

    assert rendering.choose_backend() == ""
    assert "MUJOCO_GL" not in os.environ


def test_without_a_backend_the_error_names_the_packages_to_install(undecided: pytest.MonkeyPatch) -> None:
    undecided.setenv("MUJOCO_GL", "off")

    with pytest.raises(MissingDependencyError, match=r"apt-get install libegl1 libgl1 libgl1-mesa-dri .*libosmesa6"):
        rendering.check_backend()


def test_a_process_forked_from_one_that_has_drawn_may_not_draw(undecided: pytest.MonkeyPatch) -> None:
    rendering.check_process()
    rendering.mark_drawing()
    rendering.check_process()
    undecided.setattr(os, "getpid", lambda: -1)

    with pytest.raises(
        ConfigurationError, match=r"was forked from one that had drawn .*context='spawn' or 'forkserver'"
    ):
        rendering.check_process()


@needs_linux
def test_asking_egl_twice_gives_the_same_answer_and_disturbs_no_context() -> None:
    """The probe does not shut down a display that is in use."""
    printed, complaints = python(
        "from worldflux.envs.suites import rendering; from worldflux.envs.suites.dmc import DMCEnv\n"
        "import numpy as np\n"
        "before = rendering._egl_works(), rendering._egl_works()\n"
        "env = DMCEnv('pendulum-swingup', pixels=True, size=16, fast_rendering=True)\n"
        "frame = env.reset(seed=0)[0]\n"
        "print(rendering.choose_backend(), before, rendering._egl_works())\n"
        "assert np.array_equal(env.reset(seed=0)[0], frame)\n"
    )

    if printed.startswith("osmesa"):
        pytest.skip("this machine draws with OSMesa")
    assert printed == "egl (True, True) True"
    assert complaints == "", "no warning of GLFW, and none at the exit of a process that closed nothing"


@needs_linux
def test_a_machine_that_cannot_draw_still_gives_observations_of_the_state() -> None:
    printed, complaints = python(
        "from worldflux.envs.suites import rendering; from worldflux.envs.suites.dmc import DMCEnv\n"
        "rendering._OSMESA_LIBRARIES = ()\n"  # as if it were not installed
        "for name in ('walker-walk', 'quadruped-escape'):\n"
        "    env = DMCEnv(name, render_mode='rgb_array'); env.reset(seed=0)\n"
        "    print(env.step(env.action_space.low)[0].shape)\n"
        "for ask in (env.render, lambda: DMCEnv('walker-walk', pixels=True)):\n"
        "    try: ask()\n"
        "    except ImportError as error: print(type(error).__name__, error)\n",
        **NO_EGL,
    )

    first, second, *errors = printed.splitlines()
    assert (first, second) == ("(24,)", "(101,)")
    assert len(errors) == 2
    assert all(
        error.startswith("MissingDependencyError Pictures need EGL or OSMesa") and "libgl1-mesa-dri" in error
        for error in errors
    )
    assert complaints == ""


@needs_linux
def test_a_backend_that_does_not_load_is_named_with_what_to_do() -> None:
    code = (
        "from worldflux.envs.suites.dmc import DMCEnv\n"
        "try: DMCEnv('walker-walk')\n"
        "except ValueError as error: print(type(error).__name__, error)\n"
    )

    for backend in ("vulkan", "egl"):
        printed, _ = python(code, MUJOCO_GL=backend, **NO_EGL)
        assert printed.startswith(f"ConfigurationError dm_control cannot be imported with MUJOCO_GL='{backend}'")
        assert "Without MUJOCO_GL the backend is chosen by what works here. On Debian" in printed


@needs_linux
def test_dm_control_imported_first_without_a_display_is_an_error_that_says_so() -> None:
    printed, _ = python(
        "import warnings; warnings.simplefilter('ignore')\n"
        "from dm_control import suite\n"
        "from worldflux.envs.suites.dmc import DMCEnv\n"
        "print(DMCEnv('walker-walk').reset()[0].shape)\n"
        "try: DMCEnv('walker-walk', pixels=True)\n"
        "except ValueError as error: print(type(error).__name__, error)\n"
    )

    shape, error = printed.splitlines()
    assert shape == "(24,)"
    assert error.startswith("ConfigurationError dm_control was imported with GLFW") and "MUJOCO_GL=egl" in error


@needs_linux
def test_a_forked_worker_raises_instead_of_hanging_once_its_parent_has_drawn() -> None:
    printed, _ = python(
        "import functools, gymnasium as gym\n"
        "from worldflux.envs.suites import rendering; from worldflux.envs.suites.dmc import DMCEnv\n"
        "make = functools.partial(DMCEnv, 'pendulum-swingup', pixels=True, size=16, fast_rendering=True)\n"
        "env = make(); env.reset(seed=0)\n"
        "workers = gym.vector.AsyncVectorEnv([make], context='fork')\n"
        "try: workers.reset()\n"
        "except ValueError as error: print(type(error).__name__, error)\n"
        "env.close()\n"
    )

    assert printed.startswith("ConfigurationError This process was forked from one that had drawn with MuJoCo")
