"""Objectives of a planner: a function of predicted trajectories that takes the place of the learned reward.

>>> def stay_low(trajectory: PlannedTrajectory) -> Tensor:                  # [H, B], one number for each step
...     return -trajectory.observations[..., 0].abs()
>>> planner.objective = stay_low                                            # in place of the model's reward
>>> planner.objective = RewardPlus(stay_low)                                # added to the model's reward
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from worldflux.errors import ConfigurationError, ShapeMismatchError, TrainingError, a_type
from worldflux.models.base import State, Trajectory, WorldModel
from worldflux.models.mppi import PartialReturn, PlanningModel, discounted_rewards, repeated
from worldflux.replay.batch import Observation


@dataclass(frozen=True)
class PlannedTrajectory(Trajectory):
    """Predictions for the sequences of actions that a planner compares, which an objective judges.

    H is the planner's horizon; the B sequences are the candidates of all environments. Step t holds an action, the
    predicted reward of this action, and what is predicted after it.
    """

    actions: Tensor
    """Actions, in [-1, 1] whatever the bounds of the environment, or one-hot if they are discrete. `[H, B, A]`"""
    model: WorldModel = field(repr=False)
    """Model that made the predictions."""

    @cached_property
    def observations(self) -> Observation:
        """Decoded observation after each action, computed when it is first read. `[H, B, ...]`

        It has the structure of the model's observations, a tensor or a dictionary of tensors, with images as floats in
        [0, 1].

        Raises:
            ConfigurationError: If the model has no decoder.
        """
        H, B = self.rewards.shape
        states = State({name: tensor.flatten(0, 1) for name, tensor in self.states.items()})
        try:
            found = self.model.decode(states).get("obs")
        except NotImplementedError:
            found = None
        if found is None:
            remedy = "judge trajectory.states instead"
            for field, setting in (("use_decoder", "True"), ("representation", "'reconstruction'")):
                if hasattr(self.model.config, field):
                    remedy = f"train it with model_kwargs={{'{field}': {setting}}}, or {remedy}"
            raise ConfigurationError(
                f"The objective reads trajectory.observations, but the {type(self.model).__name__} has no decoder. "
                f"{remedy[0].upper()}{remedy[1:]}."
            )
        if isinstance(found, dict):
            return {key: tensor.unflatten(0, (H, B)) for key, tensor in found.items()}
        return found.unflatten(0, (H, B))


Objective = Callable[[PlannedTrajectory], Tensor]
"""Function that returns what each step of each sequence is worth, `[H, B]`; minus infinity forbids a state."""


@dataclass(frozen=True)
class RewardPlus:
    """Objective that adds a function to the reward that the model predicts.

    The model's value still estimates the rewards after the last planned step, so the planner continues to add it. A
    plain function takes the place of the reward, of which the value then says nothing.

    Args:
        function: What to add to the reward of each step, such as minus a cost. `[H, B]`
    """

    function: Objective

    def __post_init__(self) -> None:
        check_objective(self.function)

    def __call__(self, trajectory: PlannedTrajectory) -> Tensor:
        """Returns the sum of the model's reward and the function. `[H, B]`"""
        rewards = trajectory.rewards.clone()
        return rewards + _checked(self.function, trajectory)


