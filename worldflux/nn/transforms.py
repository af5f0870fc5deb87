"""Squashing transforms and the bins of two-hot distributions."""

from __future__ import annotations

import torch
from torch import Tensor


def symlog(x: Tensor) -> Tensor:
    """Computes `sign(x) * log(1 + |x|)`: linear around zero, logarithmic far from it. Inverse of `symexp`."""
    return torch.sign(x) * torch.log1p(torch.abs(x))


def symexp(x: Tensor) -> Tensor:
    """Computes `sign(x) * (exp|x| - 1)`. Inverse of `symlog`."""
    return torch.sign(x) * torch.expm1(torch.abs(x))


def symexp_bins(count: int, limit: float = 20.0) -> Tensor:
    """Returns bins for two-hot targets from `-symexp(limit)` to `symexp(limit)`, evenly spaced in symlog space.
    One half mirrors the other, so that the bins are antisymmetric to the last bit and a uniform distribution over them
    has a mean of exactly zero.

    Args:
        count: Odd number of bins; the middle one is 0.
        limit: Largest magnitude in symlog space.

    Returns:
        Increasing positions. `[count]`

    Source: DreamerV3, arXiv:2301.04104, symexp twohot loss.
    """
    return _mirrored(symexp(_up_to_zero(limit, count)))


def symlog_bins(count: int, limit: float) -> Tensor:
    """Returns evenly spaced bin positions from `-limit` to `limit`, for two-hot distributions over symlog values.

    One half mirrors the other, so that a uniform distribution over the bins has a mean of exactly zero.

    Args:
        count: Odd number of bins; the middle one is 0.
        limit: Largest magnitude.

    Returns:
        Increasing positions. `[count]`
    """
    return _mirrored(_up_to_zero(limit, count))


def _up_to_zero(limit: float, count: int) -> Tensor:
    """Returns the positions from `-limit` to 0 of `count` evenly spaced bins. `[(count + 1) / 2]`

    They are on the CPU: computing them on the meta device, which shows the shapes of a model before it is loaded, would
    import torch's compiler, which takes seconds.
    """
    return torch.linspace(-limit, 0.0, (count - 1) // 2 + 1, dtype=torch.float64, device="cpu")


def _mirrored(half: Tensor) -> Tensor:
    """Adds the positive bins to those up to zero, on the default device. `[K]` → `[2 K - 1]`"""
    half = half.float()
    return torch.cat([half, -half[:-1].flip(0)]).to(torch.get_default_device())


def simnorm(x: Tensor, dim: int) -> Tensor:
    """Applies a softmax within consecutive groups of `dim` elements, so that each group lies on a simplex. `[..., L]`

    Source: TD-MPC2, arXiv:2310.16828, simplicial normalisation.
    """
    groups = x.unflatten(-1, (-1, dim))
    if x.device.type == "cpu":
        # torch's CPU kernel is many times faster if the axis is not the last one.
        return torch.softmax(groups.transpose(-1, -2), -2).transpose(-1, -2).flatten(-2)
    return torch.softmax(groups, -1).flatten(-2)


def bounded(actions: Tensor) -> Tensor:
    """Rescales actions with magnitudes above 1 to magnitude 1, without a gradient through the magnitude."""
    return actions / actions.abs().clamp(min=1.0).detach()
