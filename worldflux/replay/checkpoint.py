"""The replay data of a checkpoint: written so that the next one costs only what is new, and read back exactly."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from worldflux.errors import BufferError, CheckpointError, ConfigurationError
from worldflux.replay.buffer import ReplayBuffer
from worldflux.replay.ring import RingStorage
from worldflux.replay.segments import (
    COUNTERS,
    IN_FLIGHT_FILE,
    SEGMENT_NAME,
    STATE_FILE,
    Segment,
    check_rows,
    damaged,
    identity,
    joined_from,
    read_segment,
    read_state,
    split,
    write_segment,
    write_state,
)

REPLAY_FOLDER = "replay"
"""In the directory of a checkpoint."""


class ReplaySegments:
    """A buffer's rows in the directories of its checkpoints, each of which is complete in itself.

    `write` fills the folder `replay` of a directory:

        replay.json        what the buffer is, its counters, its sampler's state, and the list of the segments
        rows-000000.npz    segments: rows that will not change any more, each in one of them
        rows-000001.npz
        in-flight.npz      of each episode in flight the last row, which is marked when the episode ends there, and
                           the observation after it, if it is known; missing if no episode is in flight

    A segment is never changed. The next checkpoint gets a hard link to each one that still has rows of the buffer, and
    a new segment with the rows since then. So an old checkpoint can be deleted at any time, which frees what no other
    one shares. Where the file system has no hard links, or the last checkpoint is gone, the rows are written again.
    Small segments are joined from time to time (`segments.joined_from`).

    Extras are stored as they were when their segment was written. Training rewrites those of rows all over the buffer,
    and storing them anew would cost all of it at each checkpoint; after a resumption they are refreshed as their rows
    are replayed, as always. Two resumptions from one checkpoint start from the same bytes.

    Attributes:
        buffer: The buffer.

    Args:
        buffer: Of which nothing is on the disk yet.
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
            directory: Exists, and has no such folder.
            final_obs: The observations after the last steps of the episodes in flight, as for
                `ReplayBuffer.end_episodes`; None where they are not known, or one is of another stream. `[n_envs, ...]`

        Raises:
            ShapeMismatchError: If `final_obs` has another shape.
            BufferError: If `final_obs` cannot be stored.
            OSError: If the disk does not take it.
        """
        self._written = None
        store, _ = self.buffer.stored()
        if len(self._settled) != len(store.end):  # recorders got streams of their own: all rows are written again
            self._segments, self._settled = [], np.zeros(len(store.end), np.int64)
        in_flight = np.flatnonzero(store.in_flight)
        is_known = final_obs is not None and bool((in_flight < self.buffer.n_envs).all())
        finals = self.buffer.checked_final_obs(final_obs, in_flight) if is_known else None
        folder = Path(directory) / REPLAY_FOLDER
        folder.mkdir()

        alive = [segment for segment in self._segments if (segment.end > store.begin).any()]
        settled = store.end - store.in_flight
        first, level = np.maximum(self._settled, store.begin), 0
        if (settled > first).any():
            kept, level = joined_from(alive)
            if kept < len(alive):
                first = np.maximum(alive[kept].first, store.begin)
            del alive[kept:]
        segments = [self._link(segment, folder, store) for segment in alive]
        segments += [self._new_segment(folder, store, *piece, level) for piece in split(store, first, settled)]
        last_rows = None
        if in_flight.size:
            path = folder / IN_FLIGHT_FILE
            last_rows = write_segment(path, store, settled, store.end, beside=_final_columns(finals))

        write_state(folder, self.buffer, segments, last_rows, finals is not None)
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
            if identity(path) == segment.identity:
                return segment
            path.unlink()  # somebody put another file there, such as the checkpoint of another run
        except OSError:  # no hard links here, too many of them, or the old directory is gone
            pass
        first = np.minimum(np.maximum(segment.first, store.begin), segment.end)
        return self._new_segment(folder, store, first, segment.end, segment.level)

    def _new_segment(self, folder: Path, store: RingStorage, first: np.ndarray, end: np.ndarray, level: int) -> Segment:
        path = folder / f"rows-{self._number:06}.npz"
        self._number += 1
        return write_segment(path, store, first, end, level=level)

    # --- reading

    @classmethod
    def read(cls, directory: str | Path, buffer: ReplayBuffer) -> ReplaySegments:
        """Fills an empty buffer with what `write` wrote, and goes on from there.

        Rows keep their numbers, and the sampler its state: a batch that is drawn next is the one that the original
        buffer would have given after `end_episodes`, because episodes in flight end here as truncated. (Of the extras,
        see the class.)

        Args:
            directory: Of the checkpoint.
            buffer: Made with the same arguments as the one that was written; where it is stored is its own affair.

        Returns:
            The segments of this buffer, with which the next checkpoint is written.

        Raises:
            ConfigurationError: If the buffer is another one: in capacity, environments, shapes, dtypes or extras.
            CheckpointError: If a file is missing, damaged, or contradicts another. The buffer is as empty as before.
            BufferError: If the rows do not fit into memory.
        """
        store, fresh = buffer.stored()
        if store.end.any():
            raise ConfigurationError(f"{buffer} is not empty. Read a checkpoint into a new buffer.")
        folder = Path(directory).absolute() / REPLAY_FOLDER
        for path in (folder, *(folder.iterdir() if folder.is_dir() else ())):
            if path.is_symlink():  # its rows would get into the next checkpoint from elsewhere
                raise CheckpointError(
                    f"{path} is a symbolic link, and the replay data of a checkpoint are its own. Copy the checkpoint "
                    "with its files (cp -rL), and resume from the copy."
                )
        state = read_state(folder, buffer)
        buffer.check_budget(int(state.counters["transitions"].sum()))
        store, fresh = buffer.stored()  # which may have got streams
        in_flight = state.in_flight
        for segment in state.segments:
            read_segment(folder / segment.name, store, segment)
        finals = None
        if state.last_rows is not None:
            if state.has_final_obs:
                count = np.count_nonzero(in_flight)
                finals = {key: np.zeros((count, *column.shape[1:]), column.dtype) for key, column in store.obs.items()}
            read_segment(folder / IN_FLIGHT_FILE, store, state.last_rows, beside=_final_columns(finals))
        check_rows(folder, state, store)
        try:
            buffer.set_rng_state(state.sampler)
        except BufferError as error:
            raise damaged(folder / STATE_FILE, f"sampler is no state of a random stream ({error})") from error

        for name in COUNTERS:
            getattr(store, name)[:] = state.counters[name]
        fresh[:] = state.fresh
        if in_flight.any():
            store.close(np.flatnonzero(in_flight), finals)

        log = cls(buffer)
        log._folder, log._segments = folder, state.segments
        log._settled = state.counters["end"] - in_flight
        log._number = 1 + max((_number(segment) for segment in state.segments), default=-1)
        return log


def _final_columns(finals: Mapping[str, np.ndarray] | None) -> dict[str, np.ndarray]:
    """Observations after the last steps, by the names that they have in the file."""
    return {f"final_obs/{key}": array for key, array in (finals or {}).items()}


def _number(segment: Segment) -> int:
    match = SEGMENT_NAME.fullmatch(segment.name)
    assert match is not None, segment.name
    return int(match[1])
