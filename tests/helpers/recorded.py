"""Buffers of `CountingEnv`s, and checks of what was recorded into them."""

from __future__ import annotations

from helpers.envs import assert_rows_belong_together
from worldflux.replay.batch import Batch
from worldflux.replay.buffer import ReplayBuffer

ENDINGS = dict(lengths=(3, 1, 4), ends=("terminate", "truncate", "both"))


def buffer_for_counting(capacity: int = 1000, n_envs: int = 1) -> ReplayBuffer:
    """A buffer for vector observations and one action of `CountingEnv`."""
    return ReplayBuffer(capacity, (4,), 1, n_envs=n_envs, seed=0)


def everything(buffer: ReplayBuffer, rows: int) -> Batch:
    """The first `rows` rows of the only stream, in order."""
    while True:
        batch = buffer.sample(1, rows)
        if batch.row_ids[0, 0] == 0:
            return batch


def assert_belongs_together(batch: Batch) -> int:
    """Checks windows of `CountingEnv`; returns the number of compared pairs of rows."""
    return assert_rows_belong_together(
        batch.obs.numpy(), batch.actions.numpy(), batch.rewards.numpy(), batch.is_first.numpy()
    )
