"""The `.npz` of `ReplayBuffer.save`: what it says of the rows, whether its arrays agree, and back into rows."""

from __future__ import annotations

import heapq
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from worldflux.errors import BufferError
from worldflux.files import writing
from worldflux.replay.actions import Classes, as_executed, declared_classes, described, judged_classes, rescaled
from worldflux.replay.backends import RowArray
from worldflux.replay.npz import OTHER_NAMES, ArrayChunks, NpzFile, rows_per_chunk, write_npz
from worldflux.replay.ring import FINAL, FIRST, TERMINATED, TRUNCATED, UNSEEN, RingStorage
from worldflux.replay.spec import SINGLE, all_finite, checked, image_line, obs_shapes

logger = logging.getLogger("worldflux.training")

_MOST_STREAMS = 2**20
"""More than anybody steps at once; each takes memory even while it is empty."""

_MOST_AXES = 64
"""Of an array, in NumPy."""

_EPISODE_ARRAYS = ("episode_lengths", "episode_streams", "episode_starts", "episode_ends", "final_obs_mask", "n_envs")


@dataclass(frozen=True)
class Episodes:
    """S episodes, whole or in part, one after another; those of one stream in their order."""

    lengths: np.ndarray
    """Transitions. `[S]` int64"""
    streams: np.ndarray
    """The environment they come from. `[S]` int64"""
    starts: np.ndarray
    """False where the oldest rows are missing. `[S]` bool"""
    ends: np.ndarray
    """False where the episode is in flight. `[S]` bool"""
    final_mask: np.ndarray
    """False where the observation after the last step was not recorded. `[S]` bool"""


@dataclass(frozen=True)
class FileActions:
    """What is known of a file's actions from elsewhere; see `ReplayBuffer.load`."""

    action_type: str | None
    action_classes: Sequence[int] | None
    low: Any
    high: Any

    def read(self, file: NpzFile, shape: tuple[int, int]) -> tuple[np.ndarray, Classes | None]:
        """The actions `[N, A]`, and their kind: as the file says it, as somebody else does, or as they look."""
        named = declared_classes(self.action_type, self.action_classes, shape[1])
        classes = named
        if "action_classes" in file.names:
            classes = tuple(_small(file, "action_classes").reshape(-1).tolist())
            if classes and (min(classes) < 1 or sum(classes) != shape[1]):
                raise _wrong(file, f"action_classes is {classes}, expected sizes that add up to {shape[1]}")
            if named not in (None, classes):
                raise BufferError(
                    f"{file.path.name} holds actions with {described(classes)}, and {described(named or ())} was asked "
                    "for. Leave it out."
                )
            if self.low is not None and "episode_lengths" in file.names:
                raise BufferError(
                    f"{file.path.name} is of ReplayBuffer.save, and its actions were rescaled already: they are "
                    f"{described(classes)}. Leave action_low and action_high out."
                )
        given = file.read("actions")
        actions = _checked(file, "actions", rescaled(given, self.low, self.high), shape, np.float32)
        if "episode_lengths" not in file.names:  # a buffer that was saved holds what it was given
            actions = as_executed(f"{file.path.name}: actions", given, actions, classes)
        return actions, judged_classes(actions) if classes is None else classes


@dataclass(frozen=True)
class ReplayData:
    """What a buffer's file says: N transitions in S episodes."""

    capacity: int
    n_envs: int
    is_dict: bool
    """Whether observations are dictionaries; if not, `obs` has the one key `SINGLE`."""
    obs: dict[str, ArrayChunks]
    """`[N, ...]` each"""
    final_obs: dict[str, ArrayChunks]
    """`[S, ...]` each; empty if the file has none"""
    actions: np.ndarray
    """`[N, A]` float32"""
    rewards: np.ndarray
    """`[N]` float32"""
    terminations: np.ndarray
    """`[N]` bool"""
    truncations: np.ndarray
    """`[N]` bool"""
    episodes: Episodes
    action_classes: Classes | None = None
    """Sizes of the actions' one-hots; None where the file does not say what kind they are."""

    @property
    def action_dim(self) -> int:
        """Width of an action vector."""
        return self.actions.shape[1]


