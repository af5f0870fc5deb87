"""Measures how much rounding in the outermost bins of DreamerV3's two-hot heads contributes to their means.

In CartPole-v1 no value exceeds 333. In the first updates, the contribution of bins beyond `--beyond` to the means of
rewards, values and slow values, replayed and imagined, is therefore rounding. With `--in-full`, the last bits of
probabilities count, as in the reference.

    python benchmarks/far_bins.py --seeds 0 1 2 --dtype bfloat16 --in-full
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from worldflux import WorldFluxAgent
from worldflux.nn.distributions import TwoHot


def watch(seed: int, dtype: str, updates: int, beyond: float, in_full: bool) -> tuple[float, float]:
    """Trains, and returns the largest contribution of far bins to the mean of any call and to any single row."""
    agent = WorldFluxAgent(
        "dreamerv3:tiny",
        "CartPole-v1",
        train_ratio=64,
        seq_len=16,
        batch_size=16,
        learning_rate=1e-3,
        learning_starts=1024,
        model_kwargs={"warmup_steps": 100, "dtype": dtype},
        seed=seed,
        device="cpu",
    )
    own = TwoHot.mean.fget  # type: ignore[attr-defined]
    shares = [(0.0, 0.0)]

    def mean(dist: TwoHot) -> Tensor:
        if in_full:
            dist._rounding = 0.0
        far = TwoHot(dist.logits.detach(), torch.where(dist.bins.abs() > beyond, dist.bins, 0.0))
        far._rounding = dist._rounding
        share = own(far)
        shares.append((float(share.mean().abs()), float(share.abs().max())))
        return own(dist)

    TwoHot.mean = property(mean)  # type: ignore[assignment]
    try:
        agent.learn(agent.learning_starts + 4 * (updates - 1), log_interval=None)
    finally:
        TwoHot.mean = property(own)  # type: ignore[assignment]
    means, rows = zip(*shares, strict=True)
    return max(means), max(rows)


def main() -> None:
    """Prints one line per seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(12)))
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--beyond", type=float, default=1e4)
    parser.add_argument("--in-full", action="store_true", help="also count differences that are rounding")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("seed  far bins, mean of rows  largest row")
    for seed in args.seeds:
        mean, row = watch(seed, args.dtype, args.updates, args.beyond, args.in_full)
        print(f"{seed:4d}  {mean:22.3g}  {row:11.3g}", flush=True)


if __name__ == "__main__":
    main()
