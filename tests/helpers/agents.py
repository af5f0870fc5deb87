"""Small agents, and what tests observe of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import torch
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

from helpers.envs import CountingEnv
from helpers.recorded import assert_belongs_together
from worldflux.agents import WorldFluxAgent
from worldflux.training import Batch

TINY = dict(deter_dim=32, hidden_dim=8, stoch_discrete=4, stoch_classes=4, units=8, cnn_depth=2, imagination_horizon=3)
SETTINGS: dict[str, Any] = dict(
    batch_size=2, seq_len=6, train_ratio=6, buffer_size=500, learning_starts=10, device="cpu", seed=0, model_kwargs=TINY
)
TINY_TDMPC2 = dict(latent_dim=16, hidden_dim=16, mlp_dim=16, enc_dim=16, num_q_networks=2, num_channels=2)
PLAN = dict(num_samples=16, num_elites=4, num_pi_trajs=4, iterations=2)
PLANNING: dict[str, Any] = dict(
    batch_size=4,
    train_ratio=6,
    buffer_size=200,
    learning_starts=20,
    device="cpu",
    seed=0,
    planner_kwargs=PLAN,
    model_kwargs=TINY_TDMPC2,
)


def make_agent(env: Any = "CartPole-v1", **settings: Any) -> WorldFluxAgent:
    """A small agent with DreamerV3."""
    return WorldFluxAgent("dreamerv3:tiny", env, **{**SETTINGS, **settings})


def make_planner(env: Any = "Pendulum-v1", model: Any = "tdmpc2:tiny", **settings: Any) -> WorldFluxAgent:
    """A small agent that plans, with TD-MPC2 or another model."""
    common = PLANNING if isinstance(model, str) else {**PLANNING, "model_kwargs": None}
    return WorldFluxAgent(model, env, **{**common, **settings})


def counting_envs(n_envs: int, **settings: Any) -> DummyVecEnv:
    """Monitored `CountingEnv`s, numbered by their first observation."""
    made: list[Callable[[], gym.Env[Any, Any]]] = [
        lambda i=i: Monitor(CountingEnv(env_id=i, **settings))
        for i in range(n_envs)  # type: ignore[misc]
    ]
    return DummyVecEnv(made)


def weights(agent: Any) -> torch.Tensor:
    """All numbers in the model of an agent or a trainer."""
    return torch.cat([tensor.flatten().double() for tensor in agent.model.state_dict().values()])


def rows_compared(agent: WorldFluxAgent, batch_size: int = 200, seq_len: int = 5) -> int:
    """Checks windows of an agent that acted in `CountingEnv`s; returns the number of compared pairs of rows."""
    assert agent.replay_buffer is not None
    return assert_belongs_together(agent.replay_buffer.sample(batch_size, seq_len))


def trained_on(agent: WorldFluxAgent) -> list[Batch]:
    """The batches of the gradient steps that the agent takes from now on."""
    batches: list[Batch] = []
    step = agent.trainer.step
    agent.trainer.step = lambda batch, *rest: (batches.append(batch), step(batch, *rest))[1]  # type: ignore[method-assign]
    return batches
