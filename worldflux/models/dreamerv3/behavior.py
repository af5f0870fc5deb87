"""Losses of the actor and the critic on imagined and replayed steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from worldflux.models.dreamerv3.returns import lambda_return, update_percentiles
from worldflux.nn.distributions import PolicyDistribution, TwoHot


@dataclass(frozen=True)
class Imagined:
    """Rollout of the policy in the model, without gradient. Index 0 is the replayed state from which it starts."""

    feat: Tensor
    """Features of the states. `[N, H+1, F]`"""
    actions: Tensor
    """Actions of the policy; the action at index i was drawn at feature i. `[N, H+1, A]`"""


@dataclass(frozen=True)
class ReturnNorm:
    """Running percentiles of imagined returns."""

    low: Tensor
    """5th percentile. `[]`"""
    high: Tensor
    """95th percentile. `[]`"""
    limit: float
    """Smallest value of the scale, which keeps the noise of sparse rewards from being amplified."""

    @property
    def scale(self) -> Tensor:
        """Scale by which advantages are divided. `[]`"""
        return (self.high - self.low).clamp(min=self.limit)

    def update(self, returns: Tensor, rate: float) -> ReturnNorm:
        """Returns the normaliser updated with `returns`."""
        low, high = update_percentiles(self.low, self.high, returns, rate)
        return ReturnNorm(low, high, self.limit)


@dataclass(frozen=True)
class ImaginationLosses:
    """Losses of imagined steps, and the quantities from which they were computed."""

    actor: Tensor
    """Loss of the actor. `[N, H]`"""
    critic: Tensor
    """Loss of the critic. `[N, H]`"""
    returns: Tensor
    """Lambda returns in reward units. `[N, H]`"""
    weight: Tensor
    """Probability that each step is reached, including the discount. `[N, H+1]`"""
    advantage: Tensor
    """Normalised advantage. `[N, H]`"""
    entropy: Tensor
    """Entropy of the policy in nats. `[N, H]`"""
    norm: ReturnNorm
    """Normaliser updated with these returns."""


def imagined_returns(
    reward: Tensor, cont: Tensor, bootstrap: Tensor, *, lam: float, discount: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Computes the lambda returns of imagined rollouts and the weight of each step.

    Args:
        reward: Predicted reward at each feature. `[N, H+1]`
        cont: Probability that the episode continues at each feature. `[N, H+1]`
        bootstrap: Value at each feature. `[N, H+1]`
        lam: Lambda of the lambda return.
        discount: Discount per step; 1 if `cont` already contains it, as in DreamerV3.

    Returns:
        Returns `[N, H]` and weights `[N, H+1]`. The weight of a step includes its own `cont`, as in the reference
        implementation.
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
    """Computes the actor loss (REINFORCE with a normalised advantage) and the critic loss (two-hot regression).

    Args:
        returns: Lambda returns. `[N, H]`
        weight: Weight of each step. `[N, H+1]`
        baseline: Values from which the returns were bootstrapped, subtracted from them in the advantage. `[N, H+1]`
        critic: Distribution of the critic at each feature, over `[N, H+1]`.
        slow_value: Values of the slow critic, towards which the critic is regularised. `[N, H+1]`
        policy: Distribution of the policy at each feature, over `[N, H+1, A]`.
        actions: Action drawn at each feature. `[N, H+1, A]`
        norm: Normaliser, already updated with `returns`.
        entropy_scale: Weight of the policy's entropy.

    Source: DreamerV3, arXiv:2301.04104, actor and critic learning.
    """
    step_weight = weight[:, :-1].detach()
    returns = returns.detach()
    # Only the advantage is scaled. The targets stay in reward units, because the critic bootstraps from its own values.
    advantage = ((returns - baseline[:, :-1]) / norm.scale).detach()
    entropy = policy.entropy()[:, :-1]
    log_prob = policy.log_prob(actions.detach())[:, :-1]
    actor = -step_weight * (log_prob * advantage + entropy_scale * entropy)
    # The last feature has no return. Its target is arbitrary, because its loss is cut off.
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
    """Computes the critic's loss on replayed steps, whose gradient also reaches the world model.

    Args:
        rewards: Reward on arriving at each step. `[B, T]`
        is_terminal: 1 where the episode terminated on arriving. `[B, T]`
        is_last: 1 where the episode ended. `[B, T]`
        bootstrap: Imagined return from each step onwards. `[B, T]`
        critic: Distribution of the critic at each replayed feature, over `[B, T]`.
        slow_value: Values of the slow critic. `[B, T]`
        discount: Discount per step.
        lam: Lambda of the lambda return.

    Returns:
        Loss and targets, `[B, T-1]` each. The loss is zero in the last row of an episode.
    """
    going_on = 1.0 - is_last
    targets = lambda_return(rewards, discount * (1.0 - is_terminal), lam, bootstrap.detach(), trace=going_on)
    padded = F.pad(targets, (0, 1))
    loss = going_on[:, :-1] * critic.loss(padded, slow_value.detach())[:, :-1]
    return loss, targets


def imitation_loss(
    *, policy: PolicyDistribution, actions: Tensor, returns: Tensor, values: Tensor, is_last: Tensor
) -> Tensor:
    """Computes the loss by which the policy imitates recorded actions that were better than expected.

    It is the negative log-likelihood of the actions whose return exceeds the critic's value, and 0 for all others.

    Args:
        policy: Distribution of the policy at each replayed feature, over `[B, T-1, A]`.
        actions: Recorded action taken at each of them. `[B, T-1, A]`
        returns: Targets of the critic on these steps. `[B, T-1]`
        values: Values of the critic. `[B, T-1]`
        is_last: 1 where the episode ended, so that no action was taken. `[B, T-1]`

    Returns:
        Loss of each step. `[B, T-1]`

    Source: critic-regularised regression with the binary filter, arXiv:2006.15134.
    """
    better = (returns > values).float() * (1.0 - is_last)
    return -policy.log_prob(actions) * better.detach()
