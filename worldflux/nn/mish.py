"""Layers of TD-MPC2: linear layers with LayerNorm and Mish, for single networks and for ensembles."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldflux.accel.overriding import is_untouched
from worldflux.nn.fast import mish as nodes
from worldflux.nn.fast import mlp as fast
from worldflux.nn.init import narrow_normal_
from worldflux.nn.transforms import simnorm


def mish(x: Tensor) -> Tensor:
    """Computes `x * tanh(log(1 + exp(x)))` for a tensor of any shape."""
    if torch.compiler.is_compiling():
        # One exponential instead of three transcendental functions; the compiler fuses everything into one pass.
        s = torch.sigmoid(x.float())
        p = s * (2.0 - s)
        return (x * p / (2.0 - p)).to(x.dtype)
    return nodes.mish(x.float()).to(x.dtype) if nodes.applies(x) else F.mish(x)


class NarrowLinear(nn.Linear):
    """`torch.nn.Linear` with weights from a narrow normal distribution and a zero bias."""

    def reset_parameters(self) -> None:
        """Draws new weights and sets the bias to zero."""
        narrow_normal_(self.weight)
        nn.init.zeros_(self.bias)


def linear(parts: Sequence[Tensor], weight: Tensor, bias: Tensor) -> Tensor:
    """Applies a linear layer to the concatenation of several inputs along the last axis.

    Inputs that broadcast against the others are multiplied only once, so a state with many actions costs one row.

    Args:
        parts: Inputs, `[..., p]` each.
        weight: Weight of the layer, where `in` is the sum of all p. `[out, in]`
        bias: Bias of the layer. `[out]`

    Returns:
        The output of the layer. `[..., out]`
    """
    if _alike(parts):
        return F.linear(torch.cat(list(parts), -1) if len(parts) > 1 else parts[0], weight, bias)
    columns = weight.split([part.shape[-1] for part in parts], -1)
    products = [F.linear(part, w) for part, w in zip(parts, columns, strict=True)]
    return sum(products[1:], products[0] + bias.to(products[0].dtype))


def _alike(parts: Sequence[Tensor]) -> bool:
    return all(part.shape[:-1] == parts[0].shape[:-1] for part in parts[1:])


def _one_node(parts: Sequence[Tensor]) -> bool:
    """Returns whether the linear layer, the norm and Mish can be computed as one autograd node."""
    return _alike(parts) and all(nodes.applies(part) for part in parts)


class NormedLinear(NarrowLinear):
    """Linear layer followed by LayerNorm and an activation."""

    def __init__(self, in_features: int, out_features: int, activation: Callable[[Tensor], Tensor] = mish) -> None:
        super().__init__(in_features, out_features)
        self.norm = nn.LayerNorm(out_features)
        self.activation = activation

    def forward(self, *parts: Tensor) -> Tensor:
        """Maps the concatenation of inputs `[..., p]` to `[..., out]`. The inputs may broadcast, see `linear`."""
        output = _natively([self], parts)
        if output is not None:
            return output
        shape = parts[0].shape[:-1]
        if self.activation is mish and _one_node(parts) and is_untouched([self.norm], nn.LayerNorm.forward):
            weight, bias, scale, shift = (
                p.unsqueeze(0) for p in (self.weight, self.bias, self.norm.weight, self.norm.bias)
            )
            flat = [part.flatten(0, -2) for part in parts]
            return nodes.mish_layer(flat, weight, bias, scale, shift).view(*shape, -1)
        return self.activation(self.norm(linear(parts, self.weight, self.bias)))


class MishMLP(nn.Module):
    """MLP whose hidden layers are linear, LayerNorm and Mish, with an output layer that is linear by default.

    Args:
        in_features: Width of the input.
        hidden: Widths of the hidden layers.
        out_features: Width of the output.
        activation: If given, the output layer has a LayerNorm followed by this activation.
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

    def forward(self, *parts: Tensor) -> Tensor:
        """Maps the concatenation of inputs `[..., p]` to `[..., out]`. The inputs may broadcast, see `linear`."""
        output = _natively(self.layers, parts)
        if output is not None:
            return output
        first, *others = self.layers
        x = first(*parts)
        for layer in others:
            x = layer(x)
        return x


class StackedNorm(nn.Module):
    """LayerNorm with separate parameters for each member of an ensemble."""

    def __init__(self, members: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(members, width))
        self.bias = nn.Parameter(torch.zeros(members, width))

    def forward(self, x: Tensor, *, members: Tensor | None = None, frozen: bool = False) -> Tensor:
        """Normalises `[m, N, width]`. See `StackedLinear.forward` for `members` and `frozen`."""
        weight, bias = (_chosen(parameter, members, frozen).unsqueeze(1) for parameter in (self.weight, self.bias))
        return torch.addcmul(bias, F.layer_norm(x, x.shape[-1:]), weight)


def _chosen(parameter: Tensor, members: Tensor | None, frozen: bool) -> Tensor:
    """Returns the rows of a parameter that belong to the members, without gradient if it is frozen."""
    parameter = parameter.detach() if frozen else parameter
    return parameter if members is None else parameter.index_select(0, members)


