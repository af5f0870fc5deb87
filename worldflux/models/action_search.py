"""Distributions over sequences of actions, from which a planner draws candidates and which it fits to the best ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from worldflux.config import PlannerConfig
from worldflux.nn.distributions import gumbel_noise, one_hots

_START_UNIFORM = 0.5
"""Share of uniform probabilities in those with which a plan starts."""
_TINY = 1e-20


class SearchState(NamedTuple):
    """Parameters of the distribution of each step. Steps are the first axis, as in `rollout`."""

    mean: Tensor
    """Mean of the actions. `[H, N, A]`"""
    std: Tensor
    """Standard deviation of the actions. `[H, N, A]`"""


class ActionSearch(Protocol):
    """Kind of distribution that a planner searches with. It has no state of its own; masks are `[N, A]` or None."""

    def noise(self, *shape: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
        """Draws noise of the kind that `sample` and a policy's proposals take. Zero noise gives the likeliest action.

        Args:
            *shape: Shape of the result; the last axis are the A entries of an action.
            device: Device of the result.
            generator: Generator on that device to draw from.
        """

    def unknown(self, *shape: int, device: torch.device) -> Tensor:
        """Returns the means of actions about which nothing is known. The last axis are the A entries of an action."""

    def initial(self, mean: Tensor, mask: Tensor | None) -> SearchState:
        """Returns the distribution with which a plan starts, given means `[H, N, A]`."""

    def sample(self, state: SearchState, noise: Tensor, mask: Tensor | None) -> Tensor:
        """Returns sequences of actions as a function of noise. `[H, N, S, A]` → `[H, N, S, A]`"""

    def refit(self, state: SearchState, elites: Tensor, weights: Tensor, mask: Tensor | None) -> SearchState:
        """Fits the distribution to the elites.

        Args:
            state: Distribution that the candidates were drawn from.
            elites: Sequences of actions of the elites. `[H, N, E, A]`
            weights: Weights of the elites, which sum to 1. `[N, E]`
            mask: 1 where a row has an action dimension, else 0; None if all rows have all.
        """

    def carried_out(self, actions: Tensor, state: SearchState, noise: Tensor | None) -> Tensor:
        """Returns the actions that are carried out.

        Args:
            actions: First actions of the elite that was chosen in each row. `[N, A]`
            state: Last distribution.
            noise: Noise of exploration; None adds none. `[N, A]`
        """


@dataclass(frozen=True)
class NormalSearch:
    """Independent normal distributions, whose samples are clipped to [-1, 1], for continuous actions."""

    config: PlannerConfig

    def noise(self, *shape: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
        """Draws standard normal noise."""
        return torch.randn(*shape, device=device, generator=generator)

    def unknown(self, *shape: int, device: torch.device) -> Tensor:
        """Returns zeros, the middle of the actions' range."""
        return torch.zeros(*shape, device=device)

    def initial(self, mean: Tensor, mask: Tensor | None) -> SearchState:
        """Returns the given means with the largest standard deviation."""
        std = torch.full_like(mean, self.config.max_std)
        return SearchState(mean, std) if mask is None else SearchState(mean * mask, std * mask)

    def sample(self, state: SearchState, noise: Tensor, mask: Tensor | None) -> Tensor:
        """Returns `mean + std * noise`, clipped to [-1, 1]. `[H, N, S, A]`"""
        actions = (state.mean.unsqueeze(2) + state.std.unsqueeze(2) * noise).clamp(-1.0, 1.0)
        return actions if mask is None else actions * mask.unsqueeze(1)

    def refit(self, state: SearchState, elites: Tensor, weights: Tensor, mask: Tensor | None) -> SearchState:
        """Returns the weighted mean and standard deviation of the elites, within the configured limits.

        The deviation is around the mean of the elites; momentum only affects the mean of the distribution (TD-MPC).
        """
        c = self.config
        weights = weights[None, :, :, None]
        fitted = (weights * elites).sum(2)
        variance = (weights * (elites - fitted.unsqueeze(2)).square()).sum(2)
        std = variance.sqrt().clamp(c.min_std, c.max_std)
        if mask is not None:
            std = std * mask
        return SearchState(c.momentum * state.mean + (1.0 - c.momentum) * fitted, std)

    def carried_out(self, actions: Tensor, state: SearchState, noise: Tensor | None) -> Tensor:
        """Returns the actions plus noise with the last standard deviation, clipped to [-1, 1]. `[N, A]`"""
        if noise is not None:
            actions = actions + state.std[0] * noise
        return actions.clamp(-1.0, 1.0)


