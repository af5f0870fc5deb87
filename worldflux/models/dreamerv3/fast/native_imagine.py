"""The rollout of the policy in the model in C; `worldflux.models.dreamerv3.rollout` defines it in torch."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from worldflux.models.dreamerv3.fast.imagine import ImaginationWeights
from worldflux.models.dreamerv3.fast.native_model import Model
from worldflux.models.dreamerv3.heads import Actor
from worldflux.nn.fast.kernels import addresses, library

ROWS = 256
"""Rows that are rolled out together, so that the results of a step stay in a core's cache."""


def imagine(
    weights: ImaginationWeights, actor: Actor, deter: Tensor, stoch: Tensor, horizon: int, unimix: float
) -> tuple[Tensor, Tensor]:
    """Features `[H+1, N, F]` and actions `[H+1, N, A]`; draws the same random numbers as the form in torch.

    Args:
        weights: Parameters, including those of the actor's hidden layers.
        actor: The policy, with at least one hidden layer.
        deter: `[N, D]`
        stoch: One-hot. `[N, S, C]`
        horizon: H
        unimix: Share of the uniform distribution.
    """
    (N, D), (S, C), parts = deter.shape, stoch.shape[1:], len(actor.classes)
    outputs = [actor.logits] if parts else [actor.mean, actor.std]
    A = outputs[0].out_features
    new = deter.new_empty
    feats, actions = new(horizon + 1, N, D + S * C), new(horizon + 1, N, A)
    feats[0, :, :D], feats[0, :, D:] = deter, stoch.flatten(1)
    uniform, noise = new(horizon, N, S), new(horizon + 1, N, parts or A)
    for h in range(horizon + 1):
        if h > 0:
            torch.rand(N, S, out=uniform[h - 1])
        if not parts:
            torch.randn(N, A, out=noise[h])
        for part in range(parts):
            noise[h, :, part] = torch.rand(N)

    model = Model.of(weights.core, S, C, unimix)
    columns = [weights.core.stoch_kernel.t().contiguous(), weights.actor[0].kernel[:, D:].t().contiguous()]
    hidden = addresses([tensor for layer in weights.actor for tensor in layer])
    widths = (ctypes.c_int * parts)(*actor.classes)
    model.A, model.units, model.parts, model.actor_layers = A, len(weights.actor[0].bias), parts, len(weights.actor)
    model.widths, model.actor = ctypes.addressof(widths), ctypes.addressof(hidden)
    model.stoch_columns, model.actor_columns = (x.data_ptr() for x in columns)
    model.action_in = addresses(weights.action_in)
    model.prior_in, model.prior_out = addresses(weights.prior[:6]), addresses(weights.prior[6:])
    model.policy_out = addresses([outputs[0].weight, outputs[0].bias])
    if not parts:
        model.std_out = addresses([outputs[1].weight, outputs[1].bias])
    model.hidden_bias = weights.hidden_bias.data_ptr()

    run = library()
    memory = new(min(N, ROWS) * run.imagine_memory(ctypes.byref(model)))
    tensors = [ctypes.c_void_p(x.data_ptr()) for x in (feats, actions, uniform, noise, memory)]
    for first in range(0, N, ROWS):
        run.imagine(ctypes.byref(model), horizon, N, first, min(ROWS, N - first), *tensors)
    return feats, actions
