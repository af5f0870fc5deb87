"""Trains PPO in a world that DreamerV3 has learned, and evaluates it in the real one.

    python examples/imagined_training.py --seeds 0 1 2

DreamerV3 learns CartPole for some steps. PPO of stable-baselines3 then trains in its model alone, in episodes that
begin at recorded steps, and never sees the real environment before it is evaluated. For comparison, PPO also trains in
the real environment for as many steps as DreamerV3 had.

Prints a line of JSON for each seed with mean returns over 20 episodes with deterministic actions: of PPO that trained
in the model (`imagined`), of PPO that trained in the real environment (`real`), and of DreamerV3 (`dreamerv3`).
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any

import torch
import tyro
from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecMonitor

from worldflux import WorldFluxAgent
from worldflux.envs import ImaginedVecEnv, make_vec_env

ENV = "CartPole-v1"


@dataclass(frozen=True)
class Options:
    """Budgets of the example."""

    seeds: tuple[int, ...] = (0,)
    """Seeds, each of which is a run of its own."""
    steps: int = 3_000
    """Steps in the real environment."""
    imagined_steps: int = 300_000
    """Steps of PPO in the model."""
    n_envs: int = 32
    """Episodes that are imagined together."""
    horizon: int = 100
    """Length at which imagined episodes are truncated."""


def score(policy: Any, seed: int) -> float:
    """Mean return of 20 episodes in the real environment with deterministic actions."""
    env = make_vec_env(ENV, n_envs=20, seed=10_000 + seed)
    mean, _ = evaluate_policy(policy, env, n_eval_episodes=20, deterministic=True, warn=False)
    return round(float(mean), 1)


def run(seed: int, options: Options) -> dict[str, Any]:
    """Trains DreamerV3 in the environment, and PPO in what it has learned."""
    began = time.process_time()
    agent = WorldFluxAgent("dreamerv3:tiny", ENV, seed=seed, train_ratio=64, seq_len=16, learning_rate=1e-3)
    agent.learn(options.steps)
    learned = time.process_time()
    assert agent.replay_buffer is not None
    world = ImaginedVecEnv(
        agent.model,
        agent.replay_buffer,
        options.n_envs,
        options.horizon,
        observation_space=agent.observation_space,
        action_space=agent.action_space,
        seed=seed,
    )
    imagined = PPO("MlpPolicy", VecMonitor(world), seed=seed, n_steps=64, batch_size=256, device="cpu")
    imagined.learn(options.imagined_steps)
    trained = time.process_time()
    real = PPO("MlpPolicy", ENV, seed=seed, device="cpu").learn(options.steps)
    return {
        "seed": seed,
        "imagined": score(imagined, seed),
        "real": score(real, seed),
        "dreamerv3": score(agent, seed),
        "seconds_of_the_model": round(learned - began),
        "seconds_of_ppo": round(trained - learned),
    }


def main(options: Options) -> None:
    """Runs all seeds."""
    torch.set_num_threads(1)
    for seed in options.seeds:
        print(json.dumps(run(seed, options)), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
