"""Rollouts of the policy in the model, on which the actor and the critic are trained."""

from __future__ import annotations

import torch
from torch import Tensor

from worldflux.models.dreamerv3.behavior import Imagined
from worldflux.models.dreamerv3.fast import recurrence as fast
from worldflux.models.dreamerv3.heads import Actor
from worldflux.models.dreamerv3.parts import Draws
from worldflux.models.dreamerv3.rssm import RSSM


@torch.no_grad()
def roll_out(rssm: RSSM, actor: Actor, deter: Tensor, stoch: Tensor, horizon: int, draws: Draws | None) -> Imagined:
    """Rolls out the policy in the model from replayed states, without gradient.

    Args:
        rssm: Sequence model.
        actor: Policy.
        deter: Deterministic part of the initial states. `[N, D]`
        stoch: Stochastic part of the initial states. `[N, S, C]`
        horizon: Number of steps H.
        draws: Random draws to use instead of sampling.
    """
    if rssm.takes_fast_form(actor, forwards=[Actor.forward]):
        return Imagined(*fast.roll_out(rssm, actor, deter, stoch, horizon, draws))
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
