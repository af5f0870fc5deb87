"""Initialisation of kernels as the reference implementations do it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Standard deviation of a unit normal truncated to [-2, 2] is 0.8796; this brings it back to 1.
_TRUNCATION_CORRECTION = 1.1368


@torch.no_grad()
def truncated_normal_(kernel: Tensor, fan_in: int, scale: float = 1.0) -> Tensor:
    """Fills a kernel in place with `scale * 1.1368 / sqrt(fan_in) * z`, z a unit normal truncated to [-2, 2].

    Args:
        kernel: Any shape; changed in place.
        fan_in: Inputs that one output sums over. For a block-linear layer this is the full input width.
        scale: 0 gives an exact zero kernel (reward and value outputs start at zero).
    """
    if scale == 0.0:
        return kernel.zero_()
    torch.nn.init.trunc_normal_(kernel, std=1.0, a=-2.0, b=2.0)
    return kernel.mul_(scale * _TRUNCATION_CORRECTION / math.sqrt(fan_in))


@torch.no_grad()
def narrow_normal_(weight: Tensor) -> Tensor:
    """Fills a weight in place with normal numbers of standard deviation 0.02, as TD-MPC2 does; never beyond 2."""
    return torch.nn.init.trunc_normal_(weight, std=0.02)
