"""What runs have scored so far, and what others have published."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from worldflux.cli.evaluations import read_evaluations
from worldflux.cli.runs import EVALUATIONS_FILE, LOGS, RunConfig
from worldflux.errors import CheckpointError
from worldflux.reading import open_regular

Score = tuple[float, float, float]
"""Environment steps, seconds of training, and the score."""

_RESAMPLES = 2_000


@dataclass(frozen=True)
class Run:
    """The run of an agent."""

    directory: Path
    config: RunConfig

    @property
    def task(self) -> str:
        """The environment, with the options that make another task of it."""
        options = self.config.settings
        parts = ["pixels"] if options.get("pixels") else []
        parts += [f"size {options['size']}"] if options.get("size") else []
        parts += [f"action repeat {options['action_repeat']}"] if options.get("action_repeat") else []
        return " ".join([self.config.task, *parts])

    @property
    def seed(self) -> Any:
        """Of the run."""
        return self.config.settings.get("seed")

    @cached_property
    def evaluation(self) -> list[Score]:
        """Of the evaluations."""
        return [(row.step, row.seconds, row.score) for row in read_evaluations(self.directory / EVALUATIONS_FILE)]

    @cached_property
    def training(self) -> list[Score]:
        """Means of the last 100 training episodes, from all parts of the log."""
        parts = sorted((self.directory / LOGS).glob("progress*.csv"), key=_part)
        found: list[Score] = []
        for rows in (list(_training_rows(part)) for part in parts):
            if not rows:
                continue
            # A run that was killed has logged steps behind its checkpoint, which it then made again.
            found = [row for row in found if row[0] < rows[0][0]]
            before = found[-1][1] if found else 0.0
            found += [(step, before + seconds, score) for step, seconds, score in rows]
        return found

    def scores(self, kind: str) -> list[Score]:
        """Of one kind: "evaluation" or "training"."""
        return self.evaluation if kind == "evaluation" else self.training


@dataclass(frozen=True)
class Curve:
    """Runs that differ in their seeds only."""

    label: str
    """The model, and in what its runs differ from those of other curves."""
    runs: list[Run]
    """At least one."""


def read_run(directory: Path) -> Run | None:
    """The run in a directory; None for one without an environment."""
    config = RunConfig.read(directory)
    return Run(directory, config) if config.kind == "train" else None


def mean_and_interval(curves: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The mean over several curves where all of them are, and a bootstrap interval of 95 % around it.

    Args:
        curves: x and y of each, x ascending. `[N]` each, of different lengths

    Returns:
        x, the mean, and the interval's lower and upper end, all NaN for fewer than two curves. `[M]`, `[M]`, `[2, M]`;
        M is 0 where the curves have no x in common.
    """
    first, last = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    grid = np.unique(np.concatenate([x for x, _ in curves]))
    grid = grid[(grid >= first) & (grid <= last)]
    values = np.stack([np.interp(grid, x, y) for x, y in curves])  # [R, M]
    mean = values.mean(axis=0)
    if len(curves) < 2:
        return grid, mean, np.full((2, len(grid)), np.nan)
    drawn = np.random.default_rng(0).integers(len(curves), size=(_RESAMPLES, len(curves)))
    means = np.stack([values[rows].mean(axis=0) for rows in drawn])
    return grid, mean, np.percentile(means, (2.5, 97.5), axis=0) if len(grid) else np.empty((2, 0))


@dataclass(frozen=True)
class Published:
    """The scores of a model's authors in a task."""

    label: str
    frames: np.ndarray
    """Frames of the environment. `[M]`"""
    mean: np.ndarray
    """Over runs. `[M]`"""
    low: np.ndarray
    """Lowest run. `[M]`"""
    high: np.ndarray
    """Highest run. `[M]`"""


_TITLES = {"dreamerv3": "DreamerV3, published training episodes", "tdmpc2": "TD-MPC2, published evaluations"}


def published(model: str, task: str) -> Published | None:
    """What a model's authors have published for a task, named as in `Run.task`; None where there is nothing."""
    family = next((name for name in _TITLES if model.lower().startswith(name)), None)
    rows = _table(family)["tasks"].get(task) if family is not None else None
    if family is None or rows is None:
        return None
    frames, mean, low, high, count = np.array(rows, dtype=float).T
    return Published(f"{_TITLES[family]} ({int(count.max())} runs)", frames, mean, low, high)


@cache
def _table(family: str) -> dict[str, Any]:
    text = resources.files("worldflux").joinpath(f"reference/{family}.json").read_text(encoding="utf-8")
    table: dict[str, Any] = json.loads(text)
    return table


def _part(path: Path) -> int:
    number = path.stem.removeprefix("progress").removeprefix("-")
    return int(number) if number.isdigit() else 1


def _training_rows(path: Path) -> Iterator[Score]:
    """The rows of a log that have a mean return."""
    names = ("time/total_timesteps", "time/time_elapsed", "rollout/ep_rew_mean")
    try:
        with io.TextIOWrapper(open_regular(path), encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                try:
                    step, seconds, score = (float(row[name]) for name in names)
                except (KeyError, TypeError, ValueError):  # a row of an evaluation, or one that is being written
                    continue
                yield step, seconds, score
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise CheckpointError(f"{path} is no log of a run: {error}. Remove it, or restore it.") from error
