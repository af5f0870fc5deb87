"""Records learning curves of small tasks on a CPU over several seeds.

    python benchmarks/learning.py pendulum pixelseek --seeds 0 1 2
    python benchmarks/learning.py pendulum --algorithm SAC --seeds 0 1 2     # stable-baselines3, for comparison
    python benchmarks/learning.py pendulum --set batch_size=64 learning_rate=8e-4 --label batch64 --seeds 0 1 2
    python benchmarks/learning.py --plot docs/learning_curves.png        # plots earlier results

Each run appends to `benchmarks/results/<task>.csv` (`step,score,seed`: the return of every training episode, with
sampled actions) and prints one line of JSON with the mean return of ten episodes with deterministic actions. The exit
code is 1 if a run of worldflux is below the accepted score of the task. Algorithms of stable-baselines3 run with their
default settings for the same number of environment steps and write `<task>_<algorithm>.csv`. `--set` changes arguments
of the `WorldFluxAgent`, and the runs write `<task>_<label>.csv`.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import matplotlib
import numpy as np
import torch
from pixel_seek import PixelSeek
from stable_baselines3 import DQN, PPO, SAC
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.vec_env import VecEnv

from worldflux import WorldFluxAgent
from worldflux.envs import make_env

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
SB3: dict[str, type[BaseAlgorithm]] = {"DQN": DQN, "PPO": PPO, "SAC": SAC}


@dataclass(frozen=True)
class Task:
    """A task with its budget, settings and accepted score."""

    title: str
    make: Callable[[], gym.Env[Any, Any]]
    steps: int
    accepted: float | None
    """Mean return with deterministic actions that a run must reach; None if a CPU takes too few steps to learn."""
    settings: dict[str, Any] = field(default_factory=dict)
    preset: str = "dreamerv3:tiny"
    planner: str | None = "auto"
    """What agents of worldflux act with when they are evaluated; None is the policy alone."""


def lunar_lander() -> gym.Env[Any, Any]:
    """LunarLander, whose actions take four of its 50 steps per second, as in Atari.

    Three planned steps of a fiftieth of a second each tell one action from another too little: the agent hovers.
    """
    return make_env("LunarLander-v3", action_repeat=4)


# The values of discrete tasks with short horizons rise sooner with a target network that follows faster.
DISCRETE: dict[str, Any] = {"batch_size": 64, "learning_starts": 500, "model_kwargs": {"tau": 0.05}}

TASKS = {
    "cartpole": Task(
        "CartPole-v1",
        lambda: gym.make("CartPole-v1"),
        5_000,
        475.0,
        {"train_ratio": 64, "seq_len": 16, "learning_rate": 1e-3},
    ),
    "pendulum": Task(
        "Pendulum-v1",
        lambda: gym.make("Pendulum-v1"),
        10_000,
        -250.0,
        {"train_ratio": 64, "seq_len": 16, "learning_rate": 4e-4},
    ),
    "pixelseek": Task(
        "PixelSeek (64x64 pixels)",
        PixelSeek,
        4_500,
        15.0,
        {
            "train_ratio": 32,
            "batch_size": 8,
            "seq_len": 16,
            "learning_rate": 1e-3,
            "model_kwargs": {"cnn_depth": 4, "entropy_scale": 3e-3},
        },
    ),
    "dmc_cartpole_balance_pixels": Task(
        "dmc/cartpole-balance (64x64 pixels)",
        lambda: make_env("dmc/cartpole-balance", pixels=True),
        6_000,
        None,
        {
            "train_ratio": 64,
            "batch_size": 8,
            "seq_len": 16,
            "learning_rate": 1e-3,
            "model_kwargs": {"cnn_depth": 4, "entropy_scale": 3e-3},
        },
    ),
    "acrobot": Task(
        "Acrobot-v1",
        lambda: gym.make("Acrobot-v1"),
        10_000,
        None,
        {"train_ratio": 64, "seq_len": 16, "learning_rate": 1e-3},
    ),
    "lunarlander": Task(
        "LunarLander-v3 (action repeat 4)",
        lunar_lander,
        8_000,
        None,
        {"train_ratio": 64, "seq_len": 16, "learning_rate": 4e-4},
    ),
    "cartpole_tdmpc2": Task(
        "CartPole-v1, TD-MPC2",
        lambda: gym.make("CartPole-v1"),
        5_000,
        475.0,
        DISCRETE,
        preset="tdmpc2:tiny",
    ),
    "acrobot_tdmpc2": Task(
        "Acrobot-v1, TD-MPC2", lambda: gym.make("Acrobot-v1"), 10_000, -100.0, DISCRETE, preset="tdmpc2:tiny"
    ),
    "lunarlander_tdmpc2": Task(
        "LunarLander-v3 (action repeat 4), TD-MPC2",
        lunar_lander,
        8_000,
        200.0,
        {**DISCRETE, "model_kwargs": {"tau": 0.02}},
        preset="tdmpc2:tiny",
        planner=None,
    ),
    "pendulum_tdmpc2": Task(
        "Pendulum-v1, TD-MPC2", lambda: make_env("Pendulum-v1"), 5_000, -200.0, preset="tdmpc2:tiny"
    ),
    "dmc_cartpole_swingup_tdmpc2": Task(
        "dmc/cartpole-swingup, TD-MPC2",
        lambda: make_env("dmc/cartpole-swingup"),
        15_000,
        600.0,
        preset="tdmpc2:tiny",
    ),
    "dmc_walker_stand_tdmpc2": Task(
        "dmc/walker-stand, TD-MPC2", lambda: make_env("dmc/walker-stand"), 12_000, 800.0, preset="tdmpc2:tiny"
    ),
    "atari100k_boxing": Task(
        "atari100k/boxing (64x64 pixels)",
        lambda: make_env("atari100k/boxing"),
        9_000,
        None,
        {
            "train_ratio": 32,
            "batch_size": 8,
            "seq_len": 16,
            "learning_rate": 4e-4,
            "model_kwargs": {"cnn_depth": 4},
        },
    ),
}


def without_decoder(task: Task) -> Task:
    """The task with DreamerV3's redundancy loss in place of the reconstruction, and the same settings otherwise."""
    fields = {**task.settings["model_kwargs"], "representation": "redundancy"}
    return replace(task, title=f"{task.title}, no decoder", settings={**task.settings, "model_kwargs": fields})


