"""Windows of what was recorded last, for looking at a model without touching what it learns from."""

from __future__ import annotations

import numpy as np

from worldflux.replay.buffer import ReplayBuffer
from worldflux.replay.ring import RingStorage
from worldflux.replay.sampler import Span, WholeStreams, WindowSampler
from worldflux.replay.spec import TransitionSpec


class NewestRows(WindowSampler):
    """The newest rows of a replay buffer as they are now, in its memory; a provider like the buffer.

    Its random numbers are its own: those of the buffer's sampler stay where they are.

    Args:
        buffer: Whose rows.
        rows: Of each stream.
        seed: Of the sampler.
    """

    _hint = "Record more, or sample shorter windows."

    def __init__(self, buffer: ReplayBuffer, rows: int, seed: int) -> None:
        form = TransitionSpec(buffer.obs_shape, buffer.action_dim, buffer.obs_dtype, buffer.extras)
        super().__init__(form, seed)
        self._buffer = buffer
        store = self._rows
        self._newest = WholeStreams(np.maximum(store.begin, store.end - rows), store.end)

    @property
    def _rows(self) -> RingStorage:
        return self._buffer.stored()[0]

    def _span(self, rows: RingStorage) -> Span:
        return self._newest
