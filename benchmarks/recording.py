"""Measures the cost of recording: steps per second of vector environments with and without recording.

    python benchmarks/recording.py
    python benchmarks/recording.py --case sb3-cartpole gymnasium-pixels --repeats 15

Everything runs in one process, whose CPU time is measured. The environments alternate in turns of a few hundred steps
with the same actions, so that other load affects all of them; each ratio is the median over the turns. A `fresh` buffer
has free rows in untouched memory; a `full` one drops its oldest rows. The exit code is 1 if a ratio is below `--least`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import SyncVectorEnv
from stable_baselines3.common.vec_env import DummyVecEnv

from worldflux.envs import ActionCodec, ObservationCodec, VecRecordEpisodes, VectorRecordEpisodes, make_vec_env
from worldflux.training import ReplayBuffer

N_ENVS = 8


class DrawnEnv(gym.Env[Any, Any]):
    """An environment of 64x64 colour images that takes 0.25 ms per step, like a fast emulator."""

    def __init__(self) -> None:
        self.observation_space = spaces.Box(0, 255, (64, 64, 3), np.uint8)
        self.action_space = spaces.Discrete(4)
        self._images = np.random.default_rng(0).integers(0, 256, (50, 64, 64, 3), np.uint8)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Returns the first image."""
        super().reset(seed=seed)
        self._t = 0
        return self._images[0], {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Returns the next image."""
        until = time.process_time() + 250e-6
        self._t += 1
        while time.process_time() < until:
            pass
        return self._images[self._t % 50], 1.0, False, self._t == 200, {}


def cartpole() -> gym.Env[Any, Any]:
    """CartPole, one of the cheapest common environments."""
    return gym.make("CartPole-v1")


CASES: dict[str, Callable[[], Any]] = {
    "sb3-cartpole": lambda: make_vec_env("CartPole-v1", N_ENVS),
    "sb3-cartpole-bare": lambda: DummyVecEnv([cartpole] * N_ENVS),
    "sb3-pixels": lambda: DummyVecEnv([DrawnEnv] * N_ENVS),
    "gymnasium-cartpole": lambda: SyncVectorEnv([cartpole] * N_ENVS),
    "gymnasium-cartpole-same-step": lambda: SyncVectorEnv([cartpole] * N_ENVS, autoreset_mode="SameStep"),
    "gymnasium-pixels": lambda: SyncVectorEnv([DrawnEnv] * N_ENVS),
}


def recorded(env: Any, capacity: int) -> Any:
    """The environment in the recording wrapper of its kind, with a new buffer."""
    is_vector = isinstance(env, gym.vector.VectorEnv)
    obs_codec = ObservationCodec(env.single_observation_space if is_vector else env.observation_space)
    action_codec = ActionCodec(env.single_action_space if is_vector else env.action_space)
    buffer = ReplayBuffer(
        capacity, obs_codec.obs_shape, action_codec.action_dim, obs_dtype=obs_codec.obs_dtype, n_envs=N_ENVS
    )
    return (VectorRecordEpisodes if is_vector else VecRecordEpisodes)(env, buffer)


def seconds(env: Any, actions: np.ndarray) -> float:
    """CPU time of one turn, excluding the reset before it."""
    env.reset()
    started = time.process_time()
    for action in actions:
        env.step(action)
    return time.process_time() - started


def measure(name: str, options: argparse.Namespace) -> dict[str, float]:
    """Steps per second over all environments, and the ratios."""
    turn = options.steps // (10 if "pixels" in name else 1)
    make = CASES[name]
    capacities = {"fresh": 2 * (options.repeats + 1) * turn * N_ENVS, "full": turn * N_ENVS // 2}
    envs = {"bare": make(), **{kind: recorded(make(), capacity) for kind, capacity in capacities.items()}}
    n_actions = 2 if "cartpole" in name else 4
    actions = np.random.default_rng(0).integers(0, n_actions, (turn, N_ENVS))
    times: dict[str, list[float]] = {kind: [] for kind in envs}
    for repeat in range(options.repeats + 1):  # the first warms up
        for kind, env in envs.items():
            took = seconds(env, actions)
            if repeat:
                times[kind].append(took)
    for env in envs.values():
        env.close()
    result = {kind: turn * N_ENVS / statistics.median(took) for kind, took in times.items()}
    for kind in capacities:
        pairs = zip(times["bare"], times[kind], strict=True)
        result[f"{kind} ratio"] = statistics.median(bare / took for bare, took in pairs)
    return result


def main() -> int:
    """Measures the requested cases, and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--repeats", type=int, default=15, help="number of turns")
    parser.add_argument("--steps", type=int, default=1000, help="steps of all environments per turn (images: a tenth)")
    parser.add_argument("--least", type=float, default=0.0, help="lowest accepted ratio")
    options = parser.parse_args()
    columns = ("bare", "fresh", "full", "fresh ratio", "full ratio")
    print(f"{'steps/s':30}" + "".join(f"{column:>13}" for column in columns))
    least = np.inf
    for name in options.case:
        result = measure(name, options)
        cells = [f"{result[column]:13.2f}" if "ratio" in column else f"{result[column]:13.0f}" for column in columns]
        print(f"{name:30}" + "".join(cells), flush=True)
        least = min(least, result["fresh ratio"], result["full ratio"])
    return int(least < options.least)


if __name__ == "__main__":
    sys.exit(main())
