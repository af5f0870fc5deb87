"""One iteration of the planner's search, and what it asks of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from worldflux.models.base import State, WorldModel

if TYPE_CHECKING:
    from worldflux.models.planning import PlannerConfig


@dataclass(frozen=True)
class PartialReturn:
    """What sequences of actions lead to."""

    earned: Tensor
    """Their rewards, discounted and weighted with the chance that the episode gets there. `[N, S]`"""
    weight: Tensor
    """Of what comes after them. `[N, S]`"""
    state: State
    """After the last action. `[N, S, ...]`"""

    @staticmethod
    def join(parts: Sequence[PartialReturn]) -> PartialReturn:
        """The sequences of all of them, row by row."""
        return PartialReturn(
            torch.cat([part.earned for part in parts], 1),
            torch.cat([part.weight for part in parts], 1),
            State.cat([part.state for part in parts], dim=1),
        )


@runtime_checkable
class PlanningModel(Protocol):
    """What a model may offer to be planned with in its own way; all four methods, or none."""

    def action_mask(self, state: State) -> Tensor | None:
        """1 where a row's task has that action dimension, 0 where it has not; None if all have all. `[N, A]`"""

    def propose(self, state: State, noise: Tensor, *, deterministic: bool) -> Tensor:
        """Actions of the policy that are a function of the state and of standard normal noise. `[B, A]`

        Noise 0 is the policy's likeliest action. What `noise` cannot express may be drawn, unless `deterministic`.
        """

    def outlook(self, state: State, actions: Tensor, *, discount: float | None, deterministic: bool) -> PartialReturn:
        """What sequences of actions lead to.

        Args:
            state: Where they start, once for all sequences of a row. `[N, ...]`
            actions: `[H, N, S, A]`
            discount: None takes the model's own.
            deterministic: Draw nothing.
        """

    def outlook_value(
        self, outlook: PartialReturn, *, deterministic: bool, noise: Tensor | None = None, members: Tensor | None = None
    ) -> Tensor:
        """What the sequences are worth: what they earn, and the weighted value of their last states.

        Args:
            outlook: From the method above.
            deterministic: Draw nothing: the policy's mean action in the last state, and all critics or fixed ones.
            noise: Of the policy's action in the last state; None draws it. `[N, S, A]`
            members: Which critics of an ensemble judge the last state; None draws them. `[2]`

        Returns:
            `[N, S]`
        """


def discounted_rewards(rewards: Tensor, continues: Tensor | None, discount: float | Tensor) -> tuple[Tensor, Tensor]:
    """Sum of discounted rewards, each weighted with the chance that the episode gets there; weight of what comes after.

        earned = sum_t discount^t * alive_t * rewards_t,  weight = discount^H * alive_H
        alive_0 = 1,  alive_{t+1} = alive_t * continues_t

    Args:
        rewards: What each action earned. `[H, ...]`
        continues: Probability of going on after it, or 0 and 1 for TD-MPC2's hard threshold; None: it always does.
            `[H, ...]`
        discount: Per step; a tensor must broadcast with one step's rewards.

    Returns:
        `[...]` each.
    """
    earned, weight = torch.zeros_like(rewards[0]), torch.ones_like(rewards[0])
    for t, reward in enumerate(rewards):
        earned = earned + weight * reward
        weight = weight * discount if continues is None else weight * continues[t] * discount
    return earned, weight


class RolloutPlanning:
    """The methods of `PlanningModel`, out of `rollout`, `policy` and `value`.

    Args:
        model: Any model; its rows are planned with independently.
        spread: Size of the noise on the policy's actions in deterministic planning. A model that draws its actions
            itself cannot be handed the noise, and equal sequences would count several times among the elites.
    """

    def __init__(self, model: WorldModel, *, spread: float) -> None:
        self.model = model
        self.spread = spread

    def action_mask(self, state: State) -> Tensor | None:
        """None: all rows have all actions."""
        return None

    def propose(self, state: State, noise: Tensor, *, deterministic: bool) -> Tensor:
        """The model's own draw; deterministic: its likeliest action plus `spread * noise`. `[B, A]`"""
        if deterministic:
            return self.model.policy(state, deterministic=True) + self.spread * noise
        return self.model.policy(state)

    def outlook(self, state: State, actions: Tensor, *, discount: float | None, deterministic: bool) -> PartialReturn:
        """The rewards of one rollout of each sequence, and its last state."""
        _, N, S, _ = actions.shape
        trajectory = self.model.rollout(repeated(state, N, S), actions.flatten(1, 2), deterministic=deterministic)
        # Without a discount here, the planner has seen to it that the model has one.
        weight: float = self.model.discount if discount is None else discount  # type: ignore[assignment]
        earned, after = discounted_rewards(trajectory.rewards, trajectory.continues, weight)
        last = State({name: x.unflatten(0, (N, S)) for name, x in trajectory.states[-1].items()})
        return PartialReturn(earned.unflatten(0, (N, S)), after.unflatten(0, (N, S)), last)

    def outlook_value(
        self, outlook: PartialReturn, *, deterministic: bool, noise: Tensor | None = None, members: Tensor | None = None
    ) -> Tensor:
        """With the model's value of the last states; `noise` and `members` are not used. `[N, S]`"""
        last = State({name: x.flatten(0, 1) for name, x in outlook.state.items()})
        return outlook.earned + outlook.weight * self.model.value(last).unflatten(0, outlook.earned.shape)


