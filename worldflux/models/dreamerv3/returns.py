"""Lambda returns and running percentiles for their normalisation."""

from __future__ import annotations

import torch
from torch import Tensor

from worldflux.accel import ranks


def lambda_return(
    reward: Tensor, discount: Tensor, lam: Tensor | float, bootstrap: Tensor, *, trace: Tensor | None = None
) -> Tensor:
    """Computes TD(lambda) targets backwards from `target[T-1] = bootstrap[T-1]`:

        target[t] = reward[t+1] + discount[t+1] * ((1 - lam[t+1]) * bootstrap[t+1] + lam[t+1] * target[t+1])

    Rewards and discounts are stored at the step that they lead *to*; their first entries are not used.

    Args:
        reward: Reward on arriving at each step. `[N, T]`
        discount: Weight of everything from that step onwards; 0 where the episode terminated on arriving. `[N, T]`
        lam: Lambda: 0 uses the bootstrap after one step, 1 uses the whole sequence.
        bootstrap: Estimate of the return from each step onwards. `[N, T]`
        trace: Factor on `lam` for each step; 0 where the episode ends. `[N, T]`

    Returns:
        Targets of the first T-1 steps. `[N, T-1]`

    Source: DreamerV3, arXiv:2301.04104, critic learning.
    """
    mix = lam if trace is None else lam * trace[:, 1:]
    fixed = reward[:, 1:] + discount[:, 1:] * (1 - mix) * bootstrap[:, 1:]
    carried = discount[:, 1:] * mix
    if fixed.shape[1] == 0:
        return fixed
    target = bootstrap[:, -1]
    targets = []
    for t in range(fixed.shape[1] - 1, -1, -1):
        target = fixed[:, t] + carried[:, t] * target
        targets.append(target)
    return torch.stack(targets[::-1], 1)


def update_percentiles(low: Tensor, high: Tensor, values: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    """Moves running 5th and 95th percentiles towards those of `values`, without bias correction.

    Args:
        low: Running 5th percentile. `[]`
        high: Running 95th percentile. `[]`
        values: Values of any shape.
        rate: Weight of the new percentiles.

    Returns:
        The updated `low` and `high`, without gradient.

    Source: DreamerV3, arXiv:2301.04104, return normalisation.
    """
    # Created on the device: a tensor from Python numbers would require a copy for which the host waits.
    shares = torch.linspace(0.05, 0.95, 2, device=values.device)
    quantiles = torch.quantile(ranks.gathered(values.detach().float().flatten()), shares)
    return torch.lerp(low, quantiles[0], rate), torch.lerp(high, quantiles[1], rate)
