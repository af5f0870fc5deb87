"""One iteration of the planner's search, and the interface through which it evaluates actions with a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from worldflux.config import PlannerConfig
from worldflux.models.action_search import ActionSearch, SearchState
from worldflux.models.base import State, WorldModel


@dataclass(frozen=True)
class PartialReturn:
    """Return of sequences of actions, without the value of their last states."""

    earned: Tensor
    """Sum of discounted rewards, each weighted by the probability that the episode gets there. `[N, S]`"""
    weight: Tensor
    """Weight of the value of the last state. `[N, S]`"""
    state: State
    """State after the last action. `[N, S, ...]`"""
    forbidden: Tensor | None = None
    """Number of steps in states that an objective forbids; None if there is no objective. `[N, S]`"""

    @staticmethod
    def join(parts: Sequence[PartialReturn]) -> PartialReturn:
        """Concatenates the sequences of several partial returns in each row."""
        forbidden = [part.forbidden for part in parts if part.forbidden is not None]
        return PartialReturn(
            torch.cat([part.earned for part in parts], 1),
            torch.cat([part.weight for part in parts], 1),
            State.cat([part.state for part in parts], dim=1),
            torch.cat(forbidden, 1) if forbidden else None,
        )


@runtime_checkable
class PlanningModel(Protocol):
    """Optional interface of models with their own methods for planning; a model implements all four or none.

    With an objective, sequences of actions are predicted by `rollout` in place of `partial_return`. A model whose
    discount or continuation differs from `discount` and `rollout` then also has `step_factors`, as TD-MPC2 does.
    """

    def action_mask(self, state: State) -> Tensor | None:
        """Returns 1 where the task of a row has an action dimension, else 0; None if all rows have all. `[N, A]`"""

    def propose(self, state: State, noise: Tensor, *, deterministic: bool) -> Tensor:
        """Returns actions of the policy as a function of the state and of noise, see `ActionSearch.noise`. `[B, A]`

        Zero noise gives the policy's most likely action. Randomness that `noise` cannot express may be drawn, unless
        `deterministic` is set.
        """

    def partial_return(
        self, state: State, actions: Tensor, *, discount: float | None, deterministic: bool
    ) -> PartialReturn:
        """Computes the partial returns of sequences of actions.

        Args:
            state: Initial state, shared by all sequences of a row. `[N, ...]`
            actions: Sequences of actions. `[H, N, S, A]`
            discount: Discount per step; None uses the model's own.
            deterministic: Whether to draw no random numbers.
        """

    def estimated_return(
        self, partial: PartialReturn, *, deterministic: bool, noise: Tensor | None = None, members: Tensor | None = None
    ) -> Tensor:
        """Computes the values of the sequences: their rewards plus the weighted values of their last states.

        Args:
            partial: Result of `partial_return`.
            deterministic: Whether to draw no random numbers, but use the policy's mean action in the last state, and
                all critics or fixed ones.
            noise: Noise of the policy's action in the last state; None draws it. `[N, S, A]`
            members: Indices of the critics of an ensemble that evaluate the last state; None draws them. `[2]`

        Returns:
            Values of the sequences. `[N, S]`
        """


def discounted_rewards(rewards: Tensor, continues: Tensor | None, discount: float | Tensor) -> tuple[Tensor, Tensor]:
    """Computes the sum of discounted rewards, each weighted by the probability that the episode gets there.

        earned = sum_t discount^t * alive_t * rewards_t,  weight = discount^H * alive_H
        alive_0 = 1,  alive_{t+1} = alive_t * continues_t

    Args:
        rewards: Reward of each action. `[H, ...]`
        continues: Probability that the episode continues after each action, or 0 and 1 for TD-MPC2's hard threshold.
            None means that it always continues. `[H, ...]`
        discount: Discount per step; a tensor must broadcast with the rewards of one step.

    Returns:
        The sum `earned`, and the weight of the value of the last state. `[...]` each.
    """
    earned, weight = torch.zeros_like(rewards[0]), torch.ones_like(rewards[0])
    for t, reward in enumerate(rewards):
        earned = earned + weight * reward
        weight = weight * discount if continues is None else weight * continues[t] * discount
    return earned, weight


class RolloutPlanning:
    """Implementation of `PlanningModel` in terms of a model's `rollout`, `policy` and `value`.

    Args:
        model: Any world model; its rows are planned for independently.
        spread: Scale of the noise that deterministic planning adds to the policy's actions. A policy does not take
            noise as an argument, and identical sequences would count several times among the elites.
    """

    def __init__(self, model: WorldModel, *, spread: float) -> None:
        self.model = model
        self.spread = spread

    def action_mask(self, state: State) -> Tensor | None:
        """Returns None, because all rows have all action dimensions."""
        return None

    def propose(self, state: State, noise: Tensor, *, deterministic: bool) -> Tensor:
        """Returns a sample of the policy or, if deterministic, its mode plus `spread * noise`. `[B, A]`

        The mode of discrete actions has no noise.
        """
        if deterministic and self.model.config.action_classes:
            return self.model.policy(state, deterministic=True)
        if deterministic:
            return self.model.policy(state, deterministic=True) + self.spread * noise
        return self.model.policy(state)

    def partial_return(
        self, state: State, actions: Tensor, *, discount: float | None, deterministic: bool
    ) -> PartialReturn:
        """Computes the rewards and the last state of one rollout of each sequence."""
        _, N, S, _ = actions.shape
        trajectory = self.model.rollout(repeated(state, N, S), actions.flatten(1, 2), deterministic=deterministic)
        # If discount is None, `Planner` has checked that the model has one.
        weight: float = self.model.discount if discount is None else discount  # type: ignore[assignment]
        earned, after = discounted_rewards(trajectory.rewards, trajectory.continues, weight)
        last = State({name: x.unflatten(0, (N, S)) for name, x in trajectory.states[-1].items()})
        return PartialReturn(earned.unflatten(0, (N, S)), after.unflatten(0, (N, S)), last)

    def estimated_return(
        self, partial: PartialReturn, *, deterministic: bool, noise: Tensor | None = None, members: Tensor | None = None
    ) -> Tensor:
        """Computes the values with `WorldModel.value`; `noise` and `members` are not used. `[N, S]`"""
        last = State({name: x.flatten(0, 1) for name, x in partial.state.items()})
        return partial.earned + partial.weight * self.model.value(last).unflatten(0, partial.earned.shape)


class Proposals(NamedTuple):
    """Sequences of actions that follow the policy. They and their returns are the same in every iteration."""

    actions: Tensor
    """Sequences of actions. `[H, N, K, A]`"""
    partial: PartialReturn
    """Partial returns of the sequences."""


class SearchResult(NamedTuple):
    """Result of one iteration."""

    search: SearchState
    """Next distribution."""
    values: Tensor
    """Values of all candidates as the model returned them; NaN counts as 0. `[N, S]`"""
    elites: Tensor
    """Indices of the elites, best first. `[N, E]`"""
    elite_actions: Tensor
    """Sequences of actions of the elites. `[H, N, E, A]`"""
    log_weights: Tensor
    """Logarithms of the elites' weights. `[N, E]`"""


