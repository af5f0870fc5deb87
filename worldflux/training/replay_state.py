"""`replay.json`, which says what a checkpoint's segments are the rows of: written, and checked when it is read."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from worldflux.errors import CheckpointError, ConfigurationError
from worldflux.files import write_atomically
from worldflux.reading import read_json
from worldflux.training.config import whole_number
from worldflux.training.replay import ReplayBuffer
from worldflux.training.rows import FINAL, RowStore
from worldflux.training.segments import Segment, fault_in_flags, identity

STATE_FILE = "replay.json"
IN_FLIGHT_FILE = "in-flight.npz"
FORMAT = 1
"""Of the files; a change that older versions cannot read raises it."""

SEGMENT_NAME = re.compile(r"rows-(\d{6,12})\.npz")
COUNTERS = ("begin", "end", "transitions", "episodes")
"""Of a `RowStore`."""
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


def check_rows(folder: Path, state: ReplayState, store: RowStore) -> None:
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
