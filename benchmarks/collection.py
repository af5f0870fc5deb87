"""Measures how much faster collection is if the agent trains while other processes step the environments.

    python benchmarks/collection.py dmc/cartpole-balance --pixels --envs 2
    python benchmarks/collection.py CartPole-v1 --envs 4
    python benchmarks/collection.py waiting --envs 4          # steps of 50 ms that use no CPU time

Two agents with the same settings, one of which steps and trains sequentially, alternate in turns of equal length, so
that other load affects both. The printed line of JSON contains the median environment steps per second over all turns,
and the median ratio. The gain is largest if stepping all environments takes as long as the training per step, and if
each has its own core.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces

import worldflux.agents.agent as agent_module
from worldflux import WorldFluxAgent
from worldflux.agents.collecting import steps_in_subprocesses
from worldflux.envs import make_vec_env


class Waiting(gym.Env[Any, Any]):
    """An environment whose steps take 50 ms without using the CPU, like a simulator on other cores."""

    def __init__(self) -> None:
        self.observation_space = spaces.Box(-1, 1, (24,), np.float32)
        self.action_space = spaces.Box(-1, 1, (6,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Returns zeros."""
        super().reset(seed=seed)
        return np.zeros(24, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Returns zeros after 50 ms."""
        time.sleep(0.05)
        return np.zeros(24, np.float32), 0.0, False, False, {}


def main() -> None:
    """Measures one environment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("env", help="name of the environment, as in make_env")
    parser.add_argument("--pixels", action="store_true")
    parser.add_argument("--envs", type=int, default=2)
    parser.add_argument("--preset", default="dreamerv3:tiny")
    parser.add_argument("--train-ratio", type=float, default=32.0)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=16)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--steps", type=int, default=100, help="environment steps per turn")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    agents = {}
    for together in (True, False):
        name = Waiting if options.env == "waiting" else options.env
        pixels = {"pixels": True} if options.pixels else {}
        env = make_vec_env(name, options.envs, seed=0, processes=True, **pixels)
        agents[together] = WorldFluxAgent(
            options.preset,
            env,
            train_ratio=options.train_ratio,
            batch_size=options.batch,
            seq_len=options.length,
            learning_starts=options.envs * options.length * 2,
            seed=0,
        )
    rates: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(options.turns + 1):  # the first turn fills the buffer and is not counted
        for together, agent in agents.items():
            agent_module.steps_in_subprocesses = steps_in_subprocesses if together else lambda venv: False
            updates, started = agent.trainer.step_count, time.perf_counter()
            agent.learn(options.steps + 2 * options.envs * options.length * (turn == 0), reset_num_timesteps=turn == 0)
            if turn:
                rates[together].append(options.steps / (time.perf_counter() - started))
                assert agent.trainer.step_count > updates
    for agent in agents.values():
        env = agent.get_env()
        assert env is not None
        env.close()
    together_rate, serial_rate = statistics.median(rates[True]), statistics.median(rates[False])
    print(
        json.dumps(
            {
                "env": options.env,
                "pixels": options.pixels,
                "envs": options.envs,
                "steps_per_s_together": round(together_rate, 1),
                "steps_per_s_one_after_the_other": round(serial_rate, 1),
                "ratio": round(statistics.median(a / b for a, b in zip(rates[True], rates[False], strict=True)), 2),
            }
        )
    )


if __name__ == "__main__":
    main()
