"""Trains an agent in a run that can be stopped at any time and resumed with the same command.

python examples/resume.py --run runs/cartpole
^C
python examples/resume.py --run runs/cartpole
"""

from __future__ import annotations

from pathlib import Path

import torch
import tyro

from worldflux.agents import AgentCheckpointCallback, WorldFluxAgent


def main(
    run: Path = Path("runs/cartpole"),
    env: str = "CartPole-v1",
    total: int = 8_000,
    save_interval: int = 1_000,
    train_ratio: float = 64,
) -> WorldFluxAgent:
    """Starts a run, or resumes it if it has a checkpoint.

    Args:
        run: Directory for the checkpoints.
        env: Name of the environment, as in `make_env`.
        total: Environment steps of the whole run.
        save_interval: Environment steps between two checkpoints.
        train_ratio: Replayed steps per environment step.

    Returns:
        The agent at the end of the run.
    """
    torch.set_num_threads(1)  # layers this small benefit little from a second core
    try:
        agent = WorldFluxAgent.load(run, env, resume=True)
        print(f"resuming after {agent.num_timesteps} steps")
    except FileNotFoundError:  # no checkpoint yet
        agent = WorldFluxAgent("dreamerv3:tiny", env, train_ratio=train_ratio, seed=0, verbose=1)
    saving = AgentCheckpointCallback(run, save_interval, verbose=1)
    return agent.learn(total - agent.num_timesteps, saving, reset_num_timesteps=False)


if __name__ == "__main__":
    tyro.cli(main)
