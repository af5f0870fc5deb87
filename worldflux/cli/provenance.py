"""What a run was made with: versions, commits and the machine."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from worldflux import errors
from worldflux.cli.options import places_in

PACKAGES = ("worldflux", "torch", "numpy", "gymnasium", "stable-baselines3")
"""Packages that every run uses."""

_OF_ENVIRONMENTS = {"mujoco": "mujoco", "dm-control": "dm_control", "ale-py": "ale_py", "box2d": "Box2D"}
"""Packages of environments, and their modules."""

_OF_SUITES = {"dmc/": ("mujoco", "dm-control"), "atari/": ("ale-py",), "atari100k/": ("ale-py",)}
"""Packages of the suites. With --processes, only the processes of the environments import them."""

_SECONDS = 10
"""Time limit for each call of git."""


def circumstances(task: str, device: str) -> dict[str, Any]:
    """The `versions`, `commits` and `machine` of a run whose environment has been made. What is not known is left out.

    Args:
        task: Environment or data file of the run.
        device: Value of `--device`.
    """
    return {"versions": versions(task), "commits": commits(task), "machine": machine(device)}


def versions(task: str = "") -> dict[str, str]:
    """Versions of Python and of the packages that a run uses.

    Args:
        task: Environment of the run.
    """
    used = [package for package, module in _OF_ENVIRONMENTS.items() if module in sys.modules]
    for suite, needed in _OF_SUITES.items():
        if any(place.startswith(suite) for place in places_in(task)):
            used += needed
    found = {name: installed_version(name) for name in (*PACKAGES, *dict.fromkeys(used))}
    return {"python": platform.python_version(), **{name: known for name, known in found.items() if known is not None}}


def installed_version(package: str) -> str | None:
    """The version of a package; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commits(task: str = "") -> dict[str, str]:
    """The git commits of worldflux, and of the environment if it is the user's own code.

    Args:
        task: Environment of the run.
    """
    found = {"worldflux": commit_of(Path(errors.__file__)) or _installed_commit()}
    own = next((place for place in places_in(task) if ":" in place), None)
    if own is not None:
        code = _code_of(own)
        found["environment"] = None if code is None else commit_of(code)
    return {name: commit for name, commit in found.items() if commit is not None}


def commit_of(file: Path) -> str | None:
    """The commit of the checkout that a file belongs to; None if it is not under version control, or git is missing.

    Args:
        file: A file of the checkout.

    Returns:
        The hash of the commit. If files differ from it, `-dirty-` and a digest of the differences follow, so that equal
        texts stand for equal files (apart from those that git does not track).
    """
    folder, name = file.resolve().parent, file.name
    # A file in the virtual environment of another project lies in its checkout, too, but is not part of it.
    if _git(folder, "ls-files", "--error-unmatch", "--", name) is None:
        return None
    commit = _git(folder, "rev-parse", "--verify", "HEAD")
    if commit is None:
        return None
    differences = _git(folder, "diff", "--no-ext-diff", "--no-textconv", "--binary", "HEAD")
    if not differences:
        return commit.decode().strip()
    return f"{commit.decode().strip()}-dirty-{hashlib.sha256(differences).hexdigest()[:8]}"


def _git(folder: Path, *args: str) -> bytes | None:
    """The output of git; None if it fails."""
    command = ["git", "-C", str(folder), *args]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_SECONDS,
            # Variables such as GIT_DIR, which are set in a hook of git, name another repository.
            env={name: value for name, value in os.environ.items() if not name.startswith("GIT_")},
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _installed_commit() -> str | None:
    """The commit of a worldflux that pip has installed from a repository; None if it was installed differently."""
    source = errors.installed_from().get("vcs_info")
    commit = source.get("commit_id") if isinstance(source, dict) else None
    return commit if isinstance(commit, str) else None


def _code_of(task: str) -> Path | None:
    """The file with the code of an environment `module:Class` or `file.py:Class` that has been imported."""
    where = task.rpartition(":")[0]
    if where.endswith(".py"):
        return Path(where)
    file = getattr(sys.modules.get(where), "__file__", None)
    return None if file is None else Path(file)


def machine(device: str) -> dict[str, str]:
    """The machine and the device.

    Args:
        device: Value of `--device`.
    """
    import torch

    from worldflux.accel.device import resolve_device

    place = resolve_device(device, must_compute=True)
    return {
        "platform": platform.platform(),
        "cpu": _processor(),
        "threads": str(torch.get_num_threads()),
        "device": "cpu" if place.type == "cpu" else f"{place}, {torch.cuda.get_device_name(place)}",
    }


def _processor() -> str:
    """The name of the CPU, or at least its architecture."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            lines = (line.partition(":") for line in file)
            names = {key.strip().lower(): value.strip() for key, _, value in lines}
        return names.get("model name") or platform.machine()
    except OSError:
        return platform.processor() or platform.machine() or "unknown"


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[str | None, str | None]]:
    """What differs between the circumstances of two runs, by name; None where something was not known or not used."""
    found: dict[str, tuple[str | None, str | None]] = {}
    for kind in ("versions", "commits", "machine"):
        before, after = then.get(kind, {}), now.get(kind, {})
        for name in {**before, **after}:
            if before.get(name) != after.get(name):
                found[f"commit of {name}" if kind == "commits" else name] = (before.get(name), after.get(name))
    return found
