"""One step of imagination: the largest part of training, and without gradient.

It computes what `RSSM.core` and `RSSM.prior` do. Here weights are cast and cut once for all steps, and results are
worked on in place.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from worldflux.models.dreamerv3.fast.cell import CoreWeights, linear, tanh
from worldflux.nn.distributions import inverse_cdf, softmax
from worldflux.nn.layers import MLP, blocked, inverse_rms, joined


class Layer(NamedTuple):
    """A linear layer with RMS norm and SiLU; the kernel in the precision of the products."""

    kernel: Tensor
    """`[out, in]`"""
    bias: Tensor
    scale: Tensor
    """Of the norm, float32."""


class ImaginationWeights(NamedTuple):
    """What imagination needs of the parameters."""

    core: CoreWeights
    action_in: Layer
    dense: Tensor
    """Part of the core's hidden layer that all blocks share, the action's included. `[3 * h, D]`"""
    hidden_bias: Tensor
    """`[D]`"""
    prior_in: tuple[Layer, ...]
    prior_kernel: Tensor
    """`[S * C, h]`"""
    prior_bias: Tensor
    actor: tuple[Layer, ...]


def layers_of(mlp: MLP, kind: torch.dtype) -> tuple[Layer, ...]:
    """The layers of an MLP with their matrices in a precision."""
    layers = []
    layer_and_norm: Iterable[tuple[Any, Any]] = zip(mlp.linears, mlp.norms, strict=True)
    for linear_layer, norm in layer_and_norm:
        layers.append(Layer(linear_layer.weight.to(kind), linear_layer.bias.to(kind), norm.scale))
    return tuple(layers)


def hidden_layer(layer: Layer, x: Tensor) -> Tensor:
    """Linear, norm, SiLU. `[N, in]` → float32 `[N, out]`"""
    return norm_silu_(linear(x, layer.kernel, layer.bias), layer.scale)


def hidden_layers(layers: tuple[Layer, ...], x: Tensor) -> Tensor:
    """An MLP. `[N, in]` → float32 `[N, out]`"""
    for layer in layers:
        x = hidden_layer(layer, x)
    return x


def norm_silu_(x: Tensor, scale: Tensor) -> Tensor:
    """RMS norm and SiLU in place of `x` `[N, h]`, which nobody else may hold."""
    return F.silu(x.mul_(inverse_rms(x)).mul_(scale), inplace=True)


def imagine_step(
    w: ImaginationWeights,
    deter: Tensor,
    stoch: Tensor,
    action: Tensor,
    noise: Tensor | None,
    classes: Tensor | None,
    unimix: float,
) -> tuple[Tensor, Tensor]:
    """The state that the model expects after an action.

    Args:
        w: Weights.
        deter: `[N, D]`
        stoch: `[N, S, C]`
        action: `[N, A]`, magnitudes up to 1.
        noise: Uniform numbers that the latents are drawn with. `[N, S]`
        classes: Latents to take, without noise. `[N, S]`
        unimix: Share of the uniform distribution.

    Returns:
        `[N, D]` and one-hot `[N, S, C]`.
    """
    deter = next_deter(w, deter, stoch.flatten(1), action)
    logits = linear(hidden_layers(w.prior_in, deter), w.prior_kernel, w.prior_bias).view_as(stoch)
    if classes is None:
        classes = inverse_cdf(softmax(logits).mul_(1.0 - unimix).add_(unimix / stoch.shape[-1]), noise)
    return deter, torch.zeros_like(logits).scatter_(-1, classes.unsqueeze(-1), 1.0)


def next_deter(w: ImaginationWeights, deter: Tensor, stoch: Tensor, action: Tensor) -> Tensor:
    """`RSSM.core` for those who need no gradient. `[N, D]`, `[N, S * C]`, `[N, A]` → `[N, D]`"""
    core = w.core
    blocks, kind = len(core.recurrent), core.recurrent.dtype
    before = blocked(deter, blocks)
    shared = [
        hidden_layer(Layer(core.deter_kernel, core.deter_bias, core.deter_scale), deter),
        hidden_layer(Layer(core.stoch_kernel, core.stoch_bias, core.stoch_scale), stoch),
        hidden_layer(w.action_in, action),
    ]
    hidden = torch.addmm(w.hidden_bias, torch.cat(shared, -1).to(kind), w.dense).float()
    blocked(hidden, blocks).add_(torch.bmm(before.to(kind), core.recurrent))
    hidden = norm_silu_(hidden, core.hidden_scale)
    gates = torch.bmm(blocked(hidden, blocks).to(kind), core.gates).float()
    reset, candidate, update = gates.add_(core.gates_bias.view(blocks, 1, -1)).chunk(3, -1)
    candidate = tanh(candidate.mul_(reset.sigmoid_()))
    return joined(torch.lerp(before, candidate, update.sub_(1.0).sigmoid_()))
