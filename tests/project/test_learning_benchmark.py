"""The learning curves of `benchmarks/learning.py`: what is run, measured and kept."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import learning
import pytest
import torch
from pixel_seek import PixelSeek
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.policies import ActorCriticCnnPolicy

from worldflux import WorldFluxAgent

SETTINGS: dict[str, Any] = {"train_ratio": 2, "batch_size": 2, "seq_len": 4, "learning_starts": 30}


@pytest.mark.parametrize("algorithm", [None, "DQN"])
def test_ours_and_sb3_learn_for_the_same_steps_and_are_evaluated_alike(
    algorithm: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = learning.Task("CartPole-v1", lambda: gym.make("CartPole-v1"), 140, 1e6, SETTINGS)
    monkeypatch.setattr(learning, "TASKS", {"cartpole": task})
    monkeypatch.setattr(learning, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    monkeypatch.setattr(sys, "argv", ["learning.py", "cartpole", *(["--algorithm", algorithm] if algorithm else [])])

    assert learning.main() == (algorithm is None)  # nothing is asked of the others

    (path,) = (tmp_path / "results").iterdir()
    assert path.name == ("cartpole_dqn.csv" if algorithm else "cartpole.csv")
    curve = learning.read(path)
    assert [seed for _, _, seed in curve] == [0] * len(curve)
    assert sum(score for _, score, _ in curve) == curve[-1][0] <= 140  # every step of CartPole earns 1
    result, again = learning.run("cartpole", 0, algorithm)
    assert [(step, score, 0) for step, score in again] == curve
    assert result["env_steps"] == 140 and result["algorithm"] == (algorithm or "dreamerv3:tiny")
    assert result["gradient_steps"] > 5 and 0 <= result["cpu_seconds"] and result["score"] >= result["worst_episode"]


def test_tasks_without_a_decoder_have_the_settings_of_those_with_one() -> None:
    for name in ("pixelseek", "dmc_cartpole_balance_pixels"):
        task, other = learning.TASKS[name], learning.TASKS[f"{name}_redundancy"]
        assert (other.steps, other.accepted, other.preset) == (task.steps, task.accepted, task.preset)
        fields = task.settings["model_kwargs"] | {"representation": "redundancy"}
        assert other.settings == task.settings | {"model_kwargs": fields}
        assert "representation" not in task.settings["model_kwargs"]
    agent = learning.algorithm_for(learning.TASKS["pixelseek_redundancy"], make_vec_env(PixelSeek), 0, None)
    assert isinstance(agent, WorldFluxAgent) and agent.model.decoder is None


def test_pictures_are_given_to_a_policy_that_sees_them() -> None:
    task = learning.Task("PixelSeek", PixelSeek, 20, None)
    agent = learning.algorithm_for(task, make_vec_env(PixelSeek), 0, "PPO")
    assert isinstance(agent, PPO) and isinstance(agent.policy, ActorCriticCnnPolicy)
    task = learning.Task("CartPole-v1", lambda: gym.make("CartPole-v1"), 20, None)
    assert isinstance(learning.algorithm_for(task, make_vec_env(task.make), 0, "DQN"), DQN)
