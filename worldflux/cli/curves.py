"""Learning curves of runs, and published scores."""

from __future__ import annotations

import csv
import io
import json
import math
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, cached_property
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from worldflux.cli.commands.train import TrainSettings
from worldflux.cli.commands.train_offline import OfflineSettings
from worldflux.cli.options import from_json, tasks_in
from worldflux.cli.runs import EVALUATIONS_FILE, LOGS, RunConfig, read_evaluations
from worldflux.errors import CheckpointError, MissingDependencyError, install_hint
from worldflux.reading import open_regular
from worldflux.run_directory import CONFIG_FILE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Score = tuple[float, float, float]
"""Environment steps, seconds of training, and score."""

_RESAMPLES = 2_000
STEP, SECONDS = "time/total_timesteps", "time/time_elapsed"


@dataclass(frozen=True)
class Run:
    """The run of an agent."""

    directory: Path
    """Directory of the run."""
    config: RunConfig
    """Content of its `config.json`."""
    part: str = ""
    """Name of a task whose scores these are; empty for those of all tasks."""

    def parts(self) -> list[Run]:
        """The run with the scores of each task; the run itself if it has one task."""
        tasks = tasks_in(self.config.task) if self.config.kind == "train" else {}
        return [replace(self, part=name) for name in tasks] if len(tasks) > 1 else [self]

    @property
    def task(self) -> str:
        """The environment, and the options that make it another task."""
        options = self.config.settings
        parts = ["pixels"] if options.get("pixels") else []
        parts += [f"size {options['size']}"] if options.get("size") else []
        parts += [f"action repeat {options['action_repeat']}"] if options.get("action_repeat") else []
        parts += options.get("env_kwargs", ())
        # Not the name of the environment, for which scores of agents are published that learned nothing else.
        whole = f"{self.part}, one of {len(tasks_in(self.config.task))} tasks" if self.part else self.config.task
        return " ".join([whole, *parts])

    @property
    def seed(self) -> Any:
        """Seed of the run."""
        return self.config.settings.get("seed")

    @cached_property
    def evaluation(self) -> list[Score]:
        """Scores of the evaluations."""
        rows = read_evaluations(self.directory / EVALUATIONS_FILE)
        return [(row.step, row.seconds, row.tasks.get(self.part, row.score)) for row in rows]

    @cached_property
    def training(self) -> list[Score]:
        """Mean returns of the last 100 training episodes, from all parts of the log."""
        names = (STEP, SECONDS, f"rollout/ep_rew_mean/{self.part}" if self.part else "rollout/ep_rew_mean")
        return [(row[names[0]], row[names[1]], row[names[2]]) for row in self.log if all(name in row for name in names)]

    @cached_property
    def log(self) -> list[dict[str, float]]:
        """The rows of all parts of the log, without what was not logged in a row.

        `time/time_elapsed` counts from the beginning of the run.
        """
        found: list[dict[str, float]] = []
        for part in sorted((self.directory / LOGS).glob("progress*.csv"), key=_part):
            rows = list(_log_rows(part))
            if not rows:
                continue
            # A run that was killed has logged steps after its checkpoint, which were then repeated.
            found = [row for row in found if row[STEP] < rows[0][STEP]]
            before = next((row[SECONDS] for row in reversed(found) if SECONDS in row), 0.0)
            found += [{**row, SECONDS: before + row[SECONDS]} if SECONDS in row else row for row in rows]
        return found

    def scores(self, kind: str) -> list[Score]:
        """Scores of one kind, "evaluation" or "training"."""
        return self.evaluation if kind == "evaluation" else self.training


@dataclass(frozen=True)
class Curve:
    """Runs that differ only in their seeds."""

    label: str
    """Name of the model, and the settings that differ from those of other curves."""
    runs: list[Run]
    """Runs of the curve, at least one."""


def read_run(directory: Path) -> Run:
    """Reads the run in a directory.

    Raises:
        CheckpointError: If its `config.json` is damaged.
    """
    config = RunConfig.read(directory)
    settings: type[Any] = TrainSettings if config.kind == "train" else OfflineSettings
    from_json(settings, config.settings, directory / CONFIG_FILE)
    return Run(directory, config)


