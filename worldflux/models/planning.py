"""Planning in latent space with TD-MPC2's sampling planner (MPPI with elites), for any model with reward and value.

    >>> planner = Planner(model, PlannerConfig.from_model(model.config))
    >>> plan = planner.start(rows=1)
    >>> actions, plan = planner.plan(state, plan, is_first=is_first)        # [N, A], and the plan for the next step

A model needs `rollout`, `policy` and `value`. A model may also implement the methods of `mppi.PlanningModel`, which the
planner then calls instead. TD-MPC2 does so for its ensemble of critics, hard threshold on termination, action masks and
discount per task.

Source: TD-MPC2, arXiv:2310.16828, and its reference implementation; MPPI with a blended mean: TD-MPC, arXiv:2203.04955.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from worldflux.accel.overriding import newer_than, steps_back
from worldflux.config import WorldModelConfig
from worldflux.errors import ConfigurationError, ShapeMismatchError
from worldflux.models.base import State, WorldModel
from worldflux.models.mppi import PlanningModel, Proposals, RolloutPlanning, repeated, search_step

_NOISE_SEED = 0  # seed of the fixed noise of deterministic planning
_MOST_STEPS = 2**22
"""Largest number of steps of all candidates in all iterations of a plan, 450 times that of the paper. Their random
numbers are drawn at once."""
_LARGE_ACTION_DIM = 20  # number of action dimensions from which the paper uses two more iterations


@dataclass(frozen=True)
class PlannerConfig:
    """Configuration of sampling-based planning in latent space. The defaults follow TD-MPC2, arXiv:2310.16828."""

    horizon: int = 3
    """Number of latent steps per candidate. A longer horizon looks further ahead but compounds the model's error."""
    num_samples: int = 512
    """Number of candidates per iteration. The cost grows linearly."""
    num_elites: int = 64
    """Number of candidates to which the next distribution is fitted; at most `num_samples`. Fewer converge faster, but
    may converge too early."""
    num_pi_trajs: int = 24
    """Number of candidates that follow the policy, the same in every iteration; less than `num_samples`."""
    iterations: int = 6
    """Number of times the distribution is fitted. The cost grows linearly."""
    temperature: float = 0.5
    """Factor on the values in the elites' weights, `softmax(temperature * value)`. A larger factor favours the best
    candidate, but may converge before the search has come close to the optimum."""
    min_std: float = 0.05
    """Smallest standard deviation of the candidates' actions, and of the noise on the action that is carried out."""
    max_std: float = 2.0
    """Largest standard deviation, with which every plan starts."""
    momentum: float = 0.0
    """Weight of the old mean in the new one, in [0, 1). A larger weight changes the mean more slowly; the paper uses
    0."""
    discount: float | None = None
    """Discount per step, in (0, 1]. None uses the model's own."""

    def __post_init__(self) -> None:
        for name in ("horizon", "num_samples", "num_elites", "iterations"):
            self._check(name, isinstance(getattr(self, name), int) and getattr(self, name) >= 1, "an integer above 0")
        most = self.num_samples
        self._check("num_elites", self.num_elites <= most, f"at most num_samples ({most})")
        few = isinstance(self.num_pi_trajs, int) and 0 <= self.num_pi_trajs < most
        self._check("num_pi_trajs", few, f"an integer from 0 on, below num_samples ({most})")
        steps = self.iterations * self.num_samples * self.horizon
        if steps > _MOST_STEPS:
            raise ConfigurationError(
                f"iterations * num_samples * horizon is {self.iterations} * {self.num_samples} * {self.horizon}, "
                f"expected at most {_MOST_STEPS:,} steps of candidates in a plan."
            )
        self._check("temperature", 0.0 < self.temperature < math.inf, "a number above 0")
        self._check("max_std", 0.0 < self.max_std < math.inf, "a number above 0")
        self._check("min_std", 0.0 <= self.min_std <= self.max_std, f"0 to max_std ({self.max_std})")
        self._check("momentum", 0.0 <= self.momentum < 1.0, "at least 0 and below 1")
        self._check("discount", self.discount is None or 0.0 < self.discount <= 1.0, "above 0 and at most 1, or None")

    def _check(self, name: str, good: bool, expected: str) -> None:
        if not good:
            raise ConfigurationError(f"{name} is {getattr(self, name)!r}, expected {expected}.")

    @classmethod
    def from_model(cls, config: WorldModelConfig, **overrides: Any) -> PlannerConfig:
        """Creates a configuration from the fields that it has in common with a model's configuration.

        With 20 action dimensions or more there are two more `iterations`, as in the paper. If `num_samples` is
        overridden, or the model's configuration has no `num_pi_trajs`, at most half of the samples follow the policy.
        The discount remains that of the model.

        Args:
            config: Configuration of the model.
            **overrides: Fields to set to the given values.
        """
        names = {item.name for item in fields(cls)} - {"discount"}
        values = {name: getattr(config, name) for name in names if hasattr(config, name)}
        if config.action_dim >= _LARGE_ACTION_DIM:
            values["iterations"] = values.get("iterations", cls.iterations) + 2
        chosen_together = "num_pi_trajs" in values and "num_samples" not in overrides
        values |= overrides
        if "num_pi_trajs" not in overrides and not chosen_together:
            most = values.get("num_samples", cls.num_samples) // 2
            values["num_pi_trajs"] = min(values.get("num_pi_trajs", cls.num_pi_trajs), most)
        return cls(**values)


