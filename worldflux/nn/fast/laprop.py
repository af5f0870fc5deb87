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
    """Updates parameters, momenta and mean squares in place, unless the kernels cannot be used.

    Args:
        parameters: Parameters to update.
        grads: Gradients of the parameters, before clipping.
        mu: Momenta.
        nu: Running means of the squared gradients.
        agc: Largest norm of a gradient as a fraction of the norm of its parameter; None disables clipping.
        least_norm: Lower bound of the parameters' norms in clipping.
        betas: Decay rates of `mu` and `nu`.
        eps: Term added to the square root of `nu`.
        share: Weight of a scaled gradient in `mu`.
        keep: Factor on the parameters.
        rate: Factor on the update that is added to them.

    Returns:
        True, or False if the kernels cannot be used, in which case nothing is changed.
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
