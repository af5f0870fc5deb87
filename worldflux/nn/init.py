"""Initialisation of weights as in the reference implementations."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# A standard normal truncated to [-2, 2] has a standard deviation of 0.8796; this factor brings it back to 1.
_TRUNCATION_CORRECTION = 1.1368


@torch.no_grad()
def truncated_normal_(kernel: Tensor, fan_in: int, scale: float = 1.0) -> Tensor:
    """Fills a kernel in place with `scale * 1.1368 / sqrt(fan_in) * z`, where z is a normal truncated to [-2, 2].

    Args:
        kernel: Tensor of any shape, changed in place.
        fan_in: Number of inputs that one output sums over. For a block-linear layer this is the full input width.
        scale: Factor on the values; 0 gives a kernel of exact zeros (reward and value outputs start at zero).
    """
    if scale == 0.0:
        return kernel.zero_()
    torch.nn.init.trunc_normal_(kernel, std=1.0, a=-2.0, b=2.0)
    return kernel.mul_(scale * _TRUNCATION_CORRECTION / math.sqrt(fan_in))


@torch.no_grad()
def narrow_normal_(weight: Tensor) -> Tensor:
    """Fills a weight in place from a normal of standard deviation 0.02 truncated to [-2, 2], as TD-MPC2 does."""
    return torch.nn.init.trunc_normal_(weight, std=0.02)
