"""The policy rolled out in the model, which is where the actor and the critic learn."""

from __future__ import annotations

import torch
from torch import Tensor

from worldflux.models.dreamerv3.behavior import Imagined
from worldflux.models.dreamerv3.fast.native_imagine import imagine
from worldflux.models.dreamerv3.heads import Actor
from worldflux.models.dreamerv3.parts import Draws
from worldflux.models.dreamerv3.rssm import RSSM, bounded
from worldflux.nn.precision import autocast


@torch.no_grad()
def roll_out(rssm: RSSM, actor: Actor, deter: Tensor, stoch: Tensor, horizon: int, draws: Draws | None) -> Imagined:
    """Imagines from replayed states, acting with the policy; without gradient.

    Args:
        rssm: The model.
        actor: The policy.
        deter: `[N, D]`
        stoch: `[N, S, C]`
        horizon: H, steps.
        draws: Replaces the random draws.
    """
    if not rssm.takes_fast_form(actor, forwards=[Actor.forward]):
        return _roll_out_plainly(rssm, actor, deter, stoch, horizon, draws)
    weights, width = rssm.imagination_weights(actor.mlp), deter.shape[1]
    if draws is None and weights.actor and rssm.takes_kernels(deter, stoch):
        feats, taken = imagine(weights, actor, deter, stoch, horizon, rssm.unimix)
        return Imagined(feats.transpose(0, 1), taken.transpose(0, 1))
    # Each state is written where the heads will read it.
    feats = deter.new_empty(horizon + 1, len(deter), width + stoch[0].numel())
    actions: list[Tensor] = []
    for h, feat in enumerate(feats):
        if h > 0:
            noise = torch.rand(stoch.shape[:2], device=stoch.device) if draws is None else None
            classes = None if draws is None else draws.imagined_stoch[:, h]
            action = bounded(actions[-1])
            with autocast(deter.device, None):
                deter, stoch = rssm.cells.imagine(weights, deter, stoch, action, noise, classes, rssm.unimix)
        feat[:, :width], feat[:, width:] = deter, stoch.flatten(1)
        if draws is None:
            actions.append(actor.output(rssm.cells.policy(weights.actor, feat)).sample())
        else:
            actions.append(draws.imagined_actions[:, h])
    return Imagined(feats.transpose(0, 1), torch.stack(actions, 1))


def _roll_out_plainly(
    rssm: RSSM, actor: Actor, deter: Tensor, stoch: Tensor, horizon: int, draws: Draws | None
) -> Imagined:
    """What `roll_out` computes, written down with the model's own functions."""
    feats: list[Tensor] = []
    actions: list[Tensor] = []
    for h in range(horizon + 1):
        if h > 0:
            deter = rssm.core(deter, stoch, actions[-1])
            prior = rssm.dist(rssm.prior(deter))
            stoch = prior.sample() if draws is None else prior.straight_through(draws.imagined_stoch[:, h])
        feats.append(torch.cat([deter, stoch.flatten(1)], -1))
        actions.append(actor(feats[-1]).sample() if draws is None else draws.imagined_actions[:, h])
    return Imagined(torch.stack(feats, 1), torch.stack(actions, 1))