@dataclass(frozen=True)
class PlanDraws:
    """Random numbers of a plan. Passed to `Planner.plan`, they reproduce a recorded plan. N may be 1 for all rows."""

    policy: Tensor
    """Noise of the policy's trajectories. `[H, N, K, A]`"""
    actions: Tensor
    """Noise of the other candidates in each iteration. `[I, H, N, S - K, A]`"""
    gumbel: Tensor
    """Gumbel noise on the elites' log weights, of which the largest is carried out; 0 selects the best elite.
    `[N, E]`"""
    final: Tensor | None
    """Noise on the action that is carried out; None adds none. `[N, A]`"""
    value: Tensor | None = None
    """Noise of the policy in the last states in each iteration; None leaves it to the model. `[I, N, S, A]`"""
    members: Tensor | None = None
    """Indices of the critics used in each iteration; None leaves the choice to the model. `[I, 2]`"""


@dataclass(frozen=True)
class PlanTrace:
    """Result of one iteration. The action that is carried out comes from the last iteration."""

    values: Tensor
    """Values of all candidates as the model returned them; NaN counts as 0. `[N, S]`"""
    elites: Tensor
    """Indices of the elites, best first. `[N, E]`"""
    weights: Tensor
    """Weights of the elites. `[N, E]`"""
    mean: Tensor
    """Mean of the fitted distribution. `[N, H, A]`"""
    std: Tensor
    """Standard deviation of the fitted distribution. `[N, H, A]`"""


