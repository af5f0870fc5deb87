"""Segments: immutable files with runs of a replay buffer's rows, and how small ones are joined to larger ones."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from worldflux.errors import BufferError, CheckpointError, ConfigurationError
from worldflux.files import write_atomically
from worldflux.reading import read_json
from worldflux.replay.backends import RowArray
from worldflux.replay.buffer import ReplayBuffer
from worldflux.replay.npz import ArrayChunks, NpzFile, rows_per_chunk, write_npz
from worldflux.replay.ring import FINAL, FIRST, TERMINATED, TRUNCATED, UNSEEN, RingStorage
from worldflux.replay.spec import all_finite
from worldflux.validation import whole_number

SEGMENT_BYTES = 256 * 2**20
SEGMENT_ROWS = 2**20
"""More than either is split, because a segment stays on the disk until the last of its rows has been dropped."""
SMALL_BYTES = 32 * 2**20
"""Segments from this size on are never written again."""
JOINED = 16
"""So many small segments of one level become one of the next."""


@dataclass(frozen=True, eq=False)
class Segment:
    """Rows `first` to `end - 1` of each stream, in a file that never changes."""

    name: str
    """Of the file."""
    first: np.ndarray
    """`[n_envs]` int64"""
    end: np.ndarray
    """`[n_envs]` int64"""
    level: int
    """How many times its rows were joined with others'."""
    size: int
    """Bytes."""
    checksum: int
    """`NpzFile.checksum`"""
    identity: tuple[int, int, int]
    """Of the file on this machine; shared by all hard links to it, and by no other file."""


def identity(path: Path) -> tuple[int, int, int]:
    """What tells a file from every other that was ever at its place."""
    found = path.lstat()  # a symbolic link is no segment
    return found.st_ino, found.st_size, found.st_mtime_ns


def joined_from(segments: Sequence[Segment]) -> tuple[int, int]:
    """Which of the newest segments are written again together with new rows, and the level of what comes out.

    `JOINED - 1` neighbours of level 0 are joined with the new rows to one of level 1, as many of those to one of
    level 2, and so on. After S saves there are at most `(JOINED - 1) * (1 + log(S, JOINED))` small segments, and each
    row was written at most `1 + log(S, JOINED)` times.

    Returns:
        Index of the first one that is written again; `len(segments)` if none is.
    """
    index, level = len(segments), 0
    while True:
        start = index
        while start and segments[start - 1].level == level and segments[start - 1].size < SMALL_BYTES:
            start -= 1
        if index - start < JOINED - 1:
            return index, level
        index, level = start, level + 1


