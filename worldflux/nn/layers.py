"""Linear layers, RMS norm with SiLU, and MLPs built from them. The order is always linear layer, norm, SiLU."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from worldflux.accel.overriding import is_untouched
from worldflux.nn.fast.norm_silu import mlps
from worldflux.nn.init import truncated_normal_

PORTION = 2048
"""Number of feature rows that are processed at a time on a CPU."""

RMS_EPS = 1e-4
"""Epsilon that every RMS norm adds to the mean of squares."""


class Linear(nn.Linear):
    """`torch.nn.Linear` with a truncated-normal kernel and a zero bias."""

    def __init__(self, in_features: int, out_features: int, *, scale: float = 1.0, bias: bool = True) -> None:
        self.scale = scale
        super().__init__(in_features, out_features, bias)

    def reset_parameters(self) -> None:
        """Draws a new kernel and sets the bias to zero."""
        truncated_normal_(self.weight, self.in_features, self.scale)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class BlockLinear(nn.Module):
    """Linear layer with a block-diagonal kernel.

    The input is split into `blocks` contiguous pieces, piece k is multiplied by `weight[k]`, and the results are
    concatenated. There are `blocks` times fewer parameters and multiplications than in a dense layer of the same width.
    """

    def __init__(self, in_features: int, out_features: int, blocks: int) -> None:
        super().__init__()
        self.blocks = blocks
        self.in_features = in_features
        self.weight = nn.Parameter(torch.empty(blocks, in_features // blocks, out_features // blocks))
        self.bias = nn.Parameter(torch.zeros(out_features))
        # The reference implementation scales by the full input width, not by the width of one block.
        truncated_normal_(self.weight, in_features)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[N, in]` to `[N, out]`."""
        return block_matmul(x, self.weight) + self.bias


def block_matmul(x: Tensor, weight: Tensor) -> Tensor:
    """Multiplies each of the g contiguous pieces of `x` by its own matrix.

    Args:
        x: Rows of g pieces. `[N, g * i]`
        weight: One matrix for each piece. `[g, i, o]`

    Returns:
        The concatenated products. `[N, g * o]`
    """
    return joined(torch.bmm(blocked(x, len(weight)), weight))


def blocked(x: Tensor, blocks: int) -> Tensor:
    """Splits each row into contiguous pieces: a view of `[N, g * i]` as `[g, N, i]`."""
    return x.unflatten(-1, (blocks, -1)).transpose(0, 1)


def joined(x: Tensor) -> Tensor:
    """Joins the pieces of each row, `[g, N, o]` to `[N, g * o]`: the inverse of `blocked`."""
    return x.transpose(0, 1).flatten(1)


