"""The batch that every implementation of a case is given. `../cases.py` writes it, from an agent's replay buffer."""

from __future__ import annotations

from typing import Any

import numpy as np


def read(path: str) -> dict[str, np.ndarray]:
    """Rows of windows `[B, T, ...]`, aligned as worldflux has them: what an action earned is in its own row.

    Images are `[B, T, C, H, W]`; what DreamerV3 has stored of its latents is `deter` and, as class numbers, `stoch`.
    """
    with np.load(path) as file:
        return {name.rpartition("/")[2]: file[name] for name in file.files}


def on_arrival(batch: dict[str, np.ndarray]) -> dict[str, Any]:
    """The same as DreamerV3's authors have it: a row has what the action before it has earned, and images as HWC."""
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
    """The stored class numbers, which begin at 1, as one-hot vectors; zeros where nothing was stored."""
    return np.eye(classes + 1, dtype=np.float32)[stoch][..., 1:]
