"""Compares the returns around the stops of a resumed run with those of an uninterrupted run.

    python benchmarks/resuming.py --out benchmarks/results

There are three runs of TD-MPC2 on Pendulum-v1 with the same seed: one without a stop, one that is stopped twice and
resumed from its checkpoint, and one that is stopped twice and continued from the zip of `save`, which contains no
replay data. The returns around each stop are printed as JSON, and the return of every episode is written to
`resuming.csv`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback

from worldflux import WorldFluxAgent

ENV = "Pendulum-v1"
AROUND = 5
"""Number of episodes before and after a stop that are compared."""


class Returns(BaseCallback):
    """Collects the return of every episode."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, float]] = []

    def _on_step(self) -> bool:
        for info in self.locals["infos"]:
            if "episode" in info:
                self.rows.append((self.num_timesteps, info["episode"]["r"]))
        return True


def run(kind: str, ends: list[int], seed: int) -> list[tuple[int, float]]:
    """Returns of the episodes of one run, by the step at which they ended.

    Args:
        kind: "whole", "resumed" or "zip", which determines how each part continues the previous one.
        ends: Steps at which the parts end.
        seed: Seed of the agent and the environment.
    """
    returns = Returns()
    agent = WorldFluxAgent("tdmpc2:tiny", ENV, seed=seed, device="cpu")
    with tempfile.TemporaryDirectory() as directory:
        for end in ends:
            agent.learn(end - agent.num_timesteps, returns, reset_num_timesteps=False)
            saved: Any = Path(directory) / f"at-{end}"
            if kind == "resumed":
                agent.save_checkpoint(saved)
                agent = WorldFluxAgent.load(saved, ENV, device="cpu", resume=True)
            elif kind == "zip":
                agent.save(saved)
                agent = WorldFluxAgent.load(saved, ENV, device="cpu")
    return returns.rows


def main() -> None:
    """Runs the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--stops", type=int, nargs="+", default=[2000, 3000])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", default=["whole", "resumed", "zip"])
    parser.add_argument("--out", type=Path, default=None, help="directory for resuming.csv")
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines = ["kind,step,return"]
    for kind in args.kinds:
        ends = [args.steps] if kind == "whole" else [*args.stops, args.steps]
        rows = run(kind, ends, args.seed)
        lines += [f"{kind},{step},{value:.1f}" for step, value in rows]
        around = {}
        for stop in args.stops:
            before = [value for step, value in rows if step <= stop][-AROUND:]
            after = [value for step, value in rows if step > stop][:AROUND]
            around[stop] = {"before": round(float(np.mean(before))), "after": round(float(np.mean(after)))}
        print(json.dumps({"kind": kind, "mean return around": around}), flush=True)
        if args.out is not None:
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / "resuming.csv").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
