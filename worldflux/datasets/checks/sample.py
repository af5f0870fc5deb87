"""The rows that the statistical checks look at: consecutive ones, evenly spread over the data, as small features."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from worldflux.datasets.checks.sources import Source
from worldflux.validation import SINGLE_KEY

_MOST_ROWS = 100_000
_MOST_PICTURES = 12_000
_MOST_NUMBERS = 2**24
"""Numbers of all sampled observations together."""
_PIECES = 25
"""Runs of consecutive rows that are sampled where there are too many."""
_MOST_NUMBERS_OF_ACTIONS = 64
_CELLS = 8
"""Sides of the grid that images are averaged over."""


@dataclass(frozen=True)
class Sample:
    """Rows in order, those with the observations after an episode's last step among them.

    Two neighbours belong together where `run` is the same.

    Attributes:
        obs: Observations as they are, or the means of a grid of cells for images; finite. `[M, D]` float32
        labels: Key and column of each number of an observation; the column is None for those of an image.
        actions: `[M, A]`, zero in final rows.
        rewards: `[M]`, zero in final rows.
        is_step: False for rows with the observation after an episode's last step. `[M]`
        run: Number of the run of consecutive rows of one episode. `[M]`
        episode: Episode of each row. `[M]`
        row: Number of the transition; of a final row, that of the transition before it. `[M]`
        lowest: Smallest value of each image observation, by key.
        highest: Largest value of each image observation, by key.
        is_whole_numbers: Whether all values of each image observation are whole numbers, by key.
    """

    obs: np.ndarray
    labels: tuple[tuple[str, int | None], ...]
    actions: np.ndarray
    rewards: np.ndarray
    is_step: np.ndarray
    run: np.ndarray
    episode: np.ndarray
    row: np.ndarray
    lowest: dict[str, float]
    highest: dict[str, float]
    is_whole_numbers: dict[str, bool]

    @property
    def has_images(self) -> bool:
        """Whether an observation is an image."""
        return bool(self.lowest)

    def with_one_hots(self) -> Sample:
        """The same rows, with the actions of each number in a column of their own if there are a few numbers."""
        numbers, which = np.unique(self.actions[:, 0], return_inverse=True)
        if self.actions.shape[1] > 1 or len(numbers) > _MOST_NUMBERS_OF_ACTIONS:
            return self
        return replace(self, actions=np.eye(len(numbers), dtype=np.float32)[which])

    def with_actions_moved(self, shift: int) -> Sample:
        """The same rows with actions that stand so many rows later, -1 or 1; where none is known, runs are cut."""
        cut = (
            np.append(True, self.run[1:] != self.run[:-1])
            if shift > 0
            else np.append(self.run[1:] != self.run[:-1], True)
        )
        return replace(self, actions=np.roll(self.actions, shift, axis=0), run=2 * self.run + cut)


def is_image(shape: tuple[int, ...]) -> bool:
    """Whether observations of this shape are images."""
    return len(shape) == 3 and min(shape[1:]) >= _CELLS


def take_sample(source: Source) -> Sample:
    """Reads the sample."""
    pictures = any(is_image(shape) for shape, _ in source.obs.values())
    width = sum(_width(shape) for shape, _ in source.obs.values())
    most = min(_MOST_PICTURES if pictures else _MOST_ROWS, max(2_000, _MOST_NUMBERS // max(1, width)))
    rows = _spread(len(source.rewards), most)
    last = np.cumsum(source.lengths) - 1
    episode = np.searchsorted(last, rows)
    has_final = (rows == last[episode]) & source.has_final[episode]
    place = np.arange(len(rows)) + np.cumsum(has_final) - has_final  # of each step in the sample
    count = len(rows) + int(has_final.sum())
    final_place = place[has_final] + 1

    obs = np.zeros((count, width), np.float32)
    labels: list[tuple[str, int | None]] = []
    lowest: dict[str, float] = {}
    highest: dict[str, float] = {}
    whole: dict[str, bool] = {}
    at = 0
    for key, (shape, _) in source.obs.items():
        columns = slice(at, at + _width(shape))
        at = columns.stop
        image = is_image(shape)
        labels += [(key, None if image else column) for column in range(_width(shape))]
        for part, array in source.read(key, rows):
            if image:
                with np.errstate(invalid="ignore"):
                    lowest[key] = min(lowest.get(key, np.inf), float(np.nanmin(array)))
                    highest[key] = max(highest.get(key, -np.inf), float(np.nanmax(array)))
                    whole[key] = whole.get(key, True) and (
                        array.dtype.kind != "f" or bool((array == np.rint(array)).all())
                    )
            obs[place[np.searchsorted(rows, part)], columns] = _reduced(array, image)
        obs[final_place, columns] = _reduced(source.finals(key, episode[has_final]), image)

    def spread(array: np.ndarray) -> np.ndarray:
        spread = np.zeros((count, *array.shape[1:]), array.dtype)
        spread[place] = array
        return spread

    row, whose = spread(rows), spread(episode)
    row[final_place], whose[final_place] = rows[has_final], episode[has_final]
    is_step = np.ones(count, np.bool_)
    is_step[final_place] = False
    gap = np.append(True, (np.diff(row) > 1) | (np.diff(whose) != 0))
    known = np.asarray(np.isfinite(obs).all(axis=1))
    gap[1:] |= ~known[:-1]
    finite = np.nan_to_num(source.actions[rows].astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    rewards = np.nan_to_num(source.rewards[rows].astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    per_row: tuple[np.ndarray, ...] = (spread(finite), spread(rewards), is_step, np.cumsum(gap), whose, row)
    actions, earned, steps, pieces, episodes, numbers = (values[known] for values in per_row)
    return Sample(obs[known], tuple(labels), actions, earned, steps, pieces, episodes, numbers, lowest, highest, whole)


def name_of(label: tuple[str, int | None]) -> str:
    """A column's name in sentences."""
    key, column = label
    return f"column {column}" if key == SINGLE_KEY else f"column {column} of '{key}'"


def _width(shape: tuple[int, ...]) -> int:
    return shape[0] * _CELLS**2 if is_image(shape) else math.prod(shape)


def _spread(count: int, most: int) -> np.ndarray:
    """All rows, or `most` of them in pieces at equal distances."""
    if count <= most:
        return np.arange(count)
    size = most // _PIECES
    starts = np.linspace(0, count - size, _PIECES).astype(np.int64)
    return (starts[:, None] + np.arange(size)).reshape(-1)


def _reduced(array: np.ndarray, image: bool) -> np.ndarray:
    """Observations as vectors. `[N, D]`"""
    if not image:
        return array.reshape(len(array), math.prod(array.shape[1:]))
    count, channels, height, width = array.shape
    cut = array[:, :, : height // _CELLS * _CELLS, : width // _CELLS * _CELLS]
    cells = cut.reshape(count, channels, _CELLS, height // _CELLS, _CELLS, width // _CELLS)
    return cells.mean((3, 5), dtype=np.float32).reshape(count, channels * _CELLS**2)
