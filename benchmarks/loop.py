"""Runs one of the loops of `loops.py` with a `WorldFluxAgent`.

python benchmarks/loop.py --case dreamerv3-16x16
"""

from __future__ import annotations

import argparse
from typing import Any

import loops
import torch
from stable_baselines3.common.callbacks import BaseCallback

from worldflux import WorldFluxAgent


class Losses(BaseCallback):
    """Collects the losses of every n-th gradient step; at most one step is taken per action."""

    def __init__(self, every: int) -> None:
        super().__init__()
        self.every, self.last = every, 0
        self.found: list[dict[str, float]] = []

    def _on_step(self) -> bool:
        updates = self.model._n_updates
        if self.every and updates % self.every == 0 and updates > self.last:
            self.last = updates
            losses = {name: round(float(value), 5) for name, value in self.model.last_losses.items()}
            self.found.append({"updates": updates, **losses})
        return True


def learn(loop: loops.Loop, options: argparse.Namespace) -> tuple[loops.Watched, dict[str, Any]]:
    """Runs a loop, and returns the environment and additional facts."""
    torch.set_num_threads(options.threads)
    agents: list[WorldFluxAgent] = []
    env = loops.Watched(loop, options.seed, lambda: agents[0]._n_updates if agents else 0)
    if loop.family == "tdmpc2":
        settings: dict[str, Any] = {}
        model = {"episode_length": loop.limit or 500, "episodic": False}
    else:
        settings = {"train_ratio": loop.train_ratio, "learning_rate": loop.learning_rate}
        model = {"entropy_scale": loop.entropy_scale, "warmup_steps": loop.warmup, "cnn_depth": loop.cnn_depth}
    agent = WorldFluxAgent(
        f"{loop.family}:tiny",
        env,
        batch_size=loop.batch,
        seq_len=loop.length,
        learning_starts=loop.starts,
        model_kwargs=model,
        seed=options.seed,
        device="cpu",
        **settings,
    )
    agents.append(agent)
    losses = Losses(options.losses)
    try:
        agent.learn(loop.steps + 1, losses, log_interval=None)
    except loops.Stop:
        pass
    params = sum(p.numel() for p in agent.model.parameters() if p.requires_grad)
    return env, {"params": params, "versions": {"torch": torch.__version__}, "losses": losses.found}


if __name__ == "__main__":
    loops.run(__doc__, "worldflux", ("dreamerv3", "tdmpc2"), learn)