class NormSiLU(nn.Module):
    """RMS norm over the last axis, `x * scale / sqrt(mean(x^2) + eps)`, followed by SiLU, computed in float32.

    This is one autograd node with a hand-written gradient. The plain chain of operations reads and writes large
    activations three times as often and took half the time of a gradient step on a CPU.
    """

    def __init__(self, width: int, eps: float = RMS_EPS) -> None:
        super().__init__()
        self.eps = eps
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[..., width]` to a tensor of the same shape."""
        if torch.is_grad_enabled():
            result: Tensor = _NormSiLU.apply(x, self.scale, self.eps)
            return result
        return _norm_silu(x.float(), self.scale, self.eps)[0].to(x.dtype)


def _norm_silu(x: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Returns the result and the factor `1 / sqrt(mean(x^2) + eps)` of each row."""
    inverse = inverse_rms(x, eps)
    return F.silu((x * inverse).mul_(scale), inplace=True), inverse


class _NormSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, eps: float) -> Tensor:
        result, inverse = _norm_silu(x.float(), scale, eps)
        ctx.save_for_backward(x, inverse, scale)
        return result.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, inverse, scale = ctx.saved_tensors
        grad_x, grad_scales = norm_silu_backward(grad.float(), x * inverse, inverse, scale)
        return grad_x.to(x.dtype), grad_scales.flatten(0, -2).sum(0), None


def norm_silu_backward(grad: Tensor, normalised: Tensor, inverse: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Computes the gradient of RMS norm followed by SiLU, in float32.

    Args:
        grad: Gradient with respect to the result. `[..., width]`
        normalised: The input times `inverse`. `[..., width]`
        inverse: The factor `1 / sqrt(mean(x^2) + eps)` of each row. `[..., 1]`
        scale: Scale of the norm. `[width]`

    Returns:
        Gradient with respect to the input, and the contribution of each row to the gradient with respect to `scale`.
        Each is `[..., width]`.
    """
    grad_scaled = torch.ops.aten.silu_backward(grad, normalised * scale)
    grad_scales = grad_scaled * normalised
    # The norm removes the component of the gradient that is parallel to its own output.
    along = (grad_scales @ scale).div_(scale.shape[-1]).unsqueeze(-1)
    return grad_scaled.mul_(scale).addcmul_(normalised, along, value=-1.0).mul_(inverse), grad_scales


def inverse_rms(x: Tensor, eps: float = RMS_EPS) -> Tensor:
    """Computes `1 / sqrt(mean(x^2) + eps)` over the last axis, which is kept with size 1."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.square_().mul_(1.0 / x.shape[-1]).add_(eps).rsqrt_()


class MLP(nn.Module):
    """Hidden layers of equal width, each a linear layer, a norm and SiLU. With zero `layers` it is the identity."""

    def __init__(self, in_features: int, units: int, layers: int) -> None:
        super().__init__()
        widths = [in_features] + [units] * layers
        self.out_features = widths[-1]
        self.linears = nn.ModuleList(Linear(i, o) for i, o in pairwise(widths))
        self.norms = nn.ModuleList(NormSiLU(width) for width in widths[1:])

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[..., in]` to `[..., units]`."""
        parts = (self, *self.linears, *self.norms)
        plain = is_untouched(parts, MLP.forward, Linear.forward, NormSiLU.forward)
        found = mlps(x, [self.weights()]) if plain else None
        return self._layers_from(0, x) if found is None else found[0]

    def weights(self) -> list[Tensor]:
        """Returns the kernel, the bias and the norm's scale of every layer, in this order."""
        layers: Iterable[tuple[Any, Any]] = zip(self.linears, self.norms, strict=True)
        return [weight for linear, norm in layers for weight in (linear.weight, linear.bias, norm.scale)]

    def _layers_from(self, first: int, x: Tensor) -> Tensor:
        for linear, norm in list(zip(self.linears, self.norms, strict=True))[first:]:
            x = norm(linear(x))
        return x


def are_plain(modules: Iterable[nn.Module], *forwards: Callable[..., Any]) -> bool:
    """Returns whether modules and all their submodules compute exactly what their classes define.

    A fast implementation that only reads their weights is correct if nothing is overridden or hooked.

    Args:
        modules: Modules built from the layers of this file and from those that `forwards` belong to.
        *forwards: `forward` methods of modules that are defined in other files.
    """
    inside = (part for module in modules for part in module.modules() if not isinstance(part, nn.ModuleList))
    return is_untouched(inside, MLP.forward, Linear.forward, BlockLinear.forward, NormSiLU.forward, *forwards)


def in_portions(function: Callable[..., Tensor], *inputs: Tensor, size: int) -> Tensor:
    """Computes `function(*inputs)` for rows `[N, ...]`, on a CPU in portions of `size` rows.

    The activations of a whole batch do not fit into a CPU's caches and are too large for the allocator to reuse: the
    operating system provides and clears new memory each time, which takes longer than the arithmetic.
    """
    if inputs[0].device.type != "cpu" or len(inputs[0]) <= size:
        return function(*inputs)
    return torch.cat([function(*parts) for parts in zip(*(x.split(size) for x in inputs), strict=True)])


def stacked_mlps(stack: Sequence[MLP], x: Tensor) -> list[Tensor]:
    """Applies several MLPs to one input `[..., in]`, with their first layers as one product; each gives `[..., units]`.

    The input of DreamerV3's heads is ten times as wide as their hidden layers, so reading it dominates their cost.
    """
    if not all(len(mlp.linears) for mlp in stack):
        return [mlp(x) for mlp in stack]
    found = mlps(x, [mlp.weights() for mlp in stack])
    if found is not None:
        return found
    first: list[Any] = [mlp.linears[0] for mlp in stack]
    weight, bias = torch.cat([layer.weight for layer in first]), torch.cat([layer.bias for layer in first])

    def hidden(rows: Tensor) -> list[Tensor]:
        parts = F.linear(rows, weight, bias).split([layer.out_features for layer in first], -1)
        return [mlp._layers_from(1, mlp.norms[0](part)) for mlp, part in zip(stack, parts, strict=True)]

    rows = x.flatten(0, -2)
    portions = rows.split(PORTION) if x.device.type == "cpu" else [rows]
    results = zip(*(hidden(portion) for portion in portions), strict=True)
    return [torch.cat(result).unflatten(0, x.shape[:-1]) for result in results]
