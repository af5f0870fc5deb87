"""Errors over the horizon."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from worldflux.diagnostics.calibration import at_steps, overall_ratio
from worldflux.diagnostics.open_loop import OpenLoop, PredictionError
from worldflux.diagnostics.plots.frames import image_keys
from worldflux.diagnostics.plots.style import (
    BAND,
    COMPARED,
    HATCHED,
    PREDICTED,
    new_figure,
    no_decoder,
    plot_over_horizon,
    set_title,
    share_legend,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_errors(found: OpenLoop, errors: Mapping[str, PredictionError], title: str = "") -> Figure:
    """Each error over the horizon, compared with that of "nothing changes"."""
    columns = min(len(errors), 3)
    rows = -(-len(errors) // columns)
    figure = new_figure(4.4 * columns, 3.1 * rows + 1.2)
    grid = figure.subplots(rows, columns, squeeze=False).flat
    for axes, (name, error) in zip(grid, errors.items(), strict=False):
        plot_over_horizon(axes, error.unchanged, "nothing changes", COMPARED, HATCHED)
        plot_over_horizon(axes, error.model, "model", PREDICTED, BAND)
        first, last = (int(error.model.count[step]) for step in (0, -1))
        windows = f"{first} windows" if first == last else f"{first} windows, {last} of them to the end"
        ratio = overall_ratio(error)
        said = f": {ratio:.2f} of the error of 'nothing changes'" if np.isfinite(ratio) else ""
        axes.set_title(f"{name}{said}\n{windows}", fontsize=9)
        axes.set_ylabel(_unit(found, name), fontsize=9)
        axes.set_xlabel("steps ahead", fontsize=9)
        axes.set_ylim(0, None if error.model.values.any() or error.unchanged.values.any() else 1)
        axes.tick_params(labelsize=8)
    for axes in list(grid):
        axes.set_visible(False)
    set_title(figure, title, no_decoder(found))
    share_legend(figure)
    return figure


def _unit(found: OpenLoop, name: str) -> str:
    """The unit of an error; see `OpenLoop.errors`."""
    kind, _, key = name.partition("/")
    if kind == "obs" and (key or "obs") in image_keys(found):
        return "RMS error (pixel range 0 to 1)"
    if kind == "obs" and (key or "obs") in found.one_hots:
        return "RMS error (probability)"
    if kind == "state":
        return "distance (deviations of the state)"
    if kind == "reward" and not len(np.unique(at_steps(found, found.earned))[1:]):
        return "error (reward units: the reward is constant)"
    return "error (probability)" if kind == "continue" else "error (standard deviations)"
