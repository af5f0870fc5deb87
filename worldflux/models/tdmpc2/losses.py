"""Weights, scales and statistics of TD-MPC2's losses: tensors in, tensors out."""

from __future__ import annotations

import torch
from torch import Tensor


def step_weights(counted: Tensor, rho: float) -> Tensor:
    """Weight of each step in a mean over windows and steps: `rho^t` over the number of steps that count.

    With everything counted this is the reference's mean over the batch, weighted by `rho^t` and divided by the number
    of steps. Where episodes end inside windows, the mean is over what remains.

    Args:
        counted: 1 or 0. `[N, T]`
        rho: Factor from one step to the next; 1 weighs all alike.

    Returns:
        `[N, T]`; all zero if nothing counts.
    """
    decay = torch.pow(rho, torch.arange(counted.shape[1], device=counted.device))
    return counted * decay / counted.sum().clamp(min=1.0)


def value_range(values: Tensor, counted: Tensor) -> Tensor:
    """Distance from the 5th to the 95th percentile of the values that count, interpolated linearly; NaN if none does.

    Args:
        values: `[N]`
        counted: 1 or 0. `[N]`
    """
    percentiles = value_percentiles(values, counted)
    return percentiles[1] - percentiles[0]


def value_percentiles(values: Tensor, counted: Tensor) -> Tensor:
    """5th and 95th percentile of the values that count. `[N]`, `[N]` → `[2]`"""
    # Made on the device: a tensor from Python numbers would be a copy that the host waits for.
    shares = torch.linspace(0.05, 0.95, 2, device=values.device)
    return torch.nanquantile(values.detach().float().masked_fill(counted == 0, torch.nan), shares)


def moved_scale(scale: Tensor, spread: Tensor, rate: float) -> Tensor:
    """The running scale of values, moved towards a batch's spread, of which at least 1 is taken.

        scale + rate * (max(1, spread) - scale)

    Args:
        scale: Running scale. `[]`
        spread: Of this batch; NaN leaves the scale as it is. `[]`
        rate: Share of the new spread.

    Source: TD-MPC2, arXiv:2310.16828, policy objective.
    """
    return torch.lerp(scale, torch.where(spread.isnan(), scale, spread.clamp(min=1.0)), rate)


def termination_statistics(probability: Tensor, terminated: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """How often steps terminated, and the F1 score of predicting it at a probability above one half.

    Args:
        probability: Predicted. `[N]`
        terminated: 1 or 0. `[N]`
        counted: 1 or 0. `[N]`

    Returns:
        Rate and score, scalars.
    """
    eps = 1e-9
    guessed, happened = (probability > 0.5) * counted, terminated * counted
    hits = (guessed * happened).sum()
    precision = hits / (guessed.sum() + eps)
    recall = hits / (happened.sum() + eps)
    score = 2.0 * precision * recall / (precision + recall + eps)
    return happened.sum() / counted.sum().clamp(min=1.0), score