@dataclass(frozen=True)
class CategoricalSearch:
    """Independent categorical distributions, for discrete actions: the same search with probabilities as means.

    Actions are concatenated one-hot vectors, one for each part. A row without some of the classes never draws them, and
    a part of which it has none stays zero.
    """

    config: PlannerConfig
    classes: tuple[int, ...]
    """Number of classes of each part; the sum is A."""

    def noise(self, *shape: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
        """Draws standard Gumbel noise: the largest sum with log-probabilities is a draw from the distribution."""
        return gumbel_noise(*shape, device=device, generator=generator)

    def unknown(self, *shape: int, device: torch.device) -> Tensor:
        """Returns uniform probabilities."""
        return self._uniform(torch.empty((), device=device)).expand(*shape).contiguous()

    def initial(self, mean: Tensor, mask: Tensor | None) -> SearchState:
        """Returns the given probabilities, halfway to uniform ones: the next search may change its mind."""
        return self._state(torch.lerp(mean, self._uniform(mean), _START_UNIFORM), mask)

    def sample(self, state: SearchState, noise: Tensor, mask: Tensor | None) -> Tensor:
        """Returns the classes with the largest sums of noise and log-probability. `[H, N, S, A]`"""
        mask = None if mask is None else mask.unsqueeze(1)
        return self._one_hots(state.mean.unsqueeze(2), noise, mask)

    def refit(self, state: SearchState, elites: Tensor, weights: Tensor, mask: Tensor | None) -> SearchState:
        """Returns the weighted frequency of each class among the elites, mixed with uniform probabilities."""
        c = self.config
        fitted = (weights[None, :, :, None] * elites).sum(2)
        mean = c.momentum * state.mean + (1.0 - c.momentum) * fitted
        return self._state(torch.lerp(mean, self._uniform(mean), c.uniform_share), mask)

    def carried_out(self, actions: Tensor, state: SearchState, noise: Tensor | None) -> Tensor:
        """Returns the actions; each part becomes a random class with probability `uniform_share`. `[N, A]`"""
        if noise is None:
            return actions
        # A row has the classes of which its distribution is above 0.
        mask = (state.mean[0] > 0).to(actions.dtype)
        probs = torch.lerp(actions, self._uniform(actions), self.config.uniform_share)
        return self._one_hots(probs * mask, noise, mask)

    def _uniform(self, like: Tensor) -> Tensor:
        """Returns uniform probabilities. `[A]`"""
        return torch.cat([like.new_full((size,), 1.0 / size) for size in self.classes])

    def _state(self, probs: Tensor, mask: Tensor | None) -> SearchState:
        """Returns the distribution of probabilities `[H, N, A]`, of which a mask leaves those of the classes that a row
        has.
        """
        if mask is not None:
            parts = (probs * mask).split(self.classes, -1)
            probs = torch.cat([part / part.sum(-1, keepdim=True).clamp(min=_TINY) for part in parts], -1)
        return SearchState(probs, (probs * (1.0 - probs)).clamp(min=0.0).sqrt())

    def _one_hots(self, probs: Tensor, noise: Tensor, mask: Tensor | None) -> Tensor:
        """Draws classes from probabilities, as a function of noise."""
        drawn = one_hots(probs.clamp(min=_TINY).log() + noise, self.classes)
        return drawn if mask is None else drawn * mask


@dataclass(frozen=True)
class ExhaustiveSearch(CategoricalSearch):
    """All sequences of discrete actions, where there are few: none is drawn, and one iteration finds the best."""

    def sample(self, state: SearchState, noise: Tensor, mask: Tensor | None) -> Tensor:
        """Returns all sequences in the same order in each row, of classes that the row has. `[H, N, S, A]`"""
        horizon, rows, _ = state.mean.shape
        single = torch.eye(self.classes[0], device=noise.device)
        for size in self.classes[1:]:  # all combinations of the parts
            left, right = len(single), size
            single = torch.cat(
                [single.repeat_interleave(right, 0), torch.eye(size, device=noise.device).repeat(left, 1)], -1
            )
        index = torch.arange(len(single) ** horizon, device=noise.device)
        digits = torch.stack([index // len(single) ** t % len(single) for t in range(horizon)])
        actions = single[digits].unsqueeze(1).expand(-1, rows, -1, -1)
        if mask is None:
            return actions
        # The first class that a row has replaces those that it has not.
        mask = mask.unsqueeze(1)
        return one_hots((2.0 * actions + 1.0) * mask, self.classes) * mask


def search_for(config: PlannerConfig, classes: tuple[int, ...]) -> tuple[ActionSearch, PlannerConfig]:
    """Returns the kind of search for actions with these classes (none: continuous ones), and its configuration.

    If there are no more sequences of discrete actions than samples, all of them are evaluated once, with the same share
    of elites.
    """
    if not classes:
        return NormalSearch(config), config
    sequences = prod(classes) ** config.horizon
    if sequences > config.num_samples:
        return CategoricalSearch(config, classes), config
    elites = max(1, round(sequences * config.num_elites / config.num_samples))
    config = replace(config, num_samples=sequences, num_elites=elites, num_pi_trajs=0, iterations=1)
    return ExhaustiveSearch(config, classes), config
