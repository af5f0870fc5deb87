"""TD-MPC2: the latent model behind the common interface, and how it learns.

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
from worldflux.models.tdmpc2.losses import moved_scale, step_weights, termination_statistics, value_range
from worldflux.models.tdmpc2.parts import ModelDraws, ModelParts, PolicyDraws
from worldflux.nn.distributions import TwoHot
from worldflux.nn.fast.dropout import dropout_factors
from worldflux.nn.transforms import symlog
from worldflux.replay.batch import Batch


class TDMPC2(LatentModel):
    """TD-MPC2: the latent model and how it learns, in two phases.

    The policy learns after everything else, on the latents of the same step and on the values that it left behind.
    """

    _functions: CompiledFunctions  # plain ones are the class's, compiled ones an instance's

    def compile_functions(self) -> None:
        """Compiles the model's loss, the policy's values and a step of planning with `torch.compile`, each as a whole.

        What they draw at random comes from the compiler's own stream. Where a compiled function meets more shapes than
        the compiler keeps (eight), further ones are computed plainly.
        """
        self._functions = compiled_functions()

    def __getstate__(self) -> dict[str, Any]:
        """Without what was compiled: copies and pickles compute plainly until they are asked to compile."""
        return {name: value for name, value in vars(self).items() if name != "_functions"}

    @property
    def search_step(self) -> Callable[..., SearchResult]:
        """An iteration of planning, compiled or not; `Planner` calls it."""
        return self._functions.search_step

    def loss(self, batch: Batch) -> LossOutput:
        """The losses of model, policy and decoder together; a step of the Trainer takes them one after the other.

        The policy's part trains the policy only, the decoder's the decoder only, and the model's none of the two.
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
        """Model first; then the policy, on the latents of the model's step and on the values that it left behind.

        Where a subclass or the model itself has a `loss` of its own, there is a single phase: the gradient of that
        loss, with everybody's rates as otherwise.
        """
        phases = self._phases()
        if steps_back("TD-MPC2's gradient step in phases", self, overridden(self, _LOSS)):
            groups = [group for phase in phases for group in parameter_groups(phase.parameters)]
            return [Phase("model", groups, lambda batch, previous: self.loss(batch))]
        model, *others = phases

        def model_loss(batch: Batch, previous: Sequence[LossOutput]) -> LossOutput:
            if overridden(self, _LOSS):
                raise TrainingError(
                    "The model was given another loss after its trainer was made, whose phases do not call it. Give it "
                    "its loss first, or derive a class from TDMPC2, and pass that model to the trainer or the agent."
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
        """One of the hot functions, as it was compiled, or the method that somebody put in its place."""
        if overridden(self, getattr(CompiledFunctions(), name)):
            return getattr(self, name)(*arguments)
        return getattr(self._functions, name)(self, *arguments)

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
            # such head. The reference trains it from the start where it is told that episodes terminate, and stops
            # with an error where it is not told.
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
        # Not within the same autocast: it may hand weights that it cast without gradient to what needs one.
        next_latents, targets = self._targets(w, tasks, draws)
        with self._autocast():
            # Latents, open loop from the first observation, with gradient all the way
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
        future = self._q(self.target_critics, self._inputs(latents, tasks, action), draws.members).amin(0)
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
        value, scaled_entropy, entropy = self._called("policy_values", latents, tasks, draws)
        # The scale follows the first states' values and is used as it is after that.
        spread = value_range(value[:, 0], states[:, 0])
        scale = moved_scale(self.value_scale, spread, self.config.tau)
        gain = self.config.entropy_coef * scaled_entropy + value / scale
        loss = -(step_weights(states, self.config.rho) * gain).sum()
        even = step_weights(states, 1.0)
        terms = {
            "policy": loss.detach(),
            "policy_entropy": (even * entropy.detach()).sum(),
            "policy_scaled_entropy": (even * scaled_entropy.detach()).sum(),
            "value_scale": scale,
        }
        return LossOutput(loss, terms, updates={"value_scale": scale})

    def policy_values(self, latents: Tensor, tasks: Tensor | None, draws: PolicyDraws) -> tuple[Tensor, Tensor, Tensor]:
        """Values of the policy's actions, its scaled entropy and its entropy. `[N, T]` each

        Args:
            latents: `[N, T, L]`
            tasks: `[N, T]`
            draws: Random draws.
        """
        with self._autocast():
            sample = self._policy(latents, tasks, draws.noise, frozen_tasks=True)
            inputs = self._inputs(latents, tasks, sample.action, frozen_tasks=True)
            value = self._q(self.critics, inputs, draws.members, dropout=draws.dropout, frozen=True).mean(0)
        return value, sample.scaled_entropy, sample.entropy

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

    @torch.no_grad()
    def health(self, batch: Batch) -> tuple[HealthMetric, ...]:
        """What TD-MPC2 dies of, measured on a batch; `models/tdmpc2/health.py` says where the thresholds come from.

        - `saturated_groups`, bad above 0.25: share of the encodings' SimNorm groups that are one-hot.
        - `constant_latents`, bad above 0.5: share of the SimNorm groups that do not vary over the batch.
        - `value_over_rewards`, bad above 1: the values' targets (95th percentile of their magnitudes) or the running
          scale, whichever is larger, over the batch's largest reward earned at every step for ever. Without a discount,
          "for ever" is a full episode.
        - `values_at_edge`, bad above 0.05: share of the values' targets that the bins can hardly express.
        - `policy_randomness`, bad below 0.01: log-std of the policy, from the least possible (0) to the largest (1).
        """
        w = self._windows(batch)
        parts = self.model_parts(w)
        N, T = w.states.shape
        tasks = None if w.task is None else w.task.unsqueeze(1).expand(N, T)
        policy = self._policy(parts.latents, tasks, torch.randn(N, T, self.config.action_dim, device=self.device))
        return health_metrics(
            w,
            parts,
            self.config,
            discount=self._discount(None if tasks is None else tasks[:, 1:]),
            value_scale=self.value_scale,
            log_std=policy.log_std,
            action_mask=None if tasks is None or self.tasks is None else self.tasks.action_masks[tasks],
        )

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
        """The number of the task beside each row, where there are several."""
        return {} if self.tasks is None else {"task": ((), np.dtype(np.int64))}

    def extras_from_state(self, state: State) -> dict[str, Tensor]:
        """What `replay_extras` stores for a state `[B, ...]`."""
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
    """TD-MPC2's hot functions."""

    model_loss: Callable[..., LossOutput] = TDMPC2.model_loss
    # Without the division by the running scale: compiled for a CPU (torch 2.13), a division by a tensor of one number
    # behind these values gave wrong gradients.
    policy_values: Callable[..., tuple[Tensor, Tensor, Tensor]] = TDMPC2.policy_values
    search_step: Callable[..., SearchResult] = search_step


TDMPC2._functions = CompiledFunctions()
_LOSS = TDMPC2.loss


@cache
def compiled_functions() -> CompiledFunctions:
    """All of them compiled, for every model of this process."""
    plain = CompiledFunctions()
    return CompiledFunctions(*(torch.compile(getattr(plain, name)) for name in plain._fields))


def _trainable(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]
