"""The reference arrays of TD-MPC2 and models with the reference's parameters, for the golden tests.

Recorded from the authors' PyTorch implementation (nicklashansen/tdmpc2, MIT licence) on CPU in float32. Their arrays
are time-major, with `[T, B, 1]` for numbers; ours are batch-major, with `[B, T]`.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from worldflux.interop.tdmpc2 import load_official_tdmpc2
from worldflux.models.base import State
from worldflux.models.tdmpc2.world_model import TDMPC2, ModelDraws, PolicyDraws
from worldflux.replay.batch import Batch

GOLDEN = Path(__file__).parent.parent / "golden"
KINDS = ("state", "episodic", "multitask", "pixels")
OBS_SHAPES = {"state": (9,), "episodic": (7,), "multitask": (11,), "pixels": (9, 64, 64)}
ACTION_DIMS = {"state": 3, "episodic": 4, "multitask": 4, "pixels": 2}
EPISODE_LENGTHS = {"state": 500, "episodic": 250, "pixels": 500}
TOLERANCE = {"state": 2e-5, "episodic": 2e-5, "multitask": 2e-5, "pixels": 2e-4}
"""Relative to one plus the value; the recorded image shifts are exact to 1.5e-4 grey levels only."""


class Golden:
    """The arrays of one file as tensors; those asked for through a method are in worldflux's layout."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        with np.load(GOLDEN / f"tdmpc2_{kind}.npz") as file:
            self.arrays = {name: file[name] for name in file.files}

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def __getitem__(self, name: str) -> Tensor:
        return torch.from_numpy(np.array(self.arrays[name]))

    def under(self, prefix: str) -> dict[str, Tensor]:
        return {name[len(prefix) :]: self[name] for name in self.arrays if name.startswith(prefix)}

    def rows(self, name: str) -> Tensor:
        """Batch-major: `[T, B, ...]` → `[B, T, ...]`, without a last axis of one."""
        array = self[name].transpose(0, 1)
        return array.squeeze(-1) if array.ndim == 3 and array.shape[-1] == 1 else array

    @property
    def task(self) -> Tensor | None:
        return self["in/task"] if "in/task" in self else None

    def batch(self, prefix: str) -> Batch:
        """What an update learns from; the last row holds the last observation only."""

        def padded(name: str) -> Tensor:
            array = self.rows(prefix + name)
            return torch.cat([array, torch.zeros_like(array[:, :1])], 1)

        obs = self.rows(f"{prefix}obs")
        extras = {} if self.task is None else {"task": self.task.unsqueeze(1).expand(obs.shape[:2])}
        return Batch(
            obs=obs,
            actions=padded("action"),
            rewards=padded("reward"),
            terminations=padded("terminated"),
            is_first=torch.zeros(obs.shape[:2], dtype=torch.bool),
            extras=extras,
        )

    def state(self, latent: Tensor, task: Tensor | int | None = None) -> State:
        """A state of latents `[B, L]`, with the recorded tasks or the one given where there are several."""
        if self.task is None:
            return State({"latent": latent})
        task = self.task if task is None else torch.as_tensor(task)
        return State({"latent": latent, "task": task.expand(len(latent))})

    def model_draws(self, update: str) -> ModelDraws:
        shift = None
        if f"{update}shift_0" in self:
            shift = torch.cat([self[f"{update}shift_0"].unsqueeze(1), self.rows(f"{update}shift_next")], 1)
        return ModelDraws(self.rows(f"{update}td_eps"), self[f"{update}td_q_idx"], shift=shift)

    def policy_draws(self, update: str) -> PolicyDraws:
        return PolicyDraws(self.rows(f"{update}pi_eps"), self[f"{update}pi_q_idx"])


def model(file: str, **overrides: Any) -> TDMPC2:
    """A new model with the weights in `sd/` of one of the four files, dropout off, in evaluation mode."""
    ref = golden(file)
    if file == "multitask":
        fixed: dict[str, Any] = {"task_episode_lengths": (500, 200, 1000)}
    else:
        fixed = {"episode_length": EPISODE_LENGTHS[file]}
    for name in ("iterations", "num_samples", "num_elites", "num_pi_trajs", "horizon", "min_std", "max_std"):
        value = ref[f"cfg/{name}"].item()
        fixed[name] = round(value, 6) if isinstance(value, float) else value
    return load_official_tdmpc2(
        ref.under("sd/"),
        obs_shape=OBS_SHAPES[file],
        action_dim=ACTION_DIMS[file],
        **{"dropout": 0.0, **fixed, **overrides},
    )


@lru_cache
def golden(kind: str) -> Golden:
    return Golden(kind)


def assert_matches(actual: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    """Equal within `tolerance * (1 + |expected|)`."""
    expected = expected.float()
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    torch.testing.assert_close(actual.detach().float(), expected, rtol=tolerance, atol=tolerance)
