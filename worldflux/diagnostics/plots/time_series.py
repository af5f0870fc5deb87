"""Time series of vectors, of the reward and of the continuation probability in some windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from worldflux.diagnostics.calibration import HIGH, LOW
from worldflux.diagnostics.open_loop import OpenLoop
from worldflux.diagnostics.plots.frames import image_keys, visible
from worldflux.diagnostics.plots.style import (
    BAND,
    PREDICTED,
    TRUE,
    ending,
    mark_context,
    new_figure,
    no_decoder,
    set_title,
    share_legend,
)
from worldflux.replay.batch import by_key

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_ENTRIES = 8
"""Largest number of entries of vectors that are drawn."""


@dataclass(frozen=True, eq=False)
class Entry:
    """A value that is drawn over time."""

    name: str
    """Label of its axis."""
    true: np.ndarray
    """Recorded values. `[B, T]`"""
    predicted: np.ndarray
    """Predicted values. `[S, B, T]`"""
    is_probability: bool = False
    """Whether the axis runs from 0 to 1."""


def vector_entries(found: OpenLoop) -> list[Entry]:
    """The first entries of all vectors that are not constant; empty if the model decodes no vectors."""
    seen, made, total = visible(found), list[Entry](), 0
    for key, predicted in found.obs.items():
        if key in image_keys(found):
            continue
        true = by_key(found.real.obs)[key].float().flatten(2).cpu().numpy()
        expected = predicted.float().flatten(3).cpu().numpy()
        for entry in range(true.shape[-1]):
            total += 1
            values = true[..., entry]
            if len(made) < MOST_ENTRIES and (np.ptp(values[seen]) > 0 or true.shape[-1] <= MOST_ENTRIES):
                made.append(Entry(f"{key}[{entry}]", values, expected[..., entry], key in found.one_hots))
    if len(made) < total and made:
        made[0] = Entry(f"{made[0].name}\n({len(made)} of {total} drawn)", *list(vars(made[0]).values())[1:])
    return made


def draw_time_series(found: OpenLoop, entries: Sequence[Entry], windows: Sequence[int], title: str = "") -> Figure:
    """Recorded and predicted values of each entry and of the reward, with one column for each window.

    Without a decoder, the value of the states is one of the entries; its recorded values are those that the model gives
    to states which have seen the observations.
    """
    entries = [*entries, *_value_entry(found)]
    steps = [_reward_entry(found), *_continue_entry(found)]
    rows, columns = len(entries) + len(steps), len(windows)
    figure = new_figure(2.6 * columns + 1.4, 1.25 * rows + 1.5)
    grid = figure.subplots(rows, columns, sharex=True, sharey="row", squeeze=False)
    time_axis = np.arange(visible(found).shape[1]) - found.context + 1
    seen = visible(found)[list(windows)]
    for row, entry in enumerate((*entries, *steps)):
        true = np.where(seen, entry.true[list(windows)], np.nan)
        expected = np.where(seen, entry.predicted[:, list(windows)], np.nan)
        if entry in steps:
            after = found.steps.cpu().numpy()[list(windows)]
            true[:, found.context :] = np.where(after, entry.true[list(windows), found.context :], np.nan)
            expected[..., found.context :] = np.where(after, entry.predicted[:, list(windows), found.context :], np.nan)
        for column in range(columns):
            axes = grid[row, column]
            mark_context(axes, time_axis, found.context)
            axes.plot(time_axis, true[column], label="recorded", **TRUE)
            _plot_futures(axes, time_axis, expected[:, column])
            axes.tick_params(labelsize=8)
        grid[row, 0].set_ylim(*_limits(true, expected, entry.is_probability))
        grid[row, 0].set_ylabel(entry.name, fontsize=9)
    for column, window in enumerate(windows):
        grid[0, column].set_title(f"window {column + 1}{ending(found, window)}", fontsize=9)
        grid[-1, column].set_xlabel("steps ahead", fontsize=9)
    set_title(
        figure,
        title,
        no_decoder(found),
        "grey: rows that the model sees; right of them it sees only the actions",
    )
    share_legend(figure)
    return figure


def _reward_entry(found: OpenLoop) -> Entry:
    earned = found.real.rewards.float().cpu().numpy()
    return Entry("reward", *_on_arrival(found, earned, found.rewards.cpu().numpy()))


def _continue_entry(found: OpenLoop) -> list[Entry]:
    """The continuation probability; empty if the model is certain that episodes always go on."""
    if bool((found.continues == 1).all()):
        return []
    went_on = 1.0 - found.real.terminations.float().cpu().numpy()
    return [Entry("continue", *_on_arrival(found, went_on, found.continues.cpu().numpy()), is_probability=True)]


def _value_entry(found: OpenLoop) -> list[Entry]:
    """The value of states that have seen the observations, and of predicted ones; empty with a decoder."""
    if found.values is None or found.observed_values is None:
        return []
    true, ahead = found.observed_values.cpu().numpy(), found.values.cpu().numpy()
    expected = np.full((len(ahead), *true.shape), np.nan, np.float32)
    expected[:, :, found.context :] = ahead
    return [Entry("value", true, expected)]


def _on_arrival(found: OpenLoop, actual: np.ndarray, predicted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Moves the outcome of each row's action `[B, T]`, and its prediction `[S, B, H]`, to the row after it.

    NaN where there was no previous action, and for predictions in the context. `[B, T]`, `[S, B, T]`
    """
    assert found.real.is_first is not None
    outcome = np.concatenate([np.full_like(actual[:, :1], np.nan), actual[:, :-1]], 1)
    outcome[found.real.is_first.cpu().numpy()] = np.nan
    expected = np.full((len(predicted), *outcome.shape), np.nan, np.float32)
    expected[:, :, found.context :] = predicted
    return outcome, expected


def _plot_futures(axes: Axes, time_axis: np.ndarray, futures: np.ndarray) -> None:
    """Plots the mean of futures `[S, T]`, and a band that contains most of them."""
    axes.plot(time_axis, futures.mean(0), label="predicted", **PREDICTED)
    if len(futures) > 1:
        low, high = np.quantile(futures, (LOW, HIGH), axis=0)
        share = f"{HIGH - LOW:.0%} of {len(futures)} futures"
        axes.fill_between(time_axis, low, high, label=share, **BAND)


def _limits(true: np.ndarray, predicted: np.ndarray, is_probability: bool) -> tuple[float, float]:
    """Limits of an axis: they include all recorded values, and cut off predictions that are far away."""
    if is_probability:
        return -0.05, 1.05
    known = true[np.isfinite(true)]
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 0.0)
    span = high - low
    if span == 0:
        span = abs(low) or 1.0
    expected = predicted[np.isfinite(predicted)]
    least = max(float(expected.min(initial=low)), low - span)
    most = min(float(expected.max(initial=high)), high + span)
    if high == low:  # small errors should look small
        least, most = min(least, low - span / 10), max(most, high + span / 10)
    return least - 0.08 * span, most + 0.08 * span
