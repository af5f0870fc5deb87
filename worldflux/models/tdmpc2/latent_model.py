"""TD-MPC2's networks and their predictions: the common interface except for learning."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from worldflux.accel import ranks
from worldflux.accel.overriding import overridden
from worldflux.config import TDMPC2Config
from worldflux.errors import ConfigurationError, ShapeMismatchError
from worldflux.models.base import State, Trajectory, WorldModel
from worldflux.models.mppi import PartialReturn, discounted_rewards
from worldflux.models.tdmpc2.encoder import MAX_SHIFT, Decoder, Encoder
from worldflux.models.tdmpc2.policy import CategoricalSample, PolicySample, categorical, squashed_normal
from worldflux.models.tdmpc2.tasks import ModelT, Tasks, with_task
from worldflux.nn.distributions import TwoHot, gumbel_noise
from worldflux.nn.mish import Ensemble, MishMLP, rollout_natively
from worldflux.nn.transforms import simnorm, symexp, symlog_bins
from worldflux.replay.batch import Observation

_SAMPLED_MEMBERS = 2
"""Number of value networks in each estimate."""


class LatentModel(WorldModel):
    """Encoder, dynamics, reward, termination, values and policy prior on one latent state.

    States consist of `latent` `[B, L]` and, if several tasks share the model, `task` `[B]`.
    """

    config_class: ClassVar[type[TDMPC2Config]] = TDMPC2Config
    config: TDMPC2Config
    bins: Tensor
    value_scale: Tensor
    termination_seen: Tensor

    def __init__(self, config: TDMPC2Config) -> None:
        super().__init__(config)
        c = config
        task_dim = c.task_dim if c.num_tasks > 1 else 0
        hidden = [c.mlp_dim] * c.num_hidden_layers
        state_dim, step_dim = c.latent_dim + task_dim, c.latent_dim + task_dim + c.action_dim
        self.tasks = Tasks(c) if c.num_tasks > 1 else None
        self.encoder = Encoder(c, task_dim)
        self.dynamics = MishMLP(
            step_dim, [c.hidden_dim] * c.num_hidden_layers, c.latent_dim, partial(simnorm, dim=c.simnorm_dim)
        )
        self.reward_head = MishMLP(step_dim, hidden, c.num_bins)
        nn.init.zeros_(self.reward_head.layers[-1].weight)  # type: ignore[arg-type]
        self.actor = MishMLP(state_dim, hidden, c.action_dim if c.action_classes else 2 * c.action_dim)
        self.critics = Ensemble(c.num_q_networks, step_dim, hidden, c.num_bins)
        self.target_critics = copy.deepcopy(self.critics).requires_grad_(False)
        self.termination_head = MishMLP(state_dim, hidden, 1) if c.episodic else None
        self.decoder = Decoder(c) if c.use_decoder else None
        self.register_buffer("bins", symlog_bins(c.num_bins, c.vmax), persistent=False)
        self.register_buffer("value_scale", torch.ones(()))
        if c.episodic:
            # Set to 1 by the first termination in a trained batch; the head's predictions are not used before.
            self.register_buffer("termination_seen", torch.zeros(()))

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self.value_scale.device

    def with_task(
        self: ModelT,
        name: str,
        *,
        like: str | int | None = None,
        action_dim: int | None = None,
        episode_length: int | None = None,
    ) -> ModelT:
        """Returns a copy of a model of several tasks that has one more, whose embedding is new.

        All other weights are those of this model, which stays as it is. The optimiser begins anew.

            >>> model = create_world_model("two-tasks").with_task("walker-run", like="walker-walk")
            >>> WorldFluxAgent(model, {"walker-run": "dmc/walker-run"}).learn(20_000)

        Args:
            name: Name of the new task.
            like: Task whose embedding the new one begins with; None takes a random one, as a new model does.
            action_dim: Number of action dimensions that the task uses. None: all of them.
            episode_length: Number of steps in a full episode. None: that of the task `like`, or `episode_length`.

        Raises:
            ConfigurationError: If the model has a single task, there is such a task already, or a number does not fit.
        """
        return with_task(self, name, like, action_dim, episode_length)

    # States

    def initial_state(self, batch_size: int, *, task: Tensor | int = 0) -> State:
        """Returns a placeholder before any observation, for the given task or tasks `[B]`."""
        latent = torch.zeros(batch_size, self.config.latent_dim, device=self.device)
        return _state(latent, self._task(task, batch_size))

    def encode(
        self,
        obs: Observation,
        *,
        deterministic: bool = False,
        task: Tensor | int = 0,
        shift: Tensor | None = None,
    ) -> State:
        """Returns the state of an observation `[B, ...]`, which does not depend on earlier observations.

        Args:
            obs: Observation to encode.
            deterministic: Whether to leave images unchanged instead of shifting each at random as in training.
            task: Index of the task, or of the task of each row `[B]`.
            shift: Shift of the images instead of a random one; see `encoder.shifted`. `[B, 2]`
        """
        tensors = self._observations(obs, leading=1)
        rows = len(next(iter(tensors.values())))
        tasks = self._task(task, rows)
        if shift is None and self.encoder.image_keys and not deterministic:
            shift = self._shifts(rows)
        return _state(self._encode(tensors, tasks, shift), tasks)

    def update(
        self,
        state: State,
        action: Tensor,
        obs: Observation,
        *,
        is_first: Tensor | None = None,
        deterministic: bool = False,
    ) -> State:
        """Returns the state of the new observation. TD-MPC2 has no memory, so only the task of `state` is used."""
        self._observations(obs, leading=1, rows=len(state["latent"]))
        self._check_actions(action, len(state["latent"]))
        return self.encode(obs, deterministic=deterministic, task=state.get("task", 0))

    def transition(self, state: State, action: Tensor, *, deterministic: bool = False) -> State:
        """Returns the state that the model predicts after an action `[B, A]`."""
        self._check_actions(action, len(state["latent"]))
        task = state.get("task")
        return _state(self._next(state["latent"], action.float(), task), task)

    def decode(self, state: State) -> dict[str, Any]:
        """Returns predictions for a state. Rewards also depend on the action, see `rollout`.

        Returns:
            `"obs"` (with a decoder): observation in its own structure, with images as floats in [0, 1]; `"continue"`
            (with a termination head): probability that the episode continues there `[B]`.
        """
        found: dict[str, Any] = {}
        if self.decoder is not None:
            latent = state["latent"]
            with self._autocast():
                obs = self.decoder(latent.flatten(0, -2))
            obs = {key: value.unflatten(0, latent.shape[:-1]) for key, value in obs.items()}
            found["obs"] = obs if isinstance(self.config.obs_shape, dict) else obs["obs"]
        if self.termination_head is not None:
            found["continue"] = self._continues(state["latent"], state.get("task"))
        return found

    def rollout(self, state: State, actions: Tensor, *, deterministic: bool = False) -> Trajectory:
        """Predicts the results of a sequence of at least one action `[H, B, A]` open loop."""
        if actions.ndim != 3 or len(actions) == 0:
            raise ShapeMismatchError(
                f"actions have shape {list(actions.shape)}, expected [H, B, A] with H of at least 1."
            )
        self._check_actions(actions, len(actions), len(state["latent"]))
        actions, task = actions.float(), state.get("task")
        latents = [state["latent"]]
        for action in actions:
            latents.append(self._next(latents[-1], action, task))
        before, after = torch.stack(latents[:-1]), torch.stack(latents[1:])  # [H, B, L]
        tasks = None if task is None else task.expand(len(actions), -1)
        with self._autocast():
            rewards = self._decoded(self.reward_head(*self._inputs(before, tasks, actions)))
        return Trajectory(_state(after, tasks), rewards, self._continues(after, tasks))

    def policy(self, state: State, deterministic: bool = False) -> Tensor:
        """Returns actions of the policy prior, or if deterministic, its mean. `[B, A]`"""
        latent = state["latent"]
        shape = () if deterministic else (*latent.shape[:-1], self.config.action_dim)
        noise = torch.zeros(shape, device=latent.device) if deterministic else self._noise(*shape)
        return self._policy(latent, state.get("task"), noise).action

    def q_values(self, state: State, action: Tensor) -> Tensor:
        """Returns the discounted return from each state and action, as estimated by every value network. `[Q, B]`"""
        self._check_actions(action, len(state["latent"]))
        return self._q(self.critics, self._inputs(state["latent"], state.get("task"), action.float()))

    def value(self, state: State) -> Tensor:
        """Returns the discounted return of the policy's mean action, averaged over all value networks. `[B]`"""
        return self._final_value(state["latent"], state.get("task"), noise=None, members=None)

    @property
    def discount(self) -> float:
        """Discount per step; with several tasks, that of the first one."""
        return self.config.discounts[0]

    # Planning: the methods of `PlanningModel`

    def action_mask(self, state: State) -> Tensor | None:
        """Returns 1 where the task of a row has an action dimension, else 0; None for a single task. `[N, A]`"""
        return None if self.tasks is None else self.tasks.action_masks[state["task"]]

    def propose(self, state: State, noise: Tensor, *, deterministic: bool) -> Tensor:
        """Returns actions of the policy for given standard normal noise. `[B, A]`"""
        return self._policy(state["latent"], state.get("task"), noise).action

    def partial_return(
        self, state: State, actions: Tensor, *, discount: float | None, deterministic: bool
    ) -> PartialReturn:
        """Rewards and last states of sequences of actions `[H, N, S, A]`; `discount` None takes the task's own.

        A step that is expected to terminate, with a probability above one half, ends the sequence: nothing after it
        counts.
        """
        # The state and its task are given once for each row and broadcast with its sequences.
        task = state["task"].unsqueeze(1) if "task" in state else None  # [N, 1]
        found = None
        if task is None and not overridden(self, _NEXT, _INPUTS):
            with self._autocast():
                found = rollout_natively(self.dynamics, self.reward_head, state["latent"], actions)
        if found is not None:
            after, logits = found
            rewards = self._decoded(logits)  # [H, N, S]
        else:
            latents = [state["latent"].unsqueeze(1)]  # [N, 1, L]
            for action in actions:
                latents.append(self._next(latents[-1], action, task))
            after = torch.stack(latents[1:])
            with self._autocast():
                parts = [self.reward_head(*self._inputs(latents[0], task, actions[0])).unsqueeze(0)]
                if len(actions) > 1:
                    parts.append(self.reward_head(*self._inputs(after[:-1], task, actions[1:])))
            rewards = torch.cat([self._decoded(part) for part in parts])
        continues = None if self.termination_head is None else self._continues(after, task)
        earned, left = discounted_rewards(rewards, *self.step_factors(state, continues, discount))
        return PartialReturn(earned, left, _state(after[-1], None if task is None else task.expand(earned.shape)))

    def step_factors(
        self, state: State, continues: Tensor | None, discount: float | None
    ) -> tuple[Tensor | None, Tensor | float]:
        """Returns the continuation after each step of a plan, 0 or 1, and the discount per step.

        Args:
            state: State to plan from. `[N, ...]`
            continues: Probability that the episode continues after each step; None if it always does. `[H, N, S]`
            discount: Discount per step; None takes that of the task of each row.
        """
        task = state["task"].unsqueeze(1) if "task" in state else None  # [N, 1]
        if continues is not None:
            # With a termination probability of exactly one half the episode continues. A comparison would hide NaN.
            continues = 1.0 - torch.round(1.0 - continues)
        return continues, self._discount(task) if discount is None else discount

    def estimated_return(
        self, partial: PartialReturn, *, deterministic: bool, noise: Tensor | None = None, members: Tensor | None = None
    ) -> Tensor:
        """Rewards of the sequences and the value of the policy in their last states. `[N, S]`

        Args:
            partial: Result of `partial_return`.
            deterministic: Without `noise` take the policy's mean, without `members` all value networks. Otherwise both
                are drawn.
            noise: Noise of the policy's action in the last state. `[N, S, A]`
            members: Value networks whose mean judges the last state. `[2]`
        """
        latent, task = partial.state["latent"], partial.state.get("task")
        if noise is None and not deterministic:
            noise = self._noise(*latent.shape[:-1], self.config.action_dim)
        if members is None and not deterministic:
            members = self._members()
        return partial.earned + partial.weight * self._final_value(latent, task, noise=noise, members=members)

    def _final_value(
        self, latent: Tensor, task: Tensor | None, *, noise: Tensor | None, members: Tensor | None
    ) -> Tensor:
        """Computes the value of the policy's action at a latent, averaged over the given value networks (None: all).

        Without `noise` the action is the policy's mean.
        """
        sample = self._policy(latent, task, latent.new_zeros(()) if noise is None else noise)
        return self._q(self.critics, self._inputs(latent, task, sample.action), members).mean(0)

    # Networks on latents `[..., L]`, tasks `[...]` and actions `[..., A]`

    def _encode(self, obs: dict[str, Tensor], task: Tensor | None, shift: Tensor | None) -> Tensor:
        with self._autocast():
            embedding = None if task is None or self.tasks is None else self.tasks(task)
            return self.encoder(obs, embedding, shift)

    def _next(self, latent: Tensor, action: Tensor, task: Tensor | None) -> Tensor:
        with self._autocast():
            return self.dynamics(*self._inputs(latent, task, action))

    def _termination_logits(self, latent: Tensor, task: Tensor | None) -> Tensor:
        assert self.termination_head is not None
        with self._autocast():
            return self.termination_head(*self._inputs(latent, task)).squeeze(-1).float()

    def _continues(self, latent: Tensor, task: Tensor | None) -> Tensor:
        """Returns the probability that the episode continues at a latent; 1 before any termination was seen. `[...]`"""
        if self.termination_head is None:
            return torch.ones(latent.shape[:-1], device=latent.device)
        return 1.0 - self.termination_seen * torch.sigmoid(self._termination_logits(latent, task))

    def _policy(
        self, latent: Tensor, task: Tensor | None, noise: Tensor, *, frozen_tasks: bool = False
    ) -> PolicySample | CategoricalSample:
        with self._autocast():
            raw = self.actor(*self._inputs(latent, task, frozen_tasks=frozen_tasks))
        mask = None if task is None or self.tasks is None else self.tasks.action_masks[task]
        if self.config.action_classes:
            return categorical(raw, noise, self.config.action_classes, mask)
        return squashed_normal(
            raw,
            noise,
            log_std_min=self.config.log_std_min,
            log_std_max=self.config.log_std_max,
            mask=mask,
        )

    def _noise(self, *shape: int) -> Tensor:
        """Draws noise of the policy's actions: normal for continuous ones, Gumbel for discrete ones."""
        if self.config.action_classes:
            return gumbel_noise(*shape, device=self.device)
        return torch.randn(*shape, device=self.device)

    def _q(
        self,
        ensemble: Ensemble,
        inputs: tuple[Tensor, ...],
        members: Tensor | None = None,
        *,
        dropout: Tensor | None = None,
        frozen: bool = False,
    ) -> Tensor:
        """Computes the values of ensemble members for `_inputs` of states and actions `[...]`. `[m, ...]`"""
        shape = inputs[-1].shape[:-1]
        flat = [part.expand(*shape, part.shape[-1]).flatten(0, -2) for part in inputs]
        with self._autocast():
            logits = ensemble(*flat, members=members, dropout=dropout, frozen=frozen)
        return self._decoded(logits).unflatten(1, shape)

    def _decoded(self, logits: Tensor) -> Tensor:
        """Computes the expectation in symlog space and applies symexp. `[..., K]` → `[...]`"""
        return symexp(TwoHot(logits, self.bins).mean)

    def _inputs(
        self, latent: Tensor, task: Tensor | None, action: Tensor | None = None, *, frozen_tasks: bool = False
    ) -> tuple[Tensor, ...]:
        """Returns the inputs of the networks: latent, embedding of the task, and action, `[..., p]` each."""
        parts = [latent]
        if task is not None and self.tasks is not None:
            embedding = self.tasks(task)
            parts.append(embedding.detach() if frozen_tasks else embedding)
        if action is not None:
            parts.append(action)
        return tuple(parts)

    # Helpers

    def _task(self, task: Tensor | int, rows: int) -> Tensor | None:
        """Returns the index of the task of each row `[B]`, or None if there is only one task."""
        if isinstance(task, int) and not 0 <= task < self.config.num_tasks:
            raise ConfigurationError(f"task is {task}, expected 0 to {self.config.num_tasks - 1}.")
        if self.tasks is None:
            return None
        return torch.as_tensor(task, dtype=torch.int64, device=self.device).expand(rows)

    def _discount(self, task: Tensor | None) -> Tensor | float:
        """Returns the discount per step: a number or, if several tasks share the model, one for each entry."""
        return self.discount if task is None or self.tasks is None else self.tasks.discounts[task]

    def _members(self) -> Tensor:
        """Draws the indices of two different value networks, or of one if there is only one. `[m]`"""
        count = self.config.num_q_networks
        # All windows of a batch share the networks, also those of other ranks.
        return ranks.from_first(torch.rand(count, device=self.device)).topk(min(_SAMPLED_MEMBERS, count)).indices

    def _shifts(self, *shape: int) -> Tensor:
        """Draws random shifts of images. `[..., 2]`"""
        return torch.randint(0, 2 * MAX_SHIFT + 1, (*shape, 2), device=self.device)


# The methods that a native rollout bypasses, captured at import time so that overriding them is detected.
_NEXT, _INPUTS = LatentModel._next, LatentModel._inputs


def _state(latent: Tensor, task: Tensor | None) -> State:
    return State({"latent": latent} if task is None else {"latent": latent, "task": task})
