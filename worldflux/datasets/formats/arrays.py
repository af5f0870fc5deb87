"""Anybody's arrays: flat ones with marks of the episodes, or some for each episode, told apart by a mapping."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from worldflux.datasets.columns import (
    Hdf5Columns,
    NpzColumns,
    hdf5_column,
    hdf5_group,
    hdf5_names,
    in_order,
    is_hdf5,
    open_hdf5,
)
from worldflux.datasets.flat import Alignment, Renamed, flat_recording, recording_of_episodes
from worldflux.datasets.options import NAMES
from worldflux.datasets.recording import Recording
from worldflux.errors import BufferError, ConfigurationError, a_type, nearest
from worldflux.replay.npz import NpzFile
from worldflux.replay.spec import as_numpy
from worldflux.validation import SINGLE_KEY

Keys = Mapping[str, str | Mapping[str, str] | None]


@dataclass
class Layout:
    """Which array is what.

    Attributes:
        obs: Name of each observation by its key in the buffer.
        is_dict: Whether observations are a dictionary.
        next_obs: Name of the observation after each step, by key; empty if they are not stored.
        others: Name of each other array by what it is.
    """

    obs: dict[str, str]
    is_dict: bool
    next_obs: dict[str, str]
    others: dict[str, str]

    @property
    def names(self) -> dict[str, str]:
        """The names of all arrays; those of observations begin with "obs/" or "next_obs/"."""
        return {
            **{f"obs/{key}": name for key, name in self.obs.items()},
            **{f"next_obs/{key}": name for key, name in self.next_obs.items()},
            **self.others,
        }


def layout_of(source: str, names: Sequence[str], keys: Keys | None) -> Layout:
    """Which of the arrays is what.

    Args:
        source: What the source is called in messages.
        names: Names of the arrays.
        keys: The user's names, which come first. None in place of a name: there is none.

    Raises:
        ConfigurationError: If a name is missing, unknown, or can mean two arrays.
    """
    given = dict(keys or {})
    found: dict[str, str] = {}
    folders = {name.partition("/")[0] for name in names if "/" in name}
    for role, usual in NAMES.items():
        named = given.get(role)
        if isinstance(named, str):
            found[role] = named
        elif role not in given:
            fitting = [name for name in usual if name in names or (role.endswith("obs") and name in folders)]
            if len(fitting) > 1:
                raise ConfigurationError(
                    f"{source} has {' and '.join(fitting)}, any of which can be '{role}'. Say which: "
                    f"keys={{'{role}': '{fitting[0]}'}}."
                )
            if fitting:
                found[role] = fitting[0]
    parts: dict[str, dict[str, str]] = {}
    is_dict = False
    for role in ("next_obs", "obs"):
        named, name = given.get(role), found.pop(role, "")
        inner = {one.removeprefix(f"{name}/"): one for one in names if name and one.startswith(f"{name}/")}
        is_dict = isinstance(named, Mapping) or (name not in names and bool(inner))
        parts[role] = dict(named) if isinstance(named, Mapping) else inner if is_dict else {SINGLE_KEY: name}
        if not name and not isinstance(named, Mapping):
            parts[role] = {}
    layout, others = Layout(parts["obs"], is_dict, parts["next_obs"], found), found
    missing = [name for name in layout.names.values() if name not in names]
    if missing:
        raise ConfigurationError(
            f"{source} has no array '{missing[0]}'{nearest(missing[0], names)} It has {', '.join(sorted(names))}."
        )
    for role, there in (("obs", layout.obs), ("actions", "actions" in others)):
        if not there:
            raise ConfigurationError(
                f"{source} has none of the arrays {', '.join(NAMES[role])}. It has {', '.join(sorted(names))}. Say "
                f"which one is '{role}': keys={{'{role}': '...'}}."
            )
    if layout.next_obs and layout.next_obs.keys() != layout.obs.keys():
        raise ConfigurationError(
            f"next_obs has {sorted(layout.next_obs)}, expected those of obs: {sorted(layout.obs)}."
        )
    return layout


def open_source(
    source: Any,
    *,
    keys: Keys | None = None,
    align: str = "own",
    final_row: bool | None = None,
    time_limit: int | None = None,
) -> Recording:
    """Opens arrays in memory, in an `.npz` file, in an HDF5 file, or in a directory of `.npz` files, one an episode.

    Args:
        source: A path, a dict of arrays `[N, ...]`, or a sequence of such dicts, one for each episode. An HDF5 file may
            have a group for each episode.
        keys: Name of the array for each of `NAMES`, or None if there is none; for observations that are dictionaries,
            a dict of names.
        align: Where an action and its reward stand; see `recording.steps_of_rows`.
        final_row: Whether the last row of each episode holds nothing but its last observation. None: unless `align` is
            "own".
        time_limit: Number of steps after which an episode is cut, for arrays that do not say where.
    """
    how = Alignment(align, final_row, time_limit)
    if isinstance(source, Mapping):
        return _flat("the dict of arrays", _in_memory(source), keys, how)
    if isinstance(source, Sequence) and not isinstance(source, str):
        return _of_episodes("the list of episodes", lambda: map(_in_memory, source), keys, how)
    path = Path(source)
    if path.is_dir():
        return _of_episodes(path.name, lambda: _npz_episodes(path), keys, how)
    if not is_hdf5(path):
        archive = NpzFile(path)
        recording = _flat(path.name, NpzColumns(archive), keys, how)
        recording.close = archive.close
        return recording
    file = open_hdf5(path)
    if _has_groups_of_episodes(file):
        recording = _of_episodes(path.name, lambda: _hdf5_episodes(file), keys, how)
    else:
        recording = _flat(path.name, Hdf5Columns(file), keys, how)
    recording.close = file.close
    return recording


def _flat(name: str, arrays: Mapping[str, Any], keys: Keys | None, how: Alignment) -> Recording:
    layout = layout_of(name, list(arrays), keys)
    columns = {role: arrays[one] for role, one in layout.names.items()}
    return flat_recording(name, columns, layout.is_dict, how, notes=_notes(layout, how, is_flat=True))


def _of_episodes(
    name: str, episodes: Callable[[], Iterator[Mapping[str, Any]]], keys: Keys | None, how: Alignment
) -> Recording:
    first = next(iter(episodes()), None)
    if first is None:
        raise BufferError(f"{name} has no episodes.")
    layout = layout_of(f"{name}, episode 0", list(first), keys)

    def columns() -> Iterator[Mapping[str, Any]]:
        for number, arrays in enumerate(episodes()):
            missing = [one for one in layout.names.values() if one not in arrays]
            if missing:
                raise BufferError(f"{name}, episode {number} has no array '{missing[0]}', which the first one has.")
            yield Renamed(arrays, layout.names)

    return recording_of_episodes(name, columns, layout.is_dict, how, notes=_notes(layout, how, is_flat=False))


def _notes(layout: Layout, how: Alignment, *, is_flat: bool) -> list[str]:
    """What the arrays do not tell."""
    has, notes = layout.others, []
    if "rewards" not in has:
        notes.append("it has no rewards, which are stored as zeros. If it has, name them: keys={'rewards': ...}.")
    if "terminations" not in has:
        notes.append(
            "it does not say which episodes terminated; all count as truncated. If it does, name the array: "
            "keys={'terminations': ...}."
        )
    marks = {"terminations", "truncations", "is_first", "is_last", "episode"}
    if is_flat and not marks & has.keys() and how.time_limit is None:
        notes.append(
            "it does not say where episodes end: all rows are taken as one. Name an array of flags or numbers "
            f"({', '.join(sorted(marks))}) in keys, or pass time_limit."
        )
    elif is_flat and marks & has.keys() == {"terminations"} and how.time_limit is None:
        notes.append(
            "it says where episodes terminated, and not where a time limit cut them. If there was one, pass time_limit "
            "or name an array: keys={'truncations': ...}."
        )
    return notes


def _in_memory(arrays: Any, prefix: str = "") -> dict[str, np.ndarray]:
    """A dict of arrays, or of dicts of them, by their paths."""
    if not isinstance(arrays, Mapping):
        raise ConfigurationError(
            f"An episode is {a_type(arrays)}, expected a dict of arrays such as obs, actions and rewards."
        )
    found: dict[str, np.ndarray] = {}
    for key, value in arrays.items():
        if isinstance(value, Mapping):
            found |= _in_memory(value, f"{prefix}{key}/")
        else:
            found[f"{prefix}{key}"] = as_numpy(f"{prefix}{key}", value)
    return found


def _npz_episodes(directory: Path) -> Iterator[Mapping[str, Any]]:
    for path in sorted(directory.glob("*.npz")):
        with NpzFile(path) as file:
            yield NpzColumns(file)


def _has_groups_of_episodes(file: Any) -> bool:
    """Whether all arrays of an HDF5 file are in groups with numbers in their names."""
    found = False
    for name in file:
        group = hdf5_group(file, name)
        if any(map(str.isdigit, name)) and group is not None:
            found = True
        elif hdf5_column(file, name) is not None or (group is not None and any(True for _ in Hdf5Columns(group))):
            return False
    return found


def _hdf5_episodes(file: Any) -> Iterator[Mapping[str, Any]]:
    """The arrays of each group that has some, in the order of the numbers in the names."""
    for name in sorted(file, key=in_order):
        group = hdf5_group(file, name)
        if group is not None and any(True for _ in hdf5_names(group)):
            yield Hdf5Columns(group)
