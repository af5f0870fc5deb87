"""Losses of the actor and the critic, on imagined and on replayed steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from worldflux.models.dreamerv3.returns import lambda_return, update_percentiles
from worldflux.nn.distributions import PolicyDistribution, TwoHot


@dataclass(frozen=True)
class Imagined:
    """A rollout of the policy in the model, without gradient; index 0 is the replayed state that it starts from."""

    feat: Tensor
    """`[N, H+1, F]`"""
    actions: Tensor
    """The one at index i was drawn at feature i. `[N, H+1, A]`"""


@dataclass(frozen=True)
class ReturnNorm:
    """Running percentiles of imagined returns."""

    low: Tensor
    """5th percentile. `[]`"""
    high: Tensor
    """95th percentile. `[]`"""
    limit: float
    """The scale is never smaller, so that the noise of sparse rewards is not blown up."""

    @property
    def scale(self) -> Tensor:
        """What advantages are divided by. `[]`"""
        return (self.high - self.low).clamp(min=self.limit)

    def update(self, returns: Tensor, rate: float) -> ReturnNorm:
        """The normaliser after seeing `returns`."""
        low, high = update_percentiles(self.low, self.high, returns, rate)
        return ReturnNorm(low, high, self.limit)


@dataclass(frozen=True)
class ImaginationLosses:
    """Losses of imagined steps and what they were computed from."""

    actor: Tensor
    """`[N, H]`"""
    critic: Tensor
    """`[N, H]`"""
    returns: Tensor
    """Lambda returns, in reward units. `[N, H]`"""
    weight: Tensor
    """Probability that each step is reached, discount included. `[N, H+1]`"""
    advantage: Tensor
    """After normalisation. `[N, H]`"""
    entropy: Tensor
    """Of the policy, in nats. `[N, H]`"""
    norm: ReturnNorm
    """After seeing these returns."""


def imagined_returns(
    reward: Tensor, cont: Tensor, bootstrap: Tensor, *, lam: float, discount: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Lambda returns of imagined rollouts and the weight of each step.

    Args:
        reward: Predicted at each feature. `[N, H+1]`
        cont: Probability of going on, at each feature. `[N, H+1]`
        bootstrap: Value at each feature. `[N, H+1]`
        lam: Of the lambda return.
        discount: 1 where `cont` already contains the discount, as in DreamerV3.

    Returns:
        Returns `[N, H]` and weights `[N, H+1]`. The weight of a step includes its own `cont`, as in the reference.
    """
    weight = torch.cumprod(discount * cont, 1) / discount
    return lambda_return(reward, discount * cont, lam, bootstrap), weight


def imagination_losses(
    *,
    returns: Tensor,
    weight: Tensor,
    baseline: Tensor,
    critic: TwoHot,
    slow_value: Tensor,
    policy: PolicyDistribution,
    actions: Tensor,
    norm: ReturnNorm,
    entropy_scale: float,
) -> ImaginationLosses:
    """REINFORCE with a normalised advantage for the actor; two-hot regression for the critic.

    Args:
        returns: Targets. `[N, H]`
        weight: `[N, H+1]`
        baseline: What the returns are compared with: the values that they were bootstrapped from. `[N, H+1]`
        critic: At each feature; `[N, H+1]`.
        slow_value: The slow critic's values, towards which the critic is drawn. `[N, H+1]`
        policy: At each feature; over `[N, H+1, A]`.
        actions: Drawn at each feature. `[N, H+1, A]`
        norm: The normaliser to use; already updated with `returns`.
        entropy_scale: Weight of the policy's entropy.

    Source: DreamerV3, arXiv:2301.04104, actor and critic learning.
    """
    step_weight = weight[:, :-1].detach()
    returns = returns.detach()
    # Only the advantage is scaled. Targets stay in reward units, because the critic bootstraps from its own values.
    advantage = ((returns - baseline[:, :-1]) / norm.scale).detach()
    entropy = policy.entropy()[:, :-1]
    log_prob = policy.log_prob(actions.detach())[:, :-1]
    actor = -step_weight * (log_prob * advantage + entropy_scale * entropy)
    # The last feature has no return: any target will do there, its loss is cut off.
    padded = F.pad(returns, (0, 1))
    critic_loss = step_weight * critic.loss(padded, slow_value.detach())[:, :-1]
    return ImaginationLosses(actor, critic_loss, returns, weight, advantage, entropy.detach(), norm)


def replay_critic_loss(
    *,
    rewards: Tensor,
    is_terminal: Tensor,
    is_last: Tensor,
    bootstrap: Tensor,
    critic: TwoHot,
    slow_value: Tensor,
    discount: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """The critic's loss on replayed steps; its gradient goes on into the world model.

    Args:
        rewards: On arriving at each step. `[B, T]`
        is_terminal: 1 where the episode terminated on arriving. `[B, T]`
        is_last: 1 where the episode ended. `[B, T]`
        bootstrap: Imagined return from each step on. `[B, T]`
        critic: At each replayed feature; `[B, T]`.
        slow_value: `[B, T]`
        discount: Per step.
        lam: Of the lambda return.

    Returns:
        Loss and targets, `[B, T-1]` each. The last row of an episode has no loss.
    """
    going_on = 1.0 - is_last
    targets = lambda_return(rewards, discount * (1.0 - is_terminal), lam, bootstrap.detach(), trace=going_on)
    padded = F.pad(targets, (0, 1))
    loss = going_on[:, :-1] * critic.loss(padded, slow_value.detach())[:, :-1]
    return loss, targets
