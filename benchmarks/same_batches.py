"""Compares DreamerV3's losses with the reference's, on the same batches and from the same initial weights.

    python benchmarks/same_batches.py batches.npz                       # from peers/dreamerv3_batches.py
    python benchmarks/same_batches.py batches.npz --imitate-rounding

The random samples (latents, actions, imagined trajectories) differ, so the losses agree only up to the noise of one
batch. `--imitate-rounding` sums mirrored bins of two-hot distributions as the reference does on a CPU, with a fused
multiply-add, which rounds only one of the two products.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from worldflux.interop import load_official_dreamerv3
from worldflux.nn.distributions import TwoHot
from worldflux.training import Batch, Trainer, TrainingConfig

LOSSES = {"value": "critic", "repval": "replay_critic", "rew": "reward", "con": "continue", "dyn": "dynamics"}
LEARNING_RATE, WARMUP = 1e-3, 100  # as in `loops.py`


def fused_mean(dist: TwoHot) -> Tensor:
    """The mean as XLA computes it on a CPU: `fma(p, b, round(p' * b'))` per pair, with the upper product rounded."""
    middle = len(dist.bins) // 2
    probs, bins = dist.probs, dist.bins
    rounded = (probs[..., middle + 1 :] * bins[middle + 1 :]).double()
    exact = (probs[..., :middle].double() * bins[:middle].double()).flip(-1)
    return (exact + rounded).float().sum(-1)


def batch_of(arrays: dict[str, Tensor]) -> Batch:
    """Converts the reference's rows `[B, T, ...]`, aligned with the previous action, to rows aligned with the next."""

    def ahead(x: Tensor) -> Tensor:
        return torch.cat([x[:, 1:], torch.zeros_like(x[:, :1])], 1)

    terminal = ahead(arrays["is_terminal"])
    return Batch(
        obs=arrays["vector"].float(),
        actions=F.one_hot(arrays["action"].long(), 2).float(),
        rewards=ahead(arrays["reward"].float()),
        terminations=terminal,
        truncations=ahead(arrays["is_last"]) & ~terminal,
        is_first=arrays["is_first"],
        extras={"deter": arrays["dyn/deter"], "stoch": arrays["dyn/stoch"].argmax(-1) + 1},
    )


def main() -> None:
    """Prints the losses of worldflux and of the reference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("batches")
    parser.add_argument("--imitate-rounding", action="store_true")
    parser.add_argument("--every", type=int, default=5, help="gradient steps between printed lines")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if options.imitate_rounding:
        TwoHot.mean = property(fused_mean)  # type: ignore[assignment]
    with np.load(options.batches) as file:
        arrays = {name: file[name] for name in file.files}
    weights = {name.removeprefix("weights/"): x for name, x in arrays.items() if name.startswith("weights/")}
    shape = arrays["batch/0/vector"].shape[2:]
    model = load_official_dreamerv3(weights, obs_shape=shape, action_dim=2, action_type="discrete", stoch_discrete=16)
    config = TrainingConfig(learning_rate=LEARNING_RATE, warmup_steps=WARMUP, weight_decay=0.0, grad_clip=0.0)
    trainer = Trainer(model, config)
    print("update  " + "  ".join(f"{name:>13} (reference)" for name in LOSSES.values()))
    for update in range(sum(name.startswith("batch/") and name.endswith("/vector") for name in arrays)):
        prefix = f"batch/{update}/"
        rows = {name.removeprefix(prefix): x for name, x in arrays.items() if name.startswith(prefix)}
        losses = trainer.step(batch_of({name: torch.from_numpy(x) for name, x in rows.items()}))
        if (update + 1) % options.every == 0:
            pairs = [(float(losses[b]), float(arrays[f"losses/{update}/loss/{a}"])) for a, b in LOSSES.items()]
            print(f"{update + 1:6d}  " + "  ".join(f"{ours:13.3f} {theirs:11.3f}" for ours, theirs in pairs))


if __name__ == "__main__":
    main()
