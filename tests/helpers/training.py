"""A model and a provider small enough to work out by hand, for the tests of the trainer and what surrounds it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from worldflux.models.base import LossOutput, OptimizerSpec
from worldflux.replay.batch import Batch


class MemoryProvider:
    """Windows of a fixed array of rows; the stored extra "count" says how often a row was written back."""

    def __init__(self, rows: int = 64, seed: int = 0) -> None:
        data = np.random.default_rng(seed)
        self.obs = data.normal(size=(rows, 3)).astype(np.float32)
        self.actions = data.uniform(-1, 1, size=(rows, 2)).astype(np.float32)
        self.rewards = (self.obs.sum(1) + 2 * self.actions[:, 0]).astype(np.float32)
        self.count = np.zeros((rows, 1), np.float32)
        self.sampled: list[Tensor] = []
        self.seed(0)

    def seed(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def rng_state(self) -> dict[str, Any]:
        return dict(self._rng.bit_generator.state)

    def set_rng_state(self, state: dict[str, Any]) -> None:
        self._rng.bit_generator.state = state

    def sample(self, batch_size: int, seq_len: int | None = None, device: str | torch.device = "cpu") -> Batch:
        length = seq_len or 8
        start = self._rng.integers(0, len(self.obs) - length + 1, size=(batch_size, 1))
        rows = start + np.arange(length)
        self.sampled.append(torch.from_numpy(rows))
        return Batch(
            obs=torch.from_numpy(self.obs[rows]),
            actions=torch.from_numpy(self.actions[rows]),
            rewards=torch.from_numpy(self.rewards[rows]),
            terminations=torch.zeros(rows.shape, dtype=torch.bool),
            extras={"count": torch.from_numpy(self.count[rows])},
            row_ids=torch.from_numpy(rows),
        ).to(device)

    def update_extras(self, rows: Tensor, values: dict[str, Tensor]) -> None:
        self.count[rows.numpy()] = values["count"].numpy()


class NoisyRegression(nn.Module):
    """Predicts rewards from observations and actions; its loss draws noise, and a step leaves a mark in `steps`."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 1))
        self.steps = nn.Buffer(torch.zeros(()))
        self.poison_at: int | None = None
        """Step from which on the term "noise" is NaN."""

    @property
    def optimizer_spec(self) -> OptimizerSpec:
        return OptimizerSpec(kind="laprop", learning_rate=123.0, eps=1e-20, agc=0.3)

    def loss(self, batch: Batch) -> LossOutput:
        assert isinstance(batch.obs, Tensor)
        error = self.body(torch.cat([batch.obs, batch.actions], -1)).squeeze(-1) - batch.rewards
        fit = error.square().mean()
        noise = 0.01 * (torch.randn(()) * error.mean())
        if self.poison_at is not None and self.steps + 1 >= self.poison_at:
            noise = noise * torch.nan
        terms = {"fit": fit.detach(), "noise": noise.detach()}
        extras = {name: value[:, 1:] + 1 for name, value in batch.extras.items()}
        return LossOutput(fit + noise, terms, extras)

    def after_step(self, outputs: Sequence[LossOutput]) -> None:
        self.steps += 1
