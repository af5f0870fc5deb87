"""The replay data of a checkpoint: files that later checkpoints share through hard links, read back exactly."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from worldflux.errors import BufferError, CheckpointError, ConfigurationError
from worldflux.files import write_atomically
from worldflux.reading import only_our_errors, read_json
from worldflux.replay.backends import RowArray
from worldflux.replay.buffer import ReplayBuffer
from worldflux.replay.npz import NpzFile, gathered, rows_per_chunk, write_npz
from worldflux.replay.ring import FINAL, RingStorage

REPLAY_FOLDER = "replay"
"""Name of the folder in the directory of a checkpoint."""
STATE_FILE = "replay.json"
IN_FLIGHT_FILE = "in-flight.npz"
FORMAT = 2
"""Version of the files. Any change to what they hold raises it."""

SEGMENT_BYTES = 256 * 2**20
SEGMENT_ROWS = 2**20
"""Size from which a segment is split: it stays on the disk until the last of its rows has been dropped."""
SMALL_BYTES = 32 * 2**20
"""Size from which a segment is never written again."""
JOINED = 16
"""Number of small segments that become one."""

_SEGMENT_NAME = re.compile(r"rows-(\d{6,12})\.npz")
_LARGEST = 2**48
"""Bound of every number in `replay.json`, so that sums of them stay within an int64."""


@dataclass(frozen=True, eq=False)
class Segment:
    """Rows `first` to `end - 1` of each stream, in a file that never changes."""

    name: str
    """Name of the file."""
    first: np.ndarray
    """`[num_streams]` int64"""
    end: np.ndarray
    """`[num_streams]` int64"""
    size: int
    """Bytes of the file."""
    checksum: int
    """`NpzFile.checksum` of the file."""
    identity: tuple[int, int, int]
    """Value that distinguishes the file from every other that was ever at its path; hard links to it share it."""


class ReplaySegments:
    """A buffer's rows in the directories of its checkpoints, each of which is complete in itself.

    `write` fills the folder `replay` of a directory:

        replay.json        a description of the buffer, its counters, its sampler's state, a list of the segments, and a
                           digest of all this
        rows-000000.npz    segments: rows that will not change any more, each in one of them
        rows-000001.npz
        in-flight.npz      the last row of each episode in flight, which will be marked if the episode ends there, and
                           the observation after it, if it is known; missing if no episode is in flight

    A segment is never changed. The next checkpoint gets a hard link to each one that still has rows of the buffer, and
    a new segment with the rows since then. An old checkpoint can therefore be deleted at any time, which frees what no
    other one shares. Where the file system has no hard links, or the last checkpoint is gone, the rows are written
    again. So are the newest segments once `JOINED - 1` of them are small, together with the new rows: there are at most
    `JOINED` small segments, and on average a save rewrites no more than a small segment's worth of rows.

    Extras are stored as they were when their segment was written. Training rewrites those of rows all over the buffer,
    and storing them again would write the whole buffer at each checkpoint. After a resumption they are refreshed as
    their rows are replayed, as always. Two resumptions from one checkpoint start from the same bytes.

    Attributes:
        buffer: The buffer.

    Args:
        buffer: A buffer of which nothing is on the disk yet.
    """

    def __init__(self, buffer: ReplayBuffer) -> None:
        self.buffer = buffer
        self._folder: Path | None = None  # of the last checkpoint
        self._segments: list[Segment] = []  # in it, the oldest first
        self._settled = np.zeros(buffer.num_streams, np.int64)  # the first row of each stream that is in none of them
        self._number = 0  # of the next segment
        self._written: tuple[list[Segment], np.ndarray] | None = None  # until it is known where they are

    # --- writing

    def write(self, directory: str | Path, *, final_obs: Any = None) -> None:
        """Writes everything that the buffer holds to the folder `replay` of a directory.

        Call `moved_to` when the directory has its final name. If that does not happen, because this or anything after
        it failed, the next call starts from the same state as this one.

        Args:
            directory: An existing directory without such a folder.
            final_obs: The observations after the last steps of the episodes in flight, as for
                `ReplayBuffer.end_episodes`; None where they are not known, or one is of another stream. `[n_envs, ...]`

        Raises:
            ShapeMismatchError: If `final_obs` has another shape.
            BufferError: If `final_obs` cannot be stored.
            OSError: If the files cannot be written.
        """
        self._written = None
        store, fresh = self.buffer.stored()
        if len(self._settled) != len(store.end):  # recorders got streams of their own: all rows are written again
            self._segments, self._settled = [], np.zeros(len(store.end), np.int64)
        in_flight = np.flatnonzero(store.in_flight)
        is_known = final_obs is not None and bool((in_flight < self.buffer.n_envs).all())
        finals = self.buffer.checked_final_obs(final_obs, in_flight) if is_known else None
        folder = Path(directory) / REPLAY_FOLDER
        folder.mkdir()

        alive = [segment for segment in self._segments if (segment.end > store.begin).any()]
        settled = store.end - store.in_flight
        first = np.maximum(self._settled, store.begin)
        if (settled > first).any() and (joined := _joined_with_new_rows(alive)):
            first = np.maximum(joined[0].first, store.begin)
            del alive[-len(joined) :]
        segments = [self._link(segment, folder, store) for segment in alive]
        segments += [self._new_segment(folder, store, *piece) for piece in _pieces(store, first, settled)]
        last_rows = None
        if in_flight.size:
            path = folder / IN_FLIGHT_FILE
            last_rows = _write_segment(path, store, settled, store.end, _final_columns(finals))

        state = {
            "format": FORMAT,
            "buffer": _description(self.buffer),
            "transitions": len(self.buffer),
            "begin": store.begin.tolist(),
            "end": store.end.tolist(),
            "fresh": fresh.tolist(),
            "sampler": self.buffer.rng_state(),
            "segments": [_entry(segment) for segment in segments],
            "last_rows": None if last_rows is None else _entry(last_rows),
            "final_obs": finals is not None,
        }
        write_atomically(folder / STATE_FILE, (json.dumps({**state, "digest": _digest(state)}) + "\n").encode())
        self._written = segments, settled

    def moved_to(self, directory: str | Path) -> None:
        """Says where the directory that was written last is from now on, for the links of the next one."""
        assert self._written is not None, "write was not called, or failed"
        self._folder = Path(directory).absolute() / REPLAY_FOLDER
        (self._segments, self._settled), self._written = self._written, None

    def _link(self, segment: Segment, folder: Path, store: RingStorage) -> Segment:
        """Puts a segment of the last checkpoint into `folder`; what cannot be linked is written again."""
        assert self._folder is not None
        path = folder / segment.name
        try:
            os.link(self._folder / segment.name, path)
            if _identity(path) == segment.identity:
                return segment
            path.unlink()  # somebody put another file there, such as the checkpoint of another run
        except OSError:  # no hard links here, too many of them, or the old directory is gone
            pass
        first = np.minimum(np.maximum(segment.first, store.begin), segment.end)
        return self._new_segment(folder, store, first, segment.end)

    def _new_segment(self, folder: Path, store: RingStorage, first: np.ndarray, end: np.ndarray) -> Segment:
        path = folder / f"rows-{self._number:06}.npz"
        self._number += 1
        return _write_segment(path, store, first, end)

    # --- reading

    @classmethod
    def read(cls, directory: str | Path, buffer: ReplayBuffer) -> ReplaySegments:
        """Fills an empty buffer with what `write` wrote, and goes on from there.

        Rows keep their numbers, and the sampler its state: a batch that is drawn next is the one that the original
        buffer would have given after `end_episodes`, because episodes in flight end here as truncated. (Extras may
        differ, as the class explains.)

        Args:
            directory: The checkpoint's directory.
            buffer: A buffer made with the same arguments as the one that was written. It may be stored elsewhere.

        Returns:
            The segments of this buffer, with which the next checkpoint is written.

        Raises:
            ConfigurationError: If the buffer differs in capacity, environments, shapes, dtypes or extras.
            CheckpointError: If a file is missing, damaged, or was changed. The buffer is as empty as before.
            BufferError: If the rows do not fit into memory.
        """
        if len(buffer):
            raise ConfigurationError(f"{buffer} is not empty. Read a checkpoint into a new buffer.")
        folder = Path(directory).absolute() / REPLAY_FOLDER
        for path in (folder, *(folder.iterdir() if folder.is_dir() else ())):
            if path.is_symlink():  # its rows would get into the next checkpoint from elsewhere
                raise CheckpointError(
                    f"{path} is a symbolic link, and the replay data of a checkpoint are its own. Copy the checkpoint "
                    "with its files (cp -rL), and resume from the copy."
                )
        file = folder / STATE_FILE
        if not file.is_file():
            raise CheckpointError(f"{folder} has no {STATE_FILE}. Pass a checkpoint that was saved with replay data.")
        with only_our_errors(file):
            return cls._restored(file, _checked_state(file, buffer), buffer)

    @classmethod
    def _restored(cls, file: Path, state: dict[str, Any], buffer: ReplayBuffer) -> ReplaySegments:
        begin, end, fresh = (_numbers(file, state[name]) for name in ("begin", "end", "fresh"))
        streams = len(begin)
        if not len(end) == len(fresh) == streams or not buffer.n_envs <= streams <= buffer.capacity:
            raise _damaged(file, f"it has rows of {streams} streams, expected at least {buffer.n_envs}")
        if streams != buffer.num_streams:  # recorders got some of their own
            buffer.clear(streams)
        store, waiting = buffer.stored()
        if ((end < begin) | (end - begin > store.ring)).any():
            raise _damaged(
                file, f"rows {begin.tolist()} to {end.tolist()} are more than the streams of this buffer hold"
            )
        segments = [_segment(file, entry, _SEGMENT_NAME, streams) for entry in state["segments"]]
        in_flight, finals, last_rows = np.zeros(streams, np.bool_), None, None
        if state["last_rows"] is not None:
            last_rows = _segment(file, state["last_rows"], re.compile(re.escape(IN_FLIGHT_FILE)), streams)
            in_flight = last_rows.end > last_rows.first
            if state["final_obs"]:
                lead = (int(np.count_nonzero(in_flight)),)
                finals = {key: np.zeros((*lead, *column.shape[1:]), column.dtype) for key, column in store.obs.items()}
        buffer.check_budget(state["transitions"])

        # Until all is read, only the arrays are changed, so that an error leaves the store as empty as it was. Rows
        # that were dropped after their segment was written need no care: later segments overwrite them.
        for segment in segments:
            _read_segment(file.parent / segment.name, store, segment)
        if last_rows is not None:
            _read_segment(file.parent / IN_FLIGHT_FILE, store, last_rows, _final_columns(finals))
        try:
            buffer.set_rng_state(state["sampler"])
        except BufferError as error:
            raise _damaged(file, f"sampler is no state of a random stream ({error})") from error
        store.begin[:], store.end[:], store.in_flight[:], waiting[:] = begin, end, in_flight, fresh
        for stream in range(streams):
            rows = np.arange(begin[stream], end[stream])
            store.episodes[stream] = np.count_nonzero(store.flags[store.at(stream, rows)] & FINAL)
            store.transitions[stream] = len(rows) - store.episodes[stream]
        if in_flight.any():
            store.close(np.flatnonzero(in_flight), finals)

        log = cls(buffer)
        log._folder, log._segments, log._settled = file.parent, segments, end - in_flight
        log._number = 1 + max((int(segment.name[5:-4]) for segment in segments), default=-1)
        return log


# --- replay.json


def _description(buffer: ReplayBuffer) -> dict[str, Any]:
    """The arguments with which a buffer of the same form is made, as JSON gives them back."""
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
        "bytes": segment.size,
        "checksum": segment.checksum,
    }


def _digest(state: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(state, sort_keys=True).encode(), digest_size=16).hexdigest()


def _checked_state(file: Path, buffer: ReplayBuffer) -> dict[str, Any]:
    """What `replay.json` says, if it is as it was written, and of a buffer like this one."""
    state = read_json(file)
    if not isinstance(state, dict) or "format" not in state:
        raise _damaged(file, "it has no format")
    if state["format"] != FORMAT:
        raise CheckpointError(
            f"{file} has format {state['format']!r}, this version of worldflux reads {FORMAT}. Load it with the "
            "version that wrote it."
        )
    if state.pop("digest", None) != _digest(state):
        raise _damaged(file, "its digest does not match its content")
    saved, own = state["buffer"], _description(buffer)
    others = [name for name in own if saved[name] != own[name]]
    if others:
        was, now = (", ".join(f"{name} {what[name]}" for name in others) for what in (saved, own))
        raise ConfigurationError(
            f"{file} is of a buffer with {was}, and this one has {now}. "
            "A run continues exactly only with the same; start a new one for another."
        )
    return state


# A digest can be computed anew by whoever edits a file on purpose. What follows keeps such a file from taking memory
# that it does not fill, and from naming files elsewhere.


def _numbers(file: Path, value: Any) -> np.ndarray:
    """Row numbers, one for each stream, of which no sum can overflow. `[num_streams]` int64"""
    array = np.array(value)
    if array.ndim != 1 or not array.size or array.dtype.kind != "i" or array.min() < 0 or array.max() >= _LARGEST:
        raise _damaged(file, f"it has {str(value)[:99]} where numbers of rows are expected")
    return array.astype(np.int64)


def _segment(file: Path, entry: Any, names: re.Pattern[str], streams: int) -> Segment:
    name, first, end = entry["file"], _numbers(file, entry["first"]), _numbers(file, entry["end"])
    if not names.fullmatch(name):
        raise _damaged(file, f"a segment is called {name!r}, which none is")
    path = file.parent / name
    if not path.is_file():
        raise CheckpointError(f"{path.parent} has no {name}, which {STATE_FILE} lists. The checkpoint is incomplete.")
    size = path.stat().st_size
    if size != entry["bytes"]:
        raise CheckpointError(f"{path} has {size} bytes, expected {entry['bytes']}. The file is damaged (cut short?).")
    if len(first) != streams or len(end) != streams or (first > end).any() or (end - first).sum() > size:
        raise _damaged(file, f"{name} cannot have rows {first.tolist()} to {end.tolist()}")
    return Segment(name, first, end, size, entry["checksum"], _identity(path))


def _damaged(file: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{file}: {what}. The file is damaged or was edited.")


# --- segments


def _joined_with_new_rows(segments: Sequence[Segment]) -> Sequence[Segment]:
    """The newest segments that are written again together with new rows."""
    start = len(segments)
    while start and segments[start - 1].size < SMALL_BYTES:
        start -= 1
    return segments[start:] if len(segments) - start >= JOINED - 1 else []


def _pieces(store: RingStorage, first: np.ndarray, end: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Rows `first` to `end - 1` of each stream in pieces that are no larger than a segment, the oldest first."""
    row_bytes = sum(column.nbytes // len(store.flags) for column in _columns(store).values())
    most = min(SEGMENT_ROWS, max(1, SEGMENT_BYTES // row_bytes))
    pieces = max(1, -(-int((end - first).sum()) // most))
    edges = [first + (end - first) * piece // pieces for piece in range(pieces + 1)]
    return [(start, stop) for start, stop in pairwise(edges) if (stop > start).any()]


def _write_segment(
    path: Path,
    store: RingStorage,
    first: np.ndarray,
    end: np.ndarray,
    beside: Mapping[str, np.ndarray] | None = None,
) -> Segment:
    """Writes rows `first` to `end - 1` of each stream, stream by stream, and further arrays beside them."""
    at = store.at(*store.places(first, end))
    write_npz(path, {name: gathered(column, at) for name, column in _columns(store).items()} | dict(beside or {}))
    with NpzFile(path) as file:
        return Segment(path.name, first, end, path.stat().st_size, file.checksum, _identity(path))


def _read_segment(
    path: Path, store: RingStorage, segment: Segment, beside: Mapping[str, np.ndarray] | None = None
) -> None:
    """Copies the rows of a segment to their places in `store`, and further arrays into those given."""
    at = store.at(*store.places(segment.first, segment.end))
    try:
        with NpzFile(path) as file:
            if file.checksum != segment.checksum:
                raise BufferError(f"{path.name} is not the file that was saved: its checksum differs")
            for name, column in _columns(store).items():
                _copy(file, name, column, at)
            for name, array in (beside or {}).items():
                _copy(file, name, array, np.arange(len(array)))
    except BufferError as error:
        raise CheckpointError(f"{path.parent}: {str(error).rstrip('.')}. The file is damaged.") from error


def _copy(file: NpzFile, name: str, column: RowArray, at: np.ndarray) -> None:
    source, expected = file.open(name), (len(at), *column.shape[1:])
    if source.shape != expected or source.dtype != column.dtype:
        raise BufferError(
            f"{file.path.name}: array {name!r} is {source.dtype} {source.shape}, expected {column.dtype} {expected}"
        )
    step = rows_per_chunk(source.shape[1:], source.dtype)
    for start in range(0, max(1, len(at)), step):  # an empty one, too, has a checksum
        column[at[start : start + step]] = source.take(step)


def _columns(store: RingStorage) -> dict[str, RowArray]:
    """The arrays of `store` by the names that they have in a segment."""
    return {
        **{f"obs/{key}": column for key, column in store.obs.items()},
        "actions": store.actions,
        "rewards": store.rewards,
        "flags": store.flags,
        **{f"extras/{name}": column for name, column in store.extras.items()},
    }


def _final_columns(finals: Mapping[str, np.ndarray] | None) -> dict[str, np.ndarray]:
    """Observations after the last steps, by the names that they have in the file."""
    return {f"final_obs/{key}": array for key, array in (finals or {}).items()}


def _identity(path: Path) -> tuple[int, int, int]:
    found = path.lstat()  # a symbolic link is no segment
    return found.st_ino, found.st_size, found.st_mtime_ns