def write_replay(path: str | Path, data: ReplayData) -> None:
    """Writes exactly `path`, moved into place when it is complete. The schema stands in `ReplayBuffer.save`."""
    arrays: dict[str, np.ndarray | ArrayChunks] = {}
    for key, obs in data.obs.items():
        arrays[_member("obs", key, data.is_dict)] = obs
        arrays[_member("final_obs", key, data.is_dict)] = data.final_obs[key]
        arrays[_member("obs_shape", key, data.is_dict)] = np.array(obs.shape[1:], np.int64)
    arrays |= {
        "actions": data.actions,
        "rewards": data.rewards,
        "dones": data.terminations,
        "action_dim": np.array(data.action_dim),
        "capacity": np.array(data.capacity),
        "truncations": data.truncations,
        "episode_lengths": data.episodes.lengths,
        "episode_streams": data.episodes.streams,
        "episode_starts": data.episodes.starts,
        "episode_ends": data.episodes.ends,
        "final_obs_mask": data.episodes.final_mask,
        "n_envs": np.array(data.n_envs),
    }
    classes = judged_classes(data.actions) if data.action_classes is None else data.action_classes
    if classes is not None:
        arrays["action_classes"] = np.array(classes, np.int64)
    with writing(path, BufferError):
        write_npz(path, arrays)


def read_replay(file: NpzFile, reader: FileActions) -> ReplayData:
    """What `file` says, checked but for the observations' values, which are not read yet.

    Of the arrays only the documented ones need to be there: a file without the episodes' table is split at its
    dones, and then no observation after an episode's last step is known.

    Args:
        file: The file.
        reader: What is known of its actions.

    Raises:
        BufferError: If arrays are missing, unreadable, or do not agree with each other.
    """
    keys = [name.removeprefix("obs/") for name in file.names if name.startswith("obs/")]
    is_dict = bool(keys) and "obs" not in file.names
    keys = keys if is_dict else [SINGLE]
    file.require(_member(part, key, is_dict) for part in ("obs", "obs_shape") for key in keys)
    file.require(("actions", "rewards", "dones", "action_dim", "capacity"))

    capacity, action_dim = _number(file, "capacity"), _number(file, "action_dim")
    shape = file.stream("actions").shape
    if len(shape) != 2 or shape[1] != action_dim:
        raise _wrong(file, f"actions have shape {shape}, expected [N, action_dim] with action_dim {action_dim}")
    count = shape[0]
    obs = {}
    for key in keys:
        name, shape_name = _member("obs", key, is_dict), _member("obs_shape", key, is_dict)
        obs[key] = file.stream(name)
        said = tuple(_small(file, shape_name).reshape(-1).tolist())
        if obs[key].shape != (count, *said):
            raise _wrong(
                file, f"{name} has shape {obs[key].shape}, but there are {count} actions and {shape_name} is {said}"
            )
        try:
            obs_shapes({key: obs[key].shape[1:]})
        except ValueError as error:
            raise _wrong(file, str(error).rstrip(".")) from error

    actions, action_classes = reader.read(file, (count, action_dim))
    rewards = _column(file, "rewards", (count,), np.float32)
    terminations = _column(file, "dones", (count,), np.bool_)
    truncations = np.zeros(count, np.bool_)
    named = [name for name in ("truncations", "timeouts") if name in file.names]
    if len(named) > 1:
        raise _wrong(file, "it has truncations and timeouts, which mean the same")
    if named:
        truncations = _column(file, named[0], (count,), np.bool_)
    if any(name in file.names for name in _EPISODE_ARRAYS):
        file.require(_EPISODE_ARRAYS)
        n_envs = _number(file, "n_envs")
        if n_envs > min(capacity, _MOST_STREAMS):
            raise _wrong(file, f"n_envs is {n_envs}, expected at most capacity ({capacity}) and {_MOST_STREAMS}")
        episodes = _read_episodes(file, terminations | truncations, n_envs)
        names = {key: _member("final_obs", key, is_dict) for key in keys}
        file.require(names.values())
        final_obs = {key: file.stream(name) for key, name in names.items()}
        for key, name in names.items():
            if final_obs[key].shape != (len(episodes.lengths), *obs[key].shape[1:]):
                raise _wrong(file, f"{name} has shape {final_obs[key].shape}, expected one row per episode")
    else:
        n_envs, final_obs = 1, {}
        for key, stream in obs.items():
            if len(stream.shape) == 4 and stream.dtype.kind == "f":
                obs[key] = _as_bytes(file, _member("obs", key, is_dict))
        _warn_of_unread(file, keys, is_dict)
        if count:  # what the file's end cuts off is an episode that goes on elsewhere
            truncations[-1] |= not terminations[-1]
        episodes = _split(terminations | truncations)
    return ReplayData(
        capacity,
        n_envs,
        is_dict,
        obs,
        final_obs,
        actions,
        rewards,
        terminations,
        truncations,
        episodes,
        action_classes,
    )