def split(store: RingStorage, first: np.ndarray, end: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Rows `first` to `end - 1` of each stream in pieces that are no larger than a segment, the oldest first."""
    row_bytes = sum(_row_bytes(column) for column in _columns(store).values())
    most = min(SEGMENT_ROWS, max(1, SEGMENT_BYTES // row_bytes))
    pieces = max(1, -(-int((end - first).sum()) // most))
    edges = [first + (end - first) * piece // pieces for piece in range(pieces + 1)]
    return [(start, stop) for start, stop in pairwise(edges) if (stop > start).any()]


def write_segment(
    path: Path,
    store: RingStorage,
    first: np.ndarray,
    end: np.ndarray,
    *,
    level: int = 0,
    beside: Mapping[str, np.ndarray] | None = None,
) -> Segment:
    """Writes rows `first` to `end - 1` of each stream, stream by stream, without a copy of them in memory.

    Args:
        path: Target.
        store: Holds the rows.
        first: `[n_envs]`
        end: `[n_envs]`
        level: Of the segment.
        beside: Further arrays, by name.

    Raises:
        OSError: If the disk does not take it; nothing is left of it then.
    """
    streams, rows = _places(first, end)
    at = store.at(streams, rows)
    arrays: dict[str, np.ndarray | ArrayChunks] = {"first": first, "end": end}
    arrays |= {name: _gathered(column, at) for name, column in _columns(store).items()}
    write_npz(path, arrays | dict(beside or {}))
    with NpzFile(path) as file:
        return Segment(path.name, first, end, level, path.stat().st_size, file.checksum, identity(path))


def read_segment(
    path: Path, store: RingStorage, segment: Segment, *, beside: Mapping[str, np.ndarray] | None = None
) -> None:
    """Copies the rows of a segment to their places in `store`; the segments of a buffer are read in their order.

    Rows that the ring dropped after the segment was written need no care: what lies at their places now is in a later
    segment, or nothing. Only the arrays are changed, so that a store which was empty still is when an error comes.

    Args:
        path: The segment's file.
        store: Gets the rows.
        segment: What was said of the file.
        beside: Further arrays, by name, which are filled. `[E, ...]`

    Raises:
        CheckpointError: If the file is missing, damaged, or not the one that `segment` was made of.
    """
    if not path.is_file():
        raise CheckpointError(f"{path.parent} has no {path.name}, which belongs to it. The checkpoint is incomplete.")
    if path.stat().st_size != segment.size:
        raise CheckpointError(
            f"{path} has {path.stat().st_size} bytes, expected {segment.size}. The file is damaged (cut short?)."
        )
    if (segment.end - segment.first).sum() > segment.size:  # before room is made for their numbers
        raise CheckpointError(f"{path} has {segment.size} bytes, too few for its rows. The file is damaged.")
    streams, rows = _places(segment.first, segment.end)
    at = store.at(streams, rows)
    try:
        with NpzFile(path) as file:
            if file.checksum != segment.checksum:
                raise BufferError(f"{path.name} is not the file that was saved: its checksum differs")
            for name, expected in (("first", segment.first), ("end", segment.end)):
                if not np.array_equal(file.read(name), expected):
                    raise BufferError(f"{path.name}: array {name!r} is not {expected.tolist()}")
            for name, column in _columns(store).items():
                _copy(file, name, column, at)
            for name, array in (beside or {}).items():
                _copy(file, name, array, np.arange(len(array)))
    except BufferError as error:
        raise CheckpointError(f"{path.parent}: {str(error).rstrip('.')}. The file is damaged.") from error


def fault_in_flags(flags: np.ndarray, in_flight: bool) -> str | None:
    """What is wrong with the flags of one stream's rows, oldest first; None if nothing is.

    Args:
        flags: `[N]` uint8
        in_flight: Whether the last row is that of an episode in flight.
    """
    is_final, is_first = (flags & FINAL) != 0, (flags & FIRST) != 0
    ended, unseen = (flags & (TERMINATED | TRUNCATED)) != 0, (flags & UNSEEN) != 0
    if (flags > (TERMINATED | TRUNCATED | FIRST | FINAL | UNSEEN)).any():
        return "a row has a flag that does not exist"
    if (is_final & (is_first | ended)).any() or (unseen & ~is_final).any() or is_final[:1].any():
        return "a row is a step and an observation after the last step at once"
    if not np.array_equal(ended[:-1], is_final[1:]) or (len(flags) and (ended[-1] or is_final[-1] == in_flight)):
        return "an observation after the last step does not follow on the end of an episode"
    if not np.array_equal(is_first[1:], is_final[:-1]):
        return "an episode does not begin where the one before it ends"
    return None


def _row_bytes(column: RowArray) -> int:
    """Bytes of one row."""
    return int(np.prod(column.shape[1:], dtype=np.int64)) * column.dtype.itemsize


def _columns(store: RingStorage) -> dict[str, RowArray]:
    """The arrays of `store` by the names that they have in a segment."""
    return {
        **{f"obs/{key}": column for key, column in store.obs.items()},
        "actions": store.actions,
        "rewards": store.rewards,
        "flags": store.flags,
        **{f"extras/{name}": column for name, column in store.extras.items()},
    }


def _places(first: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Stream and row number of each row of a segment. `[N]`, `[N]`."""
    counts = end - first
    streams = np.repeat(np.arange(len(counts)), counts)
    return streams, np.arange(counts.sum()) + np.repeat(first - (np.cumsum(counts) - counts), counts)


def _gathered(column: RowArray, at: np.ndarray) -> ArrayChunks:
    step = rows_per_chunk(column.shape[1:], column.dtype)
    chunks = (column[at[start : start + step]] for start in range(0, len(at), step))
    return ArrayChunks((len(at), *column.shape[1:]), column.dtype, chunks)


def _copy(file: NpzFile, name: str, column: RowArray, at: np.ndarray) -> None:
    """Checks an array and copies its rows to `column[at]`."""
    if name not in file.names:
        raise BufferError(f"{file.path.name} has no array {name!r}")
    source = file.stream(name)
    expected = (len(at), *column.shape[1:])
    if source.shape != expected or source.dtype != column.dtype:
        raise BufferError(
            f"{file.path.name}: array {name!r} is {source.dtype} {source.shape}, expected {column.dtype} {expected}"
        )
    start = 0
    for chunk in source.chunks:
        # Extras are a model's own affair: what it computed is stored unchecked, and may be anything.
        if chunk.dtype.kind == "f" and not name.startswith("extras/") and not all_finite(chunk):
            raise BufferError(f"{file.path.name}: array {name!r} has values that are not finite")
        column[at[start : start + len(chunk)]] = chunk
        start += len(chunk)


STATE_FILE = "replay.json"
IN_FLIGHT_FILE = "in-flight.npz"
FORMAT = 1
"""Of the files; a change that older versions cannot read raises it."""

SEGMENT_NAME = re.compile(r"rows-(\d{6,12})\.npz")
COUNTERS = ("begin", "end", "transitions", "episodes")
"""Of a `RingStorage`."""
_LARGEST = 2**48
"""No number is that large; sums and products of them stay within an int64."""


@dataclass(frozen=True, eq=False)
class ReplayState:
    """What `replay.json` says beside the description of the buffer."""

    counters: dict[str, np.ndarray]
    """By name, those of `COUNTERS`. `[n_envs]` int64"""
    in_flight: np.ndarray
    """`[n_envs]` bool"""
    fresh: np.ndarray
    """Where the fresh windows of each stream begin. `[n_envs]` int64"""
    sampler: dict[str, Any]
    """State of the sampler's random numbers."""
    segments: list[Segment]
    """Of all rows but the last ones of episodes in flight, the oldest first."""
    last_rows: Segment | None
    """Those; None if no episode is in flight."""
    has_final_obs: bool
    """Whether the observations after them are known."""


def write_state(
    folder: Path, buffer: ReplayBuffer, segments: list[Segment], last_rows: Segment | None, has_final_obs: bool
) -> None:
    """Writes `replay.json`.

    Args:
        folder: Where to.
        buffer: The one whose rows were written.
        segments: As in `ReplayState`.
        last_rows: As in `ReplayState`.
        has_final_obs: As in `ReplayState`.
    """
    store, fresh = buffer.stored()
    state = {
        "format": FORMAT,
        "buffer": _description(buffer),
        "streams": buffer.num_streams,
        **{name: getattr(store, name).tolist() for name in COUNTERS},
        "in_flight": np.flatnonzero(store.in_flight).tolist(),
        "fresh": fresh.tolist(),
        "sampler": buffer.rng_state(),
        "segments": [_entry(segment) for segment in segments],
        "last_rows": None if last_rows is None else _entry(last_rows),
        "final_obs": has_final_obs,
    }
    write_atomically(folder / STATE_FILE, (json.dumps(state) + "\n").encode())


def read_state(folder: Path, buffer: ReplayBuffer) -> ReplayState:
    """What `replay.json` says, checked in itself and against an empty buffer that is to get the rows.

    Raises:
        ConfigurationError: If it is of another buffer than this one.
        CheckpointError: If it is missing, damaged, or contradicts itself.
    """
    file = folder / STATE_FILE
    if not file.is_file():
        raise CheckpointError(f"{folder} has no {STATE_FILE}. Pass a checkpoint that was saved with replay data.")
    return _Reader(file, read_json(file), buffer).state()


def check_rows(folder: Path, state: ReplayState, store: RingStorage) -> None:
    """Raises a `CheckpointError` unless the counters fit the rows that were read."""
    file = folder / STATE_FILE
    for stream, in_flight in enumerate(state.in_flight.tolist()):
        begin, end, *counted = (int(state.counters[name][stream]) for name in COUNTERS)
        flags = store.flags[store.at(stream, np.arange(begin, end))]
        fault = fault_in_flags(flags, in_flight)
        if fault is not None:
            raise damaged(file, f"the rows of stream {stream} cannot be: {fault}")
        finals = int(np.count_nonzero(flags & FINAL))
        if counted != [len(flags) - finals, finals]:
            raise damaged(
                file,
                f"stream {stream} has {counted[0]} transitions and {counted[1]} ended episodes, "
                f"but its rows have {len(flags) - finals} and {finals}",
            )


def damaged(file: Path, what: str) -> CheckpointError:
    """The error for a file that contradicts itself or others."""
    return CheckpointError(f"{file}: {what}. The file is damaged or was edited.")


def _description(buffer: ReplayBuffer) -> dict[str, Any]:
    """With which arguments a buffer of the same form is made, as JSON gives it back."""
    shape, dtype = buffer.obs_shape, buffer.obs_dtype
    return {
        "capacity": buffer.capacity,
        "n_envs": buffer.n_envs,
        "action_dim": buffer.action_dim,
        "obs_shape": {key: list(one) for key, one in shape.items()} if isinstance(shape, dict) else list(shape),
        "obs_dtype": {key: one.name for key, one in dtype.items()} if isinstance(dtype, dict) else dtype.name,
        "extras": {name: [list(one), dtype.name] for name, (one, dtype) in buffer.extras.items()},
    }


def _entry(segment: Segment) -> dict[str, Any]:
    return {
        "file": segment.name,
        "first": segment.first.tolist(),
        "end": segment.end.tolist(),
        "level": segment.level,
        "bytes": segment.size,
        "checksum": segment.checksum,
    }


class _Reader:
    """Makes a `ReplayState` of what JSON gave."""

    def __init__(self, file: Path, said: Any, buffer: ReplayBuffer) -> None:
        self._file, self._said = file, said
        if not isinstance(said, dict):
            raise damaged(file, "it is no object")
        if self._get("format") != FORMAT:
            raise CheckpointError(
                f"{file} has format {said['format']!r}, this version reads {FORMAT}. Load it with a newer worldflux."
            )
        self._check_description(_description(buffer))
        # Those that recorders got; in older files there is none of them.
        streams = self._number("streams", said.get("streams", buffer.n_envs))
        if not buffer.n_envs <= streams <= buffer.capacity:
            raise damaged(file, f"streams is {streams}, expected {buffer.n_envs} to {buffer.capacity}")
        if streams != buffer.num_streams:
            buffer.clear(streams)
        self._streams = streams
        self._store, _ = buffer.stored()

    def _check_description(self, own: dict[str, Any]) -> None:
        saved = self._get("buffer")
        if not isinstance(saved, dict) or saved.keys() != own.keys():
            raise damaged(self._file, f"buffer is {saved!r}, expected {', '.join(own)}")
        others = [name for name in own if saved[name] != own[name]]
        if others:
            was, now = (", ".join(f"{name} {what[name]}" for name in others) for what in (saved, own))
            raise ConfigurationError(
                f"{self._file} is of a buffer with {was}, and this one has {now}. "
                "A run continues exactly only with the same; start a new one for another."
            )

    def state(self) -> ReplayState:
        counters = {name: self._numbers(name, self._get(name)) for name in COUNTERS}
        begin, end = counters["begin"], counters["end"]
        held = end - begin
        if (held < 0).any() or (held > self._store.ring).any() or (counters["transitions"] > self._store.limits).any():
            raise damaged(
                self._file, f"rows {begin.tolist()} to {end.tolist()} are not what streams of this buffer hold"
            )
        in_flight = self._in_flight()
        sampler = self._get("sampler")
        if not isinstance(sampler, dict):
            raise damaged(self._file, f"sampler is {sampler!r}, expected a state")
        segments = self._segments(begin, end - in_flight)
        last_rows, has_final_obs = None, self._get("final_obs")
        if not isinstance(has_final_obs, bool):
            raise damaged(self._file, f"final_obs is {has_final_obs!r}, expected true or false")
        if in_flight.any():
            last_rows = self._segment(self._get("last_rows"), re.compile(re.escape(IN_FLIGHT_FILE)))
            if not (np.array_equal(last_rows.first, end - in_flight) and np.array_equal(last_rows.end, end)):
                raise damaged(self._file, "last_rows are not those of the episodes in flight")
        fresh = self._numbers("fresh", self._get("fresh"))
        return ReplayState(counters, in_flight, fresh, sampler, segments, last_rows, has_final_obs)

    def _in_flight(self) -> np.ndarray:
        listed = self._get("in_flight")
        numbers = {number for number in listed if isinstance(number, int)} if isinstance(listed, list) else set()
        mask = np.array([stream in numbers for stream in range(self._streams)])
        if np.flatnonzero(mask).tolist() != listed:
            raise damaged(self._file, f"in_flight is {listed!r}, expected numbers of streams in order")
        return mask

    def _segments(self, begin: np.ndarray, settled: np.ndarray) -> list[Segment]:
        """The segments, which together have each row from `begin` to `settled` once."""
        entries = self._get("segments")
        if not isinstance(entries, list):
            raise damaged(self._file, f"segments is {entries!r}, expected a list")
        segments = [self._segment(entry, SEGMENT_NAME) for entry in entries]
        if len({segment.name for segment in segments}) < len(segments):
            raise damaged(self._file, "two segments have the same name")
        reached = begin.copy()
        for segment in segments:
            first = np.maximum(segment.first, begin)
            has_rows = segment.end > first
            if (has_rows & (first != reached)).any():
                raise damaged(self._file, f"{segment.name} does not go on where the segments before it end")
            reached = np.where(has_rows, segment.end, reached)
        if not np.array_equal(reached, settled):
            raise damaged(self._file, f"the segments end at rows {reached.tolist()}, expected {settled.tolist()}")
        return segments

    def _segment(self, entry: Any, names: re.Pattern[str]) -> Segment:
        if not isinstance(entry, dict) or not {"file", "first", "end", "level", "bytes", "checksum"} <= entry.keys():
            raise damaged(self._file, f"a segment is described as {entry!r}")
        name = entry["file"]
        if not isinstance(name, str) or not names.fullmatch(name):
            raise damaged(self._file, f"a segment is called {name!r}, which none is")
        first, end = (self._numbers(f"{key} of {name}", entry[key]) for key in ("first", "end"))
        if (first > end).any() or (end - first > self._store.ring).any():
            raise damaged(self._file, f"{name} cannot have rows {first.tolist()} to {end.tolist()}")
        level, size, checksum = (self._number(f"{key} of {name}", entry[key]) for key in ("level", "bytes", "checksum"))
        path = self._file.parent / name
        if not path.is_file():
            raise CheckpointError(
                f"{path.parent} has no {name}, which {STATE_FILE} lists. The checkpoint is incomplete."
            )
        return Segment(name, first, end, level, size, checksum, identity(path))

    def _get(self, name: str) -> Any:
        if name not in self._said:
            raise damaged(self._file, f"it has no {name}")
        return self._said[name]

    def _number(self, name: str, value: Any) -> int:
        number = whole_number(f"{self._file}: {name}", value, 0, error=CheckpointError)
        if number >= _LARGEST:
            raise damaged(self._file, f"{name} is {number}, more than can be")
        return number

    def _numbers(self, name: str, value: Any) -> np.ndarray:
        if not isinstance(value, list) or len(value) != self._streams:
            raise damaged(self._file, f"{name} is no list of {self._streams} numbers, one for each environment")
        return np.array([self._number(name, number) for number in value], np.int64)
