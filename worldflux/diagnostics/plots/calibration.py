"""Calibration plots of rewards and continuation probabilities."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from worldflux.diagnostics.calibration import Calibration, at_steps, continue_calibration, reward_calibration
from worldflux.diagnostics.open_loop import OpenLoop, horizon_error
from worldflux.diagnostics.plots.style import (
    BAND,
    BELOW,
    COMPARED,
    HATCHED,
    PREDICTED,
    TRUE,
    legend_below,
    new_figure,
    plot_over_horizon,
    set_title,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_rewards(found: OpenLoop, title: str = "") -> Figure:
    """Earned against predicted rewards, and both over the horizon."""
    predicted, earned = at_steps(found, found.rewards.mean(0)), at_steps(found, found.earned)
    figure = new_figure(9.6, 4.4)
    left, right = figure.subplots(1, 2)
    if len(predicted):
        low, high = min(predicted.min(), earned.min()), max(predicted.max(), earned.max())
        # Small errors should look small, also if the rewards hardly differ.
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
        figure.colorbar(cells, ax=left, label="steps per cell").ax.set_ylim(1, None)
        left.plot(extent, extent, label="perfect prediction", **COMPARED)
        _plot_groups(left, reward_calibration(found), "tenths of the steps, by prediction: mean, 95 %")
        left.set(xlim=extent, ylim=extent, xlabel="predicted reward", ylabel="earned reward")
        legend_below(left)
        left.set_title(_reward_remark(predicted, earned), fontsize=9)
        right.set_ylim(*extent)
    _plot_means(right, found, found.earned, found.rewards.mean(0), "earned")
    right.set_ylabel("reward of a step")
    set_title(figure, title, "" if len(predicted) else "No predicted step lies in the episode of its context.")
    return figure


def _reward_remark(predicted: np.ndarray, earned: np.ndarray) -> str:
    if np.ptp(earned) == 0:
        return f"every one of {len(earned)} steps earned {earned[0]:.4g}"
    if np.ptp(predicted) == 0:
        return f"{len(earned)} steps, the model predicts {predicted[0]:.4g} for all"
    return f"{len(earned)} steps, correlation {np.corrcoef(predicted, earned)[0, 1]:.2f}"


def draw_continues(found: OpenLoop, title: str = "") -> Figure:
    """Plots how often episodes continued against the predicted probability, and both over the horizon."""
    predicted = at_steps(found, found.continues.mean(0))
    terminations = int(len(predicted) - at_steps(found, found.went_on).sum())
    groups = continue_calibration(found)
    figure = new_figure(9.6, 4.9)
    parts = figure.subplot_mosaic([["shares", "means"], ["counts", "means"]], height_ratios=(3, 1))
    shares, counts, means = parts["shares"], parts["counts"], parts["means"]
    shares.plot((0, 1), (0, 1), label="perfect prediction", **COMPARED)
    _plot_groups(shares, groups, "steps with similar predictions: share, 95 %")
    shares.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), ylabel="share that continued", xticklabels=[])
    edges = np.linspace(0, 1, len(groups.counts) + 1)
    bars = counts.bar(edges[:-1], groups.counts, width=np.diff(edges), align="edge", color="0.6", edgecolor="white")
    counts.bar_label(bars, [str(count) if count else "" for count in groups.counts], fontsize=7, padding=1)
    counts.set(xlim=(-0.02, 1.02), xlabel="predicted probability that the episode continues", ylabel="steps")
    if groups.counts.any():  # a logarithmic axis has no place for zeros alone
        counts.set(yscale="log", ylim=(0.7, 30 * int(groups.counts.max())))
    # These axes are lower than others, so that the legend needs a larger distance.
    counts.legend(*shares.get_legend_handles_labels(), **{**BELOW, "bbox_to_anchor": (0.5, -0.75)})
    _plot_means(means, found, found.went_on, found.continues.mean(0), "continued", has_band=False)
    means.set(ylabel="probability of continuing", ylim=(-0.02, 1.02))
    remark = f"{len(predicted)} steps, {terminations} terminations"
    if not terminations:
        remark += ": predictions of them cannot be judged"
    if len(predicted) and predicted.min() == 1:
        remark += "; the model is certain that the episode continues after each"
    set_title(figure, title, remark)
    return figure


def _plot_groups(axes: Axes, groups: Calibration, label: str) -> None:
    """Mean outcomes over mean predictions, with 95 % intervals."""
    some = groups.counts > 0
    actual = groups.actual[some]
    ends = np.abs(np.stack([groups.low[some], groups.high[some]]) - actual)
    # A group of one step has no interval.
    margins = np.where(np.isfinite(ends), ends, 0.0)
    markers: dict[str, Any] = {"markersize": 5, "markeredgecolor": "black", "markeredgewidth": 0.6}
    color = PREDICTED["color"]
    axes.errorbar(groups.predicted[some], actual, margins, fmt="o", label=label, color=color, capsize=2, **markers)


def _plot_means(
    axes: Axes, found: OpenLoop, actual: Tensor, predicted: Tensor, outcome: str, *, has_band: bool = True
) -> None:
    """Means over the windows at each step ahead, with bands that contain most of them. `[B, H]` each"""
    for values, name, line, band in (
        (actual, outcome, TRUE, HATCHED if has_band else None),
        (predicted, "predicted", PREDICTED, BAND),
    ):
        plot_over_horizon(axes, horizon_error(values, found.steps), name, line, band)
    axes.set_xlabel("steps ahead")
    axes.set_title("over the horizon", fontsize=9)
    legend_below(axes)
