"""TD-MPC2: the latent model and its losses behind the common interface.

Source: "TD-MPC2: Scalable, Robust World Models for Continuous Control", arXiv:2310.16828, and its reference
implementation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldflux.accel import ranks
from worldflux.accel.overriding import overridden, steps_back
from worldflux.errors import TrainingError
from worldflux.models.base import (
    LossOutput,
    OnlineDefaults,
    OptimizerSpec,
    ParameterGroup,
    Phase,
    State,
    parameter_groups,
)
from worldflux.models.health import HealthMetric
from worldflux.models.mppi import SearchResult, search_step
from worldflux.models.tdmpc2.alignment import Windows, windows
from worldflux.models.tdmpc2.health import health_metrics
from worldflux.models.tdmpc2.latent_model import LatentModel
from worldflux.models.tdmpc2.losses import moved_scale, numbers_of, step_weights, termination_statistics, value_range
from worldflux.models.tdmpc2.parts import ModelDraws, ModelParts, PolicyDraws
from worldflux.models.tdmpc2.policy import CategoricalSample, alternatives, expected_value
from worldflux.nn.distributions import TwoHot
from worldflux.nn.fast.dropout import dropout_factors
from worldflux.nn.transforms import symlog
from worldflux.replay.batch import Batch


class TDMPC2(LatentModel):
    """TD-MPC2 agent: the latent model and its losses, which are optimised in two phases.

    The policy is trained after everything else, on the latents of the same step and with the updated value networks.
    """

    _functions: CompiledFunctions  # plain functions on the class, compiled functions on an instance

    def compile_functions(self) -> None:
        """Compiles the model's loss, the policy's values and a planning iteration with `torch.compile`, each fully.

        Compiled functions draw random numbers from the compiler's own generator. If a function is called with more
        shapes than the compiler keeps (eight), further shapes are not compiled.
        """
        self._functions = compiled_functions()

    def __getstate__(self) -> dict[str, Any]:
        """Returns the attributes without compiled functions; copies and pickles are not compiled."""
        return {name: value for name, value in vars(self).items() if name != "_functions"}

    @property
    def search_step(self) -> Callable[..., SearchResult]:
        """Function for one iteration of planning, compiled or not, which `Planner` calls."""
        return self._functions.search_step

    def loss(self, batch: Batch) -> LossOutput:
        """Computes the sum of the losses of model, policy and decoder, which the Trainer optimises one after the other.

        The policy's loss only trains the policy, the decoder's loss only the decoder, and the model's loss neither.
        """
        outputs: list[LossOutput] = []
        for phase in self._phases():
            outputs.append(phase.loss(batch, outputs))
        return LossOutput(
            torch.stack([output.loss for output in outputs]).sum(),
            {name: value for output in outputs for name, value in output.terms.items()},
            updates={name: value for output in outputs for name, value in output.updates.items()},
        )

    def phases(self) -> list[Phase]:
        """Returns the phases: first the model; then the policy, on the latents of the model's step and with the updated
        value networks; then the decoder, if there is one.

        If a subclass or the model itself overrides `loss`, there is a single phase with the gradient of that loss; all
        parameters keep their learning rates.
        """
        phases = self._phases()
        if steps_back("TD-MPC2's gradient step in phases", self, overridden(self, _LOSS)):
            groups = [group for phase in phases for group in parameter_groups(phase.parameters)]
            return [Phase("model", groups, lambda batch, previous: self.loss(batch))]
        model, *others = phases

        def model_loss(batch: Batch, previous: Sequence[LossOutput]) -> LossOutput:
            if overridden(self, _LOSS):
                raise TrainingError(
                    "The model's loss was replaced after its trainer was created, whose phases do not call it. Replace "
                    "the loss first, or subclass TDMPC2, and pass that model to the trainer or the agent."
                )
            return model.loss(batch, previous)

        return [replace(model, loss=model_loss), *others]

    def _phases(self) -> list[Phase]:
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
        policy = [ParameterGroup(_trainable(self.actor), eps=1e-5)]
        phases = [
            Phase("model", groups, lambda batch, previous: self._called("model_loss", batch)),
            Phase("policy", policy, lambda batch, previous: self.policy_loss(previous[0])),
        ]
        if self.decoder is not None:
            decoder = _trainable(self.decoder)
            phases.append(Phase("decoder", decoder, lambda batch, previous: self.decoder_loss(batch, previous[0])))
        return phases

    def _called(self, name: str, *arguments: Any) -> Any:
        """Calls one of the compiled functions, or the model's own method if it is overridden."""
        if overridden(self, getattr(CompiledFunctions(), name)):
            return getattr(self, name)(*arguments)
        return getattr(self._functions, name)(self, *arguments)

    def model_loss(self, batch: Batch, draws: ModelDraws | None = None) -> LossOutput:
        """Computes the loss of everything but the policy and the decoder; `draws` replaces the random draws."""
        w = self._windows(batch)
        parts = self.model_parts(w, draws)
        c = self.config
        weights = {"consistency": c.consistency_coef, "reward": c.reward_coef, "value": c.value_coef}
        total = torch.stack([weight * parts.losses[name] for name, weight in weights.items()]).sum()
        terms = {name: loss.detach() for name, loss in parts.losses.items()}
        updates: dict[str, Tensor] = {}
        if parts.termination_logits is not None and parts.termination_seen is not None:
            # The head is trained from the first termination on. Without any termination, the model learns as if it had
            # no such head. The reference trains the head from the start if it is told that episodes terminate, and
            # otherwise stops with an error at a termination.
            total = total + c.termination_coef * parts.termination_seen * parts.losses["termination"]
            probability = torch.sigmoid(parts.termination_logits.detach()[:, -1])
            ends = torch.stack([probability, w.terminated[:, -1], w.steps[:, -1]], 1)
            rate, score = termination_statistics(*ranks.gathered(ends).unbind(1))
            terms |= {"termination_rate": rate, "termination_f1": score}
            updates["termination_seen"] = parts.termination_seen
        carry = {"latents": parts.latents.detach(), "states": w.states}
        if w.task is not None:
            carry["task"] = w.task
        return LossOutput(total, terms, updates=updates, carry=carry)

    def model_parts(self, w: Windows, draws: ModelDraws | None = None) -> ModelParts:
        """Computes the losses of the model on windows, and returns them with the quantities they were computed from."""
        N, H = w.rewards.shape
        if draws is None:
            draws = self.model_draws(N, H)
        tasks = None if w.task is None else w.task.unsqueeze(1).expand(N, H)
        # Outside of the following autocast, which could reuse weights cast without gradient where gradients are needed.
        next_latents, targets = self._targets(w, tasks, draws)
        with self._autocast():
            # Latents: open loop from the first observation, with gradients through all steps
            first = {key: value[:, 0] for key, value in w.obs.items()}
            latents = [self._encode(first, w.task, None if draws.shift is None else draws.shift[:, 0])]
            for action in w.actions.unbind(1):
                latents.append(self._next(latents[-1], action, w.task))
            rolled = torch.stack(latents, 1)  # [N, H+1, L]
            # Predictions
            inputs = [part.flatten(0, 1) for part in self._inputs(rolled[:, :-1], tasks, w.actions)]
            reward_logits = self.reward_head(*inputs).unflatten(0, (N, H))
            value_logits = self.critics(*inputs, dropout=draws.dropout).unflatten(1, (N, H))
            ends = None if self.termination_head is None else self._termination_logits(rolled[:, 1:], tasks)
        # Losses
        rho = self.config.rho
        consistency = (rolled[:, 1:].float() - next_latents).square().mean(-1)  # [N, H]
        reward_loss = TwoHot(reward_logits, self.bins).loss(symlog(w.rewards))
        value_loss = TwoHot(value_logits, self.bins).loss(symlog(targets).expand(len(value_logits), N, H)).mean(0)
        steps, arrived, known = numbers_of(w.steps, w.arrived, w.targets)
        weights = step_weights(w.steps, rho, steps)
        losses = {
            "consistency": (step_weights(w.arrived, rho, arrived) * consistency).sum(),
            "reward": (weights * reward_loss).sum(),
            "value": (step_weights(w.targets, rho, known) * value_loss).sum(),
        }
        seen = None
        if ends is not None:
            error = F.binary_cross_entropy_with_logits(ends, w.terminated, reduction="none")
            losses["termination"] = (step_weights(w.steps, 1.0, steps) * error).sum()
            seen = torch.maximum(self.termination_seen, ranks.maximum((w.terminated * w.steps).amax()))
        return ModelParts(losses, rolled, next_latents, targets, reward_logits, value_logits, ends, seen)

    @torch.no_grad()
    def _targets(self, w: Windows, tasks: Tensor | None, draws: ModelDraws) -> tuple[Tensor, Tensor]:
        """Computes the latents of the observations after each step `[N, H, L]`, and the value targets `[N, H]`."""
        N, H = w.rewards.shape
        after = {key: value[:, 1:].flatten(0, 1) for key, value in w.obs.items()}
        flat_tasks = None if tasks is None else tasks.flatten()
        shift = None if draws.shift is None else draws.shift[:, 1:].flatten(0, 1)
        latents = self._encode(after, flat_tasks, shift).unflatten(0, (N, H))
        action = self._policy(latents, tasks, draws.noise).action
        future = self._q(self.target_critics, self._inputs(latents, tasks, action), draws.members).amin(0)
        return latents.float(), w.rewards + self._discount(tasks) * (1.0 - w.terminated) * future

    def policy_loss(self, model: LossOutput, draws: PolicyDraws | None = None) -> LossOutput:
        """Computes the loss of the policy on the latents of the model's loss; its gradient only reaches the policy.

        Args:
            model: Result of `model_loss`.
            draws: Random draws to use instead of drawing them.
        """
        latents, states = model.carry["latents"], model.carry["states"]
        N, T = states.shape
        if draws is None:
            draws = self.policy_draws(N, T)
        tasks = model.carry["task"].unsqueeze(1).expand(N, T) if "task" in model.carry else None
        value, scaled_entropy, entropy = self._called("policy_values", latents, tasks, draws)
        # The scale is updated with the values of the first states, and the updated scale is used.
        spread = value_range(value[:, 0], states[:, 0])
        scale = moved_scale(self.value_scale, spread, self.config.tau)
        gain = self.config.entropy_coef * scaled_entropy + value / scale
        (number,) = numbers_of(states)
        loss = -(step_weights(states, self.config.rho, number) * gain).sum()
        even = step_weights(states, 1.0, number)
        terms = {
            "policy": loss.detach(),
            "policy_entropy": (even * entropy.detach()).sum(),
            "policy_scaled_entropy": (even * scaled_entropy.detach()).sum(),
            "value_scale": scale,
        }
        return LossOutput(loss, terms, updates={"value_scale": scale})

    def policy_values(self, latents: Tensor, tasks: Tensor | None, draws: PolicyDraws) -> tuple[Tensor, Tensor, Tensor]:
        """Computes the values of the policy's actions, its scaled entropy and its entropy, `[N, T]` each.

        Args:
            latents: Latent states. `[N, T, L]`
            tasks: Index of the task of each state; None for a single task. `[N, T]`
            draws: Random draws.
        """
        with self._autocast():
            sample = self._policy(latents, tasks, draws.noise, frozen_tasks=True)
            if isinstance(sample, CategoricalSample):
                values = self._alternative_values(latents, tasks, sample.action, draws)
                parts = len(self.config.action_classes)
                return expected_value(values, sample.probs, parts), sample.scaled_entropy, sample.entropy
            inputs = self._inputs(latents, tasks, sample.action, frozen_tasks=True)
            value = self._q(self.critics, inputs, draws.members, dropout=draws.dropout, frozen=True).mean(0)
        return value, sample.scaled_entropy, sample.entropy

    @torch.no_grad()
    def _alternative_values(self, latents: Tensor, tasks: Tensor | None, actions: Tensor, draws: PolicyDraws) -> Tensor:
        """Computes the values of all `alternatives` to discrete actions `[N, T, A]`. `[N, T, A]`"""
        others = alternatives(actions, self.config.action_classes)  # [A, N, T, A]
        dropout = None if draws.dropout is None else draws.dropout.repeat(1, len(others), 1)  # the same for all
        inputs = self._inputs(latents, tasks, others)
        return self._q(self.critics, inputs, draws.members, dropout=dropout).mean(0).movedim(0, -1)

    def decoder_loss(self, batch: Batch, model: LossOutput) -> LossOutput:
        """Computes the loss of decoding the observations from the latents of the model's loss."""
        assert self.decoder is not None
        w = self._windows(batch)
        obs = {key: value.flatten(0, 1) for key, value in w.obs.items()}
        with self._autocast():
            predicted = self.decoder(model.carry["latents"].flatten(0, 1))
        error = self.decoder.losses(predicted, obs).unflatten(0, w.states.shape)
        loss = (step_weights(w.states, 1.0, *numbers_of(w.states)) * error).sum()
        return LossOutput(loss, {"reconstruction": loss.detach()})

    @torch.no_grad()
    def health(self, batch: Batch) -> tuple[HealthMetric, ...]:
        """Measures the health metrics of TD-MPC2 on a batch; `models/tdmpc2/health.py` explains the thresholds.

        - `saturated_groups`, bad above 0.25: fraction of the encodings' SimNorm groups that are one-hot.
        - `constant_latents`, bad above 0.5: fraction of the SimNorm groups that are constant over the batch.
        - `value_over_rewards`, bad above 1: the targets of the values (95th percentile of their magnitudes) or the
          running scale, whichever is larger, divided by the return of earning the batch's largest reward in every step
          forever, or with a discount of 1, for a full episode.
        - `values_at_edge`, bad above 0.05: fraction of the values' targets at the edge of the bins or beyond.
        - `policy_randomness`, bad below 0.01: log-std of the policy, or entropy for discrete actions, rescaled from the
          smallest possible (0) to the largest (1).
        """
        w = self._windows(batch)
        parts = self.model_parts(w)
        N, T = w.states.shape
        tasks = None if w.task is None else w.task.unsqueeze(1).expand(N, T)
        policy = self._policy(parts.latents, tasks, self._noise(N, T, self.config.action_dim))
        return health_metrics(
            w,
            parts,
            self.config,
            discount=self._discount(None if tasks is None else tasks[:, 1:]),
            value_scale=self.value_scale,
            policy=policy,
            action_mask=None if tasks is None or self.tasks is None else self.tasks.action_masks[tasks],
        )

    def model_draws(self, windows: int, steps: int) -> ModelDraws:
        """Draws the random numbers of the model's loss for windows of `steps` steps; dropout only in training mode."""
        return ModelDraws(
            noise=self._noise(windows, steps, self.config.action_dim),
            members=self._members(),
            dropout=self._dropout(self.config.num_q_networks, windows * steps),
            shift=self._shifts(windows, steps + 1) if self.encoder.image_keys else None,
        )

    def policy_draws(self, windows: int, states: int) -> PolicyDraws:
        """Draws the random numbers of the policy's loss for `windows` windows of `states` states."""
        members = self._members()
        return PolicyDraws(
            noise=self._noise(windows, states, self.config.action_dim),
            members=members,
            dropout=self._dropout(len(members), windows * states),
        )

    @property
    def optimizer_spec(self) -> OptimizerSpec:
        """Adam, as in arXiv:2310.16828. `phases` sets different values for the encoder's rate and the policy's eps."""
        return OptimizerSpec(kind="adam", learning_rate=self.config.learning_rate, grad_clip=self.config.grad_clip)

    @torch.no_grad()
    def after_step(self, outputs: Sequence[LossOutput]) -> None:
        """Updates the value scale and moves the target networks towards the value networks."""
        super().after_step(outputs)
        if self.tasks is not None:
            self.tasks.renormalize()
        targets: list[Tensor] = list(self.target_critics.parameters())
        online: list[Tensor] = list(self.critics.parameters())
        torch._foreach_lerp_(targets, online, self.config.tau)

    # Replay and acting

    def online_defaults(self) -> OnlineDefaults:
        """Returns the reference's settings: random actions at first, then one gradient step on 256 windows per step.

        The random actions last for five episodes, but at least 1000 steps, and are followed by as many gradient steps.
        """
        rows = self.config.horizon + 1
        return OnlineDefaults(
            train_ratio=None,
            batch_size=256,
            seq_len=rows,
            buffer_size=1_000_000,
            learning_starts=max(1000, 5 * self.config.episode_length),
            random_start=True,
            min_seq_len=rows,
            planner="mppi",
        )

    def replay_extras(self) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
        """Returns the format of the task index that is stored with each row if there are several tasks."""
        return {} if self.tasks is None else {"task": ((), np.dtype(np.int64))}

    def extras_from_state(self, state: State) -> dict[str, Tensor]:
        """Returns the values of `replay_extras` for a state, `[B, ...]` each."""
        return {} if self.tasks is None else {"task": state["task"]}

    # Helpers

    def _windows(self, batch: Batch) -> Windows:
        self._observations(batch.obs, leading=2)
        self._check_actions(batch.actions, *batch.rewards.shape)
        return windows(batch, self.config.horizon, multitask=self.tasks is not None)

    def _dropout(self, members: int, rows: int) -> Tensor | None:
        rate = self.config.dropout
        if not self.training or rate == 0.0:
            return None
        return dropout_factors((members, rows, self.config.mlp_dim), rate, self.device)


class CompiledFunctions(NamedTuple):
    """TD-MPC2's functions that `compile_functions` compiles."""

    model_loss: Callable[..., LossOutput] = TDMPC2.model_loss
    # The division by the running scale is not included: compiled for a CPU (torch 2.13), a division of these values by
    # a tensor with one element gave wrong gradients.
    policy_values: Callable[..., tuple[Tensor, Tensor, Tensor]] = TDMPC2.policy_values
    search_step: Callable[..., SearchResult] = search_step


TDMPC2._functions = CompiledFunctions()
_LOSS = TDMPC2.loss


@cache
def compiled_functions() -> CompiledFunctions:
    """Returns the compiled functions, which all models of this process share."""
    plain = CompiledFunctions()
    return CompiledFunctions(*(torch.compile(getattr(plain, name)) for name in plain._fields))


def _trainable(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]