class Planner:
    """Searches for the sequence of actions with the highest value under a model, and returns its first action.

    Each iteration draws candidates from a normal distribution for each step, evaluates them with the model, and fits
    the distribution to the best ones; some candidates follow the policy. The means of a plan, shifted by one step,
    initialise the next plan. They are passed to and returned from `plan` explicitly (`[N, H, A]`, zeros before the
    first observation); the planner keeps no state between calls.

    Args:
        model: Model to plan with. Later training of it takes effect; it should be in evaluation mode.
        config: Configuration of the search.

    Raises:
        ConfigurationError: If the actions are not continuous, or there is no discount.
    """

    def __init__(self, model: WorldModel, config: PlannerConfig) -> None:
        if model.config.action_type != "continuous":
            raise ConfigurationError(
                f"The model has action_type '{model.config.action_type}', but planning needs continuous actions. "
                "Act with the policy instead (planner=None); DreamerV3 has one for every action space."
            )
        self.model = model
        self.config = config
        self.action_dim = model.config.action_dim
        if config.discount is None and not hasattr(model, "discount") and not isinstance(model, PlanningModel):
            raise ConfigurationError(
                f"{type(model).__name__} has no discount. Give the planner one: PlannerConfig(discount=0.99)."
            )
        self._fixed: PlanDraws | None = None

    @property
    def _scorer(self) -> PlanningModel:
        """The model if it implements `PlanningModel` and no method that this bypasses is overridden, or a wrapper."""
        model = self.model
        if isinstance(model, PlanningModel):
            replaced = newer_than(
                model, ("propose", "partial_return", "estimated_return"), "rollout", "policy", "value"
            )
            if not steps_back(f"The planning interface of {type(model).__name__}", model, replaced):
                return model
        return RolloutPlanning(model, spread=self.config.min_std)

    def start(self, rows: int) -> Tensor:
        """Returns the plan before the first observation: zeros `[N, H, A]`."""
        return torch.zeros(rows, self.config.horizon, self.action_dim, device=self.model.device)

    @torch.no_grad()
    def plan(
        self,
        state: State,
        previous: Tensor,
        *,
        is_first: Tensor | None = None,
        deterministic: bool = False,
        draws: PlanDraws | None = None,
        trace: Callable[[PlanTrace], None] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Plans the actions to take in a state.

        Deterministic planning draws no random numbers. It searches with fixed noise that is the same for every row, so
        that the result of a row depends only on its own state and previous plan; one of the policy's trajectories has
        no noise. It carries out the best elite without additional noise. The reference implementation also draws an
        elite by its weight during evaluation; the best elite is the most likely of these draws.

        Args:
            state: State to plan from. `[N, ...]`
            previous: Plan that the last call or `start` returned. `[N, H, A]`
            is_first: True where a row begins an episode; its previous plan is ignored. `[N]`
            deterministic: Whether to return the same actions for the same arguments.
            draws: Random numbers to use instead of drawing them.
            trace: Function that is called with the result of each iteration.

        Returns:
            Actions in [-1, 1] `[N, A]`, and the plan to pass to the next call `[N, H, A]`. Actions are NaN in rows
            where the values of all candidates, or any of the policy's first actions, are NaN.
        """
        c = self.config
        self._check(state, previous, is_first)
        if draws is None:
            draws = self._fixed_draws(previous) if deterministic else self._sample_draws(previous)
        scorer = self._scorer
        mask = scorer.action_mask(state)
        mask = None if mask is None else mask.to(previous.dtype)

        # The distribution starts from the last plan, shifted by one step. From here on steps are the first axis, as in
        # `rollout`.
        mean = torch.cat([previous[:, 1:], torch.zeros_like(previous[:, :1])], 1)
        if is_first is not None:
            mean = torch.where(is_first[:, None, None], 0.0, mean)
        mean = mean.transpose(0, 1)  # [H, N, A]
        std = torch.full_like(mean, c.max_std)
        if mask is not None:
            mean, std = mean * mask, std * mask

        # A model may provide a compiled version.
        step = getattr(scorer, "search_step", search_step)
        proposals = self._proposals(scorer, state, draws, mask, deterministic) if c.num_pi_trajs else None
        for i in range(c.iterations):
            value_noise = None if draws.value is None else draws.value[i]
            members = None if draws.members is None else draws.members[i]
            found = step(
                scorer,
                c,
                state,
                proposals,
                mean,
                std,
                mask,
                draws.actions[i],
                value_noise,
                members,
                deterministic,
            )
            mean, std = found.mean, found.std
            if trace is not None:
                weights = found.log_weights.exp()
                trace(PlanTrace(found.values, found.elites, weights, mean.transpose(0, 1), std.transpose(0, 1)))

        chosen = (found.log_weights + draws.gumbel).argmax(-1)
        actions = torch.take_along_dim(found.elite_actions[0], chosen[:, None, None], dim=1).squeeze(1)
        if draws.final is not None:
            actions = actions + std[0] * draws.final
        # Such actions would not be based on the model: no candidate has a value, or the policy's first action is NaN.
        lost = found.values.isnan().all(-1, keepdim=True)
        if proposals is not None:
            lost = lost | proposals.actions[0].isnan().flatten(1).any(-1, keepdim=True)
        actions = actions.masked_fill(lost, torch.nan)
        return actions.clamp(-1.0, 1.0), mean.transpose(0, 1)

    def _proposals(
        self, scorer: PlanningModel, state: State, draws: PlanDraws, mask: Tensor | None, deterministic: bool
    ) -> Proposals:
        """Returns the policy's actions along its own rollouts, and their returns."""
        H, _, K, A = draws.policy.shape
        N, start = _rows(state), state
        state = repeated(state, N, K)
        noise = draws.policy.expand(H, N, K, A).flatten(1, 2)
        actions = []
        for t in range(H):
            action = scorer.propose(state, noise[t], deterministic=deterministic).float().clamp(-1.0, 1.0)
            actions.append(action)
            if t + 1 < H:
                state = self.model.rollout(state, action.unsqueeze(0), deterministic=deterministic).states[-1]
        chosen = torch.stack(actions).unflatten(1, (N, K))
        if mask is not None:
            chosen = chosen * mask.unsqueeze(1)
        partial = scorer.partial_return(start, chosen, discount=self.config.discount, deterministic=deterministic)
        return Proposals(chosen, partial)

    def _sample_draws(self, like: Tensor) -> PlanDraws:
        """Draws new random numbers from torch's generator for a plan of the shape of `like` `[N, H, A]`."""
        c = self.config
        N, H, A = like.shape
        S, K, E = c.num_samples, c.num_pi_trajs, c.num_elites
        return PlanDraws(
            policy=torch.randn(H, N, K, A, device=like.device),
            actions=torch.randn(c.iterations, H, N, S - K, A, device=like.device),
            gumbel=-torch.empty(N, E, device=like.device).exponential_().log(),
            final=torch.randn(N, A, device=like.device),
        )

    def _fixed_draws(self, like: Tensor) -> PlanDraws:
        """Returns the constant draws of deterministic planning, which are the same on every device and created once."""
        if self._fixed is None or self._fixed.actions.device != like.device:
            c = self.config
            _, H, A = like.shape
            S, K, E = c.num_samples, c.num_pi_trajs, c.num_elites
            generator = torch.Generator().manual_seed(_NOISE_SEED)
            policy = torch.randn(H, 1, K, A, generator=generator)
            policy[:, :, :1] = 0.0
            actions = torch.randn(c.iterations, H, 1, S - K, A, generator=generator)
            self._fixed = PlanDraws(
                policy=policy.to(like.device),
                actions=actions.to(like.device),
                gumbel=torch.zeros(1, E, device=like.device),
                final=None,
            )
        return self._fixed

    def _check(self, state: State, previous: Tensor, is_first: Tensor | None) -> None:
        expected = (self.config.horizon, self.action_dim)
        if previous.ndim != 3 or tuple(previous.shape[1:]) != expected:
            raise ShapeMismatchError(
                f"The previous plan has shape {list(previous.shape)}, expected [N, {expected[0]}, {expected[1]}]. "
                "Pass what the last call returned, or start(rows)."
            )
        if _rows(state) != len(previous):
            raise ShapeMismatchError(f"The state has {_rows(state)} rows, but the previous plan has {len(previous)}.")
        if is_first is not None and is_first.shape != previous.shape[:1]:
            raise ShapeMismatchError(f"is_first has shape {list(is_first.shape)}, expected [{len(previous)}].")


def _rows(state: State) -> int:
    return len(next(iter(state.values())))