def _as_bytes(file: NpzFile, name: str) -> ArrayChunks:
    """Images `[N, C, H, W]` that a file has as floats: 0 to 1, or the whole numbers from 0 to 255.

    Raises:
        BufferError: If they are something else, with the line to write.
    """
    low, high, whole = 0.0, 0.0, True
    for chunk in file.stream(name).chunks:
        if chunk.size and all_finite(chunk):  # if not, whoever copies it says where
            low, high = min(low, float(chunk.min())), max(high, float(chunk.max()))
            whole = whole and bool((chunk == np.rint(chunk)).all())
    if low < 0 or high > 255 or (high > 1 and not whole):
        raise BufferError(
            f"{file.path.name}: {name} are images as floats from {low:g} to {high:g}, expected 0 to 1, or whole "
            f"numbers from 0 to 255. Write them as bytes: {image_line(low, high, whole)}"
        )
    factor = 255.0 if high <= 1 else 1.0
    stream = file.stream(name)
    chunks = (np.rint(chunk * factor).astype(np.uint8) if all_finite(chunk) else chunk for chunk in stream.chunks)
    return ArrayChunks(stream.shape, np.dtype(np.uint8), chunks)


def _warn_of_unread(file: NpzFile, keys: list[str], is_dict: bool) -> None:
    """Says which arrays of a file nobody reads, and how they might have been meant."""
    known = {"actions", "rewards", "dones", "action_dim", "capacity", "truncations", "timeouts", "action_classes"}
    known |= {_member(part, key, is_dict) for part in ("obs", "obs_shape") for key in keys}
    unread = [name for name in file.names if name not in known]
    if unread:
        hints = [f"{name} (did you mean {OTHER_NAMES[name]}?)" if name in OTHER_NAMES else name for name in unread]
        logger.warning(
            "%s has arrays that are not read: %s. See ReplayBuffer.save for the schema.",
            file.path.name,
            ", ".join(hints),
        )


def collect_data(rows: RingStorage, capacity: int, is_dict: bool, action_classes: Classes | None) -> ReplayData:
    """Everything that `rows` holds but the extras; the observations are read when the file is written."""
    steps, firsts, lasts, lengths, streams = [], [], [], [], []
    for stream in range(len(rows.base)):
        at = rows.at(stream, np.arange(rows.begin[stream], rows.end[stream]))
        is_final = (rows.flags[at] & FINAL) != 0
        is_first = (rows.flags[at] & FIRST) != 0
        is_first[:1] = True  # also where the oldest episode has lost its first rows
        first = np.flatnonzero(is_first)
        last = np.append(first[1:], len(at))[: len(first)] - 1
        steps.append(at[~is_final])
        firsts.append(at[first])
        lasts.append(at[last])
        lengths.append(last - first + 1 - is_final[last])
        streams.append(np.full(len(first), stream))
    step, first, last = np.concatenate(steps), np.concatenate(firsts), np.concatenate(lasts)
    ends = (rows.flags[last] & FINAL) != 0
    seen = ends & ((rows.flags[last] & UNSEEN) == 0)
    return ReplayData(
        capacity=capacity,
        n_envs=len(rows.base),
        is_dict=is_dict,
        obs={key: _gathered(stored, step) for key, stored in rows.obs.items()},
        final_obs={key: _gathered(stored, last, seen) for key, stored in rows.obs.items()},
        actions=rows.actions[step],
        rewards=rows.rewards[step],
        terminations=(rows.flags[step] & TERMINATED) != 0,
        truncations=(rows.flags[step] & TRUNCATED) != 0,
        episodes=Episodes(
            lengths=np.concatenate(lengths).astype(np.int64),
            streams=np.concatenate(streams).astype(np.int64),
            starts=(rows.flags[first] & FIRST) != 0,
            ends=ends,
            final_mask=seen,
        ),
        action_classes=action_classes,
    )


