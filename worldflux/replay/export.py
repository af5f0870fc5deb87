"""The `.npz` of `ReplayBuffer.save`: rows into a file, and a file, whoever wrote it, back into rows."""

from __future__ import annotations

import heapq
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from worldflux.errors import BufferError
from worldflux.files import writing
from worldflux.replay.actions import Classes, as_executed, declared_classes, described, judged_classes, rescaled
from worldflux.replay.backends import UNSEEN_AT
from worldflux.replay.npz import OTHER_NAMES, ArrayChunks, NpzFile, StoredArray, gathered, rows_per_chunk, write_npz
from worldflux.replay.ring import FINAL, FIRST, STEP, TERMINATED, TRUNCATED, UNKNOWN_TASK, UNSEEN, RingStorage
from worldflux.replay.spec import all_finite, check_tasks, checked, image_line, obs_shapes
from worldflux.validation import SINGLE_KEY, TASK_KEY

logger = logging.getLogger("worldflux.training")

_MOST_STREAMS = 2**20
"""More than anybody steps at once; each takes memory even while it is empty."""

_ROWS_AT_ONCE = 2**16
"""Rows that are stored at once without their observations."""

_LARGEST_OBS = 2**40
"""More numbers than anybody observes at once."""

_MOST_AXES = 64
"""Most axes that an array has in NumPy."""

_REQUIRED = ("actions", "rewards", "dones", "action_dim", "capacity")
_EPISODE_ARRAYS = ("episode_lengths", "episode_streams", "episode_starts", "episode_ends", "final_obs_mask", "n_envs")


def write_replay(
    path: str | Path, rows: RingStorage, capacity: int, is_dict: bool, action_classes: Classes | None
) -> None:
    """Writes all rows, but of their extras only the tasks, to exactly `path`, moved into place when it is complete.

    The schema is documented in `ReplayBuffer.save`. Observations are read as they are written.
    """
    at = rows.stored_at()
    step = at[(rows.flags[at] & FINAL) == 0]
    stream, begin, end = rows.episodes_at()
    first, last = rows.at(stream, begin), rows.at(stream, end - 1)
    ended = (rows.flags[last] & FINAL) != 0
    seen = ended & ((rows.flags[last] & UNSEEN) == 0)
    actions = rows.actions[step]
    arrays: dict[str, np.ndarray | ArrayChunks] = {}
    for key, obs in rows.obs.items():
        arrays[_member("obs", key, is_dict)] = gathered(obs, step)
        arrays[_member("final_obs", key, is_dict)] = gathered(obs, last, seen)
        arrays[_member("obs_shape", key, is_dict)] = np.array(obs.shape[1:], np.int64)
    arrays |= {
        "actions": actions,
        "rewards": rows.rewards[step],
        "dones": (rows.flags[step] & TERMINATED) != 0,
        "action_dim": np.array(actions.shape[1]),
        "capacity": np.array(capacity),
        "truncations": (rows.flags[step] & TRUNCATED) != 0,
        "episode_lengths": end - begin - ended,
        "episode_streams": stream,
        "episode_starts": (rows.flags[first] & FIRST) != 0,
        "episode_ends": ended,
        "final_obs_mask": seen,
        "n_envs": np.array(len(rows.base)),
    }
    classes = judged_classes(actions) if action_classes is None else action_classes
    tasks = rows.extras[TASK_KEY][step] if TASK_KEY in rows.extras else step[:0]
    if (tasks != UNKNOWN_TASK).any():
        arrays[TASK_KEY] = tasks
    if classes is not None:
        arrays["action_classes"] = np.array(classes, np.int64)
    with writing(path, BufferError):
        write_npz(path, arrays)


