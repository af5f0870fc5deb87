"""How all figures look: lines that can be told apart without colours, texts that hide nothing."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np

from worldflux.diagnostics.open_loop import OpenLoop
from worldflux.errors import MissingDependencyError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TRUE: dict[str, Any] = {"color": "black", "linewidth": 1.3}
PREDICTED: dict[str, Any] = {"color": "#d95f02", "linewidth": 1.6, "linestyle": (0, (4, 1.5))}
COMPARED: dict[str, Any] = {"color": "0.5", "linewidth": 1.3, "linestyle": "-."}
BAND: dict[str, Any] = {"color": "#d95f02", "alpha": 0.25, "linewidth": 0}
HATCHED: dict[str, Any] = {"facecolor": "none", "edgecolor": "0.7", "hatch": "////", "linewidth": 0.5}
"""Of the band that another one lies on."""
BELOW: dict[str, Any] = {
    "loc": "upper center",
    "bbox_to_anchor": (0.5, -0.16),
    "ncols": 2,
    "fontsize": 8,
    "frameon": False,
}
DPI = 100


def new_figure(width: float, height: float) -> Figure:
    """Without pyplot, which would choose a backend and keep every figure alive."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            f'Pictures need matplotlib, which cannot be imported: {error}. pip install "worldflux[plot]".'
        ) from error
    return Figure(figsize=(width, height), layout="constrained", dpi=DPI)


def set_title(figure: Figure, *lines: str) -> None:
    """Says above a figure what it shows; empty lines are left out, long ones broken."""
    width = int(figure.get_figwidth() * 13)
    figure.suptitle("\n".join(textwrap.fill(line, width) for line in lines if line), fontsize=10)


def legend_below(axes: Axes) -> None:
    """Below the axes, where it hides nothing."""
    axes.legend(**BELOW)


def mark_context(axes: Axes, time_axis: np.ndarray, context: int) -> None:
    """Shades the rows that the model sees; `time_axis` are the steps ahead of all rows. `[T]`"""
    axes.axvspan(float(time_axis[0]) - 0.5, 0.5, color="0.88", linewidth=0)
    axes.set_xlim(float(time_axis[0]) - 0.5, float(time_axis[-1]) + 0.5)


def where(shown: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The values as floats, NaN where they are not shown."""
    return np.where(shown, values, np.nan)


def ending(found: OpenLoop, window: int) -> str:
    """How the episode ends, where it does so in the window."""
    real, steps = found.real, found.steps[window].cpu()
    last = int(steps.sum())
    if not last:
        return ": the episode is over"
    if bool(real.terminations[window, found.context - 2 + last]):
        return f": terminates after {last}"
    return "" if bool(steps.all()) else f": ends after {last}"


def no_decoder(found: OpenLoop) -> str:
    """Says so of a model that pictures no observations; empty for the others."""
    return "" if found.obs else "The model has no decoder: it pictures no observations, its states are compared."
