"""Random draws and results of one computation of DreamerV3's losses."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from worldflux.models.dreamerv3.alignment import ArrivalRows
from worldflux.models.dreamerv3.behavior import ImaginationLosses, Imagined
from worldflux.models.dreamerv3.rssm import Observed
from worldflux.nn.distributions import OneHot, PolicyDistribution


@dataclass(frozen=True)
class Draws:
    """Random draws of one computation of the losses. Passed to it, they reproduce a recorded computation."""

    stoch: Tensor
    """Classes of the posterior samples. `[B, T, S]`"""
    imagined_stoch: Tensor
    """Classes of the imagined samples; index 0 is not used. `[B * K, H+1, S]`"""
    imagined_actions: Tensor
    """Actions of the policy in imagination. `[B * K, H+1, A]`"""


@dataclass(frozen=True)
class LossParts:
    """All losses before averaging, and the quantities from which they were computed."""

    losses: dict[str, Tensor]
    """Losses per step `[B, T]`. With K start steps of imagination, those of the actor and the critic are `[B, K]`, and
    `"replay_critic"` is `[B, K-1]`. `"redundancy"` is one number for the batch, `[]`."""
    reconstruction: dict[str, Tensor]
    """Reconstruction loss of each observation key; the sum is `losses["reconstruction"]`. Empty without a decoder.
    `[B, T]`"""
    rows: ArrivalRows
    """Batch in DreamerV3's alignment."""
    observed: Observed
    """Posterior states along the windows."""
    posterior: OneHot
    """Posterior distributions, over `[B, T, S, C]`."""
    kl: Tensor
    """KL divergence before applying the free nats. `[B, T]`"""
    imagined: Imagined
    """Imagined rollouts."""
    policy: PolicyDistribution
    """Policy at each imagined feature, over `[B * K, H+1, A]`."""
    behavior: ImaginationLosses
    """Losses of the imagined steps."""
    replay_returns: Tensor
    """Targets of the critic on replayed steps. `[B, K-1]`"""
