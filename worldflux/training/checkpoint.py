"""Checkpoints on disk: directories that appear whole or not at all, and the random state that goes into them."""

from __future__ import annotations

import base64
import os
import random
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

_BESIDE = re.compile(r"^\.(?P<name>.+)\.(?P<pid>\d+)\.writing$")
_ASIDE = ".{name}.replaced"


@contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Gives an empty directory to fill, which becomes `path` when the block ends without an error.

    A directory that is already there stays until then. The files reach the disk before it is replaced. What writers
    that were killed left beside `path` is removed.

    Args:
        path: Target. Missing parents are made; an existing directory is replaced as a whole.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    recover_directory(path)
    _remove_leftovers(path.parent)
    beside = path.with_name(f".{path.name}.{os.getpid()}.writing")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        yield beside
        for file in beside.rglob("*"):
            if file.is_file():
                _sync(file)
        _sync(beside)
        aside = path.with_name(_ASIDE.format(name=path.name))
        if path.exists():
            # A directory cannot be renamed over a full one. A kill between the two renames is what
            # `recover_directory` mends.
            os.rename(path, aside)
        os.rename(beside, path)
        _sync(path.parent)
        shutil.rmtree(aside, ignore_errors=True)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        recover_directory(path)
        raise


def recover_directory(path: str | Path) -> None:
    """Brings back the directory that a killed `atomic_directory` had moved aside, if it left none at `path`."""
    path = Path(path)
    aside = path.with_name(_ASIDE.format(name=path.name))
    if not aside.exists():
        return
    if path.exists():
        shutil.rmtree(aside, ignore_errors=True)
    else:
        os.rename(aside, path)


def remove_directory(path: Path) -> None:
    """Removes a directory so that a kill on the way does not leave half of it under its name."""
    going = path.with_name(f".{path.name}.{os.getpid()}.writing")
    os.rename(path, going)
    shutil.rmtree(going, ignore_errors=True)


def random_state(device: torch.device) -> dict[str, Any]:
    """State of the global random streams of Python, NumPy and torch, as JSON can hold it.

    Args:
        device: Its own stream is included if it is a CUDA device.
    """
    version, words, gauss = random.getstate()
    legacy = np.random.get_state(legacy=False)
    assert isinstance(legacy, dict), legacy
    streams = {"cpu": _encode(torch.get_rng_state())}
    if device.type == "cuda":
        streams["cuda"] = _encode(torch.cuda.get_rng_state(device))
    return {
        "python": [version, list(words), gauss],
        "numpy": {**legacy, "state": {k: np.asarray(v).tolist() for k, v in legacy["state"].items()}},
        "torch": streams,
    }


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Continues the streams that `random_state` described.

    A CUDA stream is continued where both it and the device are there.
    """
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    internal = {k: np.array(v, np.uint32) if isinstance(v, list) else v for k, v in state["numpy"]["state"].items()}
    np.random.set_state({**state["numpy"], "state": internal})
    torch.set_rng_state(_decode(state["torch"]["cpu"]))
    if device.type == "cuda" and "cuda" in state["torch"]:
        torch.cuda.set_rng_state(_decode(state["torch"]["cuda"]), device)


def seed_everything(seed: int) -> None:
    """Starts the global random streams of Python, NumPy and torch (on every device)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _encode(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def _decode(text: str) -> torch.Tensor:
    return torch.tensor(list(base64.b64decode(text)), dtype=torch.uint8)


def _remove_leftovers(directory: Path) -> None:
    """Removes what writers that no longer run left unfinished in `directory`."""
    for entry in directory.iterdir():
        match = _BESIDE.match(entry.name)
        if match and not _is_running(int(match["pid"])):
            shutil.rmtree(entry, ignore_errors=True)


def _is_running(pid: int) -> bool:
    if os.name == "nt":  # os.kill ends processes there
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync(path: Path) -> None:
    """Waits until a file or a directory's entries are on the disk."""
    if os.name == "nt" and path.is_dir():  # directories cannot be opened there
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
