"""The global random streams of Python, NumPy and torch: seeding, saving and restoring them."""

from __future__ import annotations

import base64
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of the global random streams of Python, NumPy and torch in a form that JSON can hold.

    Args:
        device: The stream of this device is included if it is a CUDA device.
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
    """Restores the states that `random_state` returned; that of a CUDA device if both it and the device are there."""
    python, legacy, streams = decoded(state)
    random.setstate(python)
    np.random.set_state(legacy)
    torch.set_rng_state(streams["cpu"])
    if device.type == "cuda" and "cuda" in streams:
        torch.cuda.set_rng_state(streams["cuda"], device)


def seed_everything(seed: int) -> None:
    """Seeds the global random streams of Python, NumPy and torch (on every device)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextmanager
def keeping_random_streams(device: torch.device) -> Iterator[None]:
    """Restores the global random streams after the block, whatever is drawn or seeded inside it.

    Args:
        device: The stream of this device is restored, too, if it is a CUDA device.
    """
    python, legacy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)


def _encode(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def decoded(state: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, Tensor]]:
    """The states in the form in which Python, NumPy and torch take them."""
    version, words, gauss = state["python"]
    internal = {k: np.array(v, np.uint32) if isinstance(v, list) else v for k, v in state["numpy"]["state"].items()}
    streams = {
        name: torch.tensor(list(base64.b64decode(text)), dtype=torch.uint8) for name, text in state["torch"].items()
    }
    return (version, tuple(words), gauss), {**state["numpy"], "state": internal}, streams
