"""Health metrics of TD-MPC2, which detect known kinds of collapse from one batch.

The thresholds come from measured runs. "Healthy" values were measured while `tdmpc2:tiny` learned Pendulum, walker-walk
and a task with images, starting before the first gradient step; "broken" runs were broken on purpose.
"""

from __future__ import annotations

import torch
from torch import Tensor

from worldflux.config import TDMPC2Config
from worldflux.models.health import (
    HealthMetric,
    Threshold,
    counted_mean,
    largest_reward,
    randomness,
    read,
    share_at_edge,
    share_constant,
    value_over_rewards,
)
from worldflux.models.tdmpc2.alignment import Windows
from worldflux.models.tdmpc2.parts import ModelParts
from worldflux.models.tdmpc2.policy import CategoricalSample, PolicySample

TDMPC2_THRESHOLDS: dict[str, Threshold] = {
    # Healthy: 0. Broken: 0.33 to 0.9 with learning rates of 0.3 and 3, 0.8 with encoder weights multiplied by 30.
    "saturated_groups": Threshold(
        0.25,
        "above",
        "SimNorm groups have become one-hot and no longer pass a gradient: lower learning_rate or encoder_lr_scale.",
    ),
    # Healthy: 0. Broken: 1 with an encoder without input.
    "constant_latents": Threshold(
        0.5,
        "above",
        "The latents do not depend on the observations: check whether the observations of the batch vary at all; if "
        "they do, restart training with a lower learning_rate or consistency_coef.",
    ),
    # No policy can earn more. Healthy: at most 0.09. Broken: 1.2 and then 2.4 without a discount and without slow
    # target networks (tau 1).
    "value_over_rewards": Threshold(
        1.0,
        "above",
        "The values promise more than the rewards can add up to: lower learning_rate, tau or discount_max; if rewards "
        "are rare, measure on a larger batch first.",
    ),
    # Healthy: 0. Broken: 1 with Pendulum's rewards multiplied by 10^6; with a factor of 1000, 0.03 at first and soon
    # 0.36.
    "values_at_edge": Threshold(
        0.05,
        "above",
        "Values are too large for the two-hot bins, which clip them: scale the rewards down, or raise vmax and "
        "lower vmin.",
    ),
    # Healthy: 0.39 to 0.99. Broken: 0 with a learning rate of 0.03.
    "policy_randomness": Threshold(
        0.01,
        "below",
        "The policy prior has reached its smallest standard deviation and no longer learns: raise entropy_coef or "
        "lower learning_rate.",
    ),
}
"""Thresholds of TD-MPC2's health metrics, which `TDMPC2.health` defines."""

_ONE_HOT = 0.99
"""Largest entry from which a SimNorm group counts as one-hot."""


def health_metrics(
    w: Windows,
    parts: ModelParts,
    config: TDMPC2Config,
    *,
    discount: Tensor | float,
    value_scale: Tensor,
    policy: PolicySample | CategoricalSample,
    action_mask: Tensor | None,
) -> tuple[HealthMetric, ...]:
    """Computes the health metrics from one computation of the model's loss.

    Args:
        w: Windows of the batch.
        parts: Losses and the quantities from which they were computed.
        config: Configuration of the model.
        discount: Discount per step: a number, or one for the task of each step `[N, H]`.
        value_scale: Running scale of the values. `[]`
        policy: Policy at each latent. `[N, H+1, ...]`
        action_mask: 1 where the task uses an action dimension, else 0; None if all are used. `[N, H+1, A]`
    """
    encodings = torch.cat([parts.latents[:, :1].float(), parts.next_latents], 1)  # [N, H+1, L]
    if isinstance(policy, CategoricalSample):
        random = randomness(policy.entropy, w.states, *policy.distribution.entropy_range)
    else:
        chosen = w.states.unsqueeze(-1).expand_as(policy.log_std)
        if action_mask is not None:
            chosen = chosen * action_mask
        random = randomness(policy.log_std, chosen, config.log_std_min, config.log_std_max)
    episode = max(config.task_episode_lengths or (config.episode_length,))
    bound = largest_reward(w.rewards * w.steps) * steps_that_count(discount, episode, like=w.rewards)
    values = {
        "saturated_groups": saturated_groups(encodings, w.states, config.simnorm_dim),
        "constant_latents": share_constant(encodings.unflatten(-1, (-1, config.simnorm_dim)), w.states),
        "value_over_rewards": value_over_rewards(parts.targets, w.targets, bound, value_scale / bound.max()),
        "values_at_edge": share_at_edge(parts.targets, w.targets, config.vmax),
        "policy_randomness": random,
    }
    return read(values, TDMPC2_THRESHOLDS)


def steps_that_count(discount: Tensor | float, episode: int, *, like: Tensor) -> Tensor:
    """Computes the return of a reward of 1 in every step: `1 / (1 - discount)`, or the episode length if discount is 1.

    Args:
        discount: Discount per step: a number, or `[N, H]`.
        episode: Length of an episode in steps.
        like: Tensor with the shape and device of the result. `[N, H]`
    """
    lost = 1.0 - torch.zeros_like(like) - discount
    return torch.where(lost > 0, 1.0 / lost, float(episode))


def saturated_groups(latents: Tensor, counted: Tensor, dim: int) -> Tensor:
    """Computes the fraction of SimNorm groups whose largest entry is above 0.99, where softmax has almost no gradient.

    Args:
        latents: Latent states. `[N, T, L]`
        counted: 1 for latents that count, else 0. `[N, T]`
        dim: Size of each group.
    """
    largest = latents.float().unflatten(-1, (-1, dim)).amax(-1)  # [N, T, G]
    return counted_mean((largest > _ONE_HOT).float(), counted.unsqueeze(-1))
