"""Health metrics, which show whether training of a world model is collapsing, and measurements shared by all families.

The `health.py` of each family defines its metrics and their thresholds, in `DREAMERV3_THRESHOLDS` and
`TDMPC2_THRESHOLDS`. Nothing here is part of a gradient step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from worldflux.nn.transforms import symlog

_EDGE = 0.95
"""Fraction of a two-hot distribution's range in symlog space from which a number counts as being at its edge."""

_SAME = 1e-6
"""Mean distance from the average below which values count as constant up to rounding."""


@dataclass(frozen=True)
class Threshold:
    """Limit of a health metric, and advice for values beyond it."""

    value: float
    """The threshold."""
    bad: Literal["above", "below"]
    """Side of the threshold that is bad; the threshold itself is good."""
    advice: str
    """Meaning of a bad value and what to try, in one sentence."""


@dataclass(frozen=True)
class HealthMetric:
    """Measured value of a health metric and its threshold."""

    name: str
    """Name of the metric in the log, such as `kl_at_free_nats`."""
    value: float
    """The measured value."""
    threshold: Threshold
    """The threshold of the metric."""

    @property
    def is_bad(self) -> bool:
        """Whether the value is beyond its threshold or not finite."""
        if not math.isfinite(self.value):
            return True
        return self.value > self.threshold.value if self.threshold.bad == "above" else self.value < self.threshold.value

    def __str__(self) -> str:
        """Returns the value with its threshold, and the advice if it is bad."""
        line = f"{self.name} {self.value:.4g} (bad {self.threshold.bad} {self.threshold.value:g})"
        return f"{line}: {self.threshold.advice}" if self.is_bad else line


def read(values: Mapping[str, Tensor], thresholds: Mapping[str, Threshold]) -> tuple[HealthMetric, ...]:
    """Transfers measured scalars to the host, all at once, and combines them with their thresholds.

    Args:
        values: Scalars on one device, by name.
        thresholds: Threshold of each metric by name, in the order of the result.
    """
    numbers = torch.stack([values[name].float() for name in thresholds]).tolist()
    return tuple(
        HealthMetric(name, number, threshold)
        for (name, threshold), number in zip(thresholds.items(), numbers, strict=True)
    )


def counted_mean(values: Tensor, counted: Tensor) -> Tensor:
    """Computes the mean of the values that count, or 0 if there are none.

    Args:
        values: Values to average. `[...]`
        counted: 1 for values that count, else 0; broadcasts to `[...]`.
    """
    counted = counted.expand_as(values).float()
    return (values * counted).sum() / counted.sum().clamp(min=1.0)


def share_constant(groups: Tensor, counted: Tensor) -> Tensor:
    """Computes the fraction of a latent state's groups that are constant over the batch; 0 if at most one step counts.

    A group is constant if the total variation distance between its probabilities and their average over the batch,
    averaged over the steps, is below 1e-6, that is, if they are equal up to rounding. The limit is this small because a
    newly initialised image encoder may give distances of only 1e-5 and still learn.

    Args:
        groups: Probabilities that sum to 1 within each of G groups. `[B, T, G, C]`
        counted: 1 for steps that count, else 0. `[B, T]`
    """
    groups = groups.float()
    weights = (counted / counted.sum().clamp(min=1.0))[..., None, None]
    average = (weights * groups).sum((0, 1))
    distance = (weights * (groups - average).abs()).sum((0, 1, 3)) / 2  # [G]
    return (distance < _SAME).float().mean() * (counted.sum() > 1)


def share_at_edge(targets: Tensor, counted: Tensor, limit: Tensor | float) -> Tensor:
    """Computes the fraction of value targets at or beyond the edge of what a two-hot distribution can represent.

    Args:
        targets: Targets in reward units. `[...]`
        counted: 1 for targets that count, else 0. `[...]`
        limit: Outermost bin in symlog space. A target `y` is at the edge if `|symlog(y)| >= 0.95 * limit`.
    """
    return counted_mean((symlog(targets).abs() >= _EDGE * limit).float(), counted)


def randomness(values: Tensor, counted: Tensor, lowest: float, highest: float) -> Tensor:
    """Computes the mean entropy or log standard deviation of a policy, scaled from its minimum (0) to its maximum (1).

    Args:
        values: Entropies in nats, or log standard deviations. `[...]`
        counted: 1 for values that count, else 0; broadcasts to `[...]`.
        lowest: Value of a policy without any exploration.
        highest: Value of a policy without any preference. If it is not above `lowest`, the policy cannot collapse, and
            the result is 1.
    """
    if highest <= lowest:
        return torch.ones((), device=values.device)
    return counted_mean((values - lowest) / (highest - lowest), counted)


def largest_reward(rewards: Tensor) -> Tensor:
    """Computes the largest magnitude of a batch's rewards `[...]`, which is at least 1. `[]`

    The papers' own normalisers also divide by at least 1: if all rewards are smaller, or if rewards are rare and the
    batch contains none, values of up to one unit of reward per step are normal.
    """
    return rewards.detach().abs().max().clamp(min=1.0)


def value_over_rewards(targets: Tensor, counted: Tensor, bound: Tensor | float, scale: Tensor | float) -> Tensor:
    """Computes the ratio of the values to the largest possible return; above 1 they promise more than can be earned.

    Args:
        targets: Targets of the values, of which the 95th percentile of the magnitudes is taken. `[...]`
        counted: 1 for targets that count, else 0. `[...]`
        bound: Discounted return of earning the largest reward in every step forever. Broadcasts to `[...]`
        scale: Running scale of the values as a fraction of its own bound; a lower limit of the result. `[]`

    Returns:
        A scalar, which is infinite if a target that counts is not finite.
    """
    shares = (targets.detach().float().abs() / bound).masked_fill(counted == 0, torch.nan)
    percentile = torch.nanquantile(shares, 0.95).nan_to_num(0.0)
    broken = ((counted > 0) & ~torch.isfinite(targets)).any()
    percentile = percentile.masked_fill(broken, torch.inf)
    return torch.maximum(percentile, torch.as_tensor(scale, device=percentile.device, dtype=percentile.dtype))
