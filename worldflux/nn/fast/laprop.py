"""LaProp's update in two passes over each tensor; `worldflux.training.optim.LaProp` defines it."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from torch import Tensor

from worldflux.nn.fast.kernels import addresses, kernels


def laprop(
    parameters: Sequence[Tensor],
    grads: Sequence[Tensor],
    mu: Sequence[Tensor],
    nu: Sequence[Tensor],
    *,
    agc: float | None,
    least_norm: float,
    betas: tuple[float, float],
    eps: float,
    share: float,
    keep: float,
    rate: float,
) -> bool:
    """Updates the tensors, all but the gradients in place; False, and nothing done, where the kernels do not apply.

    Args:
        parameters: To update.
        grads: Theirs, before clipping.
        mu: Momenta.
        nu: Mean squares.
        agc: Largest norm of a gradient as a share of the norm of its tensor; None: no clipping.
        least_norm: Norm that a smaller tensor is taken to have.
        betas: Decay of `mu` and `nu`.
        eps: Added to the root of `nu`.
        share: Of a scaled gradient in `mu`.
        keep: Factor on the parameters.
        rate: Factor on what is added to them.
    """
    tensors = (*parameters, *grads, *mu, *nu)
    sizes = [p.numel() for p in parameters]
    run = kernels(*tensors, elements=max(sizes))
    if run is None or not all(x.is_contiguous() for x in tensors):
        return False
    numbers = (agc or 0.0, least_norm, *betas, eps, share, keep, rate)
    run.laprop(
        len(sizes),
        (ctypes.c_long * len(sizes))(*sizes),
        *(addresses(group) for group in (parameters, grads, mu, nu)),
        *(ctypes.c_float(number) for number in numbers),
    )
    return True
