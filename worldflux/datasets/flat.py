"""Rows in flat arrays `[N, ...]`, or in arrays for each episode, as recordings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from worldflux.datasets.columns import Column
from worldflux.datasets.recording import (
    ALIGNMENTS,
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
from worldflux.validation import check_choice, whole_number

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
        check_choice("align", self.align, ALIGNMENTS)
        if self.final_row is None:
            self.final_row = self.align != "own"
        if not self.final_row and self.align != "own":
            raise ConfigurationError(
                f"With align='{self.align}', the last row of each episode holds nothing but its last observation: "
                "leave final_row out."
            )
        if self.time_limit is not None:
            self.time_limit = whole_number("time_limit", self.time_limit, 1)


class Columns:
    """The arrays of a source by what they are: "obs/<key>", "next_obs/<key>", "actions", "rewards", and those of marks.

    Args:
        name: What the source is called in messages.
        arrays: The arrays.
        count: Rows that each has; None: as many as there are actions.

    Raises:
        ShapeMismatchError: If one has another number of rows.
    """

    def __init__(self, name: str, arrays: Mapping[str, Column], count: int | None = None) -> None:
        self.name = name
        self.obs = {key.removeprefix("obs/"): array for key, array in arrays.items() if key.startswith("obs/")}
        self.next_obs = {
            key.removeprefix("next_obs/"): one for key, one in arrays.items() if key.startswith("next_obs/")
        }
        self.actions, self.rewards = arrays["actions"], arrays.get("rewards")
        self.marks = {key: arrays[key] for key in _OF_ROWS if key in arrays}
        self.count = int(self.actions.shape[0]) if count is None else count
        if not self.count:
            raise BufferError(f"{name} has no steps: there is nothing to load.")
        for key, array in arrays.items():
            if not len(array.shape) or array.shape[0] != self.count:
                raise ShapeMismatchError(
                    f"{name}: {key} has shape {tuple(array.shape)}, and there are {self.count} rows of actions. "
                    "Expected as many rows of each."
                )
            if np.dtype(array.dtype).kind not in "biuf" and key != "episode":
                raise BufferError(f"{name}: {key} has dtype {array.dtype}, expected numbers. Objects are not read.")

    def read(self, arrays: Mapping[str, Column], part: slice) -> dict[str, np.ndarray]:
        """Some rows of several arrays."""
        return {key: np.asarray(array[part]) for key, array in arrays.items()}

    def rewards_at(self, part: slice) -> np.ndarray | None:
        """Some rewards. `[K]`"""
        return None if self.rewards is None else np.asarray(self.rewards[part])


def _marks(
    name: str, arrays: Mapping[str, Column], count: int, how: Alignment
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Whether an episode terminates with each row, begins with it, and has its last row there. `[N]` bool each"""

    def flags(mark: str) -> np.ndarray:
        if mark not in arrays:
            return np.zeros(count, np.bool_)
        given = np.asarray(arrays[mark][:])
        return checked(f"{name}: {mark}", given.reshape(count, -1)[:, 0], (count,), _BOOL).copy()

    terminal, is_first = flags("terminations"), flags("is_first")
    is_last = terminal | flags("truncations") | flags("is_last")
    is_last[:-1] |= is_first[1:]
    if "episode" in arrays:
        number = np.asarray(arrays["episode"][:]).reshape(count, -1)
        is_last[:-1] |= (number[1:] != number[:-1]).any(1)
    is_last[-1:] = True
    if how.time_limit is not None:
        starts = np.append(0, np.flatnonzero(is_last[:-1]) + 1)
        lengths = np.diff(np.append(starts, count))
        place = np.arange(count) - np.repeat(starts, lengths) + 1
        is_last |= place % (how.time_limit + bool(how.final_row)) == 0
    return terminal, is_first, is_last


