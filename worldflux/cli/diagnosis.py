"""The findings of `worldflux doctor`, as JSON values."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from typing import Any

from worldflux.cli.commands.check_env import check_report
from worldflux.cli.provenance import installed_version
from worldflux.envs.suites.rendering import choose_backend
from worldflux.errors import WorldFluxError, install_hint

_PACKAGES = (
    "worldflux",
    "torch",
    "numpy",
    "gymnasium",
    "stable-baselines3",
    "safetensors",
    "opencv-python",
    "tyro",
    "mujoco",
    "dm-control",
    "ale-py",
    "tensorboard",
    "tqdm",
    "rich",
    "matplotlib",
    "wandb",
    "mlflow",
    "minari",
    "h5py",
    "pyarrow",
    "av",
    "huggingface-hub",
    "rl_zoo3",
)

_SECONDS = 60
"""Time limit for one frame; software rendering on a busy machine is slow."""

_FRAME = """
import mujoco, numpy as np
light = "<light pos='0 0 3'/><geom type='sphere' size='1' rgba='1 1 1 1'/>"
model = mujoco.MjModel.from_xml_string(f"<mujoco><worldbody>{light}</worldbody></mujoco>")
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
with mujoco.Renderer(model, 48, 64) as renderer:
    renderer.update_scene(data)
    frame = renderer.render()
assert frame.shape == (48, 64, 3) and frame.max() > 0, "the frame is black"
"""

BACKENDS = {
    "egl": "apt-get install libegl1 libgl1 libgl1-mesa-dri",
    "osmesa": "apt-get install libosmesa6",
    "glfw": "a display (DISPLAY is not set)",
}
"""OpenGL backends of MuJoCo, and what they need."""


def packages() -> dict[str, str | None]:
    """Versions by package; None if it is not installed."""
    found = {name: installed_version(name) for name in _PACKAGES}
    try:
        import cv2  # noqa: F401
    except ImportError as error:
        if found["opencv-python"] is not None:
            found["opencv-python"] += f", cannot be imported ({error}); apt-get install libgl1 libglib2.0-0"
    return {"python": f"{platform.python_version()} on {platform.platform()}", **found}


def hardware(device: str) -> dict[str, Any]:
    """The hardware of this machine, and whether a device works.

    Args:
        device: Value of `--device`.
    """
    import torch

    from worldflux.accel.device import resolve_device

    works, problem = None, ""
    try:
        place = resolve_device(device)
        torch.ones(8, 8, device=place).matmul(torch.ones(8, 8, device=place)).sum().item()
        works = f"works on {place}"
    except (WorldFluxError, RuntimeError) as error:
        problem = str(error).partition("\n")[0]
    found = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    gpus = [f"{gpu.name} ({gpu.total_memory / 2**30:.0f} GiB)" for gpu in found]
    return {
        "asked_for": device,
        "works": works,
        "problem": problem,
        "cores": _cores(),
        "threads of torch": torch.get_num_threads(),
        "memory": _memory(),
        "CUDA": torch.version.cuda or "not in this build of torch",
        "GPUs": gpus or "none",
    }


def rendering() -> dict[str, str]:
    """For each OpenGL backend of MuJoCo: "works", or what is wrong and what to install.

    Each backend renders in its own process, because some crash if libraries are missing.
    """
    if installed_version("mujoco") is None:
        return {}
    with ThreadPoolExecutor() as pool:
        answers = dict(zip(BACKENDS, pool.map(_render, BACKENDS), strict=True))
    said = " (set by MUJOCO_GL)" if os.environ.get("MUJOCO_GL") else ""
    return {**answers, "worldflux uses": f"{choose_backend() or 'the default of the system'}{said}"}


def environment(name: str, *, render: bool) -> dict[str, Any]:
    """Whether an environment keeps its contract, check by check.

    Args:
        name: ENV of `worldflux check-env`.
        render: Check the rendered image, too.
    """
    try:
        report = check_report(name, render=render)
    except WorldFluxError as error:
        return {"name": name, "works": False, "checks": [("failed", " ".join(str(error).split()))]}
    return {"name": name, "works": report.passed, "checks": list(report.lines())}


def missing(versions: dict[str, str | None]) -> dict[str, str]:
    """The command that installs each missing package, through the extra of worldflux it belongs to if there is one."""
    extras = _extras()
    return {
        name: install_hint(extras[_plain(name)]) if _plain(name) in extras else f"pip install {name}"
        for name, version in versions.items()
        if version is None
    }


def _extras() -> dict[str, str]:
    """The extra of each optional package, from the metadata of the installed worldflux."""
    try:
        requirements = metadata.requires("worldflux") or []
    except metadata.PackageNotFoundError:
        return {}
    found: dict[str, str] = {}
    for requirement in requirements:
        match = re.match(r"""([\w.-]+)[^;]*;.*\bextra\s*==\s*["']([\w-]+)["']""", requirement)
        if match and match[2] != "dev":
            found.setdefault(_plain(match[1]), match[2])
    return found


def _plain(package: str) -> str:
    """The normalised name of a package."""
    return re.sub(r"[-_.]+", "-", package).lower()


def _render(backend: str) -> str:
    """The result of rendering a frame in a process of its own."""
    environment = {**os.environ, "MUJOCO_GL": backend}
    environment.pop("PYOPENGL_PLATFORM", None)  # belongs to another backend
    command = [sys.executable, "-c", _FRAME]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        return f"no frame after {_SECONDS} seconds"
    if done.returncode == 0:
        return "works"
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    said = lines[-1].strip()[:100] if lines else "nothing"
    how = f"signal {-done.returncode}" if done.returncode < 0 else said
    return f"does not work ({how}); it needs: {BACKENDS[backend]}"


def _cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> str:
    """Memory of the machine, if the system reports it."""
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    except (AttributeError, OSError, ValueError):
        return "unknown"
