"""Weights, scales and statistics of TD-MPC2's losses."""

from __future__ import annotations

import torch
from torch import Tensor

from worldflux.accel import ranks


def numbers_of(*counted: Tensor) -> tuple[Tensor, ...]:
    """Counts the steps that count in each of several masks, as the mean over the ranks of a gradient step."""
    return ranks.mean(torch.stack([mask.sum() for mask in counted])).unbind()


def step_weights(counted: Tensor, rho: float, number: Tensor | None = None) -> Tensor:
    """Computes the weight of each step in a mean over windows and steps: `rho^t` over the number of steps that count.

    If all steps count, this is the mean of the reference implementation over the batch, weighted by `rho^t` and divided
    by the number of steps. If episodes end inside windows, the mean is over the remaining steps.

    Args:
        counted: 1 for steps that count, else 0. `[N, T]`
        rho: Factor from one step to the next; 1 weights all steps equally.
        number: Number of steps that count, from `numbers_of`; None counts them. `[]`

    Returns:
        Weights, all zero if no step counts. `[N, T]`
    """
    decay = torch.pow(rho, torch.arange(counted.shape[1], device=counted.device))
    return counted * decay / (counted.sum() if number is None else number).clamp(min=1.0)


def value_range(values: Tensor, counted: Tensor) -> Tensor:
    """Computes the distance from the 5th to the 95th percentile of the values that count, or NaN if there are none.

    Percentiles are interpolated linearly.

    Args:
        values: Values. `[N]`
        counted: 1 for values that count, else 0. `[N]`
    """
    percentiles = value_percentiles(values, counted)
    return percentiles[1] - percentiles[0]


def value_percentiles(values: Tensor, counted: Tensor) -> Tensor:
    """Computes the 5th and 95th percentile of the values that count. `[N]`, `[N]` → `[2]`"""
    # Created on the device: a tensor from Python numbers would require a copy for which the host waits.
    shares = torch.linspace(0.05, 0.95, 2, device=values.device)
    counting = values.detach().float().masked_fill(counted == 0, torch.nan)
    return torch.nanquantile(ranks.gathered(counting), shares)


def moved_scale(scale: Tensor, spread: Tensor, rate: float) -> Tensor:
    """Moves the running scale of values towards the spread of a batch, which is at least 1.

        scale + rate * (max(1, spread) - scale)

    Args:
        scale: Running scale. `[]`
        spread: Spread of the values of this batch; NaN does not change the scale. `[]`
        rate: Weight of the new spread.

    Source: TD-MPC2, arXiv:2310.16828, policy objective.
    """
    return torch.lerp(scale, torch.where(spread.isnan(), scale, spread.clamp(min=1.0)), rate)


def termination_statistics(probability: Tensor, terminated: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Computes the rate of terminations, and the F1 score of predicting them with probabilities above one half.

    Args:
        probability: Predicted probability of termination. `[N]`
        terminated: 1 for steps that terminated, else 0. `[N]`
        counted: 1 for steps that count, else 0. `[N]`

    Returns:
        Rate and score, both scalars.
    """
    eps = 1e-9
    guessed, happened = (probability > 0.5) * counted, terminated * counted
    hits = (guessed * happened).sum()
    precision = hits / (guessed.sum() + eps)
    recall = hits / (happened.sum() + eps)
    score = 2.0 * precision * recall / (precision + recall + eps)
    return happened.sum() / counted.sum().clamp(min=1.0), score