def fill(rows: RingStorage, data: ReplayData, file_name: str) -> None:
    """Stores a file's episodes in `rows`, which are empty.

    Where the file has another number of streams, episodes are shared out, and those in flight are closed as truncated.

    Raises:
        BufferError: If an observation cannot be read or holds NaN.
    """
    episodes, truncations = data.episodes, data.truncations
    lengths, streams, starts, ends = episodes.lengths, episodes.streams, episodes.starts, episodes.ends
    if len(rows.base) != data.n_envs:
        streams = _shared_out(lengths, len(rows.base))
        truncations[np.cumsum(lengths)[~ends] - 1] = True
        # Where an episode's oldest rows are missing, another one may now lie in front of it.
        starts = ends = np.ones(len(lengths), np.bool_)
    begin = np.cumsum(lengths) - lengths
    step_at = np.full(len(data.rewards), -1)  # where each transition goes; -1: nowhere, it is too old
    final_at = np.full(len(lengths), -1)
    for stream in np.unique(streams).tolist():
        mine = np.flatnonzero(streams == stream)
        place = rows.reserve(stream, lengths[mine], starts=starts[mine], ends=ends[mine])
        offset = np.cumsum(lengths[mine]) - lengths[mine]
        steps = np.repeat(begin[mine] - offset, lengths[mine]) + np.arange(lengths[mine].sum())
        kept = steps[place.skipped :]
        rows.write_steps(place, kept, data.actions, data.rewards, data.terminations, truncations)
        rows.write_finals(place.finals, None)
        step_at[kept] = place.steps
        ended = mine[ends[mine]]
        final_at[ended[len(ended) - len(place.finals) :]] = place.finals
        rows.commit(stream, place)
    final_at[~episodes.final_mask] = -1
    for key, stored in rows.obs.items():
        _copy(f"{file_name}: {_member('obs', key, data.is_dict)}", data.obs[key], stored, step_at)
        if data.final_obs:
            _copy(f"{file_name}: {_member('final_obs', key, data.is_dict)}", data.final_obs[key], stored, final_at)
    rows.flags[final_at[final_at >= 0]] &= ~UNSEEN


def dtype_in_memory(obs: ArrayChunks) -> np.dtype | None:
    """A file's own choice between bytes and floats; None leaves it to the shape."""
    if obs.dtype == np.uint8:
        return np.dtype(np.uint8)
    return np.dtype(np.float32) if obs.dtype.kind == "f" else None


def _copy(name: str, source: ArrayChunks, stored: RowArray, at: np.ndarray) -> None:
    """Checks all of `source` and copies its rows to `stored[at]`, but those where `at` is -1."""
    start = 0
    for chunk in source.chunks:
        to = at[start : start + len(chunk)]
        place = name if len(chunk) == len(at) else f"{name}[{start}:{start + len(chunk)}]"
        array = checked(place, chunk, (len(chunk), *stored.shape[1:]), stored.dtype)
        stored[to[to >= 0]] = array[to >= 0]
        start += len(chunk)


def _gathered(stored: RowArray, at: np.ndarray, mask: np.ndarray | None = None) -> ArrayChunks:
    """Rows `at` of an array in chunks, zero where `mask` is False."""

    def chunks() -> Iterator[np.ndarray]:
        step = rows_per_chunk(stored.shape[1:], stored.dtype)
        for start in range(0, len(at), step):
            chunk = stored[at[start : start + step]]
            if mask is not None:
                chunk[~mask[start : start + step]] = 0
            yield chunk

    return ArrayChunks((len(at), *stored.shape[1:]), stored.dtype, chunks())


