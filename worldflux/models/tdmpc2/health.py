"""What TD-MPC2 dies of, as numbers of one batch: tensors in, scalars out.

The thresholds come from measured runs. "Healthy" is what `tdmpc2:tiny` showed while it learned Pendulum, walker-walk
and a task in pictures, from before the first gradient step on; "broken" are runs that were broken on purpose.
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
    read,
    share_at_edge,
    share_constant,
    value_over_rewards,
)
from worldflux.models.tdmpc2.alignment import Windows
from worldflux.models.tdmpc2.parts import ModelParts

TDMPC2_THRESHOLDS: dict[str, Threshold] = {
    # Healthy: 0. Broken: 0.33 to 0.9 with learning rates of 0.3 and 3, 0.8 with encoder weights 30 times as large.
    "saturated_groups": Threshold(
        0.25,
        "above",
        "SimNorm groups have become one-hot and pass no gradient on: lower learning_rate or encoder_lr_scale.",
    ),
    # Healthy: 0. Broken: 1 with an encoder that sees nothing.
    "constant_latents": Threshold(
        0.5,
        "above",
        "The latent is the same whatever is seen: see whether the observations of the batch vary at all; if they do, "
        "start anew with a lower learning_rate or consistency_coef.",
    ),
    # No policy can earn more. Healthy: at most 0.09. Broken: 1.2 and then 2.4 without a discount, learning from its own
    # values at once (tau 1).
    "value_over_rewards": Threshold(
        1.0,
        "above",
        "The values promise more than the rewards can add up to: lower learning_rate, tau or discount_max; if rewards "
        "are rare, look at a larger batch first.",
    ),
    # Healthy: 0. Broken: 1 with Pendulum's rewards multiplied by 10^6; by 1000, 0.03 at first and soon 0.36.
    "values_at_edge": Threshold(
        0.05,
        "above",
        "Values are too large for the two-hot bins, which cut them off: scale the rewards down, or raise vmax and "
        "lower vmin.",
    ),
    # Healthy: 0.39 to 0.99. Broken: 0 with a learning rate of 0.03.
    "policy_randomness": Threshold(
        0.01,
        "below",
        "The policy prior stands at its smallest standard deviation and learns no more: raise entropy_coef or "
        "lower learning_rate.",
    ),
}
"""From where on each metric of TD-MPC2 is bad; what each measures stands at `TDMPC2.health`."""

_ONE_HOT = 0.99


def health_metrics(
    w: Windows,
    parts: ModelParts,
    config: TDMPC2Config,
    *,
    discount: Tensor | float,
    value_scale: Tensor,
    log_std: Tensor,
    action_mask: Tensor | None,
) -> tuple[HealthMetric, ...]:
    """The health metrics of one computation of the model's loss.

    Args:
        w: The windows.
        parts: What the losses were made of.
        config: The model's.
        discount: A number, or of each step's task. `[N, H]`
        value_scale: The running scale of values. `[]`
        log_std: Of the policy at each latent, before squashing. `[N, H+1, A]`
        action_mask: 1 where the task uses an action dimension, else 0; None: all do. `[N, H+1, A]`
    """
    encodings = torch.cat([parts.latents[:, :1].float(), parts.next_latents], 1)  # [N, H+1, L]
    chosen = w.states.unsqueeze(-1).expand_as(log_std)
    if action_mask is not None:
        chosen = chosen * action_mask
    episode = max(config.task_episode_lengths or (config.episode_length,))
    bound = largest_reward(w.rewards * w.steps) * steps_that_count(discount, episode, like=w.rewards)
    values = {
        "saturated_groups": saturated_groups(encodings, w.states, config.simnorm_dim),
        "constant_latents": share_constant(encodings.unflatten(-1, (-1, config.simnorm_dim)), w.states),
        "value_over_rewards": value_over_rewards(parts.targets, w.targets, bound, value_scale / bound.max()),
        "values_at_edge": share_at_edge(parts.targets, w.targets, config.vmax),
        "policy_randomness": randomness(log_std, chosen, config.log_std_min, config.log_std_max),
    }
    return read(values, TDMPC2_THRESHOLDS)


def steps_that_count(discount: Tensor | float, episode: int, *, like: Tensor) -> Tensor:
    """What a reward of 1 in every step adds up to: `1 / (1 - discount)`; the length of an episode without a discount.

    Args:
        discount: A number, or `[N, H]`.
        episode: Steps.
        like: Its shape and device are those of the result. `[N, H]`
    """
    lost = 1.0 - torch.zeros_like(like) - discount
    return torch.where(lost > 0, 1.0 / lost, float(episode))


def saturated_groups(latents: Tensor, counted: Tensor, dim: int) -> Tensor:
    """Share of SimNorm groups whose largest number is above 0.99, so that a softmax passes next to no gradient.

    Args:
        latents: `[N, T, L]`
        counted: 1 or 0. `[N, T]`
        dim: Numbers in each group.
    """
    largest = latents.float().unflatten(-1, (-1, dim)).amax(-1)  # [N, T, G]
    return counted_mean((largest > _ONE_HOT).float(), counted.unsqueeze(-1))


def randomness(log_std: Tensor, counted: Tensor, lowest: float, highest: float) -> Tensor:
    """Mean logarithm of the policy's standard deviation, 0 for the least and 1 for the greatest that it can have.

    Args:
        log_std: Before squashing. `[N, T, A]`
        counted: 1 or 0. `[N, T, A]`
        lowest: Smallest possible.
        highest: Largest possible; where it is the smallest, nothing can collapse: 1.
    """
    if highest <= lowest:
        return torch.ones((), device=log_std.device)
    return counted_mean((log_std - lowest) / (highest - lowest), counted)
