"""Probabilities and means of two-hot distributions in one pass; `worldflux.nn.distributions.TwoHot` defines them."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from worldflux.nn.fast.kernels import kernels


def two_hot_mean(logits: Tensor, bins: Tensor, rounding: float) -> tuple[Tensor, Tensor] | None:
    """Computes the probabilities and means of two-hot distributions without gradient.

    Args:
        logits: Logits of the distributions. `[..., n]`
        bins: Values of the bins. `[n]`
        rounding: Relative difference up to which the probabilities of two mirrored bins count as equal.

    Returns:
        Probabilities `[..., n]` and means `[...]`, or None if the kernels cannot be used.
    """
    run = kernels(logits, bins, elements=logits.numel())
    if run is None or not (logits.is_contiguous() and bins.is_contiguous()):
        return None
    probs, mean = torch.empty_like(logits), logits.new_empty(logits.shape[:-1])
    given, values, found, means = (ctypes.c_void_p(x.data_ptr()) for x in (logits, bins, probs, mean))
    run.two_hot(mean.numel(), len(bins), given, values, ctypes.c_float(0.5 * rounding), found, means)
    return probs, mean
