"""Distributions over sequences of actions, from which a planner draws candidates and which it fits to the best ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from worldflux.config import PlannerConfig


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
