"""A file, or a directory of files, as one recording, of which each rank of a training can read a part."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from worldflux.accel import ranks
from worldflux.errors import BufferError
from worldflux.replay.actions import Classes, described
from worldflux.replay.backends import FileRows, RecordedFiles, RowArray
from worldflux.replay.export import ReplayFile, shared_out
from worldflux.replay.npz import NpzFile, npz_files
from worldflux.replay.ring import RingStorage
from worldflux.replay.spec import obs_dtypes

_BALANCED = 1.05
"""Largest share of a rank, relative to that of an equal division, with which files are not divided."""


class ReplayFiles:
    """Episodes in one or several files, checked but for the observations, which are not read yet.

    A single file keeps the streams of its environments. The episodes of several files follow one another in a single
    stream, in the order of the files' names; none goes on from one file to the next.

    Attributes:
        capacity: Transitions that a buffer keeps by default.
        least_capacity: The smallest capacity of a buffer that keeps everything.
        n_envs: Number of streams.
        is_dict: Whether observations are dictionaries.
        shapes: Shape of each observation, by key.
        obs_dtype: Dtype of each observation, by key; None leaves it to the shape.
        action_dim: Width of an action vector.
        action_classes: Sizes of the actions' one-hots; None where it cannot be told what kind they are.
        has_tasks: Whether they say of which task each transition is.

    Args:
        path: The file, or a directory of `.npz` files.
        sharded: Whether to read only the part of this rank. All ranks make this call together.
        n_envs: Another number of streams.
        **actions: What is known of the actions from elsewhere, as for `ReplayFile`.

    Raises:
        FileNotFoundError: If there is no such file.
        BufferError: If a file is damaged, files do not fit together, there are fewer episodes than ranks, or the ranks
            have different files.
    """

    def __init__(self, path: Path, *, sharded: bool, n_envs: int | None, **actions: Any) -> None:
        self._paths = npz_files(path)
        read = partial(_read_all, self._paths, actions)
        self._digest: str | None = None
        chosen: list[list[int]] | None = None
        if sharded:
            ranks.join()
            survey = ranks.on_first(partial(_survey, path, read, repr(actions)))
            self._digest = survey["digest"]
            if ranks.size() > 1:
                names = [file.name for file in self._paths] if path.is_dir() else []
                same = ranks.every(names == survey["names"])
                if not all(same):
                    raise _other_copy(path, same.index(False))
                chosen = shares(path, survey["lengths"], ranks.size())[ranks.rank()]
        self._files = read(chosen)
        if chosen is not None and any(f.checksum != survey["checksums"][n] for n, f in self._files.items()):
            raise _other_copy(path, ranks.rank())
        first = next(iter(self._files.values()))
        self.is_dict, self.action_dim, self.action_classes = first.is_dict, first.action_dim, first.action_classes
        self.has_tasks = first.has_tasks
        self.shapes = {key: obs.shape[1:] for key, obs in first.obs.items()}
        self.obs_dtype = {key: first.dtype_of(key) for key in first.obs}
        self._lengths = np.concatenate([file.lengths for file in self._files.values()])

        self._streams: np.ndarray | None = None  # of each episode; None: as the file says
        if path.is_dir() or chosen is not None or n_envs not in (None, first.n_envs):
            self.n_envs = 1 if n_envs is None else n_envs
            self._streams = shared_out(self._lengths, self.n_envs)
        else:
            self.n_envs = first.n_envs
        streams = first.streams if self._streams is None else self._streams
        rows = np.bincount(streams, self._lengths + 1, minlength=self.n_envs)  # each with a last observation
        self.least_capacity = max(1, int(rows.max())) * self.n_envs
        is_one = not path.is_dir() and chosen is None
        self.capacity = first.capacity if is_one else self.least_capacity

    def __len__(self) -> int:
        return int(self._lengths.sum())

    def fill(self, rows: RingStorage) -> None:
        """Stores all episodes in empty rows, once; without observations where the rows have no arrays for them.

        Raises:
            BufferError: If an observation cannot be read or holds NaN.
        """
        start = 0
        for file in self._files.values():
            end = start + len(file.lengths)
            file.fill(rows, None if self._streams is None else self._streams[start:end])
            start = end
        if self._digest is not None:
            rows.data = rows.bounds, self._digest

    def in_place(self, rows: RingStorage) -> dict[str, RowArray]:
        """The observations of filled rows, in the files.

        Raises:
            BufferError: If the observations of a file cannot be read there as they are.
        """
        numbers = list(self._files)
        files = RecordedFiles([self._paths[number] for number in numbers])
        dtypes = obs_dtypes(self.obs_dtype, self.shapes)
        stream, first, _ = rows.episodes_at()
        counts = [len(file.lengths) for file in self._files.values()]
        file_of_episode = np.repeat(np.arange(len(numbers)), counts)
        streams = next(iter(self._files.values())).streams if self._streams is None else self._streams
        order = np.argsort(streams, kind="stable")  # of the rows
        obs: dict[str, RowArray] = {}
        for key, shape in self.shapes.items():
            row_bytes = int(np.prod(shape)) * dtypes[key].itemsize
            found = [file.places(key, dtypes[key], row_bytes) for file in self._files.values()]
            begin, final = (np.concatenate(part)[order] for part in zip(*found, strict=True))
            obs[key] = FileRows(
                files,
                (len(rows.flags), *shape),
                dtypes[key],
                rows.at(stream, first),
                self._lengths[order],
                file_of_episode[order],
                begin,
                final,
            )
        return obs


def shares(path: Path, lengths: list[list[int]], count: int) -> list[list[list[int]]]:
    """Divides the episodes of files into parts of about as many transitions, each of them of consecutive episodes.

    Where the parts are almost equal if no file is divided, none is.

    Args:
        path: The files' path, for messages.
        lengths: Transitions of each episode, for each file.
        count: Number of the parts.

    Returns:
        For each part, the number of each of its files, with the first of its episodes and the one after the last.

    Raises:
        BufferError: If there are too few episodes for every part to have one.
    """
    of_file = np.repeat(np.arange(len(lengths)), [len(one) for one in lengths])
    all_lengths = np.array([length for one in lengths for length in one], np.int64)
    until = np.cumsum(all_lengths)
    last_of_file = np.flatnonzero(np.append(of_file[1:] != of_file[:-1], True)) if len(until) else until
    bounds, largest = _bounds(until, last_of_file, count)
    if largest > _BALANCED:
        bounds, _ = _bounds(until, np.arange(len(until)), count)
    if (np.diff(bounds) < 1).any():
        raise BufferError(
            f"{path} has {len(until)} episodes of {int(all_lengths.sum())} transitions, which cannot be divided among "
            f"{count} ranks so that each has about as many. Use fewer ranks, or load with sharded=False, so that each "
            "rank reads all of them."
        )
    first_of_file = np.searchsorted(of_file, np.arange(len(lengths)))
    parts = []
    for first, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        pieces = []
        for file in np.unique(of_file[first:end]).tolist():
            offset = int(first_of_file[file])
            pieces.append([file, max(first - offset, 0), min(end - offset, len(lengths[file]))])
        parts.append(pieces)
    return parts


def _bounds(until: np.ndarray, ends: np.ndarray, count: int) -> tuple[np.ndarray, float]:
    """The first episode of each of `count` parts that end with one of the episodes `ends`, and the end of the last.

    Also returns how much larger the largest part is than an equal one.
    """
    if not len(ends):
        return np.zeros(count + 1, np.int64), 1.0
    wanted = until[-1] * np.arange(1, count) / count
    after = np.searchsorted(until[ends], wanted)
    before = np.maximum(after - 1, 0)
    nearest = np.where(wanted - until[ends[before]] < until[ends[after]] - wanted, before, after)
    bounds = np.concatenate([[0], ends[nearest] + 1, [len(until)]])
    sizes = np.diff(np.append(0, until)[bounds])
    return bounds, float(sizes.max() * count / until[-1])


def _read_all(
    paths: list[Path], actions: dict[str, Any], chosen: list[list[int]] | None = None
) -> dict[int, ReplayFile]:
    """Reads what is small of all files, or of chosen ones the chosen episodes; by number.

    Raises:
        BufferError: If a file does not fit the first one.
    """
    files: dict[int, ReplayFile] = {}
    for number, *episodes in [[number] for number in range(len(paths))] if chosen is None else chosen:
        with NpzFile(paths[number]) as opened:
            file = ReplayFile(opened, **actions, warn=not files)
        if files:
            _check_same(paths, next(iter(files.items())), (number, file))
        if episodes:
            file.keep(*episodes)
        files[number] = file
    return files


def _survey(path: Path, read: Callable[[], dict[int, ReplayFile]], actions: str) -> dict[str, Any]:
    """The files, the lengths of all episodes, and a digest of all files and how their actions are read."""
    files = read().values()
    checksums = [file.checksum for file in files]
    digest = hashlib.blake2b(repr((checksums, actions)).encode(), digest_size=16)
    return {
        "names": [file.path.name for file in files] if path.is_dir() else [],
        "checksums": checksums,
        "lengths": [file.lengths.tolist() for file in files],
        "digest": digest.hexdigest(),
    }


def _other_copy(path: Path, rank: int) -> BufferError:
    """The error for a rank that has other files than rank 0, as a machine with disks of its own may have."""
    return BufferError(
        f"{path} on rank {rank} does not have the same files as on rank 0, which divides them among the ranks. Give "
        "every machine the same copy, or a directory that all of them share; or load with sharded=False where each "
        "rank has data of its own."
    )


def _check_same(paths: list[Path], one: tuple[int, ReplayFile], other: tuple[int, ReplayFile]) -> None:
    """Raises a `BufferError` that names both files if they do not fit together."""
    for (what, mine), (_, its) in zip(_form(one[1]), _form(other[1]), strict=True):
        if mine != its:
            raise BufferError(
                f"{paths[one[0]]} and {paths[other[0]].name} are no parts of one recording: {what} are {mine} in the "
                f"first and {its} in the second. Keep such files in directories of their own."
                + (" Or name the kind with action_type=." if what.startswith("the kinds") else "")
            )


def _form(file: ReplayFile) -> list[tuple[str, Any]]:
    shapes = {key: obs.shape[1:] for key, obs in file.obs.items()}
    return [
        ("the shapes of observations", shapes if file.is_dict else next(iter(shapes.values()))),
        (
            "the dtypes of observations",
            {k: d.name for k, d in obs_dtypes({k: file.dtype_of(k) for k in shapes}, shapes).items()},
        ),
        ("the widths of actions", file.action_dim),
        ("the kinds of actions", _kind(file.action_classes)),
        ("the columns 'task'", "there" if file.has_tasks else "missing"),
    ]


def _kind(classes: Classes | None) -> str:
    return "zeros and ones of an unknown kind" if classes is None else described(classes)
