"""Views of a replay buffer: episodes held out for evaluation, and the rows recorded last."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from worldflux.errors import BufferError
from worldflux.replay.ring import FINAL, RingStorage
from worldflux.replay.sampler import Runs, Span, WholeStreams, WindowSampler
from worldflux.replay.spec import TransitionSpec
from worldflux.validation import whole_number

if TYPE_CHECKING:
    from worldflux.replay.buffer import ReplayBuffer


class ReplayPart(WindowSampler):
    """Some episodes of a `ReplayBuffer`, in its memory; a provider like the buffer. `ReplayBuffer.split` makes it.

    Args:
        source: The buffer.
        form: Of its rows.
        episodes: Those of this part.
        seed: Of the sampler.
    """

    _hint = "Split off another share, or sample shorter windows."

    def __init__(self, source: WindowSampler, form: TransitionSpec, episodes: _Episodes, seed: int) -> None:
        super().__init__(form, seed)
        self._source = source
        self._bounds = source._rows.bounds
        self._transitions = int(episodes.transitions.sum())
        self._episodes = int(episodes.ended.sum())
        # Neighbours become one run, so that windows over their ends are copied in one piece.
        stream, begin, end = episodes.stream, episodes.begin, episodes.end
        starts = np.append(True, (stream[1:] != stream[:-1]) | (begin[1:] != end[:-1]))
        self._chosen = hashlib.blake2b(np.stack([stream, begin, end]).tobytes(), digest_size=16)
        self._runs = Runs(stream[starts], begin[starts], end[np.append(starts[1:], True)])

    @property
    def _rows(self) -> RingStorage:
        rows = self._source._rows
        if rows.bounds != self._bounds:
            raise BufferError(
                "Rows were added to the replay buffer or dropped from it after it was split. Split it again."
            )
        return rows

    def _span(self, rows: RingStorage) -> Span:
        return self._runs

    def digest(self) -> str:
        """A short text that tells this part from other data, and from other parts of the same."""
        found = self._chosen.copy()
        found.update(super().digest().encode())
        return found.hexdigest()

    @property
    def num_transitions(self) -> int:
        """Transitions of this part, those of episodes in flight included."""
        return self._transitions

    @property
    def num_episodes(self) -> int:
        """Episodes of this part that have ended."""
        return self._episodes

    def __len__(self) -> int:
        return self.num_transitions

    def __repr__(self) -> str:
        return f"ReplayPart({self.num_transitions} transitions, {self.num_episodes} episodes)"


@dataclass(frozen=True)
class _Episodes:
    """Episodes in a store, stream by stream and oldest first."""

    stream: np.ndarray
    """`[S]`"""
    begin: np.ndarray
    """Their first rows. `[S]`"""
    end: np.ndarray
    """The rows after their last. `[S]`"""
    ended: np.ndarray
    """False of those in flight. `[S]`"""

    @property
    def transitions(self) -> np.ndarray:
        """Of each, without its final row. `[S]`."""
        return self.end - self.begin - self.ended

    def where(self, chosen: np.ndarray) -> _Episodes:
        """Some of them. `[S]` bool."""
        return _Episodes(self.stream[chosen], self.begin[chosen], self.end[chosen], self.ended[chosen])


def split(
    source: WindowSampler, form: TransitionSpec, fraction: float, seed: int, seq_len: int
) -> tuple[ReplayPart, ReplayPart]:
    """`ReplayBuffer.split`."""
    if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 < fraction < 1:
        raise BufferError(f"fraction is {fraction!r}, expected a number between 0 and 1, such as 0.1.")
    rng = np.random.default_rng(whole_number("seed", seed, 0))
    episodes = _episodes_of(source._rows)
    count = len(episodes.stream)
    if count < 2:
        raise BufferError(
            f"The replay buffer has {count} episodes, and whole ones are held out: expected at least 2. "
            "Record more, or pass evaluation data of its own."
        )
    order = rng.permutation(count)
    reached = np.cumsum(episodes.transitions[order])
    # At least one is kept from training and one is left to it.
    held_out = min(int(np.searchsorted(reached, fraction * reached[-1])) + 1, count - 1)
    is_held_out = np.zeros(count, np.bool_)
    is_held_out[order[:held_out]] = True
    parts = [ReplayPart(source, form, episodes.where(chosen), seed) for chosen in (~is_held_out, is_held_out)]
    for part, what in zip(parts, ("left to train on", "held out"), strict=True):
        if not part.num_windows(seq_len):
            raise BufferError(
                f"Of {count} episodes, {part.num_transitions} transitions are {what}, in no stream enough for a window "
                f"of {seq_len} rows. Record more, split off another share, or use shorter windows."
            )
    return parts[0], parts[1]


def _episodes_of(rows: RingStorage) -> _Episodes:
    stream, begin, end = rows.episodes_at()
    return _Episodes(stream, begin, end, (rows.flags[rows.at(stream, end - 1)] & FINAL) != 0)


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
