"""Learning is the proof: a known optimum in seconds, and real tasks in minutes (marked slow)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers.envs import Aim, Corridor
from learning import TASKS, run
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from worldflux import WorldFluxAgent

SMALL = dict(deter_dim=64, hidden_dim=32, units=32, stoch_discrete=8, stoch_classes=4, bins=31, imagination_horizon=5)


@pytest.fixture(autouse=True)
def one_thread():
    """Small layers gain nothing from more threads, and results then do not depend on the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def mean_return(agent: WorldFluxAgent, env: gym.Env, episodes: int = 10) -> float:
    env = Monitor(env)
    env.reset(seed=12345)
    return float(np.mean(evaluate_policy(agent, env, n_eval_episodes=episodes, deterministic=True)[0]))


def test_the_shortest_way_through_a_corridor_is_learned_in_seconds():
    agent = WorldFluxAgent(
        "dreamerv3:tiny",
        Corridor(),
        train_ratio=64,
        batch_size=8,
        seq_len=8,
        learning_starts=100,
        learning_rate=2e-3,
        model_kwargs=SMALL,
        seed=0,
    )
    agent.learn(400)
    assert mean_return(agent, Corridor()) == pytest.approx(Corridor.BEST)


def test_tdmpc2_learns_to_aim_in_seconds():
    agent = WorldFluxAgent(
        "tdmpc2:tiny",
        Aim(),
        batch_size=32,
        learning_starts=100,
        learning_rate=1e-3,
        planner_kwargs=dict(num_samples=32, num_elites=8, num_pi_trajs=4, iterations=3),
        model_kwargs=dict(latent_dim=32, hidden_dim=32, mlp_dim=32, enc_dim=32, num_q_networks=2),
        seed=0,
    )
    agent.learn(400)
    assert mean_return(agent, Aim()) > 0.8 * Aim.BEST


@pytest.mark.slow
def test_the_demo_learns_cartpole_and_draws_it(tmp_path):
    demo = Path(__file__).parent.parent.parent / "examples" / "demo.py"
    command = [sys.executable, str(demo), "--seed", "1", "--out", str(tmp_path)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    result = json.loads(output.splitlines()[-1])
    assert set(result) == {"env", "mean_return", "random_return", "env_steps", "seconds"}
    assert result["mean_return"] >= 400.0
    for name in ("agent.zip", "learning_curve.png", "imagination.png"):
        assert (tmp_path / name).stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.parametrize("task", [name for name, task in TASKS.items() if task.accepted is not None])
def test_real_tasks_are_learned_in_minutes(task):
    result, _ = run(task, seed=0)
    print(result)
    assert result["score"] >= result["accepted"]
