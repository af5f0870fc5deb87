"""Planning in latent space with TD-MPC2's sampling planner (MPPI with elites), for any model with reward and value.

    >>> planner = Planner(model, PlannerConfig.from_model(model.config))
    >>> plan = planner.start(rows=1)
    >>> actions, plan = planner.plan(state, plan, is_first=is_first)        # [N, A], and the plan for the next step

A planner maximises the model's reward, or an objective of your own: `planner.objective = function`, see `objective`.

A model needs `rollout`, `policy` and `value`. A model may also implement the methods of `mppi.PlanningModel`, which the
planner then calls instead. TD-MPC2 does so for its ensemble of critics, hard threshold on termination, action masks and
discount per task.

Source: TD-MPC2, arXiv:2310.16828, and its reference implementation; MPPI with a blended mean: TD-MPC, arXiv:2203.04955.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from worldflux.accel.overriding import newer_than, steps_back
from worldflux.config import PlannerConfig
from worldflux.errors import ConfigurationError, ShapeMismatchError
from worldflux.models.action_search import search_for
from worldflux.models.base import State, WorldModel
from worldflux.models.mppi import PlanningModel, Proposals, RolloutPlanning, repeated, search_step
from worldflux.models.objective import Objective, ObjectivePlanning, check_objective

_NOISE_SEED = 0  # seed of the fixed noise of deterministic planning


@dataclass(frozen=True)
class PlanDraws:
    """Random numbers of a plan. Passed to `Planner.plan`, they reproduce a recorded plan. N may be 1 for all rows."""

    policy: Tensor
    """Noise of the policy's trajectories: standard normal, or Gumbel for discrete actions. `[H, N, K, A]`"""
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
    """Mean of the fitted distribution, or probabilities of discrete actions. `[N, H, A]`"""
    std: Tensor
    """Standard deviation of the fitted distribution. `[N, H, A]`"""


