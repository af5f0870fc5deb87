"""Calibration: whether predicted rewards and continuation probabilities are right on average.

These are the numbers of `OpenLoop` predictions that the plots draw and the JSON file contains.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from worldflux.diagnostics.open_loop import HorizonError, OpenLoop, PredictionError
from worldflux.errors import TrainingError

BINS = 10
LOW, HIGH = 0.1, 0.9
"""Quantiles between which bands are drawn."""
_NORMAL = 1.96
"""Half the width of a 95 % interval, in standard deviations of a normal distribution."""


@dataclass(frozen=True)
class Calibration:
    """Predictions and outcomes, averaged over K groups of similar predictions."""

    counts: np.ndarray
    """Number of predictions in each group; may be 0. `[K]` int"""
    predicted: np.ndarray
    """Mean prediction of each group; NaN for an empty group. `[K]`"""
    actual: np.ndarray
    """Mean outcome of each group; NaN for an empty group. `[K]`"""
    low: np.ndarray
    """Lower end of a 95 % interval around `actual`, assuming independent steps. `[K]`"""
    high: np.ndarray
    """Upper end of that interval. `[K]`"""

    def as_json(self) -> list[dict[str, float | None]]:
        """One dictionary for each group that is not empty."""
        return [
            {name: as_json(values[group]) for name, values in vars(self).items()}
            for group in np.flatnonzero(self.counts)
        ]


def reward_calibration(found: OpenLoop, bins: int = BINS) -> Calibration:
    """Earned against predicted rewards, in groups of about the same size. Equal predictions share a group.

    Args:
        found: Open-loop predictions.
        bins: Largest number of groups.
    """
    predicted, earned = at_steps(found, found.rewards.mean(0)), at_steps(found, found.earned)
    if not len(predicted):
        return _grouped(predicted, earned, predicted.astype(np.int64), 0)
    edges = np.unique(np.quantile(predicted, np.linspace(0, 1, bins + 1)))
    counts, mean, actual, deviation = _grouped_moments(
        predicted, earned, np.searchsorted(edges[1:-1], predicted, side="right"), max(len(edges) - 1, 1)
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        margin = _NORMAL * deviation / np.sqrt(counts)
    return Calibration(counts, mean, actual, actual - margin, actual + margin)


def continue_calibration(found: OpenLoop, bins: int = BINS) -> Calibration:
    """Share of steps after which the episode went on, for ranges of equal width of the predicted probability.

    The interval is Wilson's.

    Args:
        found: Open-loop predictions.
        bins: Number of ranges between 0 and 1.
    """
    predicted, went_on = at_steps(found, found.continues.mean(0)), at_steps(found, found.went_on)
    return _grouped(predicted, went_on, np.clip((predicted * bins).astype(np.int64), 0, bins - 1), bins)


def _grouped(predicted: np.ndarray, happened: np.ndarray, group: np.ndarray, groups: int) -> Calibration:
    """Calibration of probabilities, given the group of each step. `[N]` each."""
    counts, mean, share, _ = _grouped_moments(predicted, happened, group, groups)
    with np.errstate(invalid="ignore", divide="ignore"):
        squared = _NORMAL**2 / counts
        centre = (share + squared / 2) / (1 + squared)
        margin = np.sqrt(squared * (share * (1 - share) + squared / 4)) / (1 + squared)
    return Calibration(counts, mean, share, centre - margin, centre + margin)


def _grouped_moments(
    predicted: np.ndarray, actual: np.ndarray, group: np.ndarray, groups: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Counts, both means, and the standard deviation of the outcomes. `[groups]` each."""

    def total(values: np.ndarray) -> np.ndarray:
        return np.bincount(group, values, minlength=groups)

    counts = np.bincount(group, minlength=groups)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean, outcome = total(predicted) / counts, total(actual) / counts
        deviation = np.sqrt(total(np.square(actual - outcome[group])) / (counts - 1))
    return counts, mean, outcome, deviation


def at_steps(found: OpenLoop, values: Tensor) -> np.ndarray:
    """The values, given as `[B, H]`, of the steps that lie in the window's episode. `[N]` float64"""
    return values[found.steps].double().cpu().numpy()


def overall_ratio(error: PredictionError) -> float:
    """The model's error over all windows and steps ahead, as a share of the error of "nothing changes".

    Infinite if nothing changed, and NaN if the model predicted that or if no step counts.
    """
    both = error.model.counts & error.unchanged.counts
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(error.model.values[both].sum() / error.unchanged.values[both].sum())


def check_finite(found: OpenLoop) -> None:
    """Raises a `TrainingError` if a prediction is not finite, because it cannot be drawn."""
    parts = {"observations": list(found.obs.values()), "rewards": [found.rewards], "continues": [found.continues]}
    if found.values is not None:
        parts["values"] = [found.values]
    for name, tensors in parts.items():
        if not all(bool(tensor.isfinite().all()) for tensor in tensors):
            raise TrainingError(
                f"The {name} that the model predicts are not finite: its training has diverged. "
                "Take an earlier checkpoint, or train again with a lower learning_rate."
            )


def summary(found: OpenLoop, errors: Mapping[str, PredictionError]) -> dict[str, Any]:
    """The numbers behind the plots, ready for JSON. None stands for numbers that are not finite or do not exist.

    Args:
        found: Open-loop predictions.
        errors: Errors of these predictions.
    """
    went_on = at_steps(found, found.went_on)
    return {
        "context": found.context,
        "horizon": found.steps.shape[1],
        "windows": found.real.batch_size,
        "futures": len(found.rewards),
        "errors": {
            name: {
                "model": _of_horizon(error.model),
                "unchanged": _of_horizon(error.unchanged),
                "ratio": as_json(error.ratio),
                "overall_ratio": as_json(overall_ratio(error)),
            }
            for name, error in errors.items()
        },
        "rewards": {
            "steps": len(went_on),
            "predicted": as_json(_mean(at_steps(found, found.rewards.mean(0)))),
            "earned": as_json(_mean(at_steps(found, found.earned))),
            "groups": reward_calibration(found).as_json(),
        },
        "continues": {
            "steps": len(went_on),
            "terminations": int(len(went_on) - went_on.sum()),
            "predicted": as_json(_mean(at_steps(found, found.continues.mean(0)))),
            "groups": continue_calibration(found).as_json(),
        },
    }


def _of_horizon(error: HorizonError) -> dict[str, Any]:
    bands = {f"quantile_{share}": error.quantile(share) for share in (LOW, HIGH)}
    columns = {"count": error.count, "mean": error.mean, "standard_error": error.standard_error, **bands}
    return {name: as_json(values) for name, values in columns.items()}


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else np.nan


def as_json(values: Any) -> Any:
    """A number or an array as JSON values, with None in place of what is not finite."""
    if np.ndim(values):
        return [as_json(value) for value in values]
    number = values.item() if isinstance(values, np.generic) else values
    return number if np.isfinite(number) else None
