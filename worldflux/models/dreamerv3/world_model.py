"""DreamerV3: world model, actor and critic behind the common interface.

Source: "Mastering Diverse Domains through World Models", arXiv:2301.04104, and its reference implementation.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from worldflux.accel import ranks
from worldflux.config import DreamerV3Config
from worldflux.errors import ShapeMismatchError
from worldflux.models.base import LossOutput, OnlineDefaults, OptimizerSpec, State, Trajectory, WorldModel
from worldflux.models.dreamerv3.alignment import ArrivalRows, arrival_rows
from worldflux.models.dreamerv3.behavior import (
    ReturnNorm,
    imagination_losses,
    imagined_returns,
    imitation_loss,
    replay_critic_loss,
)
from worldflux.models.dreamerv3.encoder import Decoder, Encoder
from worldflux.models.dreamerv3.heads import Actor, ContinueHead, TwoHotHead, give_by_stacks
from worldflux.models.dreamerv3.health import health_metrics
from worldflux.models.dreamerv3.parts import Draws, LossParts
from worldflux.models.dreamerv3.representation import redundancy_of_batch
from worldflux.models.dreamerv3.rollout import roll_out
from worldflux.models.dreamerv3.rssm import RSSM, kl_losses
from worldflux.models.health import HealthMetric
from worldflux.nn.layers import PORTION, Linear, in_portions, stacked_mlps
from worldflux.replay.batch import Batch, Observation


class DreamerV3(WorldModel):
    """Networks and losses of the DreamerV3 agent.

    States consist of `deter` `[B, D]`, `stoch` `[B, S, C]` (one-hot) and `logits` `[B, S, C]`.
    """

    config_class: ClassVar[type[DreamerV3Config]] = DreamerV3Config
    config: DreamerV3Config
    return_low: Tensor
    return_high: Tensor

    def __init__(self, config: DreamerV3Config) -> None:
        super().__init__(config)
        c = config
        self.encoder = Encoder(c)
        self.rssm = RSSM(
            deter_dim=c.deter_dim,
            hidden_dim=c.hidden_dim,
            groups=c.stoch_discrete,
            classes=c.stoch_classes,
            blocks=c.blocks,
            unimix=c.unimix,
            action_dim=c.action_dim,
            embed_dim=self.encoder.out_features,
        )
        feat_dim = c.deter_dim + c.stoch_discrete * c.stoch_classes
        self.decoder = Decoder(c) if c.representation == "reconstruction" else None
        self.projector = None if self.decoder else Linear(feat_dim, self.encoder.out_features, bias=False)
        self.reward_head = TwoHotHead(feat_dim, c.units, c.reward_layers, c.bins)
        self.continue_head = ContinueHead(feat_dim, c.units, c.continue_layers)
        self.actor = Actor(feat_dim, c.units, c.actor_layers, c.action_dim, c.action_classes)
        self.critic = TwoHotHead(feat_dim, c.units, c.critic_layers, c.bins)
        self.slow_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.register_buffer("return_low", torch.zeros(()))
        self.register_buffer("return_high", torch.zeros(()))

    @property
    def discount(self) -> float:
        """Discount per step, `1 - 1 / discount_horizon`."""
        return 1.0 - 1.0 / self.config.discount_horizon

    # States

    def initial_state(self, batch_size: int) -> State:
        """Returns the zero state, from which every episode starts."""
        deter, stoch = self.rssm.initial(batch_size)
        return State({"deter": deter, "stoch": stoch, "logits": torch.zeros_like(stoch)})

    def encode(self, obs: Observation, *, deterministic: bool = False) -> State:
        """Returns the state after the first observation of an episode `[B, ...]`."""
        batch = next(iter(self._observations(obs, leading=1).values())).shape[0]
        action = torch.zeros(batch, self.config.action_dim, device=self.device)
        is_first = torch.ones(batch, dtype=torch.bool, device=self.device)
        return self.update(self.initial_state(batch), action, obs, is_first=is_first, deterministic=deterministic)

    def update(
        self,
        state: State,
        action: Tensor,
        obs: Observation,
        *,
        is_first: Tensor | None = None,
        deterministic: bool = False,
    ) -> State:
        """Returns the state after an action `[B, A]` and the resulting observation; see `WorldModel.update`."""
        deter, stoch = state["deter"], state["stoch"]
        tensors = self._observations(obs, leading=1, rows=len(deter))
        self._check_actions(action, len(deter))
        if is_first is not None:
            if is_first.shape != deter.shape[:1]:
                raise ShapeMismatchError(f"is_first has shape {list(is_first.shape)}, expected [{len(deter)}].")
            first = is_first.bool().unsqueeze(-1)  # the states of these rows are ignored, even NaN
            deter, stoch, action = (
                deter.masked_fill(first, 0.0),
                stoch.masked_fill(first.unsqueeze(-1), 0.0),
                action.masked_fill(first, 0.0),
            )
        with self._autocast():
            deter = self.rssm.core(deter, stoch, action.float())
            logits = self.rssm.posterior(deter, self.encoder(tensors))
        return self._state(deter, logits, deterministic)

    def transition(self, state: State, action: Tensor, *, deterministic: bool = False) -> State:
        """Returns the state that the model predicts after an action `[B, A]`."""
        self._check_actions(action, len(state["deter"]))
        with self._autocast():
            deter = self.rssm.core(state["deter"], state["stoch"], action.float())
            logits = self.rssm.prior(deter)
        return self._state(deter, logits, deterministic)

    def decode(self, state: State) -> dict[str, Any]:
        """Returns predictions for a state.

        Returns:
            `"obs"` (with a decoder): observation in its own structure, with images as floats in [0, 1]; `"reward"`:
            reward on arriving at the state `[B]`; `"continue"`: probability that the episode continues there, without
            the discount `[B]`.
        """
        found: dict[str, Any] = {}
        with self._autocast():
            if self.decoder is not None:
                obs = self.decoder.observations(self.decoder(state["deter"], state["stoch"].flatten(-2)))
                found["obs"] = obs if isinstance(self.config.obs_shape, dict) else obs["obs"]
            reward, cont = self._reward_and_continue(self.features(state))
        return {**found, "reward": reward, "continue": (cont / self.discount).clamp(max=1.0)}

    def rollout(self, state: State, actions: Tensor, *, deterministic: bool = False) -> Trajectory:
        """Predicts the results of a sequence of at least one action `[H, B, A]` open loop."""
        if actions.ndim != 3 or len(actions) == 0:
            raise ShapeMismatchError(
                f"actions have shape {list(actions.shape)}, expected [H, B, A] with H of at least 1."
            )
        states = []
        for action in actions:
            state = self.transition(state, action, deterministic=deterministic)
            states.append(state)
        return self._trajectory(states)

    def policy(self, state: State, deterministic: bool = False) -> Tensor:
        """Returns actions of the actor `[B, A]`. Samples of continuous actions may lie outside [-1, 1] and
        are clipped before they reach the environment.
        """
        with self._autocast():
            dist = self.actor(self.features(state))
        return dist.mode if deterministic else dist.sample()

    def value(self, state: State) -> Tensor:
        """Returns the critic's estimate of the return, discounted by `discount` per step. `[B]`"""
        with self._autocast():
            return self.critic(self.features(state)).mean

    def features(self, state: State) -> Tensor:
        """Returns the input of the heads, `[deter, flat(stoch)]`. `[..., F]`"""
        return _features(state["deter"], state["stoch"])

    # Learning

    def loss(self, batch: Batch) -> LossOutput:
        """Computes the losses of the world model, the actor and the critic on replayed windows.

        If the extras of the batch contain the latents of its rows (`replay_extras`), the first row of each window is
        context: its latents initialise the recurrence, and the other rows are trained. Otherwise all rows are trained,
        starting from the initial state.
        """
        return self._reduce(self.loss_parts(batch))

    def loss_parts(self, batch: Batch, draws: Draws | None = None) -> LossParts:
        """Computes all losses before averaging; `draws` replaces the random draws."""
        self._observations(batch.obs, leading=2)
        self._check_actions(batch.actions, *batch.rewards.shape)
        has_context = "deter" in batch.extras
        rows = arrival_rows(batch, has_context=has_context)
        deter, stoch = self._context(batch) if has_context else self.rssm.initial(batch.batch_size)
        with self._autocast():
            return self._loss_parts(rows, deter, stoch, draws)

    def _loss_parts(self, rows: ArrivalRows, deter: Tensor, stoch: Tensor, draws: Draws | None) -> LossParts:
        c = self.config
        B, T = rows.is_first.shape
        K = min(c.imag_last or T, T)  # number of steps from which imagination starts

        # World model
        flat_obs = {k: v.flatten(0, 1) for k, v in rows.obs.items()}
        embed = self.encoder(flat_obs).unflatten(0, (B, T))
        seen = rows.obs_mask
        observed = self.rssm.observe(
            deter,
            stoch,
            rows.prev_actions,
            embed,
            rows.is_first,
            obs_mask=seen,
            draws=None if draws is None else draws.stoch,
        )
        posterior, prior = self.rssm.dist(observed.logits), self.rssm.dist(self.rssm.prior(observed.deter))
        dynamics, representation, kl = kl_losses(posterior, prior, c.kl_free)
        feat = _features(observed.deter, observed.stoch)  # [B, T, F]
        reconstruction: dict[str, Tensor] = {}
        if self.decoder is not None:
            predictions = self.decoder(observed.deter.flatten(0, 1), observed.stoch.flatten(0, 1).flatten(1))
            reconstruction = {k: v.unflatten(0, (B, T)) for k, v in self.decoder.losses(predictions, flat_obs).items()}
            if seen is not None:
                reconstruction = {k: torch.where(seen, v, 0.0) for k, v in reconstruction.items()}
            represented = torch.stack(list(reconstruction.values())).sum(0)
        else:
            assert self.projector is not None
            projected, counted = self.projector(feat).flatten(0, 1), None if seen is None else seen.flatten()
            represented = redundancy_of_batch(projected, embed.flatten(0, 1), counted)
        known = rows.arrival_known
        target = (1.0 - rows.is_terminal) * self.discount
        cont_loss = F.binary_cross_entropy_with_logits(self.continue_head(feat), target, reduction="none")

        # Behaviour: the losses of the policy and the value only reach the policy and the value
        with torch.no_grad():
            deter, stoch = observed.deter[:, -K:].flatten(0, 1), observed.stoch[:, -K:].flatten(0, 1)
            imagined = roll_out(self.rssm, self.actor, deter, stoch, c.imagination_horizon, draws)
            by_step = imagined.feat.transpose(0, 1)  # [H+1, N, F], the order in memory
            predicted = in_portions(self._predict, by_step.flatten(0, 1), size=PORTION).unflatten(0, by_step.shape[:2])
            reward, cont, slow_value = (x.t() for x in predicted.unbind(-1))
        # Some versions of torch would reuse weights that autocast cached without gradient where gradients are needed.
        torch.clear_autocast_cache()
        if give_by_stacks(self.critic, self.actor):
            critic_hidden, actor_hidden = stacked_mlps([self.critic.mlp, self.actor.mlp], by_step)
            critic = self.critic.output(critic_hidden).t()
            policy = self.actor.output(actor_hidden.transpose(0, 1))
        else:
            critic, policy = self.critic(imagined.feat), self.actor(imagined.feat)
        # Returns are bootstrapped from the critic itself; the slow critic only regularises it.
        with torch.no_grad():
            baseline = critic.mean
        returns, weight = imagined_returns(reward, cont, baseline, lam=c.lambda_)
        norm = ReturnNorm(self.return_low, self.return_high, c.return_norm_limit).update(returns, c.return_norm_rate)
        behavior = imagination_losses(
            returns=returns,
            weight=weight,
            baseline=baseline,
            critic=critic,
            slow_value=slow_value,
            policy=policy,
            actions=imagined.actions,
            norm=norm,
            entropy_scale=c.entropy_scale,
        )
        # The critic on replayed steps, bootstrapped from the imagined returns; this loss also trains the features
        replayed_critic = self.critic(feat[:, -K:])
        replay_critic, replay_returns = replay_critic_loss(
            rewards=rows.rewards[:, -K:],
            is_terminal=rows.is_terminal[:, -K:],
            is_last=rows.is_last[:, -K:],
            bootstrap=returns[:, 0].unflatten(0, (B, K)),
            critic=replayed_critic,
            slow_value=slow_value[:, 0].unflatten(0, (B, K)),
            discount=self.discount,
            lam=c.lambda_,
        )
        losses = {
            c.representation: represented,
            "reward": torch.where(known, self.reward_head(feat).loss(rows.rewards), 0.0),
            "continue": torch.where(known, cont_loss, 0.0),
            "dynamics": dynamics,
            "representation": representation,
            "actor": behavior.actor.mean(1).unflatten(0, (B, K)),
            "critic": behavior.critic.mean(1).unflatten(0, (B, K)),
            "replay_critic": replay_critic,
        }
        if c.loss_scales["imitation"]:
            losses["imitation"] = imitation_loss(
                policy=self.actor(feat[:, -K:-1].detach()),
                actions=rows.prev_actions[:, T - K + 1 :],
                returns=replay_returns,
                values=replayed_critic.mean[:, :-1].detach(),
                is_last=rows.is_last[:, -K:-1],
            )
        return LossParts(
            losses=losses,
            reconstruction=reconstruction,
            rows=rows,
            observed=observed,
            posterior=posterior,
            kl=kl,
            imagined=imagined,
            policy=policy,
            behavior=behavior,
            replay_returns=replay_returns,
        )

    def loss_scale(self, name: str) -> float:
        """Returns the weight of a loss; `kl_balance` divides that of the KL between the prior and the posterior."""
        scales, balance = self.config.loss_scales, self.config.kl_balance
        shares = {"dynamics": balance, "representation": 1.0 - balance}
        return scales["kl"] * shares[name] if name in shares else scales[name]

    def _reduce(self, parts: LossParts) -> LossOutput:
        """Averages the losses over all steps, computes their weighted sum, and adds metrics for the log."""
        # Averages exclude steps whose reward lies before the window or whose observation was not recorded.
        known, mask = parts.rows.arrival_known.float().mean(), parts.rows.obs_mask
        seen = None if mask is None else mask.float().mean()
        if ranks.is_reducing():  # these shares are those of the whole batch
            known, seen = ranks.mean(torch.stack([known, torch.ones_like(known) if seen is None else seen])).unbind()
        known = known.clamp(min=1e-8)
        share = {"reward": known, "continue": known}
        if seen is not None:
            share["reconstruction"] = seen.clamp(min=1e-8)
        # A window of a single step has no replayed transition for the critic, whose loss is then 0.
        means = {
            name: (loss.mean() if loss.numel() else loss.sum()) / share.get(name, 1.0)
            for name, loss in parts.losses.items()
        }
        total = torch.stack([self.loss_scale(name) * mean for name, mean in means.items()]).sum()
        behavior = parts.behavior
        terms = {name: mean.detach() for name, mean in means.items()}
        if len(parts.reconstruction) > 1:
            terms |= {f"reconstruction/{k}": v.detach().mean() for k, v in parts.reconstruction.items()}
        terms |= {
            "kl": parts.kl.mean(),
            "policy_entropy": behavior.entropy.mean(),
            "imagined_return": behavior.returns.mean(),
            "return_scale": behavior.norm.scale,
            "advantage_magnitude": behavior.advantage.abs().mean(),
        }
        extras = self._extras(parts.observed.deter.detach(), parts.observed.stoch.detach())
        updates = {"return_low": behavior.norm.low, "return_high": behavior.norm.high}
        return LossOutput(total, terms, extras, updates)

    @torch.no_grad()
    def health(self, batch: Batch) -> tuple[HealthMetric, ...]:
        """Measures the health metrics of DreamerV3 on a batch; `models/dreamerv3/health.py` explains the thresholds.

        - `kl_at_free_nats`, bad above 0.8: fraction of steps whose latents carry no more than the free nats.
        - `unused_codes`, bad above 0.5: fraction of the latents' classes that no step uses.
        - `constant_latents`, bad above 0.5: fraction of the categorical latents that are constant over the batch.
        - `value_over_rewards`, bad above 1: the critic's imagined targets (95th percentile of their magnitudes) or the
          scale of returns, whichever is larger, divided by the return of earning the batch's largest reward in every
          step forever.
        - `values_at_edge`, bad above 0.05: fraction of the critic's targets at the edge of its bins or beyond; the
          larger one of imagined and replayed targets.
        - `policy_randomness`, bad below 0.001: entropy of the policy, rescaled from the lowest possible (0) to the
          highest (1).
        """
        return health_metrics(self.loss_parts(batch), self.config, self.critic.bins)

    def imagine(self, state: State, horizon: int) -> tuple[Trajectory, Tensor]:
        """Rolls out the policy in the model open loop.

        Args:
            state: Initial state. `[B, ...]`
            horizon: Number of steps H.

        Returns:
            The predicted trajectory, and the actions `[H, B, A]`.
        """
        states, actions = [], []
        for _ in range(horizon):
            actions.append(self.policy(state))
            state = self.transition(state, actions[-1])
            states.append(state)
        return self._trajectory(states), torch.stack(actions)

    def compile_functions(self) -> None:
        """Compiles the steps of the recurrence along replayed windows and in imagination."""
        self.rssm.functions = self.rssm.functions.compiled()

    @property
    def optimizer_spec(self) -> OptimizerSpec:
        """LaProp with adaptive gradient clipping, as in arXiv:2301.04104."""
        return OptimizerSpec(
            kind="laprop",
            learning_rate=self.config.learning_rate,
            betas=(0.9, 0.999),
            eps=1e-20,
            agc=self.config.grad_clip,
            warmup_steps=self.config.warmup_steps,
        )

    @torch.no_grad()
    def after_step(self, outputs: Sequence[LossOutput]) -> None:
        """Updates the return normaliser and moves the slow critic towards the critic."""
        super().after_step(outputs)
        slow: list[Tensor] = list(self.slow_critic.parameters())
        fast: list[Tensor] = list(self.critic.parameters())
        torch._foreach_lerp_(slow, fast, self.config.slow_critic_rate)

    # Replay and acting

    def online_defaults(self) -> OnlineDefaults:
        """Returns the reference's settings: train ratio 1024 for vectors and 256 for images, 16 windows of 64 steps.

        The configuration may have another ratio and length, as that of the preset `tiny` does.
        """
        ratio = self.config.train_ratio
        return OnlineDefaults(
            train_ratio=ratio if ratio is not None else 256.0 if self.encoder.layout.images else 1024.0,
            batch_size=16,
            seq_len=self.config.seq_len,
            buffer_size=1_000_000,
            learning_starts=None,
            fresh_windows=True,
        )

    def replay_extras(self) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
        """Returns the format of stored states: `deter` in half precision, `stoch` as classes from 1 (0: not stored)."""
        c = self.config
        classes = np.dtype(np.uint8 if c.stoch_classes < 256 else np.int32)
        return {"deter": ((c.deter_dim,), np.dtype(np.float16)), "stoch": ((c.stoch_discrete,), classes)}

    def extras_from_state(self, state: State) -> dict[str, Tensor]:
        """Returns the values of `replay_extras` for a state, `[B, ...]` each."""
        return self._extras(state["deter"], state["stoch"])

    def _extras(self, deter: Tensor, stoch: Tensor) -> dict[str, Tensor]:
        dtype = torch.uint8 if self.config.stoch_classes < 256 else torch.int32
        return {"deter": deter.to(torch.float16), "stoch": (stoch.argmax(-1) + 1).to(dtype)}

    def _context(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Returns the stored state of each window's first row. `[B, D]`, `[B, S, C]`"""
        deter = batch.extras["deter"][:, 0].float()
        # Class 0 is encoded and cut off, so that rows without a stored state get the zero vector.
        stoch = F.one_hot(batch.extras["stoch"][:, 0].long(), self.config.stoch_classes + 1)[..., 1:].float()
        return deter, stoch

    # Helpers

    def _state(self, deter: Tensor, logits: Tensor, deterministic: bool) -> State:
        dist = self.rssm.dist(logits)
        # Sampling also gives a class for NaN logits; adding them keeps the NaN visible in the state.
        stoch = torch.add(dist.mode if deterministic else dist.sample(), logits, alpha=0.0)
        return State({"deter": deter, "stoch": stoch, "logits": logits})

    def _trajectory(self, states: Sequence[State]) -> Trajectory:
        """Returns the predictions of the heads for the states after each action, with continuation undiscounted."""
        stacked = State.stack(states)
        with self._autocast():
            reward, cont = self._reward_and_continue(self.features(stacked))
        return Trajectory(stacked, reward, (cont / self.discount).clamp(max=1.0))

    def _predict(self, feat: Tensor) -> Tensor:
        """Predicts reward, continuation probability and the slow critic's value for features `[N, F]`. `[N, 3]`"""
        heads: tuple[Any, ...] = (self.reward_head, self.continue_head, self.slow_critic)
        if give_by_stacks(*heads):
            hidden = stacked_mlps([head.mlp for head in heads], feat)
            reward, cont, value = (head.output(x) for head, x in zip(heads, hidden, strict=True))
        else:
            reward, cont, value = (head(feat) for head in heads)
        return torch.stack([reward.mean, torch.sigmoid(cont), value.mean], -1)

    def _reward_and_continue(self, feat: Tensor) -> tuple[Tensor, Tensor]:
        """Predicts reward and (discounted) continuation probability for features `[..., F]`."""
        return self.reward_head(feat).mean, torch.sigmoid(self.continue_head(feat))


def _features(deter: Tensor, stoch: Tensor) -> Tensor:
    """Concatenates `[..., D]` and the flattened `[..., S, C]` to `[..., D + S * C]`."""
    return torch.cat([deter, stoch.flatten(-2)], -1)