class Planner:
    """Searches for the sequence of actions with the highest value under a model, and returns its first action.

    Each iteration draws candidates from a normal distribution for each step, evaluates them with the model, and fits
    the distribution to the best ones; some candidates follow the policy. The means of a plan, shifted by one step,
    initialise the next plan. They are passed to and returned from `plan` explicitly (`[N, H, A]`, zeros before the
    first observation); the planner keeps no state between calls.

    For discrete actions the distributions are categorical, and the means are the probabilities of the classes, uniform
    before the first observation. If there are no more sequences of discrete actions than samples, all of them are
    evaluated once instead, and `temperature` and `uniform_share` are the only other settings with an effect.

    Args:
        model: Model to plan with. Later training of it takes effect; it should be in evaluation mode.
        config: Configuration of the search.
        objective: Function to maximise in place of the model's reward; see `models.objective`.

    Raises:
        ConfigurationError: If there is no discount.
    """

    def __init__(self, model: WorldModel, config: PlannerConfig, objective: Objective | None = None) -> None:
        self.model = model
        self.config = config
        self.action_dim = model.config.action_dim
        self._kind, self._search = search_for(config, model.config.action_classes)
        if not isinstance(model, PlanningModel):
            self._check_discount()
        self._fixed: PlanDraws | None = None
        self.objective = objective

    def __repr__(self) -> str:
        """Returns the model's class and the configuration."""
        return f"Planner({type(self.model).__name__}, {self.config})"

    @property
    def objective(self) -> Objective | None:
        """Function that the planner maximises in place of the model's reward; None plans for the reward.

        It can be set at any time. The previous plan still initialises the next one, whose deviations start anew.
        """
        return self._objective

    @objective.setter
    def objective(self, objective: Objective | None) -> None:
        if objective is not None:
            check_objective(objective)
            self._check_discount()
        self._objective = objective

    @property
    def _scorer(self) -> PlanningModel:
        """What evaluates the candidates: the objective, or the model alone."""
        inner = self._model_scorer
        return inner if self._objective is None else ObjectivePlanning(self.model, inner, self._objective)

    @property
    def _model_scorer(self) -> PlanningModel:
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
        """Returns the plan before the first observation: zeros, or uniform probabilities. `[N, H, A]`"""
        return self._kind.unknown(rows, self.config.horizon, self.action_dim, device=self.model.device)

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
            Actions in [-1, 1], or one-hot `[N, A]`, and the plan to pass to the next call `[N, H, A]`. Actions are NaN
            in rows where the values of all candidates, or any of the policy's first actions, are NaN.
        """
        c = self._search
        self._check(state, previous, is_first)
        if draws is None:
            draws = self._fixed_draws(previous) if deterministic else self._sample_draws(previous)
        scorer = self._scorer
        mask = scorer.action_mask(state)
        mask = None if mask is None else mask.to(previous.dtype)

        # The distribution starts from the last plan, shifted by one step. From here on steps are the first axis, as in
        # `rollout`.
        unknown = self._kind.unknown(*previous.shape, device=previous.device)
        mean = torch.cat([previous[:, 1:], unknown[:, :1]], 1)
        if is_first is not None:
            mean = torch.where(is_first[:, None, None], unknown, mean)
        search = self._kind.initial(mean.transpose(0, 1), mask)

        # A model may provide a compiled version.
        step = getattr(scorer, "search_step", search_step)
        proposals = self._proposals(scorer, state, draws, mask, deterministic) if c.num_pi_trajs else None
        for i in range(c.iterations):
            value_noise = None if draws.value is None else draws.value[i]
            members = None if draws.members is None else draws.members[i]
            found = step(
                scorer,
                c,
                self._kind,
                state,
                proposals,
                search,
                mask,
                draws.actions[i],
                value_noise,
                members,
                deterministic,
            )
            search = found.search
            if trace is not None:
                mean, std = (x.transpose(0, 1) for x in search)
                trace(PlanTrace(found.values, found.elites, found.log_weights.exp(), mean, std))

        chosen = (found.log_weights + draws.gumbel).argmax(-1)
        actions = torch.take_along_dim(found.elite_actions[0], chosen[:, None, None], dim=1).squeeze(1)
        actions = self._kind.carried_out(actions, search, draws.final)
        # Such actions would not be based on the model: no candidate has a value, or the policy's first action is NaN.
        lost = found.values.isnan().all(-1, keepdim=True)
        if proposals is not None:
            lost = lost | proposals.actions[0].isnan().flatten(1).any(-1, keepdim=True)
        return actions.masked_fill(lost, torch.nan), search.mean.transpose(0, 1)

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
        c = self._search
        N, H, A = like.shape
        S, K, E = c.num_samples, c.num_pi_trajs, c.num_elites
        noise = partial(self._kind.noise, device=like.device)
        return PlanDraws(
            policy=noise(H, N, K, A),
            actions=noise(c.iterations, H, N, S - K, A),
            gumbel=-torch.empty(N, E, device=like.device).exponential_().log(),
            final=noise(N, A),
        )

    def _fixed_draws(self, like: Tensor) -> PlanDraws:
        """Returns the constant draws of deterministic planning, which are the same on every device and created once."""
        if self._fixed is None or self._fixed.actions.device != like.device:
            c = self._search
            _, H, A = like.shape
            S, K, E = c.num_samples, c.num_pi_trajs, c.num_elites
            cpu = torch.device("cpu")
            noise = partial(self._kind.noise, device=cpu, generator=torch.Generator().manual_seed(_NOISE_SEED))
            policy = noise(H, 1, K, A)
            policy[:, :, :1] = 0.0
            actions = noise(c.iterations, H, 1, S - K, A)
            self._fixed = PlanDraws(
                policy=policy.to(like.device),
                actions=actions.to(like.device),
                gumbel=torch.zeros(1, E, device=like.device),
                final=None,
            )
        return self._fixed

    def _check_discount(self) -> None:
        if self.config.discount is None and not hasattr(self.model, "discount"):
            raise ConfigurationError(
                f"{type(self.model).__name__} has no discount. Give the planner one: PlannerConfig(discount=0.99)."
            )

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
