"""Health metrics of DreamerV3, which detect known kinds of collapse from one batch.

The thresholds come from measured runs. "Healthy" values were measured while `dreamerv3:tiny` learned CartPole, Pendulum
and a small task with images, starting before the first gradient step; "broken" runs were broken on purpose.
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
    randomness,
    read,
    share_at_edge,
    share_constant,
    value_over_rewards,
)
from worldflux.nn.transforms import symlog

DREAMERV3_THRESHOLDS: dict[str, Threshold] = {
    # Healthy: at most 0.65, around the hundredth gradient step, and falling. Broken: 0.86 to 1 with an encoder without
    # input, 1 with the KL loss multiplied by 1000.
    "kl_at_free_nats": Threshold(
        0.8,
        "above",
        "The latents carry no information about the observations: lower kl_free or loss_scales['kl'], raise "
        "loss_scales['reconstruction'] (of a model without a decoder, loss_scales['redundancy']), and check that "
        "observations reach the model at a useful scale.",
    ),
    # Healthy: 0, also with 32 classes. Broken: 0.6 to 1 with learning rates of 0.1 to 10, 0.95 with posterior logits
    # multiplied by 100.
    "unused_codes": Threshold(
        0.5,
        "above",
        "The categorical latents always take the same few classes: restart training with a lower learning_rate, and "
        "keep unimix above 0.",
    ),
    # Healthy: 0. Broken: 1 with learning rates of 1 and 10.
    "constant_latents": Threshold(
        0.5,
        "above",
        "The latents do not depend on the observations: check whether the observations of the batch vary at all; if "
        "they do, restart training with a lower learning_rate.",
    ),
    # No policy can earn more. Healthy: at most 0.28, for an agent that had solved CartPole.
    "value_over_rewards": Threshold(
        1.0,
        "above",
        "The critic promises more than the rewards can add up to: lower learning_rate or discount_horizon; if rewards "
        "are rare, measure on a larger batch first.",
    ),
    # Healthy: 0. Broken: 1 with CartPole's rewards multiplied by 10^8.
    "values_at_edge": Threshold(0.05, "above", "Returns are too large for the critic's bins: scale the rewards down."),
    # Healthy: from 1 down to 0.03, the value of a good policy for CartPole. Broken: 10^-16 with a learning rate of 0.1.
    "policy_randomness": Threshold(
        0.001,
        "below",
        "The policy always takes the same action and no longer explores: raise entropy_scale or lower learning_rate.",
    ),
}
"""Thresholds of DreamerV3's health metrics, which `DreamerV3.health` defines."""

_LEAST_NATS = 0.1
"""Information in nats below which latents count as collapsed, however few nats are free."""
_USED = 0.01
"""Average probability from which a code counts as used, as a fraction of the uniform probability 1 / C."""


def health_metrics(parts: LossParts, config: DreamerV3Config, bins: Tensor) -> tuple[HealthMetric, ...]:
    """Computes the health metrics from one computation of the losses.

    Args:
        parts: Losses and the quantities from which they were computed.
        config: Configuration of the model.
        bins: Bins of the critic in reward units. `[n]`
    """
    probs, behavior, mask = parts.posterior.probs, parts.behavior, parts.rows.obs_mask
    # Without an observation the posterior equals the prior, which says nothing about either of them.
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
        # Replayed returns contain the real rewards, but are too few to matter in a joint average with imagined ones.
        "values_at_edge": torch.maximum(
            share_at_edge(imagined, torch.ones_like(imagined), edge),
            share_at_edge(replayed, torch.ones_like(replayed), edge),
        ),
        "policy_randomness": randomness(
            behavior.entropy, torch.ones_like(behavior.entropy), *parts.policy.entropy_range
        ),
    }
    return read(values, DREAMERV3_THRESHOLDS)


def share_at_free_nats(kl: Tensor, probs: Tensor, counted: Tensor, free_nats: float) -> Tensor:
    """Computes the fraction of steps whose latents carry no more information than the free nats.

    This is the case if the KL divergence of a step's posterior is within the free nats both from the prior and from the
    average posterior of the batch. The first condition alone is not a problem: if the environment is easy to predict, a
    good prior is always that close.

    Args:
        kl: KL divergence of the posterior from the prior. `[B, T]`
        probs: Probabilities of the posterior. `[B, T, S, C]`
        counted: 1 for steps that count, else 0. `[B, T]`
        free_nats: KL divergence below which the loss is constant.
    """
    free = max(free_nats, _LEAST_NATS)
    mean = _mean_probs(probs, counted)
    told = (torch.xlogy(probs, probs) - torch.xlogy(probs, mean)).sum((-2, -1))  # [B, T] nats
    return counted_mean(((kl <= free) & (told <= free)).float(), counted)


def unused_codes(probs: Tensor, counted: Tensor, unimix: float) -> Tensor:
    """Computes the fraction of codes that no step of the batch uses, among all but one code of each latent.

    One code of each latent is not counted, because every latent needs at least one. A code is used if its mean
    probability, without the unimix, is at least a hundredth of 1 / C.

    Args:
        probs: Probabilities of the posterior. `[B, T, S, C]`
        counted: 1 for steps that count, else 0. `[B, T]`
        unimix: Weight of the uniform distribution in `probs`, which every code receives.
    """
    groups, classes = probs.shape[-2:]
    own = _mean_probs(probs, counted) - unimix / classes
    unused = (own < _USED / classes).sum() * (counted.sum() > 0)
    return unused / max(groups * (classes - 1), 1)


def _mean_probs(probs: Tensor, counted: Tensor) -> Tensor:
    """Computes the mean over the steps that count. `[B, T, S, C]`, `[B, T]` → `[S, C]`"""
    weights = (counted / counted.sum().clamp(min=1.0))[..., None, None]
    return (weights * probs).sum((0, 1))
