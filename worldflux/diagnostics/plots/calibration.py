"""Whether rewards and terminations are foreseen rightly on average."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from worldflux.diagnostics.calibration import (
    HIGH,
    LOW,
    Calibration,
    at_steps,
    continue_calibration,
    reward_calibration,
)
from worldflux.diagnostics.open_loop import HorizonError, OpenLoop
from worldflux.diagnostics.plots.style import (
    BAND,
    BELOW,
    COMPARED,
    HATCHED,
    PREDICTED,
    TRUE,
    legend_below,
    new_figure,
    set_title,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_rewards(found: OpenLoop, title: str = "") -> Figure:
    """What was earned where a reward was predicted, and both over the horizon."""
    predicted, earned = at_steps(found, found.rewards.mean(0)), at_steps(found, found.earned)
    figure = new_figure(9.6, 4.4)
    left, right = figure.subplots(1, 2)
    if len(predicted):
        low, high = min(predicted.min(), earned.min()), max(predicted.max(), earned.max())
        # Of rewards that hardly differ, small errors shall look small.
        pad = max(0.05 * (high - low), 0.05 * max(abs(low), abs(high)) - (high - low) / 2) or 1.0
        extent = (low - pad, high + pad)
        cells = left.hexbin(
            predicted,
            earned,
            gridsize=36,
            bins="log",
            mincnt=1,
            cmap="Greys",
            extent=(*extent, *extent),
            linewidths=0.1,
        )
        cells.set_clim(0.2, max(float(cells.get_array().max()), 10.0))  # a single step is grey, not white
        figure.colorbar(cells, ax=left, label="steps in a cell").ax.set_ylim(1, None)
        left.plot(extent, extent, label="right", **COMPARED)
        _plot_groups(left, reward_calibration(found), "tenths of the steps, by prediction: mean, 95 %")
        left.set(xlim=extent, ylim=extent, xlabel="predicted reward", ylabel="earned reward")
        legend_below(left)
        left.set_title(_reward_remark(predicted, earned), fontsize=9)
        right.set_ylim(*extent)
    _plot_means(right, found, found.earned, found.rewards.mean(0), "earned")
    right.set_ylabel("reward of a step")
    set_title(figure, title, "" if len(predicted) else "No step of the windows lies in the episode of its context.")
    return figure


def _reward_remark(predicted: np.ndarray, earned: np.ndarray) -> str:
    if np.ptp(earned) == 0:
        return f"every one of {len(earned)} steps earned {earned[0]:.4g}"
    if np.ptp(predicted) == 0:
        return f"{len(earned)} steps, the model predicts {predicted[0]:.4g} for all"
    return f"{len(earned)} steps, correlation {np.corrcoef(predicted, earned)[0, 1]:.2f}"


def draw_continues(found: OpenLoop, title: str = "") -> Figure:
    """How often episodes went on where the model gave that a probability; and both over the horizon."""
    predicted = at_steps(found, found.continues.mean(0))
    terminations = int(len(predicted) - at_steps(found, found.went_on).sum())
    groups = continue_calibration(found)
    figure = new_figure(9.6, 4.9)
    parts = figure.subplot_mosaic([["shares", "means"], ["counts", "means"]], height_ratios=(3, 1))
    shares, counts, means = parts["shares"], parts["counts"], parts["means"]
    shares.plot((0, 1), (0, 1), label="right", **COMPARED)
    _plot_groups(shares, groups, "steps with similar predictions: share, 95 %")
    shares.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), ylabel="share that went on", xticklabels=[])
    edges = np.linspace(0, 1, len(groups.counts) + 1)
    bars = counts.bar(edges[:-1], groups.counts, width=np.diff(edges), align="edge", color="0.6", edgecolor="white")
    counts.bar_label(bars, [str(count) if count else "" for count in groups.counts], fontsize=7, padding=1)
    counts.set(xlim=(-0.02, 1.02), xlabel="predicted probability that the episode goes on", ylabel="steps")
    if groups.counts.any():  # a logarithmic axis has no place for zeros alone
        counts.set(yscale="log", ylim=(0.7, 30 * int(groups.counts.max())))
    counts.legend(*shares.get_legend_handles_labels(), **{**BELOW, "bbox_to_anchor": (0.5, -0.75)})  # of a lower one
    _plot_means(means, found, found.went_on, found.continues.mean(0), "went on", has_band=False)
    means.set(ylabel="probability of going on", ylim=(-0.02, 1.02))
    remark = f"{len(predicted)} steps, {terminations} terminations"
    if not terminations:
        remark += ": nothing can be said of how well they are foreseen"
    if len(predicted) and predicted.min() == 1:
        remark += "; the model is sure that all of them go on"
    set_title(figure, title, remark)
    return figure


def _plot_groups(axes: Axes, groups: Calibration, label: str) -> None:
    """Means of predictions with 95 % intervals of what came."""
    some = groups.counts > 0
    actual = groups.actual[some]
    ends = np.abs(np.stack([groups.low[some], groups.high[some]]) - actual)
    # A group of one step has no interval.
    margins = np.where(np.isfinite(ends), ends, 0.0)
    look: dict[str, Any] = {
        "color": "#d95f02",
        "markersize": 5,
        "markeredgecolor": "black",
        "markeredgewidth": 0.6,
        "capsize": 2,
    }
    axes.errorbar(groups.predicted[some], actual, margins, fmt="o", label=label, **look)


def _plot_means(
    axes: Axes, found: OpenLoop, actual: Tensor, predicted: Tensor, came: str, *, has_band: bool = True
) -> None:
    """Means over the windows at each step ahead, with bands that hold most of them. `[B, H]` each"""
    counts = found.steps.cpu().numpy()
    ahead = np.arange(1, counts.shape[1] + 1)
    share = f"{HIGH - LOW:.0%} of the windows"
    for values, name, line, band in (
        (actual, came, TRUE, HATCHED if has_band else None),
        (predicted, "predicted", PREDICTED, BAND),
    ):
        over = HorizonError(values.double().cpu().numpy(), counts)
        axes.plot(ahead, over.mean, label=f"{name}: mean", marker="." if len(ahead) == 1 else None, **line)
        if band is not None:
            axes.fill_between(ahead, over.quantile(LOW), over.quantile(HIGH), label=f"{name}: {share}", **band)
    axes.set_xlabel("steps ahead")
    axes.set_title("over the horizon", fontsize=9)
    legend_below(axes)