class StackedLinear(nn.Module):
    """Linear layer with separate parameters for each member of an ensemble, optionally with LayerNorm and Mish.

    Args:
        members: Number of members M.
        in_features: Width of the input.
        out_features: Width of the output.
        normed: Whether LayerNorm and Mish follow the linear layer.
    """

    def __init__(self, members: int, in_features: int, out_features: int, *, normed: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(narrow_normal_(torch.empty(members, out_features, in_features)))
        self.bias = nn.Parameter(torch.zeros(members, out_features))
        self.norm = StackedNorm(members, out_features) if normed else None

    def forward(
        self, *parts: Tensor, members: Tensor | None = None, dropout: Tensor | None = None, frozen: bool = False
    ) -> Tensor:
        """Maps the concatenation of the inputs to `[m, N, out]`.

        Args:
            *parts: Inputs, each `[N, p]` if all members share it, or `[m, N, p]`.
            members: Indices of the members to evaluate; None evaluates all. `[m]`
            dropout: Factors on the output of the linear layer, before the norm. `[m, N, out]`
            frozen: Whether to treat the parameters as constants, so that gradients reach only the inputs.
        """
        weight, bias = _chosen(self.weight, members, frozen), _chosen(self.bias, members, frozen)
        if self.norm is not None and _one_node(parts) and is_untouched([self.norm], _STACKED_NORM):
            scale, shift = (_chosen(p, members, frozen) for p in (self.norm.weight, self.norm.bias))
            return nodes.mish_layer(parts, weight, bias, scale, shift, dropout)
        x = torch.cat(parts, -1) if len(parts) > 1 else parts[0]
        y = torch.baddbmm(bias.unsqueeze(1), x.expand(len(weight), *x.shape[-2:]), weight.transpose(1, 2))
        if dropout is not None:
            y = y * dropout
        if self.norm is None:
            return y
        return mish(self.norm(y, members=members, frozen=frozen))


class Ensemble(nn.Module):
    """Ensemble of MLPs of the same shape, evaluated together. Evaluating a subset only costs as much as its members.

    The hidden layers are linear, LayerNorm and Mish. The output layer is linear with zero weights, so that all members
    start with equal outputs. Dropout, if given, is applied in the first layer between its linear part and its norm.

    Args:
        members: Number of members M.
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
        self, *parts: Tensor, members: Tensor | None = None, dropout: Tensor | None = None, frozen: bool = False
    ) -> Tensor:
        """Maps the concatenation of the inputs to the outputs of the members. `[m, N, out]`

        Args:
            *parts: Inputs that all members share, `[N, p]` each.
            members: Indices of the members to evaluate; None evaluates all. `[m]`
            dropout: Factors in the first layer, 0 or `1 / (1 - p)`; None disables dropout. `[m, N, hidden]`
            frozen: Whether to treat the parameters as constants, so that gradients reach only the inputs.
        """
        output = _natively(self.layers, parts, members=self.members, chosen=members, dropout=dropout, frozen=frozen)
        if output is not None:
            return output
        first, *others = self.layers
        y = first(*parts, members=members, dropout=dropout, frozen=frozen)
        for layer in others:
            y = layer(y, members=members, frozen=frozen)
        return y


# Fast implementation of sequences of layers


def _natively(layers: Iterable[nn.Module], parts: Sequence[Tensor], **options: Any) -> Tensor | None:
    """Computes the output of the layers in one native call, or returns None if they must be called one by one."""
    if not fast.applies(parts):
        return None
    described = _all_described(layers)
    return None if described is None else fast.mlp(described, parts, **options)


def rollout_natively(
    dynamics: nn.Module, head: nn.Module, state: Tensor, actions: Tensor
) -> tuple[Tensor, Tensor] | None:
    """Predicts an open-loop rollout with two MLPs in one native call, see `nn.fast.mlp.rollout`.

    Returns None if the MLPs must be called one by one, because gradients are needed or a module was overridden or
    hooked.
    """
    if torch.is_grad_enabled() or not fast.applies((state, actions)):
        return None
    described = []
    for net in (dynamics, head):
        layers = _all_described(net.layers) if is_untouched([net], _MLP) else None  # type: ignore[arg-type]
        if layers is None:
            return None
        described.append(layers)
    return fast.rollout(described[0], described[1], state, actions)


def _all_described(layers: Iterable[nn.Module]) -> list[fast.Layer] | None:
    found = []
    for module in layers:
        layer = _described(module)
        if layer is None:
            return None
        found.append(layer)
    return found


def _described(module: nn.Module) -> fast.Layer | None:
    """Returns the parameters of a layer, or None if it is not a layer of this file or was overridden or hooked."""
    own = module._parameters
    weight, bias = own.get("weight"), own.get("bias")
    if weight is None or bias is None:
        return None
    if is_untouched([module], nn.Linear.forward):
        return fast.Layer(weight, bias, None, None, fast.PLAIN)
    if is_untouched([module], _STACKED):
        stacked: Any = module._modules.get("norm")
        if stacked is None:
            return fast.Layer(weight, bias, None, None, fast.PLAIN)
        if not is_untouched([stacked], _STACKED_NORM):
            return None
        return fast.Layer(weight, bias, stacked.weight, stacked.bias, fast.MISH)
    if not is_untouched([module], _NORMED):
        return None
    norm: Any = module.norm
    activation: Any = module.activation
    if (
        not isinstance(norm, nn.LayerNorm)
        or not is_untouched([norm], nn.LayerNorm.forward)
        or norm.eps != nodes.LAYER_NORM_EPS
        or norm.weight is None
        or norm.bias is None
    ):
        return None
    if activation is mish:
        return fast.Layer(weight, bias, norm.weight, norm.bias, fast.MISH)
    if isinstance(activation, partial) and activation.func is simnorm and list(activation.keywords) == ["dim"]:
        group = activation.keywords["dim"]
        if not activation.args and group > 0 and len(weight) % group == 0:
            return fast.Layer(weight, bias, norm.weight, norm.bias, fast.SIMNORM, group)
    return None


# The original methods, captured at import time so that replacing one on its class later is detected.
_NORMED, _STACKED, _MLP = NormedLinear.forward, StackedLinear.forward, MishMLP.forward
_STACKED_NORM = StackedNorm.forward
