"""The common style of all figures: lines differ in more than colour, and texts cover no data."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np

from worldflux.diagnostics.calibration import HIGH, LOW
from worldflux.diagnostics.open_loop import HorizonError, OpenLoop
from worldflux.errors import MissingDependencyError, install_hint

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TRUE: dict[str, Any] = {"color": "black", "linewidth": 1.3}
PREDICTED: dict[str, Any] = {"color": "#d95f02", "linewidth": 1.6, "linestyle": (0, (4, 1.5))}
COMPARED: dict[str, Any] = {"color": "0.5", "linewidth": 1.3, "linestyle": "-."}
BAND: dict[str, Any] = {"color": "#d95f02", "alpha": 0.25, "linewidth": 0}
HATCHED: dict[str, Any] = {"facecolor": "none", "edgecolor": "0.7", "hatch": "////", "linewidth": 0.5}
"""Style of a band behind another band."""
BELOW: dict[str, Any] = {
    "loc": "upper center",
    "bbox_to_anchor": (0.5, -0.16),
    "ncols": 2,
    "fontsize": 8,
    "frameon": False,
}
DPI = 100


def new_figure(width: float, height: float) -> Figure:
    """A new figure. It does not use pyplot, which would choose a backend and keep every figure alive."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            f"Plots need matplotlib, which cannot be imported: {error}. Install it with: {install_hint('plot')}."
        ) from error
    return Figure(figsize=(width, height), layout="constrained", dpi=DPI)


def lay_out(figure: Figure) -> None:
    """Arranges the parts of a figure that is complete. `savefig` would do so twice each time, and draw it twice."""
    if figure.get_layout_engine() is not None:
        figure.draw_without_rendering()
        figure.set_layout_engine(None)


def set_title(figure: Figure, *lines: str) -> None:
    """Sets the title of a figure. Empty lines are left out, long lines are wrapped."""
    width = int(figure.get_figwidth() * 13)
    figure.suptitle("\n".join(textwrap.fill(line, width) for line in lines if line), fontsize=10)


def legend_below(axes: Axes) -> None:
    """Draws the legend below the axes, where it covers no data."""
    axes.legend(**BELOW)


def share_legend(figure: Figure) -> None:
    """Draws one legend below all axes, which show the same lines."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9, frameon=False)


def plot_over_horizon(
    axes: Axes, error: HorizonError, name: str, line: dict[str, Any], band: dict[str, Any] | None
) -> None:
    """Plots the mean over the windows at each step ahead, with a band that contains most of them."""
    ahead = np.arange(1, error.values.shape[1] + 1)
    if band is not None:
        share = f"{HIGH - LOW:.0%} of the windows"
        axes.fill_between(ahead, error.quantile(LOW), error.quantile(HIGH), label=f"{name}: {share}", **band)
    axes.plot(ahead, error.mean, label=f"{name}: mean", marker="." if len(ahead) == 1 else None, **line)


def mark_context(axes: Axes, time_axis: np.ndarray, context: int) -> None:
    """Shades the rows that the model sees; `time_axis` holds the steps ahead of all rows. `[T]`"""
    axes.axvspan(float(time_axis[0]) - 0.5, 0.5, color="0.88", linewidth=0)
    axes.set_xlim(float(time_axis[0]) - 0.5, float(time_axis[-1]) + 0.5)


def ending(found: OpenLoop, window: int) -> str:
    """How the episode ends, if it ends in the window."""
    real, steps = found.real, found.steps[window].cpu()
    last = int(steps.sum())
    if not last:
        return ": the episode is over"
    if bool(real.terminations[window, found.context - 2 + last]):
        return f": terminates after {last}"
    return "" if bool(steps.all()) else f": ends after {last}"


def no_decoder(found: OpenLoop) -> str:
    """A remark about a model without a decoder; empty for other models."""
    if found.obs:
        return ""
    shown = "rewards, continuation and states" if found.values is None else "rewards, continuation, values and states"
    return f"The model has no decoder and draws no observations: its {shown} are compared instead."
