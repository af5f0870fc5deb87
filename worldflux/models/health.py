"""Health metrics: numbers that tell whether a world model is dying, and what all families measure alike.

What is measured, and from where on it is bad, stands at `DREAMERV3_THRESHOLDS` and `TDMPC2_THRESHOLDS` in the
`health.py` of each family. Nothing here is part of a gradient step.
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
"""Share of a two-hot distribution's range in symlog space, from which on a number counts as at its edge."""

_SAME = 1e-6
"""Mean distance from the average up to which numbers are the same everywhere, but for rounding."""


@dataclass(frozen=True)
class Threshold:
    """From where on a metric is bad, and what to do then."""

    value: float
    bad: Literal["above", "below"]
    """The side of the threshold that is bad; the threshold itself is good."""
    advice: str
    """What a bad value means and what to try, in one sentence."""


@dataclass(frozen=True)
class HealthMetric:
    """One number that tells whether a model is dying."""

    name: str
    """As in the log, such as `kl_at_free_nats`."""
    value: float
    threshold: Threshold

    @property
    def is_bad(self) -> bool:
        """Whether the value is beyond its limit; a value that is not finite always is."""
        if not math.isfinite(self.value):
            return True
        return self.value > self.threshold.value if self.threshold.bad == "above" else self.value < self.threshold.value

    def __str__(self) -> str:
        """The value with its limit; if it is bad, also what to do."""
        line = f"{self.name} {self.value:.4g} (bad {self.threshold.bad} {self.threshold.value:g})"
        return f"{line}: {self.threshold.advice}" if self.is_bad else line


def read(values: Mapping[str, Tensor], thresholds: Mapping[str, Threshold]) -> tuple[HealthMetric, ...]:
    """Brings measured scalars to the host, all at once, and puts their limits beside them.

    Args:
        values: Scalars on one device, by name.
        thresholds: Of each of these names, in the order of the result.
    """
    numbers = torch.stack([values[name].float() for name in thresholds]).tolist()
    return tuple(
        HealthMetric(name, number, threshold)
        for (name, threshold), number in zip(thresholds.items(), numbers, strict=True)
    )


def counted_mean(values: Tensor, counted: Tensor) -> Tensor:
    """Mean of what counts; 0 if nothing does.

    Args:
        values: `[...]`
        counted: 1 or 0. Broadcasts to `[...]`
    """
    counted = counted.expand_as(values).float()
    return (values * counted).sum() / counted.sum().clamp(min=1.0)


def share_constant(groups: Tensor, counted: Tensor) -> Tensor:
    """Share of a latent state's groups that do not vary over the batch; 0 if fewer than two steps count.

    A group is constant if its distance from the batch's average, half the sum of the absolute differences, is below
    1e-6 in the mean over the steps: the same but for rounding. It is that small, because a fresh encoder of pictures
    may give only 1e-5, and learns from there.

    Args:
        groups: Probabilities that sum to 1 within each of G groups. `[B, T, G, C]`
        counted: 1 or 0. `[B, T]`
    """
    groups = groups.float()
    weights = (counted / counted.sum().clamp(min=1.0))[..., None, None]
    average = (weights * groups).sum((0, 1))
    distance = (weights * (groups - average).abs()).sum((0, 1, 3)) / 2  # [G]
    return (distance < _SAME).float().mean() * (counted.sum() > 1)


def share_at_edge(targets: Tensor, counted: Tensor, limit: Tensor | float) -> Tensor:
    """Share of the values' targets that lie at the edge of what a two-hot distribution can express, or beyond it.

    Args:
        targets: In reward units. `[...]`
        counted: 1 or 0. `[...]`
        limit: The outermost bin, in symlog space. Of a target `y`, `|symlog(y)| >= 0.95 * limit` is at the edge.
    """
    return counted_mean((symlog(targets).abs() >= _EDGE * limit).float(), counted)


def largest_reward(rewards: Tensor) -> Tensor:
    """Largest magnitude of a batch's rewards, and at least 1. `[...]` → `[]`

    The papers' own normalisers divide by at least 1 too: where all rewards are smaller, or a batch happens to hold none
    of the rare ones, values up to one unit of reward per step are nothing unusual.
    """
    return rewards.detach().abs().max().clamp(min=1.0)


def value_over_rewards(targets: Tensor, counted: Tensor, bound: Tensor | float, scale: Tensor | float) -> Tensor:
    """How much of what rewards can add up to the values claim: above 1 they claim more than anybody can earn.

    Args:
        targets: What the values are trained towards; the 95th percentile of their magnitudes is taken. `[...]`
        counted: 1 or 0. `[...]`
        bound: The largest reward in every step for ever, discounted. Broadcasts to `[...]`
        scale: The running scale of values, as a share of its own bound; the result is at least that. `[]`

    Returns:
        A scalar, infinite if a target that counts is not finite.
    """
    shares = (targets.detach().float().abs() / bound).masked_fill(counted == 0, torch.nan)
    percentile = torch.nanquantile(shares, 0.95).nan_to_num(0.0)
    broken = ((counted > 0) & ~torch.isfinite(targets)).any()
    percentile = percentile.masked_fill(broken, torch.inf)
    return torch.maximum(percentile, torch.as_tensor(scale, device=percentile.device, dtype=percentile.dtype))
