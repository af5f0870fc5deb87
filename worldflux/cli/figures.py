"""Pictures of learning curves."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from worldflux.cli.curves import Curve, Run, mean_and_interval, published
from worldflux.errors import MissingDependencyError

try:
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter
except ImportError as error:
    raise MissingDependencyError(
        'worldflux plot needs matplotlib. Install it with: pip install "worldflux[plot]".'
    ) from error

_COLUMNS = 3
_LABEL_WIDTH = 44
_LEAST_SHARE = 0.2
"""Of the way to the first published score that runs must have gone for it to be drawn."""
_NAMES = {"evaluation": "return of evaluations", "training": "return of training episodes"}


def draw(tasks: Mapping[str, list[Curve]], path: Path, *, x: str, kind: str, reference: bool) -> None:
    """Draws a panel for each task.

    Thin lines are single runs, thick ones means over the runs of a curve, and bands bootstrap intervals of 95 % of
    these means. Published scores are dashed, with bars from the lowest to the highest of their runs; their frames are
    divided by the frames in a step of ours.

    Args:
        tasks: The curves of each.
        path: Picture to write.
        x: "steps" or "time".
        kind: "evaluation" or "training".
        reference: Draw published scores, where there are some.
    """
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
        axes.legend(fontsize="small")  # of labels that are wrapped: a wide one would leave no room for the curves
    notes = []
    if any(len(curve.runs) > 1 for curves in tasks.values() for curve in curves):
        notes.append("thick: mean over seeds; band: 95 % bootstrap interval of the mean; thin: single runs")
    if compared:
        notes.append("published: mean over runs, and the lowest and highest of them")
    figure.text(0.995, 0.005, "\n".join(notes), ha="right", va="bottom", fontsize="x-small", color="0.4")
    figure.tight_layout(rect=(0, 0.2 * len(notes) / figure.get_figheight(), 1, 1))
    figure.savefig(path, dpi=150)


def _draw_curve(axes: Any, curve: Curve, color: str, *, x: str, kind: str) -> None:
    """All runs of a curve, and their mean."""
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
    """The published scores for the models of a panel, up to one point behind our own runs; whether there are any."""
    drawn: set[str] = set()
    for curve in curves:
        found = published(curve.runs[0].config.model, task)
        if found is None or found.label in drawn:
            continue
        frames_per_step = curve.runs[0].config.frames_per_step
        last = max(run.scores(kind)[-1][0] for each in curves for run in each.runs)
        steps = found.frames / frames_per_step
        if last < _LEAST_SHARE * steps[0]:  # our runs would be a dot in the corner
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
    """A single point would be no line."""
    return {"marker": "o"} if len(x) == 1 else {}
