"""Random dropout factors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_RARE = 0.05
"""Rate below which drawing the positions of the zeros is faster than drawing a number for every factor."""


def dropout_factors(shape: Sequence[int], rate: float, device: torch.device) -> Tensor:
    """Draws independent factors that are 0 with probability `rate` and `1 / (1 - rate)` otherwise. `[*shape]`

    A CPU draws random numbers sequentially. If zeros are rare, the distances between them are drawn instead, which are
    geometrically distributed; at a rate of 1% this takes a hundredth of the random numbers.

    Args:
        shape: Shape of the result.
        rate: Dropout rate in [0, 1).
        device: Device to draw on.
    """
    if device.type != "cpu" or rate >= _RARE or rate == 0.0 or torch.compiler.is_compiling():
        return (torch.rand(shape, device=device) >= rate) / (1.0 - rate)
    count = math.prod(shape)
    # Ten standard deviations more than the expected number, so that the distances always reach the end.
    draws = math.ceil(count * rate + 10.0 * math.sqrt(count * rate) + 10.0)
    distances = torch.empty(draws).exponential_().div_(-math.log1p(-rate)).floor_().add_(1.0)
    places = distances.double().cumsum_(0).sub_(1.0).clamp_(max=count).long()
    # One extra position collects all zeros that fall beyond the end.
    factors = torch.full((count + 1,), 1.0 / (1.0 - rate))
    return factors.index_fill_(0, places, 0.0)[:count].view(*shape)
