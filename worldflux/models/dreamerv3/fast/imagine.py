"""One step of imagination without gradient, which takes the largest part of training.

It computes what `RSSM.core` and `RSSM.prior` define, with weights that are cast and cut once for all steps.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from worldflux.models.dreamerv3.fast.cell import CoreWeights, PriorWeights, core, linear, normalise_, prior
from worldflux.nn.distributions import inverse_cdf, softmax
from worldflux.nn.layers import MLP


class Layer(NamedTuple):
    """A linear layer with RMS norm and SiLU; the kernel in the precision of the products."""

    kernel: Tensor
    """`[out, in]`"""
    bias: Tensor
    scale: Tensor
    """Scale of the norm, in float32."""


class ImaginationWeights(NamedTuple):
    """Parameters that imagination needs."""

    core: CoreWeights
    """Parameters of the recurrence, whose dense part takes the action, too."""
    action_in: Layer
    hidden_bias: Tensor
    """Bias of the core's hidden layer. `[D]`"""
    prior: PriorWeights
    actor: tuple[Layer, ...]


def layers_of(mlp: MLP, kind: torch.dtype) -> tuple[Layer, ...]:
    """The layers of an MLP with their matrices in a precision."""
    layers = []
    layer_and_norm: Iterable[tuple[Any, Any]] = zip(mlp.linears, mlp.norms, strict=True)
    for linear_layer, norm in layer_and_norm:
        layers.append(Layer(linear_layer.weight.to(kind), linear_layer.bias.to(kind), norm.scale))
    return tuple(layers)


def hidden_layers(layers: Iterable[Layer], x: Tensor) -> Tensor:
    """Linear layers with RMS norm and SiLU. `[N, in]` → float32 `[N, out]`"""
    for kernel, bias, scale in layers:
        normed, _ = normalise_(linear(x, kernel, bias))
        x = F.silu(normed.mul_(scale), inplace=True)
    return x


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
        noise: Uniform numbers with which the latents are drawn. `[N, S]`
        classes: Latents to use instead of drawing them. `[N, S]`
        unimix: Share of the uniform distribution.

    Returns:
        `[N, D]` and one-hot `[N, S, C]`.
    """
    kernel, bias, scale = w.action_in
    normed, _ = normalise_(linear(action, kernel, bias))
    deter, _ = core(w.core, deter, stoch.flatten(1), w.hidden_bias, normed.mul_(scale))
    logits, _ = prior(w.prior, deter, (stoch.shape[1], stoch.shape[2]))
    if classes is None:
        classes = inverse_cdf(softmax(logits).mul_(1.0 - unimix).add_(unimix / stoch.shape[-1]), noise)
    return deter, torch.zeros_like(logits).scatter_(-1, classes.unsqueeze(-1), 1.0)
