"""What the training loops that are compared share: their settings, the environments, the clock, and what is printed.

Ours (`loop.py`) and the peers' (`peers/*_loop.py`) are run by scripts of the same form, a process for each run. This
file needs only NumPy and Gymnasium, and dm_control for its tasks, because a peer's environment need not have PyTorch.
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
"""Of the `tiny` presets, by the names that both peers have for them."""


@dataclass(frozen=True)
class Loop:
    """A run that every implementation of a family can make."""

    family: str
    env: str
    """A name of `make_env`."""
    steps: int
    """Actions to take."""
    starts: int
    """Actions before the first gradient step."""
    skipped: int
    """Gradient steps before the clock starts: compiling, filling caches, and what TD-MPC2 makes up for at once."""
    batch: int = 16
    """Windows in a gradient step."""
    length: int = 16
    """Time steps in each; TD-MPC2 makes one transition less of them."""
    train_ratio: float = 64.0
    """Replayed time steps per action. TD-MPC2 takes one gradient step for each action instead."""
    learning_rate: float = 1e-3
    warmup: int = 100
    """Gradient steps over which DreamerV3's learning rate rises."""
    entropy_scale: float = 3e-4
    cnn_depth: int = 8
    limit: int | None = None
    """Actions after which an episode is cut; None leaves that to the environment."""


SPEED = {
    "dreamerv3-16x16": Loop("dreamerv3", "CartPole-v1", 800, starts=400, skipped=10),
    "dreamerv3-16x64": Loop("dreamerv3", "CartPole-v1", 2000, starts=1200, skipped=10, length=64),
    "dreamerv3-8x8": Loop("dreamerv3", "CartPole-v1", 500, starts=200, skipped=10, batch=8, length=8),
    "dreamerv3-pixels": Loop(
        "dreamerv3", "PixelSeek", 700, starts=300, skipped=10, batch=8, train_ratio=32, entropy_scale=3e-3, cnn_depth=4
    ),
    # Short episodes, because the reference learns from ended ones only. Ours waits until it has 256 windows, and both
    # make up for all random steps at once.
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
    """A task of dm_control whose observation is one vector; each action is taken twice."""

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
    """All actions have been taken."""


class Watched(gym.Wrapper[Any, Any, Any, Any]):
    """Notes what a loop does to its environment: every episode's return, and the time between two gradient steps.

    Args:
        loop: What is run.
        seed: Of the first reset. Later ones go on from there, whatever the loop asks for.
        updates: Gives the number of gradient steps so far.
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
        """Reads the clocks."""
        self._marks.append((self.updates(), time.process_time(), time.perf_counter()))

    def times(self) -> dict[str, float]:
        """Gradient steps between the two readings of the clocks, and what they took with everything around them."""
        (before, cpu, wall), (after, cpu_end, wall_end) = self._marks[0], self._marks[-1]
        return {
            "updates": after - before,
            "cpu_s": round(cpu_end - cpu, 3),
            "wall_s": round(wall_end - wall, 3),
            "cpu_ms_per_update": round(1e3 * (cpu_end - cpu) / max(after - before, 1), 3),
        }


def make_env(loop: Loop, seed: int) -> gym.Env[Any, Any]:
    """The environment of a loop: `PixelSeek`, a `dmc/<domain>-<task>`, or an id of Gymnasium."""
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
    """The main function of a script that runs loops: prints a row of JSON.

    Args:
        description: Of the script.
        who: Is measured.
        families: That it has.
        learn: Runs a loop to its end; returns the environment and further facts.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [name for name, loop in LOOPS.items() if loop.family in families]
    parser.add_argument("--case", choices=names, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
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
