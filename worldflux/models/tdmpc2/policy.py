"""Policy prior: a normal distribution squashed by tanh."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from worldflux.nn.distributions import CategoricalPolicy, one_hots

_NEVER = -1e9
"""Logit of a class that a row has not."""


@dataclass(frozen=True)
class PolicySample:
    """One sample of the policy in each row. Quantities that only the loss needs, not a planner, are computed lazily."""

    action: Tensor
    """Action in [-1, 1]. `[..., A]`"""
    center: Tensor
    """Action without noise, before squashing. `[..., A]`"""
    log_std: Tensor
    """Logarithm of the standard deviation before squashing. `[..., A]`"""
    noise: Tensor
    """Standard normal noise, 0 in unused dimensions. `[..., A]`"""
    used: Tensor | int
    """Number of action dimensions that the row's task uses. `[...]`"""

    @property
    def mean(self) -> Tensor:
        """Action without noise. `[..., A]`"""
        return torch.tanh(self.center)

    @property
    def gaussian(self) -> Tensor:
        """Log-density before squashing. `[...]`"""
        # An unused dimension has log_std 0 and noise 0, but still contributes -log(2 pi) / 2, as in the reference.
        return (-0.5 * self.noise.square() - self.log_std - 0.5 * math.log(2.0 * math.pi)).sum(-1)

    @property
    def log_prob(self) -> Tensor:
        """Log-density of the squashed action. `[...]`"""
        return self.gaussian - torch.log(F.relu(1.0 - self.action.square()) + 1e-6).sum(-1)

    @property
    def entropy(self) -> Tensor:
        """Estimate of the entropy from one sample, `-log_prob`. `[...]`"""
        return -self.log_prob

    @property
    def scaled_entropy(self) -> Tensor:
        """Entropy bonus of the policy: the negative log-density before squashing, multiplied by the number of used
        action dimensions. `[...]`
        """
        # The reference multiplies this by log_prob / (log_prob + 1e-8), which is 1 up to rounding.
        return -self.used * self.gaussian


def squashed_normal(
    raw: Tensor, noise: Tensor, *, log_std_min: float, log_std_max: float, mask: Tensor | None = None
) -> PolicySample:
    """Samples from the squashed normal distribution that the network's output describes.

    Args:
        raw: Output of the network: means, then raw log-stds. `[..., 2A]`
        noise: Standard normal noise. `[..., A]`
        log_std_min: Smallest log-std.
        log_std_max: Largest log-std.
        mask: 1 where the task of a row uses an action dimension, else 0; None uses all. `[..., A]`

    Source: TD-MPC2, arXiv:2310.16828, policy prior.
    """
    mean, raw_std = raw.float().chunk(2, -1)
    log_std = log_std_min + 0.5 * (log_std_max - log_std_min) * (torch.tanh(raw_std) + 1.0)
    used: Tensor | int = mean.shape[-1]
    if mask is not None:
        mean, log_std, noise = mean * mask, log_std * mask, noise * mask
        used = mask.sum(-1)
    return PolicySample(torch.tanh(mean + log_std.exp() * noise), mean, log_std, noise, used)


@dataclass(frozen=True)
class CategoricalSample:
    """One sample of the policy in each row, for discrete actions: concatenated one-hot vectors."""

    action: Tensor
    """Action without gradient. `[..., A]`"""
    distribution: CategoricalPolicy
    """Distribution that the action was drawn from."""
    mask: Tensor | None
    """1 where the task of a row has a class, else 0; None if all rows have all. `[..., A]`"""

    @property
    def probs(self) -> Tensor:
        """Probabilities of the classes; 0 for those that a row has not. `[..., A]`"""
        probs = self.distribution.logprobs.exp()
        return probs if self.mask is None else probs * self.mask

    @property
    def entropy(self) -> Tensor:
        """Entropy in nats, summed over the parts. `[...]`"""
        return -(self.probs * self.distribution.logprobs).sum(-1)

    @property
    def scaled_entropy(self) -> Tensor:
        """Entropy bonus of the policy: the entropy, multiplied by the number of parts. `[...]`"""
        return len(self.distribution.classes) * self.entropy


def categorical(raw: Tensor, noise: Tensor, classes: tuple[int, ...], mask: Tensor | None = None) -> CategoricalSample:
    """Samples from the categorical distributions that the network's output describes.

    Args:
        raw: Logits of the classes. `[..., A]`
        noise: Gumbel noise; zero noise gives the most likely classes. `[..., A]`
        classes: Number of classes of each part; the sum is A.
        mask: 1 where the task of a row has a class, else 0; None if all rows have all. `[..., A]`
    """
    if mask is not None:
        raw = raw.float().masked_fill(mask == 0, _NEVER)
    distribution = CategoricalPolicy(raw, classes)
    action = one_hots(distribution.logprobs + noise, classes)
    return CategoricalSample(action if mask is None else action * mask, distribution, mask)


def alternatives(action: Tensor, classes: tuple[int, ...]) -> Tensor:
    """Returns the A actions that take another class, or the same, in one of their parts. `[..., A]` → `[A, ..., A]`

    The j-th has the class of column j, and in the other parts what the given action has.
    """
    parts = torch.block_diag(*(action.new_ones(size, size) for size in classes))  # 1 for columns of the same part
    shape = (len(parts), *[1] * (action.ndim - 1), len(parts))
    return action * (1.0 - parts).view(shape) + torch.eye(len(parts), device=action.device).view(shape)


def expected_value(values: Tensor, probs: Tensor, parts: int) -> Tensor:
    """Computes the value of a policy from the values of all alternatives to its sample. `[..., A]` → `[...]`

    Each part of the action has an expectation over its classes, in which the other parts are sampled. The result is
    their mean, and its gradient is the sum of their gradients: it is the exact one for a single part, and an unbiased
    estimate for several.

    Args:
        values: Values of the `alternatives`, without gradient. `[..., A]`
        probs: Probabilities of the classes. `[..., A]`
        parts: Number of parts.
    """
    total = (probs * values).sum(-1)
    return total - (1.0 - 1.0 / parts) * total.detach()
