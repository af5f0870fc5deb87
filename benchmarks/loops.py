"""Settings, environments, timing and output that are shared by the compared training loops.

The loops of worldflux (`loop.py`) and of the peers (`peers/*_loop.py`) are run by scripts of the same form, in a
separate process for each run. This file requires only NumPy and Gymnasium, and dm_control for its tasks, because the
virtual environment of a peer may not have PyTorch.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import rows
from pixel_seek import PixelSeek

WHAT = "training loop"
SIZES = {
    "dreamerv3": {"deter": 256, "hidden": 64, "stoch": 16, "classes": 8, "blocks": 8, "units": 64},
    "tdmpc2": {"enc_dim": 128, "mlp_dim": 128, "latent_dim": 128, "num_channels": 8, "num_q": 3}
    | {"num_samples": 192, "num_elites": 24, "num_pi_trajs": 12},
}
"""Sizes of the `tiny` presets, under the names that the peers use."""


@dataclass(frozen=True)
class Loop:
    """A run that every implementation of an algorithm can make."""

    family: str
    env: str
    """Name of the environment, as in `make_env`."""
    steps: int
    """Number of actions."""
    starts: int
    """Actions before the first gradient step."""
    skipped: int
    """Gradient steps before timing starts: compiling, filling caches, and TD-MPC2's initial burst of updates."""
    batch: int = 16
    """Windows per gradient step."""
    length: int = 16
    """Time steps per window; TD-MPC2 forms one transition fewer from them."""
    train_ratio: float = 64.0
    """Replayed time steps per action. TD-MPC2 takes one gradient step per action instead."""
    learning_rate: float = 1e-3
    warmup: int = 100
    """Gradient steps over which DreamerV3's learning rate is warmed up."""
    entropy_scale: float = 3e-4
    cnn_depth: int = 8
    limit: int | None = None
    """Actions after which an episode is truncated; None leaves this to the environment."""


SPEED = {
    "dreamerv3-16x16": Loop("dreamerv3", "CartPole-v1", 800, starts=400, skipped=10),
    "dreamerv3-16x64": Loop("dreamerv3", "CartPole-v1", 2000, starts=1200, skipped=10, length=64),
    "dreamerv3-8x8": Loop("dreamerv3", "CartPole-v1", 500, starts=200, skipped=10, batch=8, length=8),
    "dreamerv3-pixels": Loop(
        "dreamerv3", "PixelSeek", 700, starts=300, skipped=10, batch=8, train_ratio=32, entropy_scale=3e-3, cnn_depth=4
    ),
    # Short episodes, because the reference learns only from finished ones. worldflux waits for 256 windows. Both
    # then take the gradient steps for all random actions at once.
    "tdmpc2": Loop(
        "tdmpc2", "dmc/walker-stand", 320, starts=260, skipped=270, batch=256, length=4, learning_rate=3e-4, limit=50
    ),
}
LEARNING = {
    "dreamerv3-cartpole": Loop("dreamerv3", "CartPole-v1", 4000, starts=1024, skipped=10),
    "dreamerv3-pixelseek": Loop(
        "dreamerv3",
        "PixelSeek",
        4500,
        starts=1024,
        skipped=10,
        batch=8,
        train_ratio=32,
        entropy_scale=3e-3,
        cnn_depth=4,
    ),
    "tdmpc2-walker-stand": Loop(
        "tdmpc2", "dmc/walker-stand", 3000, starts=1000, skipped=1010, batch=256, length=4, learning_rate=3e-4
    ),
}
LOOPS = SPEED | LEARNING


class Control(gym.Env[np.ndarray, np.ndarray]):
    """A task of dm_control with one vector as observation and an action repeat of 2."""

    def __init__(self, domain: str, task: str, seed: int) -> None:
        from dm_control import suite

        self.task = suite.load(domain, task, task_kwargs={"random": seed})
        limits, sizes = self.task.action_spec(), self.task.observation_spec().values()
        self.action_space = gym.spaces.Box(limits.minimum.astype(np.float32), limits.maximum.astype(np.float32))
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (sum(int(np.prod(size.shape)) for size in sizes),))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        return self._vector(self.task.reset()), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        reward = 0.0
        for _ in range(2):
            seen = self.task.step(action)
            reward += seen.reward
            if seen.last():
                break
        return self._vector(seen), reward, False, seen.last(), {}

    @staticmethod
    def _vector(seen: Any) -> np.ndarray:
        return np.concatenate([np.ravel(value) for value in seen.observation.values()]).astype(np.float32)