def search_step(
    model: PlanningModel,
    config: PlannerConfig,
    kind: ActionSearch,
    state: State,
    proposals: Proposals | None,
    search: SearchState,
    mask: Tensor | None,
    noise: Tensor,
    value_noise: Tensor | None,
    members: Tensor | None,
    deterministic: bool,
) -> SearchResult:
    """Draws candidates, evaluates them, and fits the distribution to the best ones.

    Args:
        model: Model that evaluates the candidates.
        config: Configuration of the planner.
        kind: Kind of distribution, which draws and fits.
        state: State to plan from. `[N, ...]`
        proposals: Additional candidates, which come first.
        search: Distribution to draw from.
        mask: 1 where a row has an action dimension, else 0; None if all rows have all. `[N, A]`
        noise: Noise of the candidates, see `ActionSearch.noise`. `[H, N, S - K, A]`
        value_noise: See `PlanningModel.estimated_return`.
        members: See `PlanningModel.estimated_return`.
        deterministic: Whether to draw no random numbers.
    """
    candidates = kind.sample(search, noise, mask)
    partial = model.partial_return(state, candidates, discount=config.discount, deterministic=deterministic)
    if proposals is not None:
        candidates = torch.cat([proposals.actions, candidates], 2)
        partial = PartialReturn.join([proposals.partial, partial])
    values = model.estimated_return(partial, deterministic=deterministic, noise=value_noise, members=members)
    # A candidate with which the model diverges must neither be chosen nor affect the weights of the others, so NaN
    # counts as 0, as in the reference implementation.
    values = values.float()
    # A stable sort breaks ties in the same way for every batch size; a new critic gives 0 for everything.
    values_sorted, order = values.nan_to_num(0.0).sort(dim=-1, descending=True, stable=True)
    elites, elite_values = order[:, : config.num_elites], values_sorted[:, : config.num_elites]
    elite_actions = torch.take_along_dim(candidates, elites[None, :, :, None], dim=2)
    log_weights = _log_weights(elite_values, config.temperature)
    search = kind.refit(search, elite_actions, log_weights.exp(), mask)
    return SearchResult(search, values, elites, elite_actions, log_weights)


def _log_weights(values: Tensor, temperature: float | None) -> Tensor:
    """Returns the logarithms of the elites' weights for their values, of which the first is the largest. `[N, E]`"""
    # The largest value is subtracted first, because values may be close to the largest float.
    advantages = values - values[:, :1]
    if temperature is None:
        # Elites that an objective excludes are there if there are fewer others; their value is the smallest float.
        excluded = advantages < 0.5 * torch.finfo(values.dtype).min
        return torch.log_softmax(torch.zeros_like(values).masked_fill(excluded, -torch.inf), -1)
    return torch.log_softmax(temperature * advantages, -1)


def repeated(state: State, rows: int, times: int) -> State:
    """Repeats each row of a state consecutively. `[N, ...]` → `[N * times, ...]`"""
    return State({k: v.unsqueeze(1).expand(rows, times, *v.shape[1:]).flatten(0, 1) for k, v in state.items()})
