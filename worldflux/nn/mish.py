"""Layers of TD-MPC2: linear, LayerNorm, Mish; plain, and stacked for an ensemble."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from worldflux.nn.init import narrow_normal_


def mish(x: Tensor) -> Tensor:
    """`x * tanh(log(1 + exp(x)))`, of any shape.

    On a CPU it is computed with one exponential, `tanh(log(1 + e)) = n / (n + 2)` with `n = e * (e + 2)`: torch's own
    kernel takes three transcendental functions and more than twice as long.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return F.mish(x)
    return _Mish.apply(x) if torch.is_grad_enabled() and x.requires_grad else _mish(x)


def _mish(x: Tensor) -> Tensor:
    e = x.clamp(max=_MISH_LINEAR).exp_()
    n = (e + 2.0).mul_(e)
    return e.copy_(n).add_(2.0).reciprocal_().mul_(n).mul_(x)


_MISH_LINEAR = 20.0
"""From here on mish(x) is x to the last bit, and squares of its exponential stay finite."""


class _Mish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _mish(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """`n / (n + 2) + 4 x e (1 + e) / (n + 2)^2`"""
        (x,) = ctx.saved_tensors
        e = x.clamp(max=_MISH_LINEAR).exp_()
        n = (e + 2.0).mul_(e)
        inverse = (n + 2.0).reciprocal_()
        slope = (e + 1.0).mul_(e).mul_(x).mul_(inverse).mul_(4.0).add_(n)
        return slope.mul_(inverse).mul_(grad)


class NarrowLinear(nn.Linear):
    """`torch.nn.Linear` with narrow normal weights and a zero bias."""

    def reset_parameters(self) -> None:
        """Draws the weights anew and zeroes the bias."""
        narrow_normal_(self.weight)
        nn.init.zeros_(self.bias)


class NormedLinear(NarrowLinear):
    """A linear layer, LayerNorm and an activation."""

    def __init__(self, in_features: int, out_features: int, activation: Callable[[Tensor], Tensor] = mish) -> None:
        super().__init__(in_features, out_features)
        self.norm = nn.LayerNorm(out_features)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[..., in]` to `[..., out]`."""
        return self.activation(self.norm(super().forward(x)))


class MishMLP(nn.Module):
    """Hidden layers of linear, LayerNorm, Mish; then a plain linear layer, or one with a norm and an activation.

    Args:
        in_features: Width of the input.
        hidden: Widths of the hidden layers.
        out_features: Width of the output.
        activation: If given, the last layer has a LayerNorm and ends with this.
    """

    def __init__(
        self,
        in_features: int,
        hidden: Sequence[int],
        out_features: int,
        activation: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        widths = [in_features, *hidden]
        layers: list[nn.Module] = [NormedLinear(i, o) for i, o in pairwise(widths)]
        if activation is None:
            layers.append(NarrowLinear(widths[-1], out_features))
        else:
            layers.append(NormedLinear(widths[-1], out_features, activation))
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[..., in]` to `[..., out]`."""
        for layer in self.layers:
            x = layer(x)
        return x


class StackedNorm(nn.Module):
    """The scales and shifts of one LayerNorm for each member of an ensemble."""

    def __init__(self, members: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(members, width))
        self.bias = nn.Parameter(torch.zeros(members, width))


class StackedLinear(nn.Module):
    """One linear layer for each member of an ensemble, with LayerNorm and Mish if asked for.

    Args:
        members: M
        in_features: Width of the input.
        out_features: Width of the output.
        normed: Add LayerNorm and Mish.
    """

    def __init__(self, members: int, in_features: int, out_features: int, *, normed: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(narrow_normal_(torch.empty(members, out_features, in_features)))
        self.bias = nn.Parameter(torch.zeros(members, out_features))
        self.norm = StackedNorm(members, out_features) if normed else None

    def forward(
        self, x: Tensor, members: Tensor | None = None, *, dropout: Tensor | None = None, frozen: bool = False
    ) -> Tensor:
        """Maps `[m, N, in]` to `[m, N, out]`.

        Args:
            x: Input of each member that is evaluated.
            members: Their indices; all if None. `[m]`
            dropout: Factors for the linear layer's output, before the norm. `[m, N, out]`
            frozen: Take the parameters as constants, so that gradients reach the input only.
        """

        def chosen(parameter: Tensor) -> Tensor:
            parameter = parameter.detach() if frozen else parameter
            return parameter if members is None else parameter.index_select(0, members)

        y = torch.baddbmm(chosen(self.bias).unsqueeze(1), x, chosen(self.weight).transpose(1, 2))
        if dropout is not None:
            y = y * dropout
        if self.norm is None:
            return y
        y = F.layer_norm(y, y.shape[-1:])
        return mish(torch.addcmul(chosen(self.norm.bias).unsqueeze(1), y, chosen(self.norm.weight).unsqueeze(1)))


class Ensemble(nn.Module):
    """Several MLPs of one shape, evaluated together; a subset costs what its members cost.

    Each is linear, LayerNorm, Mish for the hidden layers and a plain linear layer with zero weights at the end, so that
    all members start with equal outputs. Dropout, where given, sits in the first layer between its linear part and its
    norm.

    Args:
        members: M
        in_features: Width of the input.
        hidden: Widths of the hidden layers.
        out_features: Width of the output.
    """

    def __init__(self, members: int, in_features: int, hidden: Sequence[int], out_features: int) -> None:
        super().__init__()
        self.members = members
        widths = [in_features, *hidden]
        self.layers = nn.ModuleList(StackedLinear(members, i, o, normed=True) for i, o in pairwise(widths))
        self.layers.append(StackedLinear(members, widths[-1], out_features, normed=False))
        nn.init.zeros_(self.layers[-1].weight)  # type: ignore[arg-type]

    def forward(
        self, x: Tensor, members: Tensor | None = None, *, dropout: Tensor | None = None, frozen: bool = False
    ) -> Tensor:
        """Maps one input `[N, in]` to the outputs of the members. `[m, N, out]`

        Args:
            x: What every member sees.
            members: Indices of those to evaluate; all if None. `[m]`
            dropout: Factors for the first layer, 0 or `1 / (1 - p)`; None switches dropout off. `[m, N, hidden]`
            frozen: Take the parameters as constants, so that gradients reach the input only.
        """
        count = self.members if members is None else len(members)
        y = x.expand(count, *x.shape)
        for index, layer in enumerate(self.layers):
            y = layer(y, members, dropout=dropout if index == 0 else None, frozen=frozen)
        return y
