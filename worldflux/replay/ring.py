"""How a replay buffer stores rows: a ring of flat arrays for each stream, in which new rows replace the oldest."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from worldflux.replay.backends import RowArray, Storage
from worldflux.validation import TASK_KEY

# Bits of a row's flags.
TERMINATED = np.uint8(1)
TRUNCATED = np.uint8(2)
FIRST = np.uint8(4)
FINAL = np.uint8(8)
"""The row holds the observation after an episode's last step, and no step of its own."""
UNSEEN = np.uint8(16)
"""A final row whose observation was never recorded."""
STEP = np.uint8(32)
"""Marks a step that is being added; the bit itself is not stored."""

UNKNOWN_TASK = -1
"""The task of a row of which nobody has said it. Other extras are zero where nothing was given."""
_CHUNK_BYTES = 16 * 2**20
"""Bytes of rows that are copied at once."""
_DIGESTED_AT_ONCE = 2**16
"""Rows that are digested at once."""
_DIGESTED_OBS = 256
"""Rows of a stream whose observations are digested, at most."""


def spare_rows(transitions: int, n_envs: int) -> int:
    """Room for final rows, which are no transitions: a 16th of a large stream, and in a small one enough for any."""
    return min(transitions, max(transitions // 16, 4096 // n_envs))


class RingStorage:
    """Rows of several streams, each a ring that overwrites its oldest rows.

    A stream's rows are counted from its beginning, without end; row r of stream s lies at index `base[s] + r % ring`
    of each array, and rows `begin[s]` to `end[s] - 1` are stored. The oldest of them always holds a step.

    Args:
        capacity: Transitions of all streams together.
        n_envs: Number of streams.
        obs: Shape and dtype of each observation.
        action_dim: Width of an action vector.
        extras: Shape and dtype of each further array that is stored with the rows.
        storage: Where the arrays are stored, except for the flags, which are always in memory. If it has no room for
            observations, somebody sets `obs` later.

    Raises:
        BufferError: If there is no room for it.
    """

    def __init__(
        self,
        capacity: int,
        n_envs: int,
        obs: Mapping[str, tuple[tuple[int, ...], np.dtype]],
        action_dim: int,
        extras: Mapping[str, tuple[tuple[int, ...], np.dtype]],
        storage: Storage,
    ) -> None:
        # Transitions that each stream may hold; together exactly the capacity.
        self.limits = np.full(n_envs, capacity // n_envs)
        self.limits[: capacity % n_envs] += 1
        most = int(self.limits[0])
        self.ring = most + spare_rows(most, n_envs)
        self.base = np.arange(n_envs) * self.ring
        self._numbers = np.arange(n_envs)
        self.storage = storage
        count, number = n_envs * self.ring, np.dtype(np.float32)
        obs = obs if storage.has_obs else {}
        self._row_bytes = 1 + _bytes_of([*obs.values(), ((action_dim,), number), ((), number), *extras.values()])
        if self.storage.takes_all_at_once:
            what = f"A replay buffer of {capacity:,} transitions"
            budget, needed = self.storage.budget(), count * self._row_bytes
            budget.require(needed, what=what, fits=capacity * (budget.free or 0) // needed)

        zeros = self.storage.zeros
        self.obs: dict[str, RowArray] = {key: zeros((count, *shape), dtype) for key, (shape, dtype) in obs.items()}
        self.data: tuple[bytes, str] | None = None
        """`bounds` and `digest` of rows that are a part of some data, to have the digest of all of it."""
        self.actions = zeros((count, action_dim), number)
        self.rewards = zeros((count,), number)
        self.flags = np.zeros(count, np.uint8)
        self.extras: dict[str, RowArray] = {}
        for name, (shape, dtype) in extras.items():
            self.extras[name] = zeros((count, *shape), dtype)

        self.begin = np.zeros(n_envs, np.int64)
        self.end = np.zeros(n_envs, np.int64)
        self.transitions = np.zeros(n_envs, np.int64)
        self.episodes = np.zeros(n_envs, np.int64)  # ended ones: as many as there are final rows
        self.in_flight = np.zeros(n_envs, np.bool_)
        self._first_here = np.zeros(n_envs, np.int64)  # those before it were written to another store

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays once every row has been written to."""
        return len(self.flags) * self._row_bytes

    def add_extras(self, extras: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> None:
        """Adds arrays that are stored with the rows, blank at first; the argument and errors are the constructor's."""
        count, size = len(self.flags), _bytes_of(extras.values())
        self.storage.budget().require(count * size, what=f"Adding {', '.join(extras)} to the replay buffer", fits=0)
        added = {name: self.storage.zeros((count, *shape), dtype) for name, (shape, dtype) in extras.items()}
        for name in added:
            added[name][self.stored_at()] = _blank(name)
        self.extras |= added
        self._row_bytes += size

    @property
    def _arrays(self) -> list[RowArray]:
        return [*self.obs.values(), self.actions, self.rewards, self.flags, *self.extras.values()]

    @property
    def most_steps(self) -> int:
        """Steps that `add_steps` takes at once, however their episodes end."""
        return max(1, min(int(self.limits.min()), self.ring // 2))

    @property
    def room(self) -> int:
        """Steps of every stream that fit, however their episodes end, before the oldest rows are dropped."""
        rows = self.ring - int((self.end - self.begin).max())
        return min(int((self.limits - self.transitions).min()), rows // 2)

    @property
    def bounds(self) -> bytes:
        """Something that changes whenever rows are added or dropped, quick to compare."""
        return self.begin.tobytes() + self.end.tobytes()

    @property
    def is_part(self) -> bool:
        """Whether these rows are, unchanged, a part of some data that have a digest."""
        return self.data is not None and self.data[0] == self.bounds

    def places(
        self, first: np.ndarray, end: np.ndarray, streams: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Stream and number of rows `first` to `end - 1` of each stream, one after another. `[N]`, `[N]`"""
        counts = end - first
        rows = np.arange(counts.sum()) + np.repeat(first - (np.cumsum(counts) - counts), counts)
        return np.repeat(self._numbers if streams is None else streams, counts), rows

    def stored_at(self) -> np.ndarray:
        """Index in the arrays of all rows, stream by stream and oldest first. `[N]`"""
        return self.at(*self.places(self.begin, self.end))

    def episodes_at(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Stream, first row, and row after the last of each episode, stream by stream and oldest first. `[S]` each"""
        stream, row = self.places(self.begin, self.end)
        is_first = (self.flags[self.at(stream, row)] & FIRST) != 0
        is_first |= row == self.begin[stream]  # also where the oldest episode has lost its first rows
        first = np.flatnonzero(is_first)
        last = np.append(first[1:], len(row))[: len(first)] - 1
        return stream[first], row[first], row[last] + 1

    def digest(self) -> str:
        """A short text that other rows would not have. Of observations, which may be large, only some are read."""
        if self.is_part:
            assert self.data is not None
            return self.data[1]
        found = hashlib.blake2b(self.bounds, digest_size=16)
        for stream in range(len(self.end)):
            rows = np.arange(self.begin[stream], self.end[stream])
            for part in np.array_split(rows, 1 + len(rows) // _DIGESTED_AT_ONCE):
                tasks = [self.extras[TASK_KEY]] if TASK_KEY in self.extras else []
                for array in (self.actions, self.rewards, self.flags, *tasks):
                    found.update(np.ascontiguousarray(array[self.at(stream, part)]).data)
            some = rows[:: 1 + len(rows) // _DIGESTED_OBS]
            for array in self.obs.values():
                found.update(np.ascontiguousarray(array[self.at(stream, some)]).data)
        return found.hexdigest()

    def move_to(self, other: RingStorage) -> None:
        """Copies all rows into an empty store of the same form, with room for them and at least as many streams."""
        step = max(1, _CHUNK_BYTES // self._row_bytes)
        for stream, (begin, end) in enumerate(zip(self.begin.tolist(), self.end.tolist(), strict=True)):
            for start in range(begin, end, step):
                rows = np.arange(start, min(start + step, end))
                old, new = self.at(stream, rows), other.at(stream, rows)
                for mine, its in zip(self._arrays, other._arrays, strict=True):
                    its[new] = mine[old]
        streams = len(self.base)
        for name in ("begin", "end", "transitions", "episodes", "in_flight"):
            getattr(other, name)[:streams] = getattr(self, name)
        other._first_here[:streams] = self.begin

    def drop_excess(self, other: RingStorage) -> None:
        """Drops the oldest rows of each stream until the same stream of another store can hold the rest."""
        streams = np.arange(len(self.base))
        excess = np.maximum(self.transitions - other.limits[streams], 0)
        rows_excess = np.maximum(self.end - self.begin - other.ring, 0)
        streams = np.flatnonzero(excess + rows_excess)
        if streams.size:
            self._drop(streams, excess[streams], rows_excess[streams])

    @property
    def bytes_taken(self) -> int:
        """Bytes that the arrays have taken from the machine; in memory only those that were written to."""
        if self.storage.takes_all_at_once:
            return self.nbytes
        return self._row_bytes * int(np.minimum(self.end - self._first_here, self.ring).sum())

    def bytes_to_come(self, transitions: int | None) -> int:
        """Bytes that the arrays will take from the machine with so many more transitions; None: until it is full."""
        rest = self.nbytes - self.bytes_taken
        if transitions is None:
            return rest
        with_finals = transitions + -(-transitions // 16)
        return min(rest, self._row_bytes * with_finals)

    def at(self, stream: Any, row: Any) -> np.ndarray:
        """Index in the arrays of rows of streams; the two broadcast."""
        return self.base[stream] + row % self.ring

    def add_steps(
        self,
        obs: Mapping[str, np.ndarray],
        actions: np.ndarray,
        rewards: np.ndarray,
        flags: np.ndarray,
        finals: Mapping[str, np.ndarray],
        extras: Mapping[str, np.ndarray],
        streams: np.ndarray | None = None,
        seen: np.ndarray | None = None,
    ) -> None:
        """Appends K steps to each of S streams, with a final row after each that ends an episode; K up to `most_steps`.

        Many steps take little longer than one.

        Args:
            obs: Observations by key. `[K, S, ...]` each
            actions: `[K, S, A]`
            rewards: `[K, S]`
            flags: STEP where a stream makes a step, with TERMINATED or TRUNCATED where that ends an episode, and 0
                where it makes none. `[K, S]` uint8
            finals: The observations after the ends of episodes, in the order of `flags`. `[E, ...]`
            extras: `[K, S, ...]` each; what is left out becomes zero, and tasks unknown.
            streams: Numbers of the streams, each of them once; None means all, in order. `[S]`
            seen: False for those of `finals` that were not recorded; None means that all were. `[E]`
        """
        count, ended = len(flags), flags > STEP
        is_whole = np.count_nonzero(flags) == flags.size
        if is_whole and not np.count_nonzero(ended):
            self._add_plain_steps(count, obs, actions, rewards, extras, streams)
            return
        chosen: Any = slice(None) if streams is None else streams
        numbers = self._numbers[chosen]  # [S]
        active = flags != 0  # [K, S]
        rows = active.astype(np.int64) + ended
        after = self.end[chosen] + np.cumsum(rows, axis=0)  # the row that follows each step and its final row
        end, steps = after[-1], np.count_nonzero(active, axis=0)
        self._make_room(self._at_streams(chosen, steps), self._at_streams(chosen, end - self.end[chosen]))

        kept: Any = ... if is_whole else np.nonzero(active)
        at = (self.base[chosen] + (after - rows) % self.ring)[kept]
        self._write_rows(at, {key: array[kept] for key, array in obs.items()}, actions[kept], rewards[kept])
        self.flags[at] = flags[kept] & (TERMINATED | TRUNCATED)
        for name, stored in self.extras.items():
            stored[at] = extras[name][kept] if name in extras else _blank(name)

        starts = numbers[(steps > 0) & ~self.in_flight[chosen]]
        self.flags[self.at(starts, self.end[starts])] |= FIRST
        step, column = np.nonzero(ended)
        if step.size:
            stream, following = numbers[column], after[step, column]
            self._write_finals(self.at(stream, following - 1), finals, seen)
            goes_on = following < end[column]
            self.flags[self.at(stream[goes_on], following[goes_on])] |= FIRST

        self.end[chosen] = end
        self.transitions[chosen] += steps
        self.episodes[chosen] += np.count_nonzero(ended, axis=0)
        moved = numbers[steps > 0]
        self.in_flight[moved] = (self.flags[self.at(moved, self.end[moved] - 1)] & FINAL) == 0

    def _add_plain_steps(
        self,
        count: int,
        obs: Mapping[str, np.ndarray],
        actions: np.ndarray,
        rewards: np.ndarray,
        extras: Mapping[str, np.ndarray],
        streams: np.ndarray | None,
    ) -> None:
        """`add_steps` where every one of these streams makes every step and no episode ends."""
        chosen: Any = slice(None) if streams is None else streams
        more = self._at_streams(chosen, count)
        self._make_room(more, more)
        at = self.base[chosen] + (self.end[chosen] + np.arange(count)[:, None]) % self.ring  # [K, S]
        self._write_rows(at, obs, actions, rewards)
        self.flags[at] = 0
        for name, stored in self.extras.items():
            stored[at] = extras.get(name, _blank(name))
        in_flight = self.in_flight[chosen]
        if np.count_nonzero(in_flight) < len(in_flight):
            self.flags[at[0, ~in_flight]] = FIRST
            self.in_flight[chosen] = True
        self.end[chosen] += count
        self.transitions[chosen] += count

    def _at_streams(self, chosen: slice | np.ndarray, values: Any) -> Any:
        """The values at the chosen streams, and zero for the others; as they are if all streams are chosen."""
        if isinstance(chosen, slice):
            return values
        spread = np.zeros_like(self.end)
        spread[chosen] = values
        return spread

    def _write_rows(
        self, at: np.ndarray, obs: Mapping[str, np.ndarray], actions: np.ndarray, rewards: np.ndarray
    ) -> None:
        for key, stored in self.obs.items():
            stored[at] = obs[key]
        self.actions[at] = actions
        self.rewards[at] = rewards

    def add_episodes(
        self,
        stream: int,
        obs: Mapping[str, np.ndarray],
        actions: np.ndarray,
        rewards: np.ndarray,
        flags: np.ndarray,
        finals: Mapping[str, np.ndarray],
        seen: np.ndarray,
        extras: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Appends any number of steps to one stream; of more than it can hold, the newest stay.

        The other arguments are those of `add_steps`, without the axis of the streams.
        """
        most, ended = self.most_steps, 0
        for start in range(0, len(flags), most):
            part = slice(start, start + most), None
            ends = slice(ended, ended + np.count_nonzero(flags[part] > STEP))
            ended = ends.stop
            self.add_steps(
                {key: array[part] for key, array in obs.items()},
                actions[part],
                rewards[part],
                flags[part],
                {key: array[ends] for key, array in finals.items()},
                {name: array[part] for name, array in (extras or {}).items()},
                np.array([stream]),
                seen[ends],
            )

    def close(self, streams: np.ndarray, final_obs: Mapping[str, np.ndarray] | None) -> None:
        """Ends the episodes in flight of these streams as truncated; None: the last observations are not known."""
        rows = np.zeros_like(self.end)
        rows[streams] = 1
        self._make_room(np.zeros_like(rows), rows)
        self.flags[self.at(streams, self.end[streams] - 1)] |= TRUNCATED
        seen = None if final_obs is not None else np.zeros(len(streams), np.bool_)
        self._write_finals(self.at(streams, self.end[streams]), final_obs or {}, seen)
        self.end += rows
        self.episodes += rows
        self.in_flight[streams] = False

    def _write_finals(self, at: np.ndarray, obs: Mapping[str, np.ndarray], seen: np.ndarray | None) -> None:
        """Writes final rows, which hold no step: observations, or zeros and a mark where they were not recorded."""
        self.flags[at] = FINAL if seen is None else np.where(seen, FINAL, FINAL | UNSEEN)
        self.actions[at] = 0
        self.rewards[at] = 0
        for key, stored in self.obs.items():
            stored[at] = obs.get(key, 0)
            if seen is not None and not seen.all():
                stored[at[~seen]] = 0
        for name, stored in self.extras.items():
            # An episode's last observation is of the same task as its steps; the row before it may end the ring.
            stored[at] = stored[at - 1 + self.ring * (at % self.ring == 0)] if name == TASK_KEY else 0

    def _make_room(self, transitions: Any, rows: Any) -> None:
        """Drops the oldest rows of each stream until so many more fit; `[n_envs]`, or a number for all."""
        self.storage.check_writable()
        excess = self.transitions + transitions - self.limits
        rows_excess = self.end - self.begin + rows - self.ring
        worst = np.maximum(excess, rows_excess)
        most = worst.max()
        if most > 0:
            streams = (worst > 0).nonzero()[0]
            if most == 1:
                self._drop_one(streams)
            else:
                self._drop(streams, np.maximum(excess[streams], 0), np.maximum(rows_excess[streams], 0))

    def _drop_one(self, streams: np.ndarray) -> None:
        """Drops the oldest row of streams, which is a step, and the final row behind it, if there is one."""
        second = self.begin[streams] + 1
        self.begin[streams] = second
        self.transitions[streams] -= 1
        followed = ((self.flags[self.at(streams, second)] & FINAL) != 0) & (second < self.end[streams])
        if np.count_nonzero(followed):
            self.begin[streams[followed]] += 1
            self.episodes[streams[followed]] -= 1

    def _drop(self, streams: np.ndarray, excess: np.ndarray, rows_excess: np.ndarray) -> None:
        """Drops the oldest rows of streams, reading no more rows than necessary.

        Args:
            streams: Numbers of the streams, each of them once. `[S]`
            excess: Transitions that must go, at least. `[S]`
            rows_excess: Rows that must go, at least. `[S]`
        """
        begin = self.begin[streams]
        used = self.end[streams] - begin
        # Every final row follows a step, so 2k rows hold at least k steps.
        nth = np.arange(np.minimum(used, np.maximum(2 * excess, rows_excess) + 1).max())
        oldest = self.at(streams[:, None], begin[:, None] + nth)  # [S, N]
        is_step = ((self.flags[oldest] & FINAL) == 0) & (nth < used[:, None])
        steps = np.cumsum(is_step, axis=1)
        count = np.where(excess, np.count_nonzero(steps < excess[:, None], axis=1) + 1, 0)
        count = np.maximum(count, rows_excess)
        each = np.arange(len(streams))
        # No final row stays without its step.
        count += (count < used) & ~is_step[each, np.minimum(count, len(nth) - 1)]
        dropped = steps[each, count - 1]
        self.begin[streams] += count
        self.transitions[streams] -= dropped
        self.episodes[streams] -= count - dropped


def _blank(name: str) -> int:
    """What is stored of an extra where nothing was given."""
    return UNKNOWN_TASK if name == TASK_KEY else 0


def _bytes_of(columns: Iterable[tuple[tuple[int, ...], np.dtype]]) -> int:
    """Bytes of one row of several arrays, given by the shape of a row and the dtype."""
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in columns)
