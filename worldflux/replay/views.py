"""Parts of a replay buffer: episodes held out for evaluation, and the rows recorded last."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

from worldflux.errors import BufferError
from worldflux.replay.ring import FINAL, RingStorage
from worldflux.replay.sampler import Runs, WindowSampler
from worldflux.validation import whole_number

if TYPE_CHECKING:
    from worldflux.replay.buffer import ReplayBuffer


class ReplayPart(WindowSampler):
    """Some rows of a `ReplayBuffer`, in its memory; a provider like the buffer. `ReplayBuffer.split` makes it.

    It draws random numbers of its own and does not advance those of the buffer's sampler.

    Args:
        source: The buffer.
        begin: First row of each run of rows; the runs of one stream are in order. `[K]`
        end: Row after the last one of each run. `[K]`
        stream: Stream of each run, ascending. `[K]`
        seed: Seed of the sampler.
        label: Name of the part among all parts of the buffer.
    """

    _hint = "Split off another share, or sample shorter windows."

    def __init__(
        self,
        source: ReplayBuffer,
        begin: np.ndarray,
        end: np.ndarray,
        stream: np.ndarray,
        seed: int,
        *,
        label: str = "",
    ) -> None:
        rows, _ = source.stored()
        super().__init__(source._form, seed)
        self._source, self._bounds = source, rows.bounds
        # Of data that are divided among ranks, the part is the same one on every rank.
        self._chosen = label.encode() if rows.is_part else np.stack([stream, begin, end]).tobytes()
        is_final = (rows.flags[rows.at(*rows.places(begin, end, stream))] & FINAL) != 0
        self._episodes = int(np.count_nonzero(is_final))
        self._transitions = len(is_final) - self._episodes
        # Neighbours become one run, so that windows over their ends are copied in one piece.
        starts = np.append(True, (stream[1:] != stream[:-1]) | (begin[1:] != end[:-1]))
        self._part = Runs(begin[starts], end[np.append(starts[1:], True)], stream[starts])

    @property
    def _rows(self) -> RingStorage:
        rows, _ = self._source.stored()
        if rows.bounds != self._bounds:
            raise BufferError(
                "Rows were added to the replay buffer or dropped from it after it was split. Split it again."
            )
        return rows

    def _runs(self, rows: RingStorage) -> Runs:
        return self._part

    def digest(self) -> str:
        """A short text that tells this part from other data, and from other parts of the same."""
        return hashlib.blake2b(self._chosen + super().digest().encode(), digest_size=16).hexdigest()

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


def split(buffer: ReplayBuffer, fraction: float, seed: int, seq_len: int) -> tuple[ReplayPart, ReplayPart]:
    """`ReplayBuffer.split`."""
    if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 < fraction < 1:
        raise BufferError(f"fraction is {fraction!r}, expected a number between 0 and 1, such as 0.1.")
    rng = np.random.default_rng(whole_number("seed", seed, 0))
    rows, _ = buffer.stored()
    stream, begin, end = rows.episodes_at()
    count = len(stream)
    if count < 2:
        raise BufferError(
            f"The replay buffer has {count} episodes, and whole ones are held out: expected at least 2. "
            "Record more, or pass evaluation data of its own."
        )
    order = rng.permutation(count)
    transitions = end - begin - ((rows.flags[rows.at(stream, end - 1)] & FINAL) != 0)
    reached = np.cumsum(transitions[order])
    # At least one is kept from training and one is left to it.
    held_out = min(int(np.searchsorted(reached, fraction * reached[-1])) + 1, count - 1)
    is_held_out = np.zeros(count, np.bool_)
    is_held_out[order[:held_out]] = True
    parts = [
        ReplayPart(
            buffer, begin[is_in], end[is_in], stream[is_in], seed, label=f"{what} of {fraction} with seed {seed}"
        )
        for is_in, what in ((~is_held_out, "training"), (is_held_out, "held out"))
    ]
    for part, what in zip(parts, ("left to train on", "held out"), strict=True):
        if not part.num_windows(seq_len):
            raise BufferError(
                f"Of {count} episodes, {part.num_transitions} transitions are {what}, in no stream enough for a window "
                f"of {seq_len} rows. Record more, split off another share, or use shorter windows."
            )
    return parts[0], parts[1]


def newest_rows(buffer: ReplayBuffer, count: int, seed: int) -> ReplayPart:
    """The newest `count` rows of each stream, or fewer where there are no more."""
    rows, _ = buffer.stored()
    return ReplayPart(buffer, np.maximum(rows.begin, rows.end - count), rows.end.copy(), np.arange(len(rows.end)), seed)
