"""Learns two tasks in one TD-MPC2 and each by itself, then a further task from what the model knows of both.

    python benchmarks/tasks.py --steps 6000 --seed 0 --out results/tasks
    python benchmarks/tasks.py --further 1500 --seed 0 --out results/tasks       # from the agent that was saved there
    python benchmarks/tasks.py --quick --seed 0 --out results/tasks              # a minute, see `Aim`

The tasks are Pendulum-v1 with the gravity of the default, 10, and dmc/cartpole-balance, whose observations have 3 and
5 numbers and whose rewards differ in scale. The further one is Pendulum with a gravity of 5, in three ways: with the
embedding of the first task at first, with a random one, and in a new model. A row of JSON says the steps, the gradient
steps, the seconds of the processor, and for each task the mean return of ten episodes with deterministic actions.
Rows are appended to `tasks.jsonl` in `--out`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch

from worldflux import WorldFluxAgent, create_world_model
from worldflux.agents import evaluate_tasks
from worldflux.envs import make_env

SMALL = dict(latent_dim=16, hidden_dim=16, mlp_dim=16, enc_dim=16, num_q_networks=2, num_bins=15, task_dim=4)
SMALL |= dict(num_samples=16, num_elites=4, num_pi_trajs=2, iterations=2)


class Aim(gym.Env[Any, Any]):
    """Six steps, each of which loses the distance between the action, in [-2, 2], and the aim.

    The observation is the time, so that nothing but the task tells the aim. The best return is 0; random actions have
    -9.4 for aims of -1.5 and 1.5, and -6.4 for 0.5.

    Args:
        aim: The best action.
    """

    def __init__(self, aim: float) -> None:
        self.observation_space = gym.spaces.Box(0, 1, (3,), np.float32)
        self.action_space = gym.spaces.Box(-2, 2, (1,), np.float32)
        self.aim, self.t = aim, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begins an episode."""
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(3, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Takes a step."""
        self.t += 1
        obs = np.full(3, self.t / 6, np.float32)
        return obs, -abs(float(action[0]) - self.aim), False, self.t >= 6, {}


STARTS = 1000
"""Environment steps with random actions, over all environments."""


def environments(*names: str) -> dict[str, Any]:
    """New environments of tasks, by their names."""
    makers = {
        "pendulum": lambda: gym.make("Pendulum-v1"),
        "cartpole-balance": lambda: make_env("dmc/cartpole-balance", action_repeat=2),
        "light-pendulum": lambda: gym.make("Pendulum-v1", g=5.0),
        "left": lambda: Aim(-1.5),
        "right": lambda: Aim(1.5),
        "middle": lambda: Aim(0.5),
    }
    return {name: makers[name]() for name in names}


def run(label: str, agent: WorldFluxAgent, names: tuple[str, ...], steps: int, out: Path, seed: int) -> None:
    """Trains an agent, and appends the row of the run."""
    started = time.process_time()
    agent.learn(steps, log_interval=None)
    seconds = time.process_time() - started
    scores = evaluate_tasks(agent, environments(*names), 10)
    row = {
        "run": label,
        "seed": seed,
        "steps": steps,
        "gradient_steps": agent.trainer.step_count,
        "cpu_seconds": round(seconds),
        "scores": {name: [round(mean, 1), round(std, 1)] for name, (mean, std) in scores.items()},
    }
    print(json.dumps(row), flush=True)
    with (out / "tasks.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def quick(out: Path, seed: int) -> None:
    """Learns two aims, and then a third one with a new embedding."""
    aims, settings = ("left", "right"), dict(seed=seed, device="cpu", batch_size=32, learning_rate=1e-3)
    agent = WorldFluxAgent("tdmpc2:tiny", environments(*aims), model_kwargs=SMALL, learning_starts=100, **settings)
    run("two aims", agent, aims, 0, out, seed)
    run("two aims", agent, aims, 1000, out, seed)
    grown = agent.model.with_task("middle")
    agent = WorldFluxAgent(grown, environments("middle"), learning_starts=60, **settings)
    run("further aim, before", agent, ("middle",), 0, out, seed)
    run("further aim", agent, ("middle",), 300, out, seed)
    new = WorldFluxAgent("tdmpc2:tiny", environments("middle"), model_kwargs=SMALL, learning_starts=60, **settings)
    run("further aim, new model", new, ("middle",), 300, out, seed)


def main() -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, help="environment steps of both tasks together")
    parser.add_argument("--alone", action="store_true", help="learn each task by itself, with half of the steps")
    parser.add_argument("--further", type=int, help="environment steps of the further task")
    parser.add_argument("--quick", action="store_true", help="learn tasks of a minute with a very small model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/tasks"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    out, seed = options.out, options.seed
    out.mkdir(parents=True, exist_ok=True)
    if options.quick:
        quick(out, seed)
    both = ("pendulum", "cartpole-balance")
    settings: dict[str, Any] = dict(seed=seed, device="cpu", learning_starts=STARTS)
    if options.steps is not None and not options.alone:
        agent = WorldFluxAgent("tdmpc2:tiny", environments(*both), **settings)
        run("both tasks", agent, both, options.steps, out, seed)
        agent.model.save_pretrained(out / f"both-{seed}")
    if options.steps is not None and options.alone:
        for name in both:
            agent = WorldFluxAgent("tdmpc2:tiny", environments(name), **settings)
            run(f"{name} alone", agent, (name,), options.steps // 2, out, seed)
    if options.further is not None:
        settings["learning_starts"] = 200
        for label, like in (("further task like pendulum", "pendulum"), ("further task, random embedding", None)):
            grown = create_world_model(out / f"both-{seed}").with_task("light-pendulum", like=like)
            agent = WorldFluxAgent(grown, environments("light-pendulum"), **settings)
            run(label, agent, ("light-pendulum",), options.further, out, seed)
        agent = WorldFluxAgent("tdmpc2:tiny", environments("light-pendulum"), **settings)
        run("further task, new model", agent, ("light-pendulum",), options.further, out, seed)


if __name__ == "__main__":
    main()
