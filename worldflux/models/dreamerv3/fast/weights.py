"""The weights of an `RSSM`, cut and cast for the fast forms; gradients flow through.

The input of the hidden layer of block k is `[deter_k, x0, x1, x2]`: only `deter_k` differs between blocks, so the
kernel consists of a block-diagonal part for `deter` and a dense part for the rest, of which `x2` depends on the action
alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from worldflux.models.dreamerv3.fast.cell import CoreWeights, PosteriorWeights, PriorWeights
from worldflux.models.dreamerv3.fast.imagine import ImaginationWeights, layers_of
from worldflux.nn.layers import MLP
from worldflux.nn.precision import products
from worldflux.nn.transforms import bounded

if TYPE_CHECKING:
    from worldflux.models.dreamerv3.rssm import RSSM


def of_core(rssm: RSSM, *, with_action: bool = False) -> CoreWeights:
    """Weights of the recurrence, matrices in autocast's precision.

    Args:
        rssm: The model.
        with_action: Whether the dense part takes the action, too.
    """
    kind = _precision(rssm)
    (deter_in,), (stoch_in,) = layers_of(rssm.deter_in, kind), layers_of(rssm.stoch_in, kind)
    return CoreWeights(
        deter_kernel=deter_in.kernel,
        deter_bias=deter_in.bias,
        deter_scale=deter_in.scale,
        stoch_kernel=stoch_in.kernel,
        stoch_bias=stoch_in.bias,
        stoch_scale=stoch_in.scale,
        recurrent=rssm.hidden.weight[:, : rssm.deter_dim // rssm.blocks].to(kind),
        dense=_dense_kernel(rssm)[: (3 if with_action else 2) * len(deter_in.kernel)].to(kind),
        hidden_scale=rssm.hidden_norm.scale,
        gates=rssm.gates.weight.to(kind),
        gates_bias=rssm.gates.bias,
    )


def of_posterior(rssm: RSSM) -> PosteriorWeights:
    """Weights of the posterior."""
    kind = _precision(rssm)
    (layer,) = layers_of(rssm.posterior_in, kind)
    return PosteriorWeights(
        kernel=layer.kernel[:, : rssm.deter_dim],
        scale=layer.scale,
        out_kernel=rssm.posterior_out.weight.to(kind),
        out_bias=rssm.posterior_out.bias.to(kind),
    )


def of_prior(rssm: RSSM) -> PriorWeights:
    """Weights of the prior."""
    kind = _precision(rssm)
    hidden = [weight for layer in layers_of(rssm.prior_in, kind) for weight in layer]
    return PriorWeights._make([*hidden, rssm.prior_out.weight.to(kind), rssm.prior_out.bias.to(kind)])


def of_imagination(rssm: RSSM, actor: MLP) -> ImaginationWeights:
    """Weights of the core and the prior, and of the policy's hidden layers."""
    kind = _precision(rssm)
    return ImaginationWeights(
        core=of_core(rssm, with_action=True),
        action_in=layers_of(rssm.action_in, kind)[0],
        hidden_bias=rssm.hidden.bias,
        prior=of_prior(rssm),
        actor=layers_of(actor, kind),
    )


def action_part(rssm: RSSM, actions: Tensor) -> Tensor:
    """The contribution of actions to the hidden layer, including its bias, which does not depend on the recurrence.

    Args:
        rssm: The model.
        actions: `[..., A]`; magnitudes above 1 are reduced to 1.

    Returns:
        `[..., D]`, float32.
    """
    hidden = rssm.action_in(bounded(actions))
    return (hidden @ _dense_kernel(rssm)[2 * hidden.shape[-1] :]).float() + rssm.hidden.bias


def _dense_kernel(rssm: RSSM) -> Tensor:
    """The hidden layer's kernel for the inputs that all blocks share. `[3 * hidden, D]`"""
    return rssm.hidden.weight[:, rssm.deter_dim // rssm.blocks :].transpose(0, 1).flatten(1)


def _precision(rssm: RSSM) -> torch.dtype:
    """The precision of matrix products."""
    return products(rssm.gates.weight.device)
