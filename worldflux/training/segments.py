"""Segments: immutable files with runs of a replay buffer's rows, and how small ones are joined to larger ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from worldflux.errors import BufferError, CheckpointError
from worldflux.training.arrays import all_finite
from worldflux.training.npz import NpzFile, Stream, rows_per_chunk, write_npz
from worldflux.training.rows import FINAL, FIRST, TERMINATED, TRUNCATED, UNSEEN, RowStore
from worldflux.training.storage import RowArray

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


def split(store: RowStore, first: np.ndarray, end: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Rows `first` to `end - 1` of each stream in pieces that are no larger than a segment, the oldest first."""
    row_bytes = sum(_row_bytes(column) for column in _columns(store).values())
    most = min(SEGMENT_ROWS, max(1, SEGMENT_BYTES // row_bytes))
    pieces = max(1, -(-int((end - first).sum()) // most))
    edges = [first + (end - first) * piece // pieces for piece in range(pieces + 1)]
    return [(start, stop) for start, stop in pairwise(edges) if (stop > start).any()]


def write_segment(
    path: Path,
    store: RowStore,
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
    arrays: dict[str, np.ndarray | Stream] = {"first": first, "end": end}
    arrays |= {name: _gathered(column, at) for name, column in _columns(store).items()}
    write_npz(path, arrays | dict(beside or {}))
    with NpzFile(path) as file:
        return Segment(path.name, first, end, level, path.stat().st_size, file.checksum, identity(path))


def read_segment(
    path: Path, store: RowStore, segment: Segment, *, beside: Mapping[str, np.ndarray] | None = None
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


def _columns(store: RowStore) -> dict[str, RowArray]:
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


def _gathered(column: RowArray, at: np.ndarray) -> Stream:
    step = rows_per_chunk(column.shape[1:], column.dtype)
    chunks = (column[at[start : start + step]] for start in range(0, len(at), step))
    return Stream((len(at), *column.shape[1:]), column.dtype, chunks)


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
