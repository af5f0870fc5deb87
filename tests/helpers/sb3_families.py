"""Tiny agents of both families and an environment with any spaces, to test the interface of SB3."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

from worldflux.agents import WorldFluxAgent

FAMILIES: dict[str, dict[str, Any]] = {
    "dreamerv3": dict(
        batch_size=2,
        seq_len=4,
        train_ratio=2,
        model_kwargs=dict(
            deter_dim=16, hidden_dim=8, stoch_discrete=2, stoch_classes=4, units=8, cnn_depth=2, bins=15, blocks=2,
            encoder_layers=1, decoder_layers=1, actor_layers=1, critic_layers=1, imagination_horizon=2, warmup_steps=0,
        ),
    ),
    "tdmpc2": dict(
        batch_size=2,
        train_ratio=2,
        planner_kwargs=dict(num_samples=8, num_elites=2, num_pi_trajs=2, iterations=1),
        model_kwargs=dict(latent_dim=8, hidden_dim=8, mlp_dim=8, enc_dim=8, num_q_networks=2, num_channels=2),
    ),
}  # fmt: skip
"""Settings by family with which a gradient step takes milliseconds."""

both = pytest.mark.parametrize("family", FAMILIES)

NUMBERS = spaces.Box(-1, 1, (3,), np.float32)
IMAGE = spaces.Box(0, 255, (48, 48, 3), np.uint8)
OBSERVATIONS: dict[str, spaces.Space[Any]] = {
    "box": NUMBERS,
    "box of two axes": spaces.Box(-1, 1, (2, 3), np.float64),
    "discrete": spaces.Discrete(3),
    "multidiscrete": spaces.MultiDiscrete([3, 2]),
    "multibinary": spaces.MultiBinary(3),
    "image": IMAGE,
    "channel-first image": spaces.Box(0, 255, (3, 48, 48), np.uint8),
    "dict": spaces.Dict({"image": IMAGE, "numbers": NUMBERS, "choice": spaces.Discrete(3)}),
}
BOX = spaces.Box(-2, 2, (2,), np.float32)
DISCRETE_ACTIONS: dict[str, spaces.Space[Any]] = {
    "discrete": spaces.Discrete(3),
    "multidiscrete": spaces.MultiDiscrete([3, 2]),
    "multibinary": spaces.MultiBinary(2),
}
LENGTH = 5


class AnySpaces(gym.Env[Any, Any]):
    """Shows random observations in episodes of `LENGTH` steps, each with a reward of 1; the info reports success.

    Args:
        observation_space: Of what it shows.
        action_space: Of what it takes; anything else is an error.
        terminates: Whether episodes end by themselves or because time is up.
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any] = NUMBERS,
        action_space: spaces.Space[Any] = BOX,
        terminates: bool = False,
    ) -> None:
        self.observation_space, self.action_space = observation_space, action_space
        self.terminates = terminates

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.t = 0
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action), f"{action!r} is not in {self.action_space}"
        self.t += 1
        over = self.t == LENGTH
        info = {"is_success": True} if over else {}
        return self.observation_space.sample(), 1.0, over and self.terminates, over and not self.terminates, info


def make(family: str, env: Any = None, **settings: Any) -> WorldFluxAgent:
    """An agent with a tiny model; its training begins after 8 steps."""
    shared = dict(buffer_size=300, learning_starts=8, device="cpu", seed=0)
    env = Monitor(AnySpaces()) if env is None else env
    return WorldFluxAgent(f"{family}:tiny", env, **{**FAMILIES[family], **shared, **settings})


def copies(n_envs: int, *spaces_of: Any) -> DummyVecEnv:
    """Monitored environments side by side."""
    made: list[Callable[[], gym.Env[Any, Any]]] = [lambda: Monitor(AnySpaces(*spaces_of)) for _ in range(n_envs)]
    return DummyVecEnv(made)
