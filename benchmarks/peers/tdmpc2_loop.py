"""Runs one of the loops of `../loops.py` with nicklashansen/tdmpc2: its `OnlineTrainer`, agent and buffer.

    python benchmarks/peers/tdmpc2_loop.py --repo path/to/tdmpc2 --case tdmpc2

worldflux provides the environment and the sizes. The device named in the source of the peer is replaced by the CPU.
Nothing is compiled, because on a CPU the compiled form of the peer was not faster.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import loops
import numpy as np
from tdmpc2_reference import TorchOnCpu, build, settings


class Env:
    """The environment with the interface of the peer: tensors, and one flag for the end of an episode."""

    def __init__(self, env: loops.Watched, seed: int) -> None:
        self.env, self.random = env, np.random.default_rng(seed)

    def rand_act(self) -> Any:
        import torch

        space = self.env.action_space
        return torch.from_numpy(self.random.uniform(space.low, space.high).astype(np.float32))

    def reset(self) -> Any:
        import torch

        return torch.from_numpy(self.env.reset()[0])

    def step(self, action: Any) -> tuple[Any, Any, bool, dict[str, Any]]:
        import torch

        obs, reward, terminated, truncated, _ = self.env.step(action.numpy())
        info = {"success": 0.0, "terminated": torch.tensor(float(terminated))}
        return torch.from_numpy(obs), torch.tensor(reward, dtype=torch.float32), terminated or truncated, info


def learn(loop: loops.Loop, options: argparse.Namespace) -> tuple[loops.Watched, dict[str, Any]]:
    """Runs a loop, and returns the environment and additional facts."""
    sys.path.insert(0, str(Path(options.repo) / "tdmpc2"))
    import torch

    torch.set_num_threads(options.threads)
    from common import buffer
    from trainer.online_trainer import OnlineTrainer

    updates, losses = 0, []
    watched = loops.Watched(loop, options.seed, lambda: updates)
    np.random.seed(options.seed)
    torch.manual_seed(options.seed)
    config = settings(
        options.repo,
        **loops.SIZES["tdmpc2"],
        compile=False,
        obs="state",
        obs_shape={"state": watched.observation_space.shape},
        action_dim=watched.action_space.shape[0],
        episode_length=loop.limit or 500,
        steps=loop.steps + 1000,
        seed_steps=loop.starts,
        seed=options.seed,
        eval_episodes=0,
        eval_freq=10**9,
        save_video=False,
    )
    agent = build(config, "cpu")
    buffer.torch = TorchOnCpu(torch)
    step = agent.update

    def counted(replay: Any) -> Any:
        nonlocal updates
        updates += 1
        metrics = step(replay)
        if options.losses and updates % options.losses == 0:
            losses.append({"updates": updates, **{name: round(float(value), 5) for name, value in metrics.items()}})
        return metrics

    agent.update = counted
    logger = SimpleNamespace(log=lambda *_: None, finish=lambda *_: None)
    trainer = OnlineTrainer(
        cfg=config, env=Env(watched, options.seed), agent=agent, buffer=buffer.Buffer(config), logger=logger
    )
    try:
        trainer.train()
    except loops.Stop:
        pass
    return watched, {"params": agent.model.total_params, "versions": {"torch": torch.__version__}, "losses": losses}


if __name__ == "__main__":
    loops.run(__doc__, "nicklashansen/tdmpc2", ("tdmpc2",), learn)