class Proposals(NamedTuple):
    """Sequences that follow the policy. They are the same in every iteration, and so is what they lead to."""

    actions: Tensor
    """`[H, N, K, A]`"""
    outlook: PartialReturn


class SearchResult(NamedTuple):
    """What one iteration found."""

    mean: Tensor
    """Of the next distribution. `[H, N, A]`"""
    std: Tensor
    """`[H, N, A]`"""
    values: Tensor
    """Of all candidates, as the model gave them; NaN counts as 0. `[N, S]`"""
    elites: Tensor
    """Their numbers, best first. `[N, E]`"""
    elite_actions: Tensor
    """`[H, N, E, A]`"""
    log_weights: Tensor
    """Of the elites. `[N, E]`"""


def search_step(
    model: PlanningModel,
    config: PlannerConfig,
    state: State,
    proposals: Proposals | None,
    mean: Tensor,
    std: Tensor,
    mask: Tensor | None,
    noise: Tensor,
    value_noise: Tensor | None,
    members: Tensor | None,
    deterministic: bool,
) -> SearchResult:
    """Draws candidates, values them, and fits the distribution to the best ones.

    Args:
        model: Values the candidates.
        config: Of the planner.
        state: `[N, ...]`
        proposals: Further candidates, which come first.
        mean: Of the distribution. `[H, N, A]`
        std: `[H, N, A]`
        mask: 1 where a row has that action dimension, else 0; None: all have all. `[N, A]`
        noise: Standard normal. `[H, N, S - K, A]`
        value_noise: See `PlanningModel.outlook_value`.
        members: See `PlanningModel.outlook_value`.
        deterministic: Draw nothing.
    """
    candidates = (mean.unsqueeze(2) + std.unsqueeze(2) * noise).clamp(-1.0, 1.0)
    if mask is not None:
        candidates = candidates * mask.unsqueeze(1)
    outlook = model.outlook(state, candidates, discount=config.discount, deterministic=deterministic)
    if proposals is not None:
        candidates = torch.cat([proposals.actions, candidates], 2)
        outlook = PartialReturn.join([proposals.outlook, outlook])
    values = model.outlook_value(outlook, deterministic=deterministic, noise=value_noise, members=members)
    # A candidate that takes the model to infinity must not be chosen, nor spoil the weights of the others:
    # NaN counts as 0, as in the reference.
    values = values.float()
    # Stable, so that ties (a fresh critic says 0 to everything) fall the same way for every batch size.
    values_sorted, order = values.nan_to_num(0.0).sort(dim=-1, descending=True, stable=True)
    elites, elite_values = order[:, : config.num_elites], values_sorted[:, : config.num_elites]
    elite_actions = torch.take_along_dim(candidates, elites[None, :, :, None], dim=2)
    # The largest is taken off first: values may be as large as a float can be.
    log_weights = torch.log_softmax(config.temperature * (elite_values - elite_values[:, :1]), -1)
    weights = log_weights.exp()[None, :, :, None]
    # The spread is around the elites' own mean; momentum moves the distribution's mean only (TD-MPC).
    fitted = (weights * elite_actions).sum(2)
    variance = (weights * (elite_actions - fitted.unsqueeze(2)).square()).sum(2)
    std = variance.sqrt().clamp(config.min_std, config.max_std)
    if mask is not None:
        std = std * mask
    mean = config.momentum * mean + (1.0 - config.momentum) * fitted
    return SearchResult(mean, std, values, elites, elite_actions, log_weights)


def repeated(state: State, rows: int, times: int) -> State:
    """Each row of a state several times in a row. `[N, ...]` → `[N * times, ...]`"""
    return State({k: v.unsqueeze(1).expand(rows, times, *v.shape[1:]).flatten(0, 1) for k, v in state.items()})
