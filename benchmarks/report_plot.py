"""The plot of a report, with one panel per task."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from report_data import Experiment, Task

from worldflux.errors import MissingDependencyError, install_hint

try:
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter
except ImportError as error:
    raise MissingDependencyError(f"The plot requires matplotlib. Install it with: {install_hint('plot')}.") from error

_COLUMNS = 4
_LEAST_SHARE = 0.2


def draw(experiments: Sequence[Experiment], path: Path) -> None:
    """Plots the mean over seeds and a band from the lowest to the highest; published runs are plotted in grey.

    Training episodes are averaged over the window of the protocol. Published curves end where the runs in the same
    panel end, or at the next published step.

    Args:
        experiments: Benchmarks; those with the same protocol share panels.
        path: File for the plot.
    """
    panels: dict[tuple[str, str], list[tuple[str, Task]]] = {}
    for experiment in experiments:
        label = f"{experiment.settings.settings.model} ({experiment.directory.name})"
        for task in experiment.tasks:
            panels.setdefault((task.protocol.name, task.name), []).append((label, task))
    columns = min(len(panels), _COLUMNS)
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(1 + 4 * columns, 0.5 + 3.4 * rows))
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, ((_, name), members) in zip(grid.flat, panels.items(), strict=False):
        for number, (label, task) in enumerate(members):
            _draw_task(axes, task, label, f"C{number}")
        _draw_published(axes, [task for _, task in members])
        axes.set(title=name, xlabel="steps of the simulator", ylabel="score")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlim(left=0)
        axes.grid(alpha=0.25)
        if axes.get_legend_handles_labels()[0]:  # there may be no score yet
            axes.legend(fontsize="x-small")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _draw_task(axes: Any, task: Task, label: str, color: str) -> None:
    """Plots every seed, their mean, and the band between the lowest and the highest."""
    runs = [run for run in (*task.runs, *task.waiting) if len(run.steps)]
    if not runs:
        return
    for run in runs:
        own = np.unique(run.steps)
        axes.plot(own, [run.at(step) for step in own], color=color, alpha=0.35, linewidth=0.8)
    steps = np.unique(np.concatenate([run.steps for run in runs]))
    first, last = max(run.steps[0] for run in runs), min(run.steps[-1] for run in runs)
    steps = steps[(steps >= first) & (steps <= last)]
    if not len(steps):
        return
    values = np.array([[run.at(step) for step in steps] for run in runs], dtype=float)
    title = f"{label}, {len(runs)} seed{'s' if len(runs) > 1 else ''}"
    axes.plot(
        steps, values.mean(axis=0), color=color, linewidth=2, marker="o" if len(steps) == 1 else None, label=title
    )
    axes.fill_between(steps, values.min(axis=0), values.max(axis=0), color=color, alpha=0.2, linewidth=0)


def _draw_published(axes: Any, tasks: Sequence[Task]) -> None:
    """Plots the published runs up to the first step after those of the tasks."""
    curves = tasks[0].curves
    if curves is None:
        return
    last = max((run.steps[-1] for task in tasks for run in (*task.runs, *task.waiting) if len(run.steps)), default=0.0)
    behind = int(np.searchsorted(curves.steps, last, side="right"))
    # One more point, unless the other runs would shrink to a dot in the corner of the plot.
    near = behind < len(curves.steps) and last >= _LEAST_SHARE * curves.steps[behind]
    shown = slice(0, behind + near)
    steps, runs = curves.steps[shown], curves.runs[:, shown]
    counted = ~np.isnan(runs).all(axis=0)
    steps, runs = steps[counted], runs[:, counted]
    if not len(steps):
        return
    title = f"published, {len(runs)} runs"
    axes.plot(steps, np.nanmean(runs, axis=0), color="0.25", linestyle="--", marker=".", label=title)
    axes.fill_between(steps, np.nanmin(runs, axis=0), np.nanmax(runs, axis=0), color="0.25", alpha=0.12, linewidth=0)
