"""Gives trained agents other goals: Pendulum at another angle, turning at a speed, and swinging up below a speed limit.

    python examples/own_goal.py                          # trains three agents, two to three minutes each
    python examples/own_goal.py --planner cem            # the same agents with the other planner

Nothing is trained for the new goals. The planner maximises a function of what the model predicts in place of the
learned reward.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro
from torch import Tensor

from worldflux import PlannedTrajectory, RewardPlus, WorldFluxAgent
from worldflux.envs import make_env

ANGLE, SPEED, LIMIT = 20.0, 5.0, 6.0
"""The angle to hold in degrees from upright, the speed to turn at and the speed limit in radians per second."""


def hold_angle(trajectory: PlannedTrajectory) -> Tensor:
    """Minus the squared distance to the angle, and a little for standing still. `[H, B]`"""
    obs: Any = trajectory.observations  # cosine and sine of the angle, and the speed
    distance = torch.atan2(obs[..., 1], obs[..., 0]) - math.radians(ANGLE)
    distance = torch.remainder(distance + math.pi, 2.0 * math.pi) - math.pi
    return -distance.square() - 0.1 * obs[..., 2].square()


def turn(trajectory: PlannedTrajectory) -> Tensor:
    """Minus the squared distance to the speed. `[H, B]`"""
    obs: Any = trajectory.observations
    return -(obs[..., 2] - SPEED).square()


def too_fast(trajectory: PlannedTrajectory) -> Tensor:
    """Minus infinity where the speed limit is exceeded. `[H, B]`"""
    obs: Any = trajectory.observations
    return torch.zeros_like(trajectory.rewards).masked_fill(obs[..., 2].abs() > LIMIT, -torch.inf)


GOALS: dict[str, Any] = {
    "learned reward": None,
    f"hold {ANGLE:g} degrees": hold_angle,
    f"turn at {SPEED:g} rad/s": turn,
    f"reward, at most {LIMIT:g} rad/s": RewardPlus(too_fast),
}


def main(
    directory: Path = Path("own_goal"),
    *,
    seeds: tuple[int, ...] = (0, 1, 2),
    steps: int = 4_000,
    planner: Literal["mppi", "cem"] = "mppi",
    horizon: int = 12,
    candidates: int = 128,
    test_steps: int = 120,
) -> list[dict[str, Any]]:
    """Trains an agent for each seed unless it is there already, gives it each goal, and plots what it does.

    Args:
        directory: Place of the agents and the picture.
        seeds: Seeds of the agents.
        steps: Environment steps of training.
        planner: Planner that follows the goals.
        horizon: Steps that it looks ahead.
        candidates: Sequences of actions that it compares.
        test_steps: Steps with each goal, all from the same start.

    Returns:
        For each goal and seed, over the last half of the steps: mean angle in degrees, mean speed, and the share of the
        time near upright; and the largest speed of all steps.
    """
    directory.mkdir(parents=True, exist_ok=True)
    search = dict(horizon=horizon, num_samples=candidates, num_elites=candidates // 8, iterations=4, discount=0.98)
    figure, axes = plt.subplots(1, len(GOALS), figsize=(11, 2.8), layout="constrained", dpi=90)
    rows = []
    for seed in seeds:
        path = directory / f"pendulum-{seed}.zip"
        if not path.exists():
            # The policy collects, which is faster than planning. The decoder tells objectives what a state looks like.
            settings: dict[str, Any] = dict(planner=None, batch_size=64, model_kwargs={"use_decoder": True})
            WorldFluxAgent("tdmpc2:tiny", "Pendulum-v1", seed=seed, device="cpu", **settings).learn(steps).save(path)
        agent = WorldFluxAgent.load(path, planner=planner, planner_kwargs=search, device="cpu")
        for (name, goal), plot in zip(GOALS.items(), axes, strict=True):
            agent.objective = goal
            angle, speed = play(agent, test_steps)
            late = slice(test_steps // 2, None)
            mean_angle = np.degrees(np.angle(np.exp(1j * angle[late]).mean()))
            row = {"goal": name, "seed": seed, "planner": planner, "angle": mean_angle, "speed": speed[late].mean()}
            row |= {"upright": (np.cos(angle[late]) > 0.9).mean(), "fastest": np.abs(speed).max()}
            rows.append({key: x if isinstance(x, str | int) else round(float(x), 2) for key, x in row.items()})
            print(json.dumps(rows[-1]), flush=True)
            shows_speed = "rad/s" in name
            plot.plot(speed if shows_speed else np.degrees(angle), label=f"seed {seed}", linewidth=1.2)
            plot.set(title=name, xlabel="step", ylabel="speed, rad/s" if shows_speed else "angle, degrees")
    for plot, lines in zip(axes, ([0.0], [ANGLE], [SPEED], [-LIMIT, LIMIT]), strict=True):
        for line in lines:
            plot.axhline(line, color="black", linestyle=":", linewidth=1)
    axes[0].legend(fontsize=8)
    figure.savefig(directory / f"own_goal_{planner}.png")
    plt.close(figure)
    return rows


def play(agent: WorldFluxAgent, steps: int, seed: int = 7) -> tuple[np.ndarray, np.ndarray]:
    """Acts in one episode.

    Args:
        agent: The agent, with its goal.
        steps: Number of steps.
        seed: Seed of the start.

    Returns:
        Angle from upright in radians, in (-pi, pi], and speed after each step. `[steps]`
    """
    env, memory, seen = make_env("Pendulum-v1"), None, []
    obs, _ = env.reset(seed=seed)
    for _ in range(steps):
        action, memory = agent.predict(obs, memory, deterministic=True)
        obs, *_ = env.step(action)
        seen.append(obs)
    cosine, sine, speed = np.array(seen).T
    return np.arctan2(sine, cosine), speed


if __name__ == "__main__":
    tyro.cli(main)
