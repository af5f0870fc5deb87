"""Random factors of dropout."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_RARE = 0.05
"""Below this rate, drawing where the zeros are takes less time than drawing a number for every factor."""


def dropout_factors(shape: Sequence[int], rate: float, device: torch.device) -> Tensor:
    """Independent factors: 0 with probability `rate`, else `1 / (1 - rate)`. `[*shape]`

    A CPU draws random numbers one after the other. Few zeros are therefore drawn by the distances between them, which
    are geometrically distributed: at a rate of 1 % that takes a hundredth of the numbers.

    Args:
        shape: Of the result.
        rate: At least 0 and below 1.
        device: Where to draw.
    """
    if device.type != "cpu" or rate >= _RARE or rate == 0.0 or torch.compiler.is_compiling():
        return (torch.rand(shape, device=device) >= rate) / (1.0 - rate)
    count = math.prod(shape)
    # Ten standard deviations more than are expected: that so many do not reach the end happens never.
    draws = math.ceil(count * rate + 10.0 * math.sqrt(count * rate) + 10.0)
    distances = torch.empty(draws).exponential_().div_(-math.log1p(-rate)).floor_().add_(1.0)
    places = distances.double().cumsum_(0).sub_(1.0).clamp_(max=count).long()
    # One place more than is asked for takes up all that fall behind the end.
    factors = torch.full((count + 1,), 1.0 / (1.0 - rate))
    return factors.index_fill_(0, places, 0.0)[:count].view(*shape)
