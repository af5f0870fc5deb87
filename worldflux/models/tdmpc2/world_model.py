"""TD-MPC2: world model, values and policy prior behind the common interface.

Source: "TD-MPC2: Scalable, Robust World Models for Continuous Control", arXiv:2310.16828, and its reference
implementation.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldflux.config import TDMPC2Config
from worldflux.errors import ConfigurationError, ShapeMismatchError
from worldflux.models.base import (
    LossOutput,
    OnlineDefaults,
    OptimizerSpec,
    ParameterGroup,
    Phase,
    State,
    Trajectory,
    WorldModel,
)
from worldflux.models.tdmpc2.encoder import MAX_SHIFT, Decoder, Encoder
from worldflux.models.tdmpc2.losses import moved_scale, step_weights, termination_statistics, value_range
from worldflux.models.tdmpc2.policy import PolicySample, squashed_normal
from worldflux.models.tdmpc2.tasks import Tasks
from worldflux.models.tdmpc2.windows import Windows, windows
from worldflux.nn.distributions import TwoHot
from worldflux.nn.mish import Ensemble, MishMLP
from worldflux.nn.transforms import simnorm, symexp, symlog, symlog_bins
from worldflux.training.batch import Batch, Observation

_SAMPLED_MEMBERS = 2
"""Value networks in each estimate."""


@dataclass(frozen=True)
class ModelDraws:
    """Random draws of the model's loss; given, they make it reproduce a recorded one. N windows of H steps."""

    noise: Tensor
    """Of the policy's actions in the value targets. `[N, H, A]`"""
    members: Tensor
    """Target networks of which the lower value is taken. `[2]`"""
    dropout: Tensor | None = None
    """Factors for the first hidden layer of every value network. `[Q, N * H, mlp_dim]`"""
    shift: Tensor | None = None
    """Moves of the images, see `encoder.shifted`. `[N, H+1, 2]`"""


@dataclass(frozen=True)
class PolicyDraws:
    """Random draws of the policy's loss."""

    noise: Tensor
    """`[N, H+1, A]`"""
    members: Tensor
    """Value networks of which the mean is taken. `[2]`"""
    dropout: Tensor | None = None
    """Factors for the first hidden layer of those networks. `[2, N * (H+1), mlp_dim]`"""


@dataclass(frozen=True)
class ModelParts:
    """What the model's loss is made of, before the losses are added up. N windows of H steps."""

    losses: dict[str, Tensor]
    """Means over what counts, scalars."""
    latents: Tensor
    """Encoding of each start and the predicted latents after it. `[N, H+1, L]`"""
    next_latents: Tensor
    """Encodings of the observations after each step, without gradient. `[N, H, L]`"""
    targets: Tensor
    """Of the values. `[N, H]`"""
    reward_logits: Tensor
    """`[N, H, K]`"""
    value_logits: Tensor
    """`[Q, N, H, K]`"""
    termination_logits: Tensor | None
    """`[N, H]`"""
    termination_seen: Tensor | None
    """1 if a termination was learned from, in this batch or before. `[]`"""


