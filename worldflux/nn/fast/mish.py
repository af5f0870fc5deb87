"""Layers of TD-MPC2 as hand-written autograd nodes for CPUs; `worldflux.nn.mish` is the definition.

Computed separately, linear layer, LayerNorm and Mish take about thirty passes over activations that do not fit into a
core's cache, forward and backward together. As one node they take twelve. Ensemble members are processed one at a time
while their activations are still in the cache, and the forward pass stores the slope of Mish for the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from worldflux.nn.definitions import fast_forms

LAYER_NORM_EPS = 1e-5


def applies(x: Tensor) -> bool:
    """Returns whether the nodes support this input: on a CPU, and not under `torch.compile`, which fuses by itself."""
    suited = x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)
    # The order matters: torch.compile cannot trace `fast_forms`.
    return suited and not torch.compiler.is_compiling() and fast_forms()


def mish(x: Tensor) -> Tensor:
    """Computes Mish of a float32 tensor of any shape.

    With `s = sigmoid(x)` and `p = 1 - (1 - s)^2` it is `x * p / (2 - p)`. This takes one exponential, while torch's own
    kernel takes three transcendental functions, and is accurate to the last bits for every x.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        return _Mish.apply(x)
    return _mish(x, torch.empty_like(x), torch.empty_like(x))


def _mish(x: Tensor, s: Tensor, p: Tensor) -> Tensor:
    """Computes Mish in the given memory and returns `p`, which holds the result."""
    torch.sigmoid(x, out=s)
    torch.lerp(s, s.new_ones(()), s, out=p)
    return p.div_(torch.sub(2.0, p, out=s)).mul_(x)


def mish_and_slope(x: Tensor, out: Tensor) -> Tensor:
    """Writes Mish to `out` and returns its derivative: with `r = 1 / (2 - p)`, `p r + 4 x s (r - r^2)`."""
    s = torch.sigmoid(x)
    p = torch.lerp(s, s.new_ones(()), s)
    r = torch.sub(2.0, p)
    t = p.div_(r)
    torch.mul(x, t, out=out)
    r.reciprocal_()
    return t.addcmul_(s.mul_(x), r.addcmul_(r, r, value=-1.0), value=4.0)


class _Mish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        ctx.save_for_backward(mish_and_slope(x, out))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (slope,) = ctx.saved_tensors
        return grad * slope


def mish_layer(
    parts: Sequence[Tensor], weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, dropout: Tensor | None = None
) -> Tensor:
    """Computes `mish(layer_norm(dropout * linear(parts)))` of M members, with autocast's precision in matrix products.

    Args:
        parts: Inputs to concatenate on the last axis, each `[N, p]` if all members share it, or `[M, N, p]`. All are
            float32 or bfloat16.
        weight: Weight of the linear layer. `[M, out, in]`
        bias: Bias of the linear layer. `[M, out]`
        scale: Scale of the LayerNorm. `[M, out]`
        shift: Shift of the LayerNorm. `[M, out]`
        dropout: Factors on the output of the linear layer. `[M, N, out]`

    Returns:
        The output in autocast's precision. `[M, N, out]`
    """
    precision = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else weight.dtype
    layer = (weight, bias, scale, shift, dropout)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (*layer[:4], *parts)):
        return _MishLayer.apply(precision, *layer, *parts)
    with torch.autocast("cpu", enabled=False):
        return _without_gradient(precision, *layer, _joined(parts, precision))


def _joined(parts: Sequence[Tensor], precision: torch.dtype) -> Tensor:
    return torch.cat([part.to(precision) for part in parts], -1) if len(parts) > 1 else parts[0].to(precision)


def _without_gradient(
    precision: torch.dtype,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor,
    shift: Tensor,
    dropout: Tensor | None,
    x: Tensor,
) -> Tensor:
    """Computes the layer for its concatenated input. `[M, N, out]`"""
    M, width, _ = weight.shape
    out, y = torch.empty(M, x.shape[-2], width), torch.empty(x.shape[-2], width)
    for m in range(M):
        _linear(x if x.ndim == 2 else x[m], weight[m].to(precision), bias[m].to(precision), y)
        if dropout is not None:
            y.mul_(dropout[m])
        normed = torch.native_layer_norm(y, (width,), scale[m], shift[m], LAYER_NORM_EPS)[0]
        _mish(normed, y, out[m])
    return out.to(precision)


