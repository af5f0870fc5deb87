"""What DreamerV3 dies of, as numbers of one batch: tensors in, scalars out.

The thresholds come from measured runs. "Healthy" is what `dreamerv3:tiny` showed while it learned CartPole, Pendulum
and a small task in pictures, from before the first gradient step on; "broken" are runs that were broken on purpose.
"""

from __future__ import annotations

import torch
from torch import Tensor

from worldflux.config import DreamerV3Config
from worldflux.models.dreamerv3.parts import LossParts
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
from worldflux.nn.transforms import symlog

DREAMERV3_THRESHOLDS: dict[str, Threshold] = {
    # Healthy: at most 0.65, around the hundredth gradient step, and falling. Broken: 0.86 to 1 with an encoder that
    # sees nothing, 1 with a KL loss weighted 1000 times.
    "kl_at_free_nats": Threshold(
        0.8,
        "above",
        "The latents say nothing about what was seen: lower kl_free or loss_scales['kl'], raise "
        "loss_scales['reconstruction'], and see whether observations reach the model at a useful scale.",
    ),
    # Healthy: 0, also with 32 classes. Broken: 0.6 to 1 with learning rates of 0.1 to 10, 0.95 with posterior logits
    # 100 times as large.
    "unused_codes": Threshold(
        0.5,
        "above",
        "The categorical latents always take the same few classes: start anew with a lower learning_rate, and keep "
        "unimix above 0.",
    ),
    # Healthy: 0. Broken: 1 with learning rates of 1 and 10.
    "constant_latents": Threshold(
        0.5,
        "above",
        "The latents are the same whatever is seen: see whether the observations of the batch vary at all; if they do, "
        "start anew with a lower learning_rate.",
    ),
    # No policy can earn more. Healthy: at most 0.28, by an agent that had solved CartPole.
    "value_over_rewards": Threshold(
        1.0,
        "above",
        "The critic promises more than the rewards can add up to: lower learning_rate or discount_horizon; if rewards "
        "are rare, look at a larger batch first.",
    ),
    # Healthy: 0. Broken: 1 with CartPole's rewards multiplied by 10^8.
    "values_at_edge": Threshold(0.05, "above", "Returns are too large for the critic's bins: scale the rewards down."),
    # Healthy: from 1 down to 0.03, where a good policy for CartPole ends. Broken: 10^-16 with a learning rate of 0.1.
    "policy_randomness": Threshold(
        0.001,
        "below",
        "The policy always takes the same action and explores no more: raise entropy_scale or lower learning_rate.",
    ),
}
"""From where on each metric of DreamerV3 is bad; what each measures stands at `DreamerV3.health`."""

_LEAST_NATS = 0.1
"""Latents that say less than this are dead, however few nats are free."""
_USED = 0.01
"""Share of an even probability, 1 / C, that a code has to get on average in order to count as used."""


def health_metrics(parts: LossParts, config: DreamerV3Config, bins: Tensor) -> tuple[HealthMetric, ...]:
    """The health metrics of one loss computation.

    Args:
        parts: What the losses were made of.
        config: The model's.
        bins: Of the critic, in reward units. `[n]`
    """
    probs, behavior, mask = parts.posterior.probs, parts.behavior, parts.rows.obs_mask
    # Where nothing was seen the posterior is the prior, which says nothing about either.
    seen = torch.ones_like(parts.kl) if mask is None else mask.float()
    imagined, replayed = behavior.returns, parts.replay_returns
    edge = symlog(bins[-1])
    bound = largest_reward(parts.rows.rewards) * config.discount_horizon
    values = {
        "kl_at_free_nats": share_at_free_nats(parts.kl, probs, seen, config.kl_free),
        "unused_codes": unused_codes(probs, seen, config.unimix),
        "constant_latents": share_constant(probs, seen),
        "value_over_rewards": value_over_rewards(
            imagined, torch.ones_like(imagined), bound, behavior.norm.scale / bound
        ),
        # Replayed returns hold the real rewards, and are too few to be seen among the imagined ones.
        "values_at_edge": torch.maximum(
            share_at_edge(imagined, torch.ones_like(imagined), edge),
            share_at_edge(replayed, torch.ones_like(replayed), edge),
        ),
        "policy_randomness": randomness(behavior.entropy, *parts.policy.entropy_range),
    }
    return read(values, DREAMERV3_THRESHOLDS)


def share_at_free_nats(kl: Tensor, probs: Tensor, counted: Tensor, free_nats: float) -> Tensor:
    """Share of steps whose latents carry no more than what is free.

    A step counts if neither the prior nor the batch's average would be a worse guess of its latents than the free nats
    allow. The first alone is no illness: where the world is easy to predict, a good prior is always that close.

    Args:
        kl: From the prior to the posterior. `[B, T]`
        probs: Of the posterior. `[B, T, S, C]`
        counted: 1 or 0. `[B, T]`
        free_nats: Below this the KL costs nothing.
    """
    free = max(free_nats, _LEAST_NATS)
    mean = _mean_probs(probs, counted)
    told = (torch.xlogy(probs, probs) - torch.xlogy(probs, mean)).sum((-2, -1))  # [B, T] nats
    return counted_mean(((kl <= free) & (told <= free)).float(), counted)


def unused_codes(probs: Tensor, counted: Tensor, unimix: float) -> Tensor:
    """Share of codes that no step of the batch uses, of those that could be spared: each latent needs one.

    A code is used if the mean of its probabilities, without the unimix, is at least a hundredth of 1 / C.

    Args:
        probs: Of the posterior. `[B, T, S, C]`
        counted: 1 or 0. `[B, T]`
        unimix: Share of the uniform distribution in `probs`, which every code has anyway.
    """
    groups, classes = probs.shape[-2:]
    own = _mean_probs(probs, counted) - unimix / classes
    unused = (own < _USED / classes).sum() * (counted.sum() > 0)
    return unused / max(groups * (classes - 1), 1)


def randomness(entropy: Tensor, lowest: float, highest: float) -> Tensor:
    """Mean entropy, 0 for the least and 1 for the greatest that the policy can have.

    Args:
        entropy: In nats. `[...]`
        lowest: Of a policy without any exploration.
        highest: Of a policy without any preference; where it is no more than that, there is nothing to choose: 1.
    """
    if highest <= lowest:
        return torch.ones((), device=entropy.device)
    return (entropy.mean() - lowest) / (highest - lowest)


def _mean_probs(probs: Tensor, counted: Tensor) -> Tensor:
    """Mean over the steps that count. `[B, T, S, C]`, `[B, T]` → `[S, C]`"""
    weights = (counted / counted.sum().clamp(min=1.0))[..., None, None]
    return (weights * probs).sum((0, 1))