class ReplayFile:
    """What a buffer's file says: N transitions in S episodes, checked but for the observations, which are not read yet.

    Only the documented arrays need to be there: a file without the table of episodes is split at its dones, and then no
    observation after an episode's last step is known.

    Attributes:
        capacity: Transitions that the buffer kept at most.
        n_envs: Number of its streams.
        action_dim: Width of an action vector.
        is_dict: Whether observations are dictionaries; if not, `obs` has the one key `SINGLE_KEY`.
        obs: Observations by key. `[N, ...]` each
        lengths: Transitions of each episode. `[S]`
        streams: Stream of each episode. `[S]`
        action_classes: Sizes of the actions' one-hots; None where it cannot be told what kind they are.
        has_tasks: Whether it says of which task each transition is.

    Args:
        file: The file.
        action_type: What is known of the actions from elsewhere; see `ReplayBuffer.load`.
        action_classes: See `ReplayBuffer.load`.
        action_low: See `ReplayBuffer.load`.
        action_high: See `ReplayBuffer.load`.
        warn: Whether to log which arrays are not read.

    Raises:
        BufferError: If arrays are missing, unreadable, or do not agree with each other.
    """

    def __init__(
        self,
        file: NpzFile,
        action_type: str | None,
        action_classes: Sequence[int] | None,
        action_low: Any,
        action_high: Any,
        *,
        warn: bool = True,
    ) -> None:
        self._file = file
        self._skipped = self._skipped_episodes = 0
        keys = [name.removeprefix("obs/") for name in file.names if name.startswith("obs/")]
        self.is_dict = bool(keys) and "obs" not in file.names
        keys = keys if self.is_dict else [SINGLE_KEY]
        file.require(self._name(part, key) for part in ("obs", "obs_shape") for key in keys)
        file.require(_REQUIRED)

        self.capacity, self.action_dim = self._number("capacity"), self._number("action_dim")
        given = file.open("actions")
        if len(given.shape) != 2 or given.shape[1] != self.action_dim:
            raise self._wrong(
                f"actions have shape {given.shape}, expected [N, action_dim] with action_dim {self.action_dim}"
            )
        self._count = given.shape[0]
        self.obs: dict[str, StoredArray | _Pictures] = {key: self._obs_at(key) for key in keys}
        named = declared_classes(action_type, action_classes, self.action_dim)
        self._actions, self.action_classes = self._read_actions(given, named, action_low, action_high)
        self._rewards = self._column("rewards", np.float32)
        terminated, truncated = self._column("dones", np.bool_), np.zeros(self._count, np.bool_)
        limits = [name for name in ("truncations", "timeouts") if name in file.names]
        if len(limits) > 1:
            raise self._wrong("it has truncations and timeouts, which mean the same")
        if limits:
            truncated = self._column(limits[0], np.bool_)

        self._finals: dict[str, StoredArray] = {}
        self.lengths: np.ndarray
        if any(name in file.names for name in _EPISODE_ARRAYS):
            file.require(_EPISODE_ARRAYS)
            self.n_envs = self._number("n_envs")
            self._read_table(terminated | truncated)
            names = {key: self._name("final_obs", key) for key in keys}
            file.require(names.values())
            for key, name in names.items():
                self._finals[key] = file.open(name)
                if self._finals[key].shape != (len(self.lengths), *self.obs[key].shape[1:]):
                    raise self._wrong(f"{name} has shape {self._finals[key].shape}, expected one row per episode")
        else:
            for key, obs in self.obs.items():
                if len(obs.shape) == 4 and obs.dtype.kind == "f":
                    self.obs[key] = _Pictures.of(file, self._name("obs", key))
            if warn:
                self._warn_of_unread(keys)
            if self._count:  # what the file's end cuts off is an episode that goes on elsewhere
                truncated[-1] |= not terminated[-1]
            self.n_envs, self.lengths = 1, np.diff(np.flatnonzero(terminated | truncated), prepend=-1)
            self.streams = np.zeros(len(self.lengths), np.int64)
            self._starts = self._ends = np.ones(len(self.lengths), np.bool_)
            self._seen = ~self._ends
        self.has_tasks = TASK_KEY in file.names
        self._tasks = self._column(TASK_KEY, np.int64) if self.has_tasks else np.zeros(0, np.int64)
        try:
            check_tasks(TASK_KEY, self._tasks[self._tasks != UNKNOWN_TASK])
        except BufferError as error:
            raise self._wrong(str(error)) from error
        self._flags = STEP | terminated * TERMINATED | truncated * TRUNCATED
        self._places = {key: file.place_of(obs) for key, obs in self.obs.items() if isinstance(obs, StoredArray)}
        self._final_places = {key: file.place_of(final) for key, final in self._finals.items()}

    def __len__(self) -> int:
        return self._count

    @property
    def path(self) -> Path:
        """Path of the file."""
        return self._file.path

    @property
    def checksum(self) -> int:
        """`NpzFile.checksum` of the file."""
        return self._file.checksum

    def dtype_of(self, key: str) -> np.dtype | None:
        """The file's own choice between bytes and floats for observations; None leaves it to their shape."""
        dtype = self.obs[key].dtype
        return np.dtype(np.float32) if dtype.kind == "f" else dtype if dtype == np.uint8 else None

    def keep(self, first: int, end: int) -> None:
        """Leaves out all episodes but those from number `first` to `end - 1`; once."""
        steps = slice(int(self.lengths[:first].sum()), int(self.lengths[:end].sum()))
        self._skipped, self._skipped_episodes, self._count = steps.start, first, steps.stop - steps.start
        for name in ("_actions", "_rewards", "_flags", "_tasks"):
            setattr(self, name, getattr(self, name)[steps].copy())  # the others take no memory any more
        for name in ("lengths", "streams", "_starts", "_ends", "_seen"):
            setattr(self, name, getattr(self, name)[first:end])

    def fill(self, rows: RingStorage, streams: np.ndarray | None = None) -> None:
        """Stores the episodes; once.

        Args:
            rows: Rows to add them to; empty ones if the streams are those of the file. Observations are left out where
                the rows have no arrays for them.
            streams: Stream of each episode. Those in flight are then closed as truncated. None: as in the file. `[S]`

        Raises:
            BufferError: If an observation cannot be read or holds NaN, or the file has changed.
        """
        until, starts = np.cumsum(self.lengths), self._starts
        if streams is None:
            streams = self.streams
        else:
            self._flags[until[~self._ends] - 1] |= TRUNCATED
            # Where an episode's oldest rows are missing, another one may now lie in front of it.
            starts = np.ones(len(starts), np.bool_)
        rows.in_flight[streams[~starts]] = True  # their first step is no episode's first
        stream_of_step = np.repeat(streams, self.lengths)
        with NpzFile(self._file.path) as file:
            if file.checksum != self._file.checksum:
                raise BufferError(f"{file.path} was changed while it was read. Load it again.")
            all_obs = {key: self.obs[key].reopened(file) for key in rows.obs}
            all_finals = {key: self._finals[key].reopened(file) for key in rows.obs if key in self._finals}
            for array in all_obs.values():
                array.skip(self._skipped)
            for array in all_finals.values():
                array.skip(self._skipped_episodes)
            sizes = [rows_per_chunk(stored.shape[1:], stored.dtype) for stored in rows.obs.values()]
            size = min(sizes, default=_ROWS_AT_ONCE)
            for start in range(0, max(1, self._count), size):  # an array without rows is checked, too
                part = slice(start, min(start + size, self._count))
                episodes = slice(*np.searchsorted(until, (start, part.stop), side="right"))
                obs = {key: self._next(array, "obs", key, rows, part) for key, array in all_obs.items()}
                finals = {key: self._next(array, "final_obs", key, rows, episodes) for key, array in all_finals.items()}
                flags, ended = self._flags[part], self._flags[until[episodes] - 1] > STEP
                for stream in np.unique(stream_of_step[part]).tolist():
                    steps, ends = stream_of_step[part] == stream, (streams[episodes] == stream) & ended
                    rows.add_episodes(
                        stream,
                        {key: array[steps] for key, array in obs.items()},
                        self._actions[part][steps],
                        self._rewards[part][steps],
                        flags[steps],
                        {key: array[ends] for key, array in finals.items()},
                        self._seen[episodes][ends],
                        {TASK_KEY: self._tasks[part][steps]} if self.has_tasks else None,
                    )
        # Of many files, these are then in memory twice for one at a time.
        self._actions, self._rewards, self._flags, self._tasks = (
            np.zeros(0, a.dtype) for a in (self._actions, self._rewards, self._flags, self._tasks)
        )

    def places(self, key: str, dtype: np.dtype, row_bytes: int) -> tuple[np.ndarray, np.ndarray]:
        """Where observations are in the file, if they are there as `dtype`.

        Returns:
            The position of each episode's first observation, and of the one after its last step, which is `UNSEEN_AT`
            where that was not recorded. `[S]` each

        Raises:
            BufferError: If they are compressed or would have to be converted; it says what to do.
        """
        place, final_place = self._places.get(key), self._final_places.get(key)
        of_other_form = [array.dtype != dtype for array in (self.obs[key], self._finals.get(key)) if array is not None]
        if place is None or (key in self._final_places and final_place is None) or any(of_other_form):
            name = self._file.path.name
            raise BufferError(
                f"{self._file.path}: {self._name('obs', key)} can only be read in place if it is an uncompressed array "
                f"of {dtype} in C order, as ReplayBuffer.save writes it. Write the file again, "
                f"ReplayBuffer.load({name!r}).save({name!r}), or load it with storage='<directory>', which unpacks all "
                "data into files there for as long as the buffer exists."
            )
        begin = place + (self._skipped + np.cumsum(self.lengths) - self.lengths) * row_bytes
        final = np.full(len(begin), UNSEEN_AT)
        if final_place is not None:
            final[self._seen] = final_place + (self._skipped_episodes + np.flatnonzero(self._seen)) * row_bytes
        return begin, final

    def _next(self, array: StoredArray | _Pictures, part: str, key: str, rows: RingStorage, at: slice) -> np.ndarray:
        """The next rows of observations, as they are stored."""
        stored, name, count = rows.obs[key], self._name(part, key), at.stop - at.start
        before = self._skipped if part == "obs" else self._skipped_episodes
        place = name if count == array.shape[0] else f"{name}[{before + at.start}:{before + at.stop}]"
        given = array.take(count)
        return checked(
            f"{self._file.path.name}: {place}", given, (count, *stored.shape[1:]), stored.dtype, in_time=True
        )

    def _obs_at(self, key: str) -> StoredArray:
        name, shape_name = self._name("obs", key), self._name("obs_shape", key)
        obs, said = self._file.open(name), tuple(self._small(shape_name).reshape(-1).tolist())
        if obs.shape != (self._count, *said):
            raise self._wrong(
                f"{name} has shape {obs.shape}, but there are {self._count} actions and {shape_name} is {said}"
            )
        try:
            obs_shapes({key: obs.shape[1:]})
        except ValueError as error:
            raise self._wrong(str(error)) from error
        if math.prod(said) > _LARGEST_OBS:  # which take no bytes where there are no rows
            raise self._wrong(f"{shape_name} is {said}, expected at most {_LARGEST_OBS:,} numbers in an observation")
        return obs

    def _read_actions(
        self, stored: StoredArray, named: Classes | None, low: Any, high: Any
    ) -> tuple[np.ndarray, Classes | None]:
        """The actions `[N, A]`, and their kind: as the file says it, as the caller does, or as they look."""
        file, classes, is_saved = self._file, named, "episode_lengths" in self._file.names
        if "action_classes" in file.names:
            classes = tuple(self._small("action_classes").reshape(-1).tolist())
            if classes and (min(classes) < 1 or sum(classes) != stored.shape[1]):
                raise self._wrong(f"action_classes is {classes}, expected sizes that add up to {stored.shape[1]}")
            if named not in (None, classes):
                raise BufferError(
                    f"{file.path.name} holds actions with {described(classes)}, and {described(named or ())} was asked "
                    "for. Leave it out."
                )
            if low is not None and is_saved:
                raise BufferError(
                    f"{file.path.name} is of ReplayBuffer.save, and its actions were rescaled already: they are "
                    f"{described(classes)}. Leave action_low and action_high out."
                )
        given = stored.take()
        actions = self._checked("actions", rescaled(given, low, high), stored.shape, np.float32)
        if not is_saved:  # a buffer that was saved holds what it was given
            actions = as_executed(f"{file.path.name}: actions", given, actions, classes)
        return actions, judged_classes(actions) if classes is None else classes

    def _read_table(self, ended: np.ndarray) -> None:
        """Reads the table of episodes, of which every step is known to end one or not."""
        if self.n_envs > min(self.capacity, _MOST_STREAMS):
            raise self._wrong(
                f"n_envs is {self.n_envs}, expected at most capacity ({self.capacity}) and {_MOST_STREAMS}"
            )
        count = self._file.open("episode_lengths").shape
        if len(count) != 1 or count[0] > len(ended):
            raise self._wrong(
                f"episode_lengths has shape {count}, expected one number for each of 0 to {len(ended)} episodes"
            )
        lengths = self.lengths = self._column("episode_lengths", np.int64, count)
        streams = self.streams = self._column("episode_streams", np.int64, count)
        starts = self._starts = self._column("episode_starts", np.bool_, count)
        ends = self._ends = self._column("episode_ends", np.bool_, count)
        self._seen = self._column("final_obs_mask", np.bool_, count)
        # Each length is bounded before they are added up, so that the sum cannot wrap around to the right number.
        if (lengths < 1).any() or (lengths > len(ended)).any() or sum(lengths.tolist()) != len(ended):
            raise self._wrong(
                f"episode_lengths add up to {sum(lengths.tolist())}, expected numbers from 1 that add up to the "
                f"{len(ended)} transitions"
            )
        if ((streams < 0) | (streams >= self.n_envs)).any():
            raise self._wrong(f"episode_streams has numbers outside of 0 to n_envs - 1 ({self.n_envs - 1})")
        expected = np.zeros(len(ended), np.bool_)
        expected[np.cumsum(lengths)[ends] - 1] = True
        if not np.array_equal(expected, ended):
            raise self._wrong("dones and truncations do not lie at the ends of the episodes")
        by_stream = np.argsort(streams, kind="stable")
        same = np.diff(streams[by_stream]) == 0
        if (same & ~ends[by_stream][:-1]).any() or (same & ~starts[by_stream][1:]).any():
            raise self._wrong("an episode goes on although another one follows it in its stream")
        if (self._seen & ~ends).any():
            raise self._wrong("final_obs_mask is set for an episode in flight")

    def _warn_of_unread(self, keys: list[str]) -> None:
        """Says which arrays nobody reads, and how they might have been meant."""
        known = {*_REQUIRED, "truncations", "timeouts", "action_classes", TASK_KEY}
        known |= {self._name(part, key) for part in ("obs", "obs_shape") for key in keys}
        unread = [name for name in self._file.names if name not in known]
        if unread:
            hints = [f"{name} (did you mean {OTHER_NAMES[name]}?)" if name in OTHER_NAMES else name for name in unread]
            logger.warning(
                "%s has arrays that are not read: %s. See ReplayBuffer.save for the schema.",
                self._file.path.name,
                ", ".join(hints),
            )

    def _column(self, name: str, dtype: type, shape: tuple[int, ...] | None = None) -> np.ndarray:
        """An array with a number for each transition, or of another shape."""
        found, shape = self._file.open(name), (self._count,) if shape is None else shape
        if found.shape != shape:  # before it is read: nobody knows how large it is
            raise self._wrong(f"{name} has shape {found.shape}, expected {shape}")
        return self._checked(name, found.take(), shape, dtype)

    def _checked(self, name: str, array: np.ndarray, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        if dtype is np.int64 and array.dtype.kind not in "iu":
            raise self._wrong(f"{name} has dtype {array.dtype}, expected whole numbers")
        try:
            # A copy, because what is read from a file cannot be written to.
            return checked(name, array, shape, np.dtype(dtype), in_time=True).copy()
        except ValueError as error:
            raise self._wrong(str(error)) from error

    def _small(self, name: str) -> np.ndarray:
        """An array of a few numbers, of which a file cannot make many."""
        array = self._file.open(name)
        if math.prod(array.shape) > _MOST_AXES:
            raise self._wrong(f"{name} has shape {array.shape}, expected at most {_MOST_AXES} numbers")
        return array.take()

    def _number(self, name: str) -> int:
        value = self._small(name)
        if value.size != 1 or value.dtype.kind not in "iu" or not 1 <= int(value.reshape(())) < 2**62:
            raise self._wrong(f"{name} is {value}, expected a whole number of at least 1")
        return int(value.reshape(()))

    def _name(self, part: str, key: str) -> str:
        return _member(part, key, self.is_dict)

    def _wrong(self, what: str) -> BufferError:
        return BufferError(f"{self._file.path.name}: {what.rstrip('.')}. See ReplayBuffer.save for the schema.")


class _Pictures:
    """Images that a file has as floats, read as bytes: floats from 0 to 1, or the whole numbers from 0 to 255.

    Raises:
        BufferError: If they are something else, with the line to write.
    """

    dtype = np.dtype(np.uint8)

    def __init__(self, array: StoredArray, factor: float) -> None:
        self.shape, self._array, self._factor = array.shape, array, factor

    @classmethod
    def of(cls, file: NpzFile, name: str) -> _Pictures:
        """Looks at all of them."""
        array = file.open(name)
        low, high, is_whole = 0.0, 0.0, True
        step = rows_per_chunk(array.shape[1:], array.dtype)
        for _ in range(0, array.shape[0], step):
            chunk = array.take(step)
            if all_finite(chunk):  # if not, whoever stores it says where
                low, high = min(low, float(chunk.min())), max(high, float(chunk.max()))
                is_whole = is_whole and bool((chunk == np.rint(chunk)).all())
        if low < 0 or high > 255 or (high > 1 and not is_whole):
            raise BufferError(
                f"{file.path.name}: {name} are images as floats from {low:g} to {high:g}, expected 0 to 1, or whole "
                f"numbers from 0 to 255. Write them as bytes: {image_line(low, high, is_whole)}"
            )
        return cls(array, 255.0 if high <= 1 else 1.0)

    def reopened(self, file: NpzFile) -> _Pictures:
        """The same images, from the beginning."""
        return _Pictures(self._array.reopened(file), self._factor)

    def skip(self, count: int) -> None:
        """Passes over the next `count` images."""
        self._array.skip(count)

    def take(self, count: int) -> np.ndarray:
        """The next `count` images. `[count, C, H, W]`"""
        images = self._array.take(count)
        return np.rint(images * self._factor).astype(np.uint8) if all_finite(images) else images


def shared_out(lengths: np.ndarray, n_envs: int) -> np.ndarray:
    """The stream of each episode: always the one with the fewest transitions so far. `[S]`"""
    filled = [(0, stream) for stream in range(n_envs)]
    streams = np.zeros(len(lengths), np.int64)
    for episode, length in enumerate(lengths.tolist() if n_envs > 1 else ()):
        count, stream = heapq.heappop(filled)
        streams[episode] = stream
        heapq.heappush(filled, (count + length, stream))
    return streams


def _member(name: str, key: str, is_dict: bool) -> str:
    return f"{name}/{key}" if is_dict else name