def _shared_out(lengths: np.ndarray, n_envs: int) -> np.ndarray:
    """The stream of each episode: always the one with the fewest transitions so far. `[S]`."""
    filled = [(0, stream) for stream in range(n_envs)]
    streams = np.zeros(len(lengths), np.int64)
    for episode, length in enumerate(lengths.tolist()):
        count, stream = heapq.heappop(filled)
        streams[episode] = stream
        heapq.heappush(filled, (count + length, stream))
    return streams


def _read_episodes(file: NpzFile, ended: np.ndarray, n_envs: int) -> Episodes:
    count = file.stream("episode_lengths").shape
    if len(count) != 1 or count[0] > len(ended):
        raise _wrong(
            file, f"episode_lengths has shape {count}, expected one number for each of 0 to {len(ended)} episodes"
        )
    lengths = _column(file, "episode_lengths", count, np.int64)
    streams = _column(file, "episode_streams", count, np.int64)
    starts = _column(file, "episode_starts", count, np.bool_)
    ends = _column(file, "episode_ends", count, np.bool_)
    final_mask = _column(file, "final_obs_mask", count, np.bool_)
    # Each length is bounded before they are added up, so that the sum cannot wrap around to the right number.
    if (lengths < 1).any() or (lengths > len(ended)).any() or sum(lengths.tolist()) != len(ended):
        raise _wrong(
            file,
            f"episode_lengths add up to {sum(lengths.tolist())}, expected numbers from 1 that add up to the "
            f"{len(ended)} transitions",
        )
    if ((streams < 0) | (streams >= n_envs)).any():
        raise _wrong(file, f"episode_streams has numbers outside of 0 to n_envs - 1 ({n_envs - 1})")
    expected = np.zeros(len(ended), np.bool_)
    expected[np.cumsum(lengths)[ends] - 1] = True
    if not np.array_equal(expected, ended):
        raise _wrong(file, "dones and truncations do not lie at the ends of the episodes")
    by_stream = np.argsort(streams, kind="stable")
    same = np.diff(streams[by_stream]) == 0
    if (same & ~ends[by_stream][:-1]).any() or (same & ~starts[by_stream][1:]).any():
        raise _wrong(file, "an episode goes on although another one follows it in its stream")
    if (final_mask & ~ends).any():
        raise _wrong(file, "final_obs_mask is set for an episode in flight")
    return Episodes(lengths, streams, starts, ends, final_mask)


def _split(ended: np.ndarray) -> Episodes:
    lengths = np.diff(np.flatnonzero(ended), prepend=-1)
    always = np.ones(len(lengths), np.bool_)
    return Episodes(lengths, np.zeros(len(lengths), np.int64), always, always, ~always)


def _column(file: NpzFile, name: str, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    found = file.stream(name)
    if found.shape != shape:  # before it is read: nobody knows how large it is
        raise _wrong(file, f"{name} has shape {found.shape}, expected {shape}")
    return _checked(file, name, file.read(name), shape, dtype)


def _checked(file: NpzFile, name: str, array: np.ndarray, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    if dtype is np.int64 and array.dtype.kind not in "iu":
        raise _wrong(file, f"{name} has dtype {array.dtype}, expected whole numbers")
    try:
        # A copy, because what is read from a file cannot be written to.
        return checked(name, array, shape, np.dtype(dtype)).copy()
    except ValueError as error:
        raise _wrong(file, str(error).rstrip(".")) from error


def _small(file: NpzFile, name: str) -> np.ndarray:
    """An array of a few numbers, of which a file cannot make many."""
    shape = file.stream(name).shape
    if math.prod(shape) > _MOST_AXES:
        raise _wrong(file, f"{name} has shape {shape}, expected at most {_MOST_AXES} numbers")
    return file.read(name)


def _number(file: NpzFile, name: str) -> int:
    value = _small(file, name)
    if value.size != 1 or value.dtype.kind not in "iu" or not 1 <= int(value.reshape(())) < 2**62:
        raise _wrong(file, f"{name} is {value}, expected a whole number of at least 1")
    return int(value.reshape(()))


def _member(name: str, key: str, is_dict: bool) -> str:
    return f"{name}/{key}" if is_dict else name


def _wrong(file: NpzFile, what: str) -> BufferError:
    return BufferError(f"{file.path.name}: {what}. See ReplayBuffer.save for the schema.")