def flat_recording(columns: Columns, is_dict: bool, how: Alignment, **more: Any) -> Recording:
    """A recording of flat arrays.

    Args:
        columns: The arrays.
        is_dict: Whether observations are a dictionary.
        how: How the rows are to be read.
        more: Further fields of the recording.
    """
    terminal, is_first, is_last = _marks(columns.name, columns.marks, columns.count, how)
    truncated = is_last & ~terminal
    step = rows_at_once([*columns.obs.values(), *columns.next_obs.values(), columns.actions])
    episodes = int(np.count_nonzero(is_last))

    def rows() -> Iterator[Rows]:
        for part in spans(columns.count, step):
            yield Rows(
                columns.read(columns.obs, part),
                np.asarray(columns.actions[part]),
                columns.rewards_at(part),
                terminal[part],
                is_first[part],
                is_last[part],
            )

    def blocks() -> Iterator[Block]:
        for part in spans(columns.count, step):
            ends = np.flatnonzero(is_last[part])
            following = {key: array[ends] for key, array in columns.read(columns.next_obs, part).items()}
            yield Block(
                columns.read(columns.obs, part),
                np.asarray(columns.actions[part]),
                columns.rewards_at(part),
                terminal[part],
                truncated[part],
                following or None,
            )

    return Recording(
        columns.name,
        obs_space_like(columns.obs, is_dict),
        tuple(columns.actions.shape[1:]),
        np.dtype(columns.actions.dtype),
        columns.count - episodes * bool(how.final_row),
        episodes,
        blocks=(lambda: steps_of_rows(rows(), how.align)) if how.final_row else blocks,
        **more,
    )


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


def recording_of_episodes(name: str, episodes: Episodes, is_dict: bool, how: Alignment, **more: Any) -> Recording:
    """A recording of arrays for each episode. Without a final row, there may be one more observation than actions.

    Args:
        name: What the source is called in messages.
        episodes: The arrays. Those of the same name have the same shape but for the first axis.
        is_dict: Whether observations are a dictionary.
        how: How the rows are to be read.
        more: Further fields of the recording.

    Raises:
        ShapeMismatchError: If the arrays of an episode do not fit each other.
    """
    first: Recording | None = None
    steps = ends = 0
    for number, arrays in enumerate(episodes()):
        place, count = f"{name}, episode {number}", int(arrays["actions"].shape[0])
        first = first or _episode(place, arrays, is_dict, how)
        found = int(np.count_nonzero(_marks(place, arrays, count, how)[2]))
        steps, ends = steps + count - found * bool(how.final_row), ends + found
    if first is None:
        raise BufferError(f"{name} has no episodes.")

    def blocks() -> Iterator[Block]:
        for number, arrays in enumerate(episodes()):
            yield from _episode(f"{name}, episode {number}", arrays, is_dict, how).blocks()

    return Recording(
        name,
        first.obs_space,
        first.action_shape,
        first.action_dtype,
        steps,
        ends,
        blocks,
        **more,
    )


class _Front:
    """The rows of a column but the last one."""

    def __init__(self, column: Column) -> None:
        self.shape, self.dtype, self._column = (column.shape[0] - 1, *column.shape[1:]), column.dtype, column

    def __getitem__(self, part: slice) -> np.ndarray:
        begin, end, _ = part.indices(self.shape[0])
        return self._column[begin:end]


def _episode(name: str, arrays: Mapping[str, Column], is_dict: bool, how: Alignment) -> Recording:
    """The recording of the arrays of one episode."""
    arrays = dict(arrays)  # each is opened when it is asked for
    count = int(arrays["actions"].shape[0])
    obs = {key: one for key, one in arrays.items() if key.startswith("obs/")}
    if how.final_row or any(one.shape[0] != count + 1 for one in obs.values()):
        return flat_recording(Columns(name, arrays), is_dict, how)
    recording = flat_recording(
        Columns(name, {**arrays, **{key: _Front(one) for key, one in obs.items()}}), is_dict, how
    )
    plain = recording.blocks

    def blocks() -> Iterator[Block]:
        at = 0
        for block in plain():
            at += len(block.actions)
            if at == count and block.final_obs is None:
                last = {key.removeprefix("obs/"): np.asarray(one[count : count + 1]) for key, one in obs.items()}
                ends = int(np.count_nonzero(block.terminations | block.truncations))
                block.final_obs = {key: np.repeat(array, ends, axis=0) for key, array in last.items()}
                block.final_seen = np.arange(ends) == ends - 1
            yield block

    recording.blocks = blocks
    return recording
