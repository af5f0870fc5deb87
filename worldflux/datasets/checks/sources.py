"""What is checked: the rows of a buffer, or the arrays of a file that a buffer would refuse."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from worldflux.errors import BufferError
from worldflux.files import checked_path
from worldflux.replay.buffer import ReplayBuffer
from worldflux.replay.npz import NpzFile, rows_per_chunk
from worldflux.replay.ring import FINAL, FIRST, TERMINATED, UNSEEN
from worldflux.validation import SINGLE_KEY

_MOST_AXES = 64


class Source(Protocol):
    """Transitions, stream by stream and oldest first, of which the observations are read when they are asked for."""

    obs: dict[str, tuple[tuple[int, ...], np.dtype]]
    """Shape of one observation and dtype, by key; the key of an observation that is one array is `SINGLE_KEY`."""
    actions: np.ndarray
    """`[N, A]`"""
    rewards: np.ndarray
    """`[N]`"""
    terminated: np.ndarray
    """`[N]` bool"""
    lengths: np.ndarray
    """Transitions of each episode, in order. `[S]`"""
    streams: np.ndarray
    """Stream of each episode. `[S]`"""
    is_whole: np.ndarray
    """Whether the first row of an episode is there. `[S]` bool"""
    has_ended: np.ndarray
    """Whether an episode is not in flight. `[S]` bool"""
    has_final: np.ndarray
    """Whether the observation after an episode's last step is there. `[S]` bool"""
    classes: tuple[int, ...] | None
    """Kind of the actions, as for `ReplayBuffer.action_classes`."""

    def read(self, key: str, rows: np.ndarray | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Observations in pieces, each with its rows: those of ascending `rows` `[K]`, or all."""

    def finals(self, key: str, episodes: np.ndarray) -> np.ndarray:
        """The observations after the last steps of these episodes, ascending, which have one. `[K, ...]`"""


class BufferSource:
    """The rows of a replay buffer, which are not copied.

    Args:
        buffer: The buffer.
    """

    def __init__(self, buffer: ReplayBuffer) -> None:
        rows, _ = buffer.stored()
        stream, begin, end = rows.episodes_at()
        flags = rows.flags[rows.stored_at()]
        self._rows, self._at = rows, rows.stored_at()[(flags & FINAL) == 0]
        first, self._last = rows.at(stream, begin), rows.at(stream, end - 1)
        last = rows.flags[self._last]
        self.has_ended = (last & FINAL) != 0
        self.has_final = self.has_ended & ((last & UNSEEN) == 0)
        self.is_whole = (rows.flags[first] & FIRST) != 0
        self.streams, self.lengths = stream, end - begin - self.has_ended
        self.obs = {key: (array.shape[1:], np.dtype(array.dtype)) for key, array in rows.obs.items()}
        self.actions, self.rewards = np.asarray(rows.actions[self._at]), np.asarray(rows.rewards[self._at])
        self.terminated = (rows.flags[self._at] & TERMINATED) != 0
        self.classes = buffer.action_classes

    def read(self, key: str, rows: np.ndarray | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """See `Source`."""
        numbers = np.arange(len(self._at)) if rows is None else rows
        size = rows_per_chunk(*self.obs[key])
        for start in range(0, len(numbers), size):
            part = numbers[start : start + size]
            yield part, np.asarray(self._rows.obs[key][self._at[part]])

    def finals(self, key: str, episodes: np.ndarray) -> np.ndarray:
        """See `Source`."""
        return np.asarray(self._rows.obs[key][self._last[episodes]])


class FileSource:
    """The arrays of an `.npz` of the documented schema as they are, NaN and actions of any size included.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: If there is no such file.
        BufferError: If it cannot be read, or its arrays do not belong together.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = checked_path("path", path)
        with NpzFile(self._path) as file:
            keys = [name.removeprefix("obs/") for name in file.names if name.startswith("obs/")]
            self._is_dict = bool(keys) and "obs" not in file.names
            keys = sorted(keys) if self._is_dict else [SINGLE_KEY]
            file.require(self._name("obs", key) for key in keys)
            file.require(("actions", "rewards", "dones"))
            self.rewards = self._column(file, "rewards", None)
            count = len(self.rewards)
            self.actions = self._column(file, "actions", count).reshape(count, -1)
            self.obs = {}
            for key in keys:
                stored = file.open(self._name("obs", key))
                if len(stored.shape) < 2 or stored.shape[0] != count:
                    raise self._wrong(
                        f"{self._name('obs', key)} has shape {stored.shape}, and there are {count} rewards"
                    )
                self.obs[key] = stored.shape[1:], stored.dtype
            self.terminated = self._column(file, "dones", count).astype(np.bool_)
            truncated = np.zeros(count, np.bool_)
            for name in ("truncations", "timeouts"):
                if name in file.names:
                    truncated |= self._column(file, name, count).astype(np.bool_)
            self.classes = None
            if "action_classes" in file.names:
                self.classes = tuple(int(size) for size in self._column(file, "action_classes", None))
            self._read_episodes(file, self.terminated | truncated)

    def _read_episodes(self, file: NpzFile, ended: np.ndarray) -> None:
        if "episode_lengths" in file.names:
            self.lengths = self._column(file, "episode_lengths", None).astype(np.int64)
            columns = ("episode_streams", "episode_starts", "episode_ends", "final_obs_mask")
            file.require(columns)
            table = [self._column(file, name, len(self.lengths)) for name in columns]
            self.streams = table[0].astype(np.int64)
            self.is_whole, self.has_ended, self.has_final = (column.astype(np.bool_) for column in table[1:])
            if (self.lengths < 1).any() or sum(self.lengths.tolist()) != len(ended):
                raise self._wrong("episode_lengths do not add up to the number of rewards")
            return
        ends = np.flatnonzero(ended)
        if len(ended) and (not len(ends) or ends[-1] != len(ended) - 1):
            ends = np.append(ends, len(ended) - 1)
        self.lengths = np.diff(ends, prepend=-1)
        self.streams = np.zeros(len(ends), np.int64)
        self.is_whole = self.has_ended = np.ones(len(ends), np.bool_)
        self.has_final = ~self.has_ended

    def read(self, key: str, rows: np.ndarray | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """See `Source`."""
        with NpzFile(self._path) as file:
            stored = file.open(self._name("obs", key))
            size = rows_per_chunk(*self.obs[key])
            for start in range(0, stored.shape[0], size):
                piece = stored.take(size)
                if rows is None:
                    yield np.arange(start, start + len(piece)), piece
                    continue
                part = rows[slice(*np.searchsorted(rows, (start, start + len(piece))))]
                if len(part):
                    yield part, piece[part - start]

    def finals(self, key: str, episodes: np.ndarray) -> np.ndarray:
        """See `Source`."""
        shape, dtype = self.obs[key]
        if not len(episodes):
            return np.zeros((0, *shape), dtype)
        with NpzFile(self._path) as file:
            file.require([self._name("final_obs", key)])
            stored = file.open(self._name("final_obs", key))
            if stored.shape != (len(self.lengths), *shape):
                raise self._wrong(
                    f"{self._name('final_obs', key)} has shape {stored.shape}, expected one row per episode"
                )
            return stored.take()[episodes]

    def _column(self, file: NpzFile, name: str, count: int | None) -> np.ndarray:
        stored = file.open(name)
        most = _MOST_AXES if name == "action_classes" else math.inf
        if (
            not stored.shape
            or stored.shape[0] != (stored.shape[0] if count is None else count)
            or (stored.shape[0] > most or (name != "actions" and len(stored.shape) != 1))
        ):
            raise self._wrong(f"{name} has shape {stored.shape}, expected one entry for each of {count} rewards")
        return stored.take()

    def _name(self, part: str, key: str) -> str:
        return f"{part}/{key}" if self._is_dict else part

    def _wrong(self, what: str) -> BufferError:
        return BufferError(f"{self._path.name}: {what}. See ReplayBuffer.save for the schema.")


def source_of(data: Any) -> Source:
    """The source for a buffer, or for the path of an `.npz` of the documented schema."""
    return BufferSource(data) if isinstance(data, ReplayBuffer) else FileSource(data)