TASKS |= {f"{name}_redundancy": without_decoder(TASKS[name]) for name in ("pixelseek", "dmc_cartpole_balance_pixels")}


class Returns(BaseCallback):
    """Collects the return of every training episode."""

    def __init__(self) -> None:
        super().__init__()
        self.curve: list[tuple[int, float]] = []

    def _on_step(self) -> bool:
        for info in self.locals["infos"]:
            if "episode" in info:
                self.curve.append((self.num_timesteps, float(info["episode"]["r"])))
        return True


def algorithm_for(
    task: Task, env: VecEnv, seed: int, algorithm: str | None, changes: Mapping[str, float] | None = None
) -> BaseAlgorithm:
    """An agent with the settings of the task and changes of them, or an algorithm of stable-baselines3."""
    if algorithm is None:
        return WorldFluxAgent(task.preset, env, seed=seed, **{**task.settings, **(changes or {})})
    policy = "CnnPolicy" if is_image_space(env.observation_space) else "MlpPolicy"
    return SB3[algorithm](policy, env, seed=seed, device="cpu")


def run(
    name: str, seed: int, algorithm: str | None = None, changes: Mapping[str, float] | None = None
) -> tuple[dict[str, Any], list[tuple[int, float]]]:
    """Trains on a task with worldflux or with the named algorithm of stable-baselines3.

    Returns:
        The result to print, and the curve: environment steps and return of each training episode.
    """
    task = TASKS[name]
    started, cpu_started = time.perf_counter(), time.process_time()
    agent = algorithm_for(task, make_vec_env(task.make), seed, algorithm, changes)
    returns = Returns()
    agent.learn(task.steps, callback=returns)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    gradient_steps = agent._n_updates
    if algorithm is None and task.planner != "auto":
        with tempfile.TemporaryDirectory() as place:
            agent.save(f"{place}/agent.zip")
            agent = WorldFluxAgent.load(f"{place}/agent.zip", planner=task.planner)
    test_env = Monitor(task.make())
    test_env.reset(seed=10_000 + seed)
    scores, _ = evaluate_policy(agent, test_env, n_eval_episodes=10, deterministic=True, return_episode_rewards=True)
    result = {
        "task": name,
        "algorithm": algorithm or task.preset,
        **(changes or {}),
        "seed": seed,
        "score": round(float(np.mean(scores)), 2),
        "worst_episode": round(float(np.min(scores)), 2),
        "accepted": task.accepted if algorithm is None and not changes else None,
        "env_steps": agent.num_timesteps,
        "gradient_steps": gradient_steps,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
    }
    return result, returns.curve


