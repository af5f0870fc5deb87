"""Measures training on several ranks of one machine: throughput, and the cost of averaging the gradients.

    python benchmarks/scaling.py                                   # dreamerv3:tiny and tdmpc2:tiny, 1 and 2 ranks
    python benchmarks/scaling.py --models dreamerv3:size12m --ranks 1 2 --steps 10

Each measurement trains with `Trainer.train` on a recorded buffer, at the same global batch, with one thread for each
rank. It prints one line of JSON: the median of the seconds of a gradient step, the processor seconds of all ranks, and
the seconds that a rank spends in communication, which includes waiting for slower ranks.

`ddp` trains a model of one phase through `torch.nn.parallel.DistributedDataParallel` in place of the one message of
worldflux, for comparison. Use an idle machine, and compare only results of the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from worldflux import create_world_model
from worldflux.accel import ranks
from worldflux.envs import collect
from worldflux.replay.batch import Batch
from worldflux.training import Callback, Trainer, TrainingConfig

SHAPES = {"dreamerv3": (16, 16), "tdmpc2": (256, 4)}
"""Windows and rows of a batch over all ranks."""


class Clock(Callback):
    """Records the time of each gradient step, and of the communication in it."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.communication: list[float] = []
        self.within = 0.0
        self.messages = 0
        for name in ("all_reduce", "all_gather", "broadcast", "all_gather_object", "broadcast_object_list"):
            setattr(dist, name, self._timed(getattr(dist, name)))

    def _timed(self, function: Any) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            self.messages += 1
            try:
                return function(*args, **kwargs)
            finally:
                self.within += time.perf_counter() - began

        return timed

    def on_train_begin(self, trainer: Trainer) -> None:
        """Starts the clock."""
        self._began, self.within = time.perf_counter(), 0.0

    def on_step_end(self, step: int, losses: Any) -> None:
        """Records a step."""
        now = time.perf_counter()
        self.steps.append(now - self._began)
        self.communication.append(self.within)
        self._began, self.within = now, 0.0


class ThroughDDP(nn.Module):
    """A model whose only phase has its gradients averaged by `DistributedDataParallel`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        object.__setattr__(self, "wrapped", nn.parallel.DistributedDataParallel(_Loss(model)))

    @property
    def optimizer_spec(self) -> Any:
        """That of the model."""
        return self.model.optimizer_spec

    def loss(self, batch: Batch) -> Tensor:
        """The loss, through the forward pass of the wrapper."""
        return self.wrapped(batch)


class _Loss(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        return self.model.loss(batch).loss


def measure(preset: str, way: str, steps: int) -> dict[str, Any]:
    """Trains on this rank.

    Args:
        preset: Model to train.
        way: "ours", or "ddp".
        steps: Gradient steps to measure, after three that are not.
    """
    torch.set_num_threads(1)
    ranks.join()
    buffer = collect("Pendulum-v1", steps=2_000, seed=0)
    torch.manual_seed(0)
    model: nn.Module = create_world_model(preset, obs_shape=buffer.obs_shape, action_dim=buffer.action_dim)
    windows, rows = SHAPES[preset.partition(":")[0]]
    config = TrainingConfig(total_steps=steps + 3, batch_size=windows, sequence_length=rows, device="cpu")
    if way == "ddp":
        if ranks.size() > 1:
            ranks.GradientAverage.__call__ = lambda self: None  # type: ignore[method-assign]
            model = ThroughDDP(model)
    clock = Clock()
    trainer = Trainer(model, config, [clock])
    trainer.train(buffer, num_steps=3)
    clock.steps.clear()
    clock.communication.clear()
    began = time.process_time()
    trainer.train(buffer)
    used = ranks.every((time.process_time() - began) / steps)
    count = ranks.size()
    ranks.leave()
    return {
        "model": preset,
        "way": way,
        "ranks": count,
        "seconds": round(statistics.median(clock.steps), 5),
        "cpu_seconds": round(sum(used), 5),
        "communication": round(statistics.median(clock.communication), 5),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def launch(count: int, arguments: list[str], script: str = __file__) -> dict[str, Any]:
    """Starts a script with `--measure` and these arguments on so many ranks, and returns what rank 0 has printed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    command = [sys.executable, script, "--measure", *arguments]
    started = [
        subprocess.Popen(
            command, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE, text=True
        )
        for rank in range(count)
    ]
    outputs = [one.communicate()[0] for one in started]
    if any(one.returncode for one in started):
        raise SystemExit(f"{' '.join(arguments)}: a rank has failed")
    result: dict[str, Any] = json.loads(outputs[0].splitlines()[-1])
    return result


def main() -> None:
    """Measures each model with each number of ranks, in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["dreamerv3:tiny", "tdmpc2:tiny"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--ways", nargs="+", default=["ours", "ddp"], choices=["ours", "ddp"])
    parser.add_argument("--steps", type=int, default=40, help="gradient steps of each measurement")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each kind, in turn")
    parser.add_argument("--measure", nargs=3, metavar=("MODEL", "WAY", "STEPS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        preset, way, steps = options.measure
        print(json.dumps(measure(preset, way, int(steps))))
        return
    for _ in range(options.rounds):
        for preset in options.models:
            for way in options.ways:
                if way == "ddp" and not preset.startswith("dreamerv3"):
                    continue  # TD-MPC2 has a loss for each of its phases
                for count in options.ranks:
                    if way == "ours" or count > 1:
                        print(json.dumps(launch(count, [preset, way, str(options.steps)])), flush=True)


if __name__ == "__main__":
    main()