class TDMPC2(WorldModel):
    """TD-MPC2's networks and losses.

    States have `latent` `[B, L]`, and, where several tasks share the model, `task` `[B]`.
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
        seen, moved = c.latent_dim + task_dim, c.latent_dim + task_dim + c.action_dim
        self.tasks = Tasks(c) if c.num_tasks > 1 else None
        self.encoder = Encoder(c, task_dim)
        self.dynamics = MishMLP(
            moved, [c.hidden_dim] * c.num_hidden_layers, c.latent_dim, partial(simnorm, dim=c.simnorm_dim)
        )
        self.reward_head = MishMLP(moved, hidden, c.num_bins)
        nn.init.zeros_(self.reward_head.layers[-1].weight)  # type: ignore[arg-type]
        self.actor = MishMLP(seen, hidden, 2 * c.action_dim)
        self.critics = Ensemble(c.num_q_networks, moved, hidden, c.num_bins)
        self.target_critics = copy.deepcopy(self.critics).requires_grad_(False)
        self.termination_head = MishMLP(seen, hidden, 1) if c.episodic else None
        self.decoder = Decoder(c) if c.use_decoder else None
        self.register_buffer("bins", symlog_bins(c.num_bins, c.vmax), persistent=False)
        self.register_buffer("value_scale", torch.ones(()))
        if c.episodic:
            self.register_buffer("termination_seen", torch.zeros(()))

    # States

    def initial_state(self, batch_size: int, *, task: Tensor | int = 0) -> State:
        """A placeholder before any observation, of the given task or tasks `[B]`."""
        latent = torch.zeros(batch_size, self.config.latent_dim, device=self.device)
        return self._state(latent, self._task(task, batch_size))

    def encode(
        self,
        obs: Observation,
        *,
        deterministic: bool = False,
        task: Tensor | int = 0,
        shift: Tensor | None = None,
    ) -> State:
        """State of an observation `[B, ...]`; it depends on nothing before it.

        Args:
            obs: What is seen.
            deterministic: Leave images where they are, instead of moving each at random as in training.
            task: Number of the task, or of each row's `[B]`.
            shift: How far images are moved, in place of a random draw; see `encoder.shifted`. `[B, 2]`
        """
        tensors = self._observations(obs, leading=1)
        rows = len(next(iter(tensors.values())))
        tasks = self._task(task, rows)
        if shift is None and self.encoder.image_keys and not deterministic:
            shift = self._shifts(rows)
        return self._state(self._encode(tensors, tasks, shift), tasks)

    def update(
        self,
        state: State,
        action: Tensor,
        obs: Observation,
        *,
        is_first: Tensor | None = None,
        deterministic: bool = False,
    ) -> State:
        """State of the new observation: TD-MPC2 does not remember. Only the task of `state` matters."""
        self._observations(obs, leading=1, rows=len(state["latent"]))
        self._check_actions(action, len(state["latent"]))
        return self.encode(obs, deterministic=deterministic, task=state.get("task", 0))

    def transition(self, state: State, action: Tensor, *, deterministic: bool = False) -> State:
        """State that the model expects after an action `[B, A]`."""
        self._check_actions(action, len(state["latent"]))
        task = state.get("task")
        return self._state(self._next(state["latent"], action.float(), task), task)

    def decode(self, state: State) -> dict[str, Any]:
        """What a state predicts; a reward needs an action as well, see `rollout`.

        Returns:
            `"obs"` with a decoder, in the observation's own form, images as floats in [0, 1]; `"continue"` with a
            termination head: probability that the episode goes on there `[B]`.
        """
        found: dict[str, Any] = {}
        if self.decoder is not None:
            with self._autocast():
                obs = self.decoder(state["latent"])
            found["obs"] = obs if isinstance(self.config.obs_shape, dict) else obs["obs"]
        if self.termination_head is not None:
            found["continue"] = self._continues(state["latent"], state.get("task"))
        return found

    def rollout(self, state: State, actions: Tensor, *, deterministic: bool = False) -> Trajectory:
        """Open-loop prediction of a sequence of actions `[H, B, A]`, of at least one step."""
        if actions.ndim != 3 or len(actions) == 0:
            raise ShapeMismatchError(
                f"actions have shape {list(actions.shape)}, expected [H, B, A] with H of at least 1."
            )
        self._check_actions(actions, len(actions), len(state["latent"]))
        task = state.get("task")
        latents = [state["latent"]]
        for action in actions:
            latents.append(self._next(latents[-1], action.float(), task))
        before, after = torch.stack(latents[:-1]), torch.stack(latents[1:])  # [H, B, L]
        tasks = None if task is None else task.expand(len(actions), -1)
        with self._autocast():
            rewards = self._decoded(self.reward_head(self._joined(before, tasks, actions.float())))
        return Trajectory(self._state(after, tasks), rewards, self._continues(after, tasks))

    def policy(self, state: State, deterministic: bool = False, *, noise: Tensor | None = None) -> Tensor:
        """Actions of the policy prior. `[B, A]`

        Args:
            state: Where to act.
            deterministic: Take the mean.
            noise: Standard normal numbers in place of random draws. `[B, A]`
        """
        latent = state["latent"]
        if noise is None:
            noise = torch.randn(*latent.shape[:-1], self.config.action_dim, device=latent.device)
        sample = self._policy(latent, state.get("task"), noise)
        return sample.mean if deterministic else sample.action

    def q_values(self, state: State, action: Tensor) -> Tensor:
        """Discounted reward from each state and action on, as every value network sees it. `[Q, B]`"""
        self._check_actions(action, len(state["latent"]))
        return self._q(self.critics, self._joined(state["latent"], state.get("task"), action.float()))

    def value(self, state: State, *, noise: Tensor | None = None, members: Tensor | None = None) -> Tensor:
        """Discounted reward from a state on, acting with the policy prior. `[B]`

        Args:
            state: Where to start.
            noise: Of the policy's action; None takes the mean action. `[B, A]`
            members: Value networks to average; None takes all. The reference's planner draws two with each value. `[m]`
        """
        action = self.policy(state, deterministic=noise is None, noise=noise)
        x = self._joined(state["latent"], state.get("task"), action)
        return self._q(self.critics, x, members).mean(0)

    def sequence_value(
        self, state: State, actions: Tensor, *, noise: Tensor | None = None, members: Tensor | None = None
    ) -> Tensor:
        """Discounted reward of a sequence of actions `[H, B, A]` and of the policy after it. `[B]`

        A step that is expected to terminate, with a probability above one half, ends the sequence: what comes after
        it counts nothing.

        Args:
            state: Where it starts.
            actions: What is done, first.
            noise: As of `value`. `[B, A]`
            members: As of `value`. `[m]`
        """
        trajectory = self.rollout(state, actions)
        discount = self.discount_of(state)
        going_on = (trajectory.continues >= 0.5).float()
        total: Tensor = torch.zeros_like(trajectory.rewards[0])
        weight: Tensor = torch.ones_like(total)
        for reward, goes_on in zip(trajectory.rewards, going_on, strict=True):
            total = total + weight * reward
            weight = weight * discount * goes_on
        return total + weight * self.value(trajectory.states[-1], noise=noise, members=members)

    def discount_of(self, state: State) -> Tensor | float:
        """Weight of the next step: a number, or, where several tasks share the model, one for each row. `[B]`"""
        return self._discount(state.get("task"))

    # Learning

    def loss(self, batch: Batch) -> LossOutput:
        """The losses of model, policy and decoder together; a step of the Trainer takes them one after the other.

        The policy's part trains the policy only, the decoder's the decoder only, and the model's none of the two.
        """
        outputs: list[LossOutput] = []
        for phase in self.phases():
            outputs.append(phase.loss(batch, outputs))
        return LossOutput(
            torch.stack([output.loss for output in outputs]).sum(),
            {name: value for output in outputs for name, value in output.terms.items()},
            updates={name: value for output in outputs for name, value in output.updates.items()},
        )

    def phases(self) -> list[Phase]:
        """Model first; then the policy, on the latents of the model's step and on the values that it left behind."""
        model: list[nn.Module | None] = [
            self.dynamics,
            self.reward_head,
            self.termination_head,
            self.critics,
            self.tasks,
        ]
        groups = [
            ParameterGroup(_trainable(self.encoder), self.config.encoder_lr_scale),
            ParameterGroup([p for module in model if module is not None for p in _trainable(module)]),
        ]
        phases = [
            Phase("model", groups, lambda batch, previous: self.model_loss(batch)),
            Phase("policy", _trainable(self.actor), lambda batch, previous: self.policy_loss(previous[0]), eps=1e-5),
        ]
        if self.decoder is not None:
            decoder = _trainable(self.decoder)
            phases.append(Phase("decoder", decoder, lambda batch, previous: self.decoder_loss(batch, previous[0])))
        return phases

    def model_loss(self, batch: Batch, draws: ModelDraws | None = None) -> LossOutput:
        """Loss of everything but the policy, on windows of `horizon + 1` rows; `draws` replaces the random draws."""
        w = self._windows(batch)
        parts = self.model_parts(w, draws)
        c = self.config
        weights = {"consistency": c.consistency_coef, "reward": c.reward_coef, "value": c.value_coef}
        total = torch.stack([weight * parts.losses[name] for name, weight in weights.items()]).sum()
        terms = {name: loss.detach() for name, loss in parts.losses.items()}
        updates: dict[str, Tensor] = {}
        if parts.termination_logits is not None and parts.termination_seen is not None:
            # The head counts from the first termination on. Where none ever comes, the model learns as if it had no
            # such head; the reference has to be told beforehand.
            total = total + c.termination_coef * parts.termination_seen * parts.losses["termination"]
            probability = torch.sigmoid(parts.termination_logits.detach()[:, -1])
            rate, score = termination_statistics(probability, w.terminated[:, -1], w.steps[:, -1])
            terms |= {"termination_rate": rate, "termination_f1": score}
            updates["termination_seen"] = parts.termination_seen
        carry = {"latents": parts.latents.detach(), "states": w.states}
        if w.task is not None:
            carry["task"] = w.task
        return LossOutput(total, terms, updates=updates, carry=carry)

    def model_parts(self, w: Windows, draws: ModelDraws | None = None) -> ModelParts:
        """Losses of the model on windows, and what they were computed from."""
        N, H = w.rewards.shape
        if draws is None:
            draws = self.model_draws(N, H)
        tasks = None if w.task is None else w.task.unsqueeze(1).expand(N, H)
        with self._autocast():
            next_latents, targets = self._targets(w, tasks, draws)
            # Latents, open loop from the first observation, with gradient all the way
            first = {key: value[:, 0] for key, value in w.obs.items()}
            latents = [self._encode(first, w.task, None if draws.shift is None else draws.shift[:, 0])]
            for action in w.actions.unbind(1):
                latents.append(self._next(latents[-1], action, w.task))
            rolled = torch.stack(latents, 1)  # [N, H+1, L]
            # Predictions
            x = self._joined(rolled[:, :-1], tasks, w.actions).flatten(0, 1)
            reward_logits = self.reward_head(x).unflatten(0, (N, H))
            value_logits = self.critics(x, dropout=draws.dropout).unflatten(1, (N, H))
            ends = None if self.termination_head is None else self._termination_logits(rolled[:, 1:], tasks)
        # Losses
        rho = self.config.rho
        consistency = (rolled[:, 1:].float() - next_latents).square().mean(-1)  # [N, H]
        reward_loss = TwoHot(reward_logits, self.bins).loss(symlog(w.rewards))
        value_loss = TwoHot(value_logits, self.bins).loss(symlog(targets).expand(len(value_logits), N, H)).mean(0)
        weights = step_weights(w.steps, rho)
        losses = {
            "consistency": (step_weights(w.arrived, rho) * consistency).sum(),
            "reward": (weights * reward_loss).sum(),
            "value": (step_weights(w.targets, rho) * value_loss).sum(),
        }
        seen = None
        if ends is not None:
            error = F.binary_cross_entropy_with_logits(ends, w.terminated, reduction="none")
            losses["termination"] = (step_weights(w.steps, 1.0) * error).sum()
            seen = torch.maximum(self.termination_seen, (w.terminated * w.steps).amax())
        return ModelParts(losses, rolled, next_latents, targets, reward_logits, value_logits, ends, seen)

    @torch.no_grad()
    def _targets(self, w: Windows, tasks: Tensor | None, draws: ModelDraws) -> tuple[Tensor, Tensor]:
        """Latents of the observations after each step `[N, H, L]`, and the values' targets `[N, H]`."""
        N, H = w.rewards.shape
        after = {key: value[:, 1:].flatten(0, 1) for key, value in w.obs.items()}
        flat_tasks = None if tasks is None else tasks.flatten()
        shift = None if draws.shift is None else draws.shift[:, 1:].flatten(0, 1)
        latents = self._encode(after, flat_tasks, shift).unflatten(0, (N, H))
        action = self._policy(latents, tasks, draws.noise).action
        future = self._q(self.target_critics, self._joined(latents, tasks, action), draws.members).amin(0)
        return latents.float(), w.rewards + self._discount(tasks) * (1.0 - w.terminated) * future

    def policy_loss(self, model: LossOutput, draws: PolicyDraws | None = None) -> LossOutput:
        """Loss of the policy on the latents that the model's loss went through; reaches the policy only.

        Args:
            model: What `model_loss` returned.
            draws: Replaces the random draws.
        """
        latents, states = model.carry["latents"], model.carry["states"]
        N, T = states.shape
        if draws is None:
            draws = self.policy_draws(N, T)
        tasks = model.carry["task"].unsqueeze(1).expand(N, T) if "task" in model.carry else None
        with self._autocast():
            sample = self._policy(latents, tasks, draws.noise, frozen_tasks=True)
            x = self._joined(latents, tasks, sample.action, frozen_tasks=True)
            value = self._q(self.critics, x, draws.members, dropout=draws.dropout, frozen=True).mean(0)  # [N, T]
        # The scale follows the first states' values and is used as it is after that.
        spread = value_range(value[:, 0], states[:, 0])
        scale = moved_scale(self.value_scale, spread, self.config.tau)
        gain = self.config.entropy_coef * sample.scaled_entropy + value / scale
        loss = -(step_weights(states, self.config.rho) * gain).sum()
        even = step_weights(states, 1.0)
        terms = {
            "policy": loss.detach(),
            "policy_entropy": (even * sample.entropy.detach()).sum(),
            "policy_scaled_entropy": (even * sample.scaled_entropy.detach()).sum(),
            "value_scale": scale,
        }
        return LossOutput(loss, terms, updates={"value_scale": scale})

    def decoder_loss(self, batch: Batch, model: LossOutput) -> LossOutput:
        """Loss of picturing the observations from the latents that the model's loss went through."""
        assert self.decoder is not None
        w = self._windows(batch)
        obs = {key: value.flatten(0, 1) for key, value in w.obs.items()}
        with self._autocast():
            predicted = self.decoder(model.carry["latents"].flatten(0, 1))
        error = self.decoder.losses(predicted, obs).unflatten(0, w.states.shape)
        loss = (step_weights(w.states, 1.0) * error).sum()
        return LossOutput(loss, {"reconstruction": loss.detach()})

    def model_draws(self, windows: int, steps: int) -> ModelDraws:
        """Random draws for the model's loss on `windows` windows of `steps` steps; dropout only in training."""
        return ModelDraws(
            noise=torch.randn(windows, steps, self.config.action_dim, device=self.device),
            members=self._members(),
            dropout=self._dropout(self.config.num_q_networks, windows * steps),
            shift=self._shifts(windows, steps + 1) if self.encoder.image_keys else None,
        )

    def policy_draws(self, windows: int, states: int) -> PolicyDraws:
        """Random draws for the policy's loss on `windows` windows of `states` states."""
        members = self._members()
        return PolicyDraws(
            noise=torch.randn(windows, states, self.config.action_dim, device=self.device),
            members=members,
            dropout=self._dropout(len(members), windows * states),
        )

    @property
    def optimizer_spec(self) -> OptimizerSpec:
        """Adam, arXiv:2310.16828; `phases` say where the encoder's rate and the policy's eps differ."""
        return OptimizerSpec(kind="adam", learning_rate=self.config.learning_rate, grad_clip=self.config.grad_clip)

    @torch.no_grad()
    def after_step(self, outputs: Sequence[LossOutput]) -> None:
        """Commits the value scale and moves the target networks towards the value networks."""
        super().after_step(outputs)
        if self.tasks is not None:
            self.tasks.renormalize()
        targets: list[Tensor] = list(self.target_critics.parameters())
        online: list[Tensor] = list(self.critics.parameters())
        torch._foreach_lerp_(targets, online, self.config.tau)

    # Replay and acting

    def online_defaults(self) -> OnlineDefaults:
        """The reference's numbers: a gradient step on 256 windows for each environment step, after a random start.

        The start lasts for five episodes and at least 1000 steps, and as many gradient steps follow it at once.
        """
        rows, windows_per_step = self.config.horizon + 1, 256
        start = max(1000, 5 * self.config.episode_length)
        return OnlineDefaults(
            train_ratio=float(windows_per_step * rows),
            batch_size=windows_per_step,
            seq_len=rows,
            buffer_size=1_000_000,
            learning_starts=start,
            random_actions=True,
            pretrain_updates=start,
        )

    def replay_extras(self) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
        """The number of the task beside each row, where there are several."""
        return {} if self.tasks is None else {"task": ((), np.dtype(np.int64))}

    def extras_from_state(self, state: State) -> dict[str, Tensor]:
        """What `replay_extras` stores for a state `[B, ...]`."""
        return {} if self.tasks is None else {"task": state["task"]}

    # Networks on latents `[..., L]`, tasks `[...]` and actions `[..., A]`

    def _encode(self, obs: dict[str, Tensor], task: Tensor | None, shift: Tensor | None) -> Tensor:
        with self._autocast():
            embedding = None if task is None or self.tasks is None else self.tasks(task)
            return self.encoder(obs, embedding, shift)

    def _next(self, latent: Tensor, action: Tensor, task: Tensor | None) -> Tensor:
        with self._autocast():
            return self.dynamics(self._joined(latent, task, action))

    def _termination_logits(self, latent: Tensor, task: Tensor | None) -> Tensor:
        assert self.termination_head is not None
        return self.termination_head(self._joined(latent, task)).squeeze(-1).float()

    def _continues(self, latent: Tensor, task: Tensor | None) -> Tensor:
        """Probability that the episode goes on at a latent; 1 as long as no termination was learned from. `[...]`"""
        if self.termination_head is None:
            return torch.ones(latent.shape[:-1], device=latent.device)
        with self._autocast():
            return 1.0 - self.termination_seen * torch.sigmoid(self._termination_logits(latent, task))

    def _policy(
        self, latent: Tensor, task: Tensor | None, noise: Tensor, *, frozen_tasks: bool = False
    ) -> PolicySample:
        with self._autocast():
            raw = self.actor(self._joined(latent, task, frozen_tasks=frozen_tasks))
        return squashed_normal(
            raw,
            noise,
            log_std_min=self.config.log_std_min,
            log_std_max=self.config.log_std_max,
            mask=None if task is None or self.tasks is None else self.tasks.action_masks[task],
        )

    def _q(
        self,
        ensemble: Ensemble,
        x: Tensor,
        members: Tensor | None = None,
        *,
        dropout: Tensor | None = None,
        frozen: bool = False,
    ) -> Tensor:
        """Values of the members asked for at inputs `[..., L + A]`. `[m, ...]`"""
        with self._autocast():
            logits = ensemble(x.flatten(0, -2), members, dropout=dropout, frozen=frozen)
        return self._decoded(logits).unflatten(1, x.shape[:-1])

    def _decoded(self, logits: Tensor) -> Tensor:
        """Expectation in symlog space, then symexp. `[..., K]` → `[...]`"""
        return symexp(TwoHot(logits, self.bins).mean)

    def _joined(
        self, latent: Tensor, task: Tensor | None, action: Tensor | None = None, *, frozen_tasks: bool = False
    ) -> Tensor:
        """What the networks see: latent, embedding of the task, action."""
        parts = [latent]
        if task is not None and self.tasks is not None:
            embedding = self.tasks(task)
            parts.append(embedding.detach() if frozen_tasks else embedding)
        if action is not None:
            parts.append(action)
        return torch.cat(parts, -1) if len(parts) > 1 else latent

    # Helpers

    def _windows(self, batch: Batch) -> Windows:
        self._observations(batch.obs, leading=2)
        self._check_actions(batch.actions, *batch.rewards.shape)
        return windows(batch, self.config.horizon, multitask=self.tasks is not None)

    def _state(self, latent: Tensor, task: Tensor | None) -> State:
        return State({"latent": latent} if task is None else {"latent": latent, "task": task})

    def _task(self, task: Tensor | int, rows: int) -> Tensor | None:
        """Number of each row's task `[B]`, or None where there is only one."""
        if isinstance(task, int) and not 0 <= task < self.config.num_tasks:
            raise ConfigurationError(f"task is {task}, expected 0 to {self.config.num_tasks - 1}.")
        if self.tasks is None:
            return None
        return torch.as_tensor(task, dtype=torch.int64, device=self.device).expand(rows)

    def _discount(self, task: Tensor | None) -> Tensor | float:
        return self.config.discounts[0] if task is None or self.tasks is None else self.tasks.discounts[task]

    def _members(self) -> Tensor:
        """Two different value networks, or the one that there is. `[m]`"""
        count = self.config.num_q_networks
        return torch.rand(count, device=self.device).topk(min(_SAMPLED_MEMBERS, count)).indices

    def _shifts(self, *shape: int) -> Tensor:
        return torch.randint(0, 2 * MAX_SHIFT + 1, (*shape, 2), device=self.device)

    def _dropout(self, members: int, rows: int) -> Tensor | None:
        rate = self.config.dropout
        if not self.training or rate == 0.0:
            return None
        kept = torch.rand(members, rows, self.config.mlp_dim, device=self.device) >= rate
        return kept / (1.0 - rate)


def _trainable(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]
