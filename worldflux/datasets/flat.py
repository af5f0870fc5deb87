"""Rows in flat arrays `[N, ...]`, or in arrays for each episode, as recordings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from worldflux.datasets.columns import Column
from worldflux.datasets.recording import (
    Block,
    Recording,
    Rows,
    obs_space_like,
    rows_at_once,
    spans,
    steps_of_rows,
)
from worldflux.errors import BufferError, ConfigurationError, ShapeMismatchError
from worldflux.replay.spec import checked

_BOOL = np.dtype(np.bool_)
_OF_ROWS = ("terminations", "truncations", "is_first", "is_last", "episode")


@dataclass
class Alignment:
    """How the rows of a source are to be read.

    Attributes:
        align: One of `ALIGNMENTS`; see `recording.steps_of_rows`.
        final_row: Whether the last row of an episode holds its last observation only. None: unless `align` is "own".
        time_limit: Number of steps after which an episode is cut.
    """

    align: str = "own"
    final_row: bool | None = None
    time_limit: int | None = None

    def __post_init__(self) -> None:
        if self.final_row is None:
            self.final_row = self.align != "own"
        if not self.final_row and self.align != "own":
            raise ConfigurationError(
                f"With align='{self.align}', the last row of each episode holds nothing but its last observation: "
                "leave final_row out."
            )


class Columns:
    """The arrays of a source by what they are: "obs/<key>", "next_obs/<key>", "actions", "rewards", and those of marks.

    Args:
        name: What the source is called in messages.
        arrays: The arrays.
        is_episode: Whether these are the arrays of one episode, whose observations may have one more row.

    Raises:
        ShapeMismatchError: If one has another number of rows.
    """

    def __init__(self, name: str, arrays: Mapping[str, Column], *, is_episode: bool = False) -> None:
        self.name = name
        self.obs = {key.removeprefix("obs/"): array for key, array in arrays.items() if key.startswith("obs/")}
        self.next_obs = {
            key.removeprefix("next_obs/"): one for key, one in arrays.items() if key.startswith("next_obs/")
        }
        self.actions, self.rewards = arrays["actions"], arrays.get("rewards")
        self.count = _row_count(name, self.actions)
        if not self.count:
            raise BufferError(f"{name} has no steps: there is nothing to load.")
        self.has_last = is_episode and all(one.shape[:1] == (self.count + 1,) for one in self.obs.values())
        for key, array in arrays.items():
            _check_column(name, key, array, self.count + (self.has_last and key.startswith("obs/")))

    def read(self, arrays: Mapping[str, Column], part: slice) -> dict[str, np.ndarray]:
        """Some rows of several arrays."""
        return {key: np.asarray(array[part]) for key, array in arrays.items()}

    def rewards_at(self, part: slice) -> np.ndarray | None:
        """Some rewards. `[K]`"""
        return None if self.rewards is None else np.asarray(self.rewards[part])

    @property
    def rows_at_once(self) -> int:
        """Rows that are read at once."""
        return rows_at_once([*self.obs.values(), *self.next_obs.values(), self.actions])


def _row_count(name: str, actions: Column) -> int:
    if not actions.shape:
        raise ShapeMismatchError(f"{name}: actions has shape (), expected a row for each step.")
    return int(actions.shape[0])


def _check_column(name: str, key: str, array: Column, count: int) -> None:
    if array.shape[:1] != (count,):
        raise ShapeMismatchError(
            f"{name}: {key} has shape {tuple(array.shape)}, and there are {count} rows of actions. Expected as many "
            "rows of each."
        )
    if array.dtype.kind not in "biuf" and key != "episode":
        raise BufferError(f"{name}: {key} has dtype {array.dtype}, expected numbers. Objects are not read.")


@dataclass
class _Marks:
    """Whether an episode terminates with each row, begins with it, and has its last row there. `[N]` bool each"""

    terminal: np.ndarray
    is_first: np.ndarray
    is_last: np.ndarray


def _marks_in(name: str, arrays: Mapping[str, Column], count: int, how: Alignment) -> _Marks:
    """Where the episodes in flat arrays of `count` rows begin and end."""
    found: dict[str, np.ndarray] = {}
    for mark in _OF_ROWS:
        if mark in arrays:
            array = arrays[mark]
            _check_column(name, mark, array, count)
            found[mark] = np.asarray(array[:]).reshape(count, -1)
            if mark != "episode":
                found[mark] = checked(f"{name}: {mark}", found[mark][:, 0], (count,), _BOOL)
    terminal, is_first = (found.get(mark, np.zeros(count, np.bool_)) for mark in ("terminations", "is_first"))
    is_last = terminal.copy()
    for mark in ("truncations", "is_last"):
        if mark in found:
            is_last |= found[mark]
    is_last[:-1] |= is_first[1:]
    if "episode" in found:
        number = found["episode"]
        unknown = np.flatnonzero((number != number).any(1))
        if len(unknown):
            raise BufferError(f"{name}: episode is NaN in row {unknown[0]}, expected an episode for each row.")
        is_last[:-1] |= (number[1:] != number[:-1]).any(1)
    is_last[-1:] = True
    if how.time_limit is not None:
        starts = np.append(0, np.flatnonzero(is_last[:-1]) + 1)
        lengths = np.diff(np.append(starts, count))
        place = np.arange(count) - np.repeat(starts, lengths) + 1
        is_last |= place % (how.time_limit + bool(how.final_row)) == 0
    return _Marks(terminal, is_first, is_last)


def _rows(columns: Columns, marks: _Marks, step: int) -> Iterator[Rows]:
    """Flat arrays in pieces of `step` rows."""
    for part in spans(columns.count, step):
        yield Rows(
            columns.read(columns.obs, part),
            np.asarray(columns.actions[part]),
            columns.rewards_at(part),
            marks.terminal[part],
            marks.is_first[part],
            marks.is_last[part],
        )


def _blocks(columns: Columns, marks: _Marks, step: int, how: Alignment) -> Iterator[Block]:
    """The steps of flat arrays, in pieces of about `step` rows."""
    if how.final_row:
        yield from steps_of_rows(_rows(columns, marks, step), how.align)
        return
    for part, rows in zip(spans(columns.count, step), _rows(columns, marks, step), strict=True):
        ends = np.flatnonzero(rows.is_last)
        finals = {key: array[ends] for key, array in columns.read(columns.next_obs, part).items()} or None
        seen = None
        if finals is None and columns.has_last and part.stop == columns.count:
            last = columns.read(columns.obs, slice(columns.count, columns.count + 1))
            finals = {key: np.repeat(array, len(ends), axis=0) for key, array in last.items()}
            seen = np.arange(len(ends)) == len(ends) - 1
        truncated = rows.is_last & ~rows.terminal
        yield Block(rows.obs, rows.actions, rows.rewards, rows.terminal, truncated, finals, seen)


def flat_recording(name: str, arrays: Mapping[str, Column], is_dict: bool, how: Alignment, **more: Any) -> Recording:
    """A recording of flat arrays.

    Args:
        name: What the source is called in messages.
        arrays: The arrays, as for `Columns`.
        is_dict: Whether observations are a dictionary.
        how: How the rows are to be read.
        more: Further fields of the recording.
    """
    columns = Columns(name, arrays)
    marks = _marks_in(name, arrays, columns.count, how)
    episodes = int(np.count_nonzero(marks.is_last))
    steps = columns.count - episodes * bool(how.final_row)
    blocks = partial(_blocks, columns, marks, columns.rows_at_once, how)
    return _recording(columns, name, is_dict, steps, episodes, blocks, **more)


def _recording(like: Columns, name: str, is_dict: bool, *rest: Any, **more: Any) -> Recording:
    """A recording whose rows have the shapes and dtypes of some columns."""
    obs_space, actions = obs_space_like(like.obs, is_dict), like.actions
    return Recording(name, obs_space, tuple(actions.shape[1:]), np.dtype(actions.dtype), *rest, **more)


Episodes = Callable[[], Iterator[Mapping[str, Column]]]
"""The arrays of each episode, one after another; it is called several times."""


class Renamed(Mapping[str, Column]):
    """Arrays under other names, each of which is opened when it is asked for.

    Args:
        arrays: The arrays.
        names: Their names by the new ones.
        more: Further arrays, under the new names.
    """

    def __init__(
        self, arrays: Mapping[str, Column], names: Mapping[str, str], more: Mapping[str, Column] | None = None
    ) -> None:
        self._arrays, self._names, self._more = arrays, names, more or {}

    def __getitem__(self, name: str) -> Column:
        return self._more[name] if name in self._more else self._arrays[self._names[name]]

    def __contains__(self, name: object) -> bool:
        return name in self._more or name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter({**self._names, **self._more})

    def __len__(self) -> int:
        return len({**self._names, **self._more})


def recording_of_episodes(
    name: str, episodes: Episodes, is_dict: bool, how: Alignment, notes: list[str] | None = None, **more: Any
) -> Recording:
    """A recording of arrays for each episode. Without a final row, there may be one more observation than actions.

    Episodes without steps are left out, and noted.

    Args:
        name: What the source is called in messages.
        episodes: The arrays. Those of the same name have the same shape but for the first axis.
        is_dict: Whether observations are a dictionary.
        how: How the rows are to be read.
        notes: As for the recording.
        more: Further fields of the recording.

    Raises:
        ShapeMismatchError: If the arrays of an episode do not fit each other.
    """
    found: list[_Marks | None] = []
    first: Columns | None = None
    steps = ends = 0
    for number, arrays in enumerate(episodes()):
        place = f"{name}, episode {number}"
        count = _row_count(place, arrays["actions"])
        found.append(_marks_in(place, arrays, count, how) if count else None)
        if found[-1] is not None:
            ends_here = int(np.count_nonzero(found[-1].is_last))
            steps, ends = steps + count - ends_here * bool(how.final_row), ends + ends_here
            first = first or Columns(place, dict(arrays), is_episode=not how.final_row)
    if first is None:
        raise BufferError(f"{name} has no steps: there is nothing to load." if found else f"{name} has no episodes.")
    step = first.rows_at_once
    empty = [number for number, marks in enumerate(found) if marks is None]
    notes = [] if notes is None else notes
    if empty:
        notes.append(f"{len(empty)} of its {len(found)} episodes have no steps and are left out, such as {empty[0]}.")

    def blocks() -> Iterator[Block]:
        for number, (arrays, marks) in enumerate(zip(episodes(), found, strict=True)):
            if marks is not None:
                rest = {key: arrays[key] for key in arrays if key not in _OF_ROWS}
                columns = Columns(f"{name}, episode {number}", rest, is_episode=not how.final_row)
                yield from _blocks(columns, marks, step, how)

    return _recording(first, name, is_dict, steps, ends, blocks, notes=notes, **more)
