"""Reads the batch that all implementations of a case share. `../cases.py` writes it from an agent's replay buffer."""

from __future__ import annotations

from typing import Any

import numpy as np


def read(path: str) -> dict[str, np.ndarray]:
    """Windows of rows `[B, T, ...]`, aligned as in worldflux: a reward is in the row of the action that earned it.

    Images are `[B, T, C, H, W]`. DreamerV3's stored latents are `deter` and, as class indices, `stoch`.
    """
    with np.load(path) as file:
        return {name.rpartition("/")[2]: file[name] for name in file.files}


def on_arrival(batch: dict[str, np.ndarray]) -> dict[str, Any]:
    """The batch aligned as by DreamerV3's authors: a reward is in the row after its action, and images are HWC."""
    first = batch["is_first"]

    def later(values: np.ndarray) -> np.ndarray:
        moved = np.zeros_like(values)
        moved[:, 1:] = values[:, :-1]
        moved[first] = 0
        return moved

    terminal = later(batch["terminations"])
    obs = batch["obs"]
    image = obs.ndim == 5
    return {
        "image" if image else "vector": np.ascontiguousarray(np.moveaxis(obs, 2, -1)) if image else obs,
        "action": batch["actions"],
        "reward": later(batch["rewards"]),
        "is_first": first,
        "is_last": terminal | later(batch["truncations"]),
        "is_terminal": terminal,
    }


def one_hot(stoch: np.ndarray, classes: int) -> np.ndarray:
    """The stored class indices, which start at 1, as one-hot vectors; zeros where nothing was stored."""
    return np.eye(classes + 1, dtype=np.float32)[stoch][..., 1:]