class Stop(Exception):
    """Raised when all actions have been taken."""


class Watched(gym.Wrapper[Any, Any, Any, Any]):
    """Records the return of every episode of a loop, and the time between its gradient steps.

    Args:
        loop: Loop that is run.
        seed: Seed of the first reset. Later resets use no seed, whatever the loop passes.
        updates: Function that returns the number of gradient steps so far.
    """

    def __init__(self, loop: Loop, seed: int, updates: Callable[[], int]) -> None:
        super().__init__(make_env(loop, seed))
        self.loop, self.updates = loop, updates
        self.taken = 0
        self.episodes: list[tuple[int, float]] = []
        self._seed: int | None = seed
        self._marks: list[tuple[int, float, float]] = []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        seed, self._seed = self._seed, None
        self._score = 0.0
        return self.env.reset(seed=seed)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        if self.taken == self.loop.steps:
            self.mark()
            raise Stop
        if not self._marks and self.updates() >= self.loop.skipped:
            self.mark()
        obs, reward, terminated, truncated, info = self.env.step(action)
        self.taken += 1
        self._score += float(reward)
        if terminated or truncated:
            self.episodes.append((self.taken, round(self._score, 3)))
        return obs, reward, terminated, truncated, info

    def mark(self) -> None:
        """Reads the CPU clock and the wall clock."""
        self._marks.append((self.updates(), time.process_time(), time.perf_counter()))

    def times(self) -> dict[str, float]:
        """Gradient steps between the two readings of the clocks, and their time, including everything in between."""
        (before, cpu, wall), (after, cpu_end, wall_end) = self._marks[0], self._marks[-1]
        return {
            "updates": after - before,
            "cpu_s": round(cpu_end - cpu, 3),
            "wall_s": round(wall_end - wall, 3),
            "cpu_ms_per_update": round(1e3 * (cpu_end - cpu) / max(after - before, 1), 3),
        }


def make_env(loop: Loop, seed: int) -> gym.Env[Any, Any]:
    """The environment of a loop: `PixelSeek`, `dmc/<domain>-<task>`, or a Gymnasium id."""
    if loop.env == "PixelSeek":
        env: gym.Env[Any, Any] = PixelSeek()
    elif loop.env.startswith("dmc/"):
        env = Control(*loop.env.removeprefix("dmc/").rsplit("-", 1), seed)
    else:
        env = gym.make(loop.env)
    return env if loop.limit is None else gym.wrappers.TimeLimit(env, loop.limit)


def run(
    description: str | None,
    who: str,
    families: tuple[str, ...],
    learn: Callable[[Loop, argparse.Namespace], tuple[Watched, dict[str, Any]]],
) -> None:
    """Main function of a script that runs loops. Prints a row of JSON.

    Args:
        description: Description of the script.
        who: Implementation that is measured.
        families: Model families that it has.
        learn: Function that runs a loop to its end and returns the environment and additional facts.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [name for name, loop in LOOPS.items() if loop.family in families]
    parser.add_argument("--case", choices=names, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="number of CPU threads")
    parser.add_argument(
        "--losses", type=int, default=0, metavar="N", help="print the losses of every N-th gradient step"
    )
    parser.add_argument("--repo", help="the peer's checkout")
    options = parser.parse_args()
    threads = rows.use_threads(options.threads)
    if options.repo is not None:
        sys.path.insert(0, options.repo)
    env, more = learn(LOOPS[options.case], options)
    facts = {"seed": options.seed, "threads": threads, "cpu": rows.cpu_name(), "actions": env.taken}
    whole = {"whole_updates": env.updates(), "whole_cpu_s": round(time.process_time(), 1)}
    rows.print_row(who, options.case, WHAT, {**facts, **env.times(), **whole, **more, "episodes": env.episodes})