def mean_and_interval(curves: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The mean of several curves on their common range, and its 95 % bootstrap interval.

    Args:
        curves: x and y of each curve, with x ascending. `[N]` each, with different N

    Returns:
        x, the mean, and both ends of the interval, which are NaN for a single curve. `[M]`, `[M]`, `[2, M]`; M is 0 if
        the curves have no common range.
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
    """Published scores of a model in a task."""

    label: str
    """Label of the curve."""
    frames: np.ndarray
    """Frames of the environment. `[M]`"""
    mean: np.ndarray
    """Mean score over the runs. `[M]`"""
    low: np.ndarray
    """Score of the lowest run. `[M]`"""
    high: np.ndarray
    """Score of the highest run. `[M]`"""


_TITLES = {"dreamerv3": "DreamerV3, published training episodes", "tdmpc2": "TD-MPC2, published evaluations"}


def published(model: str, task: str) -> Published | None:
    """The published scores of a model for a task, named as in `Run.task`; None if there are none."""
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


def _log_rows(path: Path) -> Iterator[dict[str, float]]:
    """The numbers in each row of a log."""
    try:
        with io.TextIOWrapper(open_regular(path), encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                numbers: dict[str, float] = {}
                for name, text in row.items():
                    with suppress(TypeError, ValueError):  # not logged in this row, or a row that is being written
                        numbers[name] = float(text)
                if math.isfinite(numbers.get(STEP, math.nan)):
                    yield numbers
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise CheckpointError(f"{path} is not a log of a run: {error}. Remove it, or restore it.") from error


_COLUMNS = 3
_LABEL_WIDTH = 44
_LEAST_SHARE = 0.2
"""Share of the steps up to the first published score that runs must have, or it is not drawn."""
_NAMES = {"evaluation": "return of evaluations", "training": "return of training episodes"}


def draw(tasks: Mapping[str, list[Curve]], *, x: str, kind: str, reference: bool) -> Figure:
    """Draws a panel for each task.

    Thin lines are single runs, thick lines are means over the runs of a curve, and bands are 95 % bootstrap intervals
    of these means. Published scores are dashed, with bars from the lowest to the highest run. Their frames are divided
    by the number of frames in each environment step.

    Args:
        tasks: Curves of each task.
        x: "steps" or "time".
        kind: "evaluation" or "training".
        reference: Draw published scores, if there are any.

    Raises:
        MissingDependencyError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import EngFormatter
    except ImportError as error:
        raise MissingDependencyError(
            f"Learning curves need matplotlib. Install it with: {install_hint('plot')}."
        ) from error
    columns = min(len(tasks), _COLUMNS)
    rows = math.ceil(len(tasks) / columns)
    figure = Figure(figsize=(1 + 5 * columns, 0.6 + 3.6 * rows))  # without pyplot, which might look for a display
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(tasks) :]:
        axes.set_visible(False)
    compared = False
    for axes, (task, curves) in zip(grid.flat, tasks.items(), strict=False):
        for number, curve in enumerate(curves):
            _draw_curve(axes, curve, f"C{number}", x=x, kind=kind)
        compared |= reference and _draw_published(axes, task, curves, kind)
        axes.set(title=task, ylabel=_NAMES[kind], xlabel="environment steps" if x == "steps" else "hours of training")
        if x == "steps":
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlim(left=0)
        axes.grid(alpha=0.25)
        axes.legend(fontsize="small")  # labels are wrapped, because a wide legend would cover the curves
    notes = []
    if any(len(curve.runs) > 1 for curves in tasks.values() for curve in curves):
        notes.append("thick: mean over seeds; band: 95 % bootstrap interval of the mean; thin: single runs")
    if compared:
        notes.append("published: mean over runs, and the lowest and highest of them")
    figure.text(0.995, 0.005, "\n".join(notes), ha="right", va="bottom", fontsize="x-small", color="0.4")
    figure.tight_layout(rect=(0, 0.2 * len(notes) / figure.get_figheight(), 1, 1))
    return figure


def _draw_curve(axes: Any, curve: Curve, color: str, *, x: str, kind: str) -> None:
    """Draws all runs of a curve, and their mean."""
    lines = [_xy(run, x, kind) for run in curve.runs]
    if len(lines) == 1:
        label = _wrapped(f"{curve.label} (seed {curve.runs[0].seed})")
        axes.plot(*lines[0], color=color, label=label, **_dot(lines[0][0]))
        return
    for line in lines:
        axes.plot(*line, color=color, alpha=0.35, linewidth=0.8)
    grid, mean, (low, high) = mean_and_interval(lines)
    label = _wrapped(f"{curve.label} ({len(lines)} seeds)")
    axes.plot(grid, mean, color=color, linewidth=2, label=label, **_dot(grid))
    axes.fill_between(grid, low, high, color=color, alpha=0.2, linewidth=0)


def _draw_published(axes: Any, task: str, curves: list[Curve], kind: str) -> bool:
    """Draws the published scores for a panel, up to one point beyond the runs. Returns whether there are any."""
    drawn: set[str] = set()
    for curve in curves:
        found = published(curve.runs[0].config.model, task)
        if found is None or found.label in drawn:
            continue
        frames_per_step = curve.runs[0].config.frames_per_step
        last = max(run.scores(kind)[-1][0] for each in curves for run in each.runs)
        steps = found.frames / frames_per_step
        if last < _LEAST_SHARE * steps[0]:  # our runs would be squeezed into the corner
            name = found.label.partition(",")[0]
            axes.plot([], [], " ", label=f"{name}'s published scores begin at {steps[0]:g} steps")
            continue
        shown = slice(0, int(np.searchsorted(steps, last)) + 1)
        bars = np.stack([found.mean - found.low, found.high - found.mean])[:, shown]
        axes.errorbar(
            steps[shown],
            found.mean[shown],
            yerr=bars,
            color="0.25",
            linestyle=("--", ":")[len(drawn)],
            marker="o",
            markersize=4,
            capsize=3,
            linewidth=1.2,
            label=found.label,
        )
        drawn.add(found.label)
    return bool(drawn)


def _wrapped(label: str) -> str:
    return textwrap.fill(label, _LABEL_WIDTH)


def _xy(run: Run, x: str, kind: str) -> tuple[np.ndarray, np.ndarray]:
    steps, seconds, scores = np.array(run.scores(kind), dtype=float).T
    return (steps if x == "steps" else seconds / 3600), scores


def _dot(x: np.ndarray) -> dict[str, Any]:
    """A marker for a curve of a single point, which has no line."""
    return {"marker": "o"} if len(x) == 1 else {}