def _linear(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> None:
    """Writes a linear layer's output to the float32 tensor `out`, whatever precision the product is computed in."""
    if x.dtype == out.dtype:
        torch.addmm(bias, x, weight.t(), out=out)
    else:
        out.copy_(F.linear(x, weight, bias))


class _MishLayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        precision: torch.dtype,
        weight: Tensor,
        bias: Tensor,
        scale: Tensor,
        shift: Tensor,
        dropout: Tensor | None,
        *parts: Tensor,
    ) -> Tensor:
        M, width, _ = weight.shape
        with torch.autocast("cpu", enabled=False):
            x = _joined(parts, precision)
            out = torch.empty(M, x.shape[-2], width, dtype=precision)
            saved = [x]
            for m in range(M):
                y = torch.empty(x.shape[-2], width)
                _linear(x if x.ndim == 2 else x[m], weight[m].to(precision), bias[m].to(precision), y)
                if dropout is not None:
                    y.mul_(dropout[m])
                normed, mean, rstd = torch.native_layer_norm(y, (width,), scale[m], shift[m], LAYER_NORM_EPS)
                result = out[m] if precision == torch.float32 else torch.empty_like(normed)
                saved += [y, mean, rstd, mish_and_slope(normed, result)]
                if result.dtype != precision:
                    out[m] = result
        ctx.precision = precision
        ctx.columns = list(pairwise([0, *accumulate(part.shape[-1] for part in parts)]))
        ctx.dtypes = [part.dtype for part in parts]
        ctx.save_for_backward(weight, scale, shift, dropout, *saved)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale, shift, dropout, x, *saved = ctx.saved_tensors
        M, width, _ = weight.shape
        shared = x.ndim == 2
        _, to_weight, to_bias, to_scale, to_shift, _, *to_parts = ctx.needs_input_grad
        d_weight = torch.empty_like(weight) if to_weight else None
        d_bias = weight.new_empty(M, width) if to_bias else None
        d_scale, d_shift = [], []
        d_parts = [
            torch.empty(*x.shape[:-1], stop - start, dtype=torch.float32 if shared else ctx.precision)
            if needed
            else None
            for needed, (start, stop) in zip(to_parts, ctx.columns, strict=True)
        ]
        for m in range(M):
            y, mean, rstd, slope = saved[4 * m : 4 * m + 4]
            d_y, *d_norm = torch.ops.aten.native_layer_norm_backward(
                grad[m] * slope, y, (width,), mean, rstd, scale[m], shift[m], [True, to_scale, to_shift]
            )
            d_scale.append(d_norm[0])
            d_shift.append(d_norm[1])
            if dropout is not None:
                d_y.mul_(dropout[m])
            if d_bias is not None:
                torch.sum(d_y, 0, out=d_bias[m])
            d_y = d_y.to(ctx.precision)
            if d_weight is not None:
                _product(d_y.t(), x if shared else x[m], d_weight[m])
            for d_part, (start, stop) in zip(d_parts, ctx.columns, strict=True):
                if d_part is None:
                    continue
                columns = weight[m, :, start:stop].to(ctx.precision)
                if not shared or m == 0:
                    _product(d_y, columns, d_part if shared else d_part[m])
                elif ctx.precision == torch.float32:
                    d_part.addmm_(d_y, columns)
                else:
                    d_part.add_(d_y @ columns)
        parts = [None if d is None else d.to(dtype) for d, dtype in zip(d_parts, ctx.dtypes, strict=True)]
        return (
            None,
            d_weight,
            d_bias,
            torch.stack(d_scale) if to_scale else None,
            torch.stack(d_shift) if to_shift else None,
            None,
            *parts,
        )


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Writes a matrix product to `out`, which may have another dtype than the operands."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a @ b)
