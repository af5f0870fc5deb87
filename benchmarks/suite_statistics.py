"""Statistics of the scores of several runs: intervals over seeds, and the interquartile mean of a suite."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

RESAMPLES = 2_000

_T_95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
"""0.975 quantiles of Student's t distribution with 1 to 30 degrees of freedom."""


def t_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Student's t interval (95 %) of the mean, or None for fewer than two values.

    A bootstrap interval would be far too narrow for the two to five seeds of a task.
    """
    count = len(values)
    if count < 2:
        return None
    t = _T_95[count - 2] if count - 2 < len(_T_95) else 1.96
    mean, half = float(np.mean(values)), t * float(np.std(values, ddof=1)) / math.sqrt(count)
    return mean - half, mean + half


def iqm(values: Sequence[float] | np.ndarray) -> float:
    """The interquartile mean, that is, the mean without the lowest and the highest quarter of the values.

    The number of values in a quarter is rounded down, as in `scipy.stats.trim_mean(values, 0.25)` and in rliable.
    """
    ordered = np.sort(np.asarray(values, dtype=float).ravel())
    cut = len(ordered) // 4
    return float(ordered[cut : len(ordered) - cut].mean())


def mean(values: Sequence[float] | np.ndarray) -> float:
    """The mean of all values."""
    return float(np.mean(values))


def stratified_interval(
    tasks: Sequence[np.ndarray], statistic: Callable[[np.ndarray], float], resamples: int = RESAMPLES
) -> tuple[float, float] | None:
    """Bootstrap interval (95 %) of a statistic of the scores of all tasks and seeds.

    Each resample draws seeds with replacement, separately for each task (Agarwal et al., 2021, arXiv:2108.13264).

    Args:
        tasks: Scores `[S]` of the seeds of each task.
        statistic: Function of all scores.
        resamples: Number of resamples; more make the interval more precise.

    Returns:
        The ends of the interval, or None if no task has two seeds.
    """
    if all(len(scores) < 2 for scores in tasks):
        return None
    rng = np.random.default_rng(0)
    drawn = [scores[rng.integers(len(scores), size=(resamples, len(scores)))] for scores in tasks]
    found = [statistic(row) for row in np.concatenate(drawn, axis=1)]
    low, high = np.percentile(found, (2.5, 97.5))
    return float(low), float(high)


def windowed(steps: np.ndarray, scores: np.ndarray, end: float, window: int) -> float | None:
    """The score of a run at a step.

    Args:
        steps: Steps `[N]` of its scores, ascending.
        scores: Scores `[N]`.
        end: The step.
        window: Number of steps before `end` over which scores are averaged; 0 uses the last score.

    Returns:
        The mean over `(end - window, end]`, or the last score before if the window has none, or None if there is none.
    """
    known = steps <= end
    inside = known & (steps > end - window)
    if window and inside.any():
        return float(scores[inside].mean())
    return float(scores[known][-1]) if known.any() else None