class ObjectivePlanning:
    """Implementation of `PlanningModel` that values sequences of actions by an objective.

    Rewards of the objective are discounted, and weighted by the probability that the episode gets there, like those of
    the model. Sequences with more forbidden steps than the best ones are excluded, so that there is always one to
    follow: if all of them enter forbidden states, those remain that do so in the fewest steps.

    Args:
        model: Model that predicts the trajectories.
        inner: Planning methods of this model: its own, or `RolloutPlanning`.
        objective: Function that judges the trajectories.
    """

    def __init__(self, model: WorldModel, inner: PlanningModel, objective: Objective) -> None:
        self.model = model
        self.inner = inner
        self.objective = objective

    def action_mask(self, state: State) -> Tensor | None:
        """Returns that of the model."""
        return self.inner.action_mask(state)

    def propose(self, state: State, noise: Tensor, *, deterministic: bool) -> Tensor:
        """Returns actions of the model's policy, which knows nothing of the objective. `[B, A]`"""
        return self.inner.propose(state, noise, deterministic=deterministic)

    def partial_return(
        self, state: State, actions: Tensor, *, discount: float | None, deterministic: bool
    ) -> PartialReturn:
        """Computes what the objective gives for one rollout of each sequence, and its number of forbidden steps."""
        _, N, S, _ = actions.shape
        flat = actions.flatten(1, 2)
        found = self.model.rollout(repeated(state, N, S), flat, deterministic=deterministic)
        # Copies of what is still needed, because a function may compute in place.
        last = State({name: x.unflatten(0, (N, S)).clone() for name, x in found.states[-1].items()})
        continues = found.continues.unflatten(1, (N, S)).clone()
        trajectory = PlannedTrajectory(found.states, found.rewards, found.continues, flat.clone(), self.model)
        worth = _checked(self.objective, trajectory).unflatten(1, (N, S))
        step_factors = getattr(self.inner, "step_factors", None)
        if step_factors is not None:
            continues, discount = step_factors(state, continues, discount)
        elif discount is None:
            discount = self.model.discount  # type: ignore[assignment]  # the planner has checked that there is one
        forbidden = worth.isneginf()
        earned, after = discounted_rewards(worth.masked_fill(forbidden, 0.0), continues, discount)  # type: ignore[arg-type]
        # Steps behind a predicted end of the episode are never reached.
        reached = torch.cat([torch.ones_like(continues[:1]), continues[:-1]]).cumprod(0) > 0.0
        return PartialReturn(earned, after, last, (forbidden & reached).sum(0))

    def estimated_return(
        self, partial: PartialReturn, *, deterministic: bool, noise: Tensor | None = None, members: Tensor | None = None
    ) -> Tensor:
        """Returns what the objective gives; after `RewardPlus`, with the value of the last states. `[N, S]`"""
        values = partial.earned
        if isinstance(self.objective, RewardPlus):
            values = self.inner.estimated_return(partial, deterministic=deterministic, noise=noise, members=members)
        assert partial.forbidden is not None
        fewest = partial.forbidden.amin(-1, keepdim=True)
        return values.masked_fill(partial.forbidden > fewest, -torch.inf)


def check_objective(objective: object) -> None:
    """Raises a `ConfigurationError` unless `objective` can be called."""
    if not callable(objective):
        raise ConfigurationError(
            f"The objective is {objective!r}, expected a function of a PlannedTrajectory that returns a number for "
            "each step [H, B], or None for the model's reward."
        )


def _checked(objective: Objective, trajectory: PlannedTrajectory) -> Tensor:
    """Calls an objective, and returns its result in float32 on the device of the trajectory. `[H, B]`"""
    found = objective(trajectory)
    shape = trajectory.rewards.shape
    name = getattr(objective, "__name__", type(objective).__name__)
    if not isinstance(found, Tensor):
        raise ConfigurationError(
            f"The objective '{name}' returned {a_type(found)}, expected a tensor of shape {list(shape)}: a "
            "number for each step of each sequence [H, B]."
        )
    if found.shape != shape:
        raise ShapeMismatchError(
            f"The objective '{name}' returned shape {list(found.shape)}, expected {list(shape)}: a number for each "
            "step of each sequence [H, B]. Reduce the other axes, for example with .sum(-1)."
        )
    found = found.detach().to(trajectory.rewards.device, torch.float32)
    wrong = found.isnan() | found.isposinf()
    if wrong.any():
        # Where the model itself predicts NaN, the action will be NaN, and the agent names what has diverged.
        predicted = [trajectory.actions, trajectory.rewards.unsqueeze(-1), *trajectory.states.values()]
        finite = torch.stack([x.flatten(2).isfinite().all(-1) if x.ndim > 2 else x.isfinite() for x in predicted])
        count = int((wrong & finite.all(0)).sum())
        if count:
            raise TrainingError(
                f"The objective '{name}' returned NaN or plus infinity for {count} of {found.numel()} steps whose "
                "predictions are finite. Return finite numbers, or minus infinity where a state is forbidden; look for "
                "a division by zero, a root or a logarithm."
            )
        found = found.masked_fill(wrong, torch.nan)
    return found
