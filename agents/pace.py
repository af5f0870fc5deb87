"""How long learning takes: the time of environment steps and gradient steps, measured while they are taken."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from stable_baselines3.common.vec_env import VecEnv

from worldflux.accel.randomness import keeping_random_streams
from worldflux.agents.acting import Actor
from worldflux.agents.building import build_model, build_planner
from worldflux.agents.settings import AgentSettings
from worldflux.envs.spaces import ActionCodec, ObservationCodec
from worldflux.models.base import WorldModel
from worldflux.replay.batch import Batch
from worldflux.training.config import TrainingConfig
from worldflux.training.trainer import Trainer
from worldflux.validation import SINGLE_KEY, TASK_KEY

_ENOUGH = 3
"""Gradient steps to measure before an estimate, and seconds that they have to take in all."""
_MANY = 20
"""Gradient steps that are enough to measure however short they are."""


class MeanTime:
    """Mean seconds of something that happens repeatedly. The first time is left out: it compiles and fills caches."""

    def __init__(self) -> None:
        self.seconds, self.count = 0.0, -1

    def add(self, seconds: float) -> None:
        """Adds one more time."""
        self.count += 1
        if self.count:
            self.seconds += seconds

    @property
    def mean(self) -> float | None:
        """Mean seconds; None before the second time."""
        return self.seconds / self.count if self.count > 0 else None


class Pace:
    """The times that one call of `learn` has measured.

    Attributes:
        gradient_step: A gradient step.
        vec_step: A step of all environments with actions that the model has chosen, and everything around it but
            gradient steps.
        random_step: The same with random actions.
        acting: Seconds to choose actions once; None if this was not measured.
        meanwhile: Whether gradient steps are taken while other processes step the environments.
        beside: Whether they are taken on a thread of their own.
        training: Seconds in gradient steps, or of waiting for those of another thread.
    """

    def __init__(self, *, meanwhile: bool, beside: bool = False) -> None:
        self.gradient_step, self.vec_step, self.random_step = MeanTime(), MeanTime(), MeanTime()
        self.acting: float | None = None
        self.meanwhile = meanwhile
        self.beside = beside
        self.training = 0.0
        self._began = time.perf_counter()

    @property
    def elapsed(self) -> float:
        """Seconds since `learn` was called."""
        return time.perf_counter() - self._began

    def add_gradient_step(self, seconds: float) -> None:
        """Adds the time of a gradient step."""
        if not self.beside:
            self.training += seconds
        self.gradient_step.add(seconds)

    @property
    def is_measured(self) -> bool:
        """Whether enough gradient steps were measured for an estimate."""
        steps = self.gradient_step
        return steps.count >= _MANY or (steps.count >= _ENOUGH and steps.seconds >= 1)

    def remaining(self, vec_steps: float, gradient_steps: float) -> float | None:
        """Estimates the seconds for so many steps of the environments, and gradient steps.

        Returns:
            The seconds; None before they can be told.
        """
        update = self.gradient_step.mean if gradient_steps else 0.0
        if update is None:
            return None
        step = self.vec_step.mean
        if step is None:  # the random start goes on
            if self.acting is None or self.random_step.mean is None:
                return 0.0 + gradient_steps * update if not vec_steps else None
            waiting = self.random_step.mean
            if self.meanwhile:
                waiting = max(waiting - update * gradient_steps / max(vec_steps, 1), 0.0)
            step = self.acting + waiting
        if self.beside:
            return max(vec_steps * step, gradient_steps * update)
        return vec_steps * step + gradient_steps * update


def seconds_of(function: Callable[[], object]) -> float:
    """Measures the second of two calls."""
    function()
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


@dataclass(frozen=True)
class PresetCost:
    """What a preset with its default settings costs on this machine."""

    train_ratio: float
    """Replayed time steps per environment step."""
    gradient_steps: float
    """Gradient steps per environment step."""
    gradient_step: float
    """Seconds of a gradient step."""
    acting: float
    """Seconds to choose the actions of all environments once."""

    def seconds(self, env_steps: float, n_envs: int, waiting: float) -> float:
        """Estimates the seconds of learning.

        Args:
            env_steps: Environment steps, over all environments.
            n_envs: Number of environments.
            waiting: Seconds of a step of all environments without acting and gradient steps.
        """
        training = self.gradient_steps * self.gradient_step
        return env_steps * ((self.acting + waiting) / n_envs + training)


def measured_cost(
    preset: str, obs_codec: ObservationCodec, action_codec: ActionCodec, env: VecEnv, obs: Any, device: torch.device
) -> PresetCost:
    """Measures a preset on the spaces of an environment, with a model that is thrown away. No random stream moves.

    Args:
        preset: Name of the preset.
        obs_codec: Codec of the environment's observations.
        action_codec: Codec of the environment's actions.
        env: The environment, which is not stepped.
        obs: Observations of all environments, as they give them.
        device: Device to measure on.
    """
    with keeping_random_streams(device):
        model = build_model(preset, {}, obs_codec, action_codec, env=env, device=device)
        settings = AgentSettings().with_defaults(model, env.num_envs)
        batch_size, seq_len, ratio = settings.batch_size, settings.seq_len, settings.train_ratio
        assert batch_size and seq_len and ratio is not None and isinstance(settings.learning_rate, float)
        config = TrainingConfig(
            batch_size=batch_size,
            sequence_length=seq_len,
            learning_rate=settings.learning_rate,
            grad_clip=model.optimizer_spec.grad_clip or 0.0,
            warmup_steps=model.optimizer_spec.warmup_steps,
            device=str(device),
            compile=False,
        )
        trainer, batch = Trainer(model, config), _blank_batch(model, batch_size, seq_len)
        actor = Actor(model, obs_codec, action_codec, build_planner(model, settings.planner, None))
        return PresetCost(
            train_ratio=ratio,
            gradient_steps=ratio / (batch_size * seq_len),
            gradient_step=seconds_of(lambda: trainer.step(batch)),
            acting=seconds_of(lambda: actor.predict(obs, None, None, deterministic=True, task=0)),
        )


def _blank_batch(model: WorldModel, batch_size: int, seq_len: int) -> Batch:
    """A batch of zeros, which takes as long as any other."""
    shapes, lead = model.config.obs_shapes, (batch_size, seq_len)
    obs = {
        key: torch.zeros(*lead, *shape, dtype=torch.uint8 if len(shape) == 3 else torch.float32)
        for key, shape in shapes.items()
    }
    return Batch(
        obs=obs if isinstance(model.config.obs_shape, dict) else obs[SINGLE_KEY],
        actions=torch.zeros(*lead, model.config.action_dim),
        rewards=torch.zeros(lead),
        terminations=torch.zeros(lead, dtype=torch.bool),
        extras={name: torch.zeros(lead, dtype=torch.int64) for name in model.replay_extras() if name == TASK_KEY},
    )
