"""Layers of TD-MPC2: linear, LayerNorm, Mish; plain, and stacked for an ensemble."""

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
    """`x * tanh(log(1 + exp(x)))`, of any shape."""
    if torch.compiler.is_compiling():
        # One exponential in place of three; the compiler makes one pass of all of it.
        s = torch.sigmoid(x.float())
        p = s * (2.0 - s)
        return (x * p / (2.0 - p)).to(x.dtype)
    return nodes.mish(x.float()).to(x.dtype) if nodes.applies(x) else F.mish(x)


class NarrowLinear(nn.Linear):
    """`torch.nn.Linear` with narrow normal weights and a zero bias."""

    def reset_parameters(self) -> None:
        """Draws the weights anew and zeroes the bias."""
        narrow_normal_(self.weight)
        nn.init.zeros_(self.bias)


def linear(parts: Sequence[Tensor], weight: Tensor, bias: Tensor) -> Tensor:
    """A linear layer of inputs that are joined on the last axis.

    Inputs that broadcast against the others are multiplied only once: a state with many actions costs one row.

    Args:
        parts: `[..., p]` each.
        weight: `[out, in]`, with `in` the sum of all p.
        bias: `[out]`

    Returns:
        `[..., out]`
    """
    if _alike(parts):
        return F.linear(torch.cat(list(parts), -1) if len(parts) > 1 else parts[0], weight, bias)
    columns = weight.split([part.shape[-1] for part in parts], -1)
    products = [F.linear(part, w) for part, w in zip(parts, columns, strict=True)]
    return sum(products[1:], products[0] + bias.to(products[0].dtype))


def _alike(parts: Sequence[Tensor]) -> bool:
    return all(part.shape[:-1] == parts[0].shape[:-1] for part in parts[1:])


def _one_node(parts: Sequence[Tensor]) -> bool:
    """Whether linear layer, norm and Mish are computed together."""
    return _alike(parts) and all(nodes.applies(part) for part in parts)


class NormedLinear(NarrowLinear):
    """A linear layer, LayerNorm and an activation."""

    def __init__(self, in_features: int, out_features: int, activation: Callable[[Tensor], Tensor] = mish) -> None:
        super().__init__(in_features, out_features)
        self.norm = nn.LayerNorm(out_features)
        self.activation = activation

    def forward(self, *parts: Tensor) -> Tensor:
        """Maps inputs `[..., p]`, joined on the last axis, to `[..., out]`; see `linear` for what may differ."""
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

    def forward(self, *parts: Tensor) -> Tensor:
        """Maps inputs `[..., p]`, joined on the last axis, to `[..., out]`; see `linear` for what may differ."""
        output = _natively(self.layers, parts)
        if output is not None:
            return output
        first, *others = self.layers
        x = first(*parts)
        for layer in others:
            x = layer(x)
        return x


class StackedNorm(nn.Module):
    """One LayerNorm for each member of an ensemble."""

    def __init__(self, members: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(members, width))
        self.bias = nn.Parameter(torch.zeros(members, width))

    def forward(self, x: Tensor, *, members: Tensor | None = None, frozen: bool = False) -> Tensor:
        """Normalises `[m, N, width]`; for `members` and `frozen` see `StackedLinear.forward`."""
        weight, bias = (_chosen(parameter, members, frozen).unsqueeze(1) for parameter in (self.weight, self.bias))
        return torch.addcmul(bias, F.layer_norm(x, x.shape[-1:]), weight)


def _chosen(parameter: Tensor, members: Tensor | None, frozen: bool) -> Tensor:
    """The members' part of a parameter."""
    parameter = parameter.detach() if frozen else parameter
    return parameter if members is None else parameter.index_select(0, members)


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
        self, *parts: Tensor, members: Tensor | None = None, dropout: Tensor | None = None, frozen: bool = False
    ) -> Tensor:
        """Maps inputs, joined on the last axis, to `[m, N, out]`.

        Args:
            *parts: One input `[N, p]` for all members, or `[m, N, p]`.
            members: Indices of those to evaluate; all if None. `[m]`
            dropout: Factors for the linear layer's output, before the norm. `[m, N, out]`
            frozen: Take the parameters as constants, so that gradients reach the input only.
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
        self, *parts: Tensor, members: Tensor | None = None, dropout: Tensor | None = None, frozen: bool = False
    ) -> Tensor:
        """Maps inputs, joined on the last axis, to the outputs of the members. `[m, N, out]`

        Args:
            *parts: What every member sees. `[N, p]` each
            members: Indices of those to evaluate; all if None. `[m]`
            dropout: Factors for the first layer, 0 or `1 / (1 - p)`; None switches dropout off. `[m, N, hidden]`
            frozen: Take the parameters as constants, so that gradients reach the input only.
        """
        output = _natively(self.layers, parts, members=self.members, chosen=members, dropout=dropout, frozen=frozen)
        if output is not None:
            return output
        first, *others = self.layers
        y = first(*parts, members=members, dropout=dropout, frozen=frozen)
        for layer in others:
            y = layer(y, members=members, frozen=frozen)
        return y


# The fast form of layers that stand behind each other


def _natively(layers: Iterable[nn.Module], parts: Sequence[Tensor], **options: Any) -> Tensor | None:
    """The output of the layers in one native call; None where they are to be called one after the other."""
    if not fast.applies(parts):
        return None
    described = _all_described(layers)
    return None if described is None else fast.mlp(described, parts, **options)


def rollout_natively(
    dynamics: nn.Module, head: nn.Module, state: Tensor, actions: Tensor
) -> tuple[Tensor, Tensor] | None:
    """Open loop with two MLPs on states and actions in one native call, see `nn.fast.mlp.rollout`.

    None where they are to be called one after the other: with gradients, and if somebody has changed one of them.
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
    """The parameters of a layer that computes what this file says; None if somebody has changed it."""
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


# As defined here, whoever replaces them later.
_NORMED, _STACKED, _MLP = NormedLinear.forward, StackedLinear.forward, MishMLP.forward
_STACKED_NORM = StackedNorm.forward