def append(path: Path, seed: int, curve: list[tuple[int, float]]) -> None:
    """Adds a run to a results file, replacing an older run with the same seed."""
    path.parent.mkdir(exist_ok=True)
    rows = [row for row in read(path) if row[2] != seed] if path.exists() else []
    rows += [(step, round(score, 3), seed) for step, score in curve]
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([("step", "score", "seed"), *sorted(rows, key=lambda row: (row[2], row[0]))])


def read(path: Path) -> list[tuple[int, float, int]]:
    """The rows of a results file."""
    with path.open(newline="") as file:
        return [(int(row["step"]), float(row["score"]), int(row["seed"])) for row in csv.DictReader(file)]


def plot(target: Path) -> None:
    """Plots all results: every episode, and a running mean over ten episodes for each seed."""
    names = [name for name in TASKS if (RESULTS / f"{name}.csv").exists()]
    columns = min(len(names), 4)
    rows_of_plots = -(-len(names) // columns)
    figure, grid = plt.subplots(rows_of_plots, columns, figsize=(4.5 * columns, 3.5 * rows_of_plots), squeeze=False)
    for axes in grid.flat[len(names) :]:
        axes.set_visible(False)
    for axes, name in zip(grid.flat, names, strict=False):
        rows = np.array(read(RESULTS / f"{name}.csv"))
        for i, seed in enumerate(np.unique(rows[:, 2])):
            steps, scores = rows[rows[:, 2] == seed, :2].T
            smooth = [scores[max(0, k - 9) : k + 1].mean() for k in range(len(scores))]
            axes.plot(steps, scores, ".", color=f"C{i}", alpha=0.15)
            axes.plot(steps, smooth, color=f"C{i}", label=f"seed {int(seed)}")
        if TASKS[name].accepted is not None:
            axes.axhline(TASKS[name].accepted, color="gray", linestyle=":", label="accepted score")
        axes.set(title=TASKS[name].title, xlabel="environment steps", ylabel="return (sampled actions)")
        axes.legend(loc="best")
    figure.tight_layout()
    figure.savefig(target, dpi=110)
    plt.close(figure)


def main() -> int:
    """Runs the tasks, and returns 1 if one of them stayed below its accepted score."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", help=f"one or more of {', '.join(TASKS)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--algorithm", choices=tuple(SB3), help="algorithm of stable-baselines3 to run instead")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=NUMBER", help="arguments of the agent to change")
    parser.add_argument("--label", help="what the results file of changed settings is called after the task")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; small layers benefit little from more")
    parser.add_argument("--plot", type=Path, help="file for a plot of all results")
    options = parser.parse_args()
    unknown = set(options.tasks) - set(TASKS)
    if unknown:
        parser.error(f"unknown tasks {sorted(unknown)}, expected some of {sorted(TASKS)}")
    changes = {name: json.loads(value) for name, _, value in (item.partition("=") for item in options.set)}
    if bool(changes) != bool(options.label) or (changes and options.algorithm):
        parser.error("--set needs a --label, changes nothing in algorithms of stable-baselines3, and a label needs it")
    torch.set_num_threads(options.threads)
    failed = False
    for name in options.tasks:
        for seed in options.seeds:
            result, curve = run(name, seed, options.algorithm, changes)
            suffix = options.label or options.algorithm
            append(RESULTS / f"{f'{name}_{suffix.lower()}' if suffix else name}.csv", seed, curve)
            print(json.dumps(result), flush=True)
            failed |= result["accepted"] is not None and result["score"] < result["accepted"]
    if options.plot:
        plot(options.plot)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
