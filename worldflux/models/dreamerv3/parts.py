"""One computation of DreamerV3's losses: the random draws that go into it, and everything that comes out."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from worldflux.models.dreamerv3.alignment import ArrivalRows
from worldflux.models.dreamerv3.behavior import ImaginationLosses, Imagined
from worldflux.models.dreamerv3.rssm import Observed
from worldflux.nn.distributions import OneHot, PolicyDistribution


@dataclass(frozen=True)
class Draws:
    """Random draws of one loss computation; given, they make it reproduce a recorded one."""

    stoch: Tensor
    """Classes of the posterior samples. `[B, T, S]`"""
    imagined_stoch: Tensor
    """Classes of the imagined samples; index 0 is not used. `[B * K, H+1, S]`"""
    imagined_actions: Tensor
    """`[B * K, H+1, A]`"""


@dataclass(frozen=True)
class LossParts:
    """All losses before they are averaged, and what they were computed from."""

    losses: dict[str, Tensor]
    """Per step: `[B, T]`; with K steps to imagine from, actor and critic `[B, K]`, `"replay_critic"` `[B, K-1]`."""
    reconstruction: dict[str, Tensor]
    """Of each observation key; their sum is `losses["reconstruction"]`. `[B, T]`"""
    rows: ArrivalRows
    observed: Observed
    posterior: OneHot
    """Over `[B, T, S, C]`"""
    kl: Tensor
    """Before the free nats. `[B, T]`"""
    imagined: Imagined
    policy: PolicyDistribution
    """At each imagined feature; over `[B * K, H+1, A]`"""
    behavior: ImaginationLosses
    replay_returns: Tensor
    """`[B, K-1]`"""
