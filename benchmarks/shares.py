"""Measures how an agent's time is divided between acting, sampling, training, stepping and recording.

python benchmarks/shares.py dmc/walker-walk --preset tdmpc2:tiny --steps 100
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import rows
import torch

from worldflux import WorldFluxAgent
from worldflux.envs import make_vec_env


class Stopwatch:
    """Sums the time spent in functions, by name."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()

    def wrapped(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function with its time added to the sum of `name`."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[name] += time.perf_counter() - started

        return timed


def shares_of(preset: str, options: argparse.Namespace) -> dict[str, Any]:
    """Steps per second and shares of the time, excluding the start of training.

    On CUDA, the share of a function is the time until it returns; work that it leaves to the device counts towards the
    next function that waits for it.
    """
    env = make_vec_env(options.env, options.envs, seed=0)
    agent = WorldFluxAgent(
        preset,
        env,
        seed=0,
        learning_starts=300,
        batch_size=options.batch,
        seq_len=options.length,
        device=options.device,
    )
    agent.learn(320 + options.envs)  # the start and its training are not counted
    assert agent.replay_buffer is not None and agent._collector is not None
    watch = Stopwatch()
    for owner, names, label in (
        (agent.actor, ("observe", "act"), "acting"),
        (agent.replay_buffer, ("sample",), "sampling"),
        (agent.trainer, ("step",), "training"),
        (env, ("step_wait",), "stepping"),
        (agent._collector.recorder, ("add_vec_step",), "recording"),
    ):
        for name in names:
            setattr(owner, name, watch.wrapped(label, getattr(owner, name)))
    updates, started = agent.trainer.step_count, time.perf_counter()
    agent.learn(options.steps, reset_num_timesteps=False)
    if agent.device.type == "cuda":
        torch.cuda.synchronize(agent.device)
    total = time.perf_counter() - started
    shares = {name: round(seconds / total, 4) for name, seconds in watch.seconds.items()}
    return {
        "preset": preset,
        "env": options.env,
        "envs": options.envs,
        "batch": [agent.batch_size, agent.seq_len],
        "env_steps_per_s": round(options.steps / total, 2),
        "gradient_steps_per_env_step": round((agent.trainer.step_count - updates) / options.steps, 3),
        "share_of_time": {**shares, "other": round(1 - sum(shares.values()), 4)},
        "device": torch.cuda.get_device_name() if agent.device.type == "cuda" else rows.cpu_name(),
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    """Prints one line of JSON per preset."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("env", help="name of the environment, as in make_env")
    parser.add_argument("--preset", nargs="+", default=["tdmpc2:tiny"])
    parser.add_argument("--steps", type=int, default=100, help="number of measured environment steps")
    parser.add_argument("--envs", type=int, default=1, help="number of parallel environments")
    parser.add_argument("--batch", type=int, help="windows per gradient step; default: that of the algorithm")
    parser.add_argument("--length", type=int, help="time steps per window; default: that of the algorithm")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, help="CPU threads; default: all cores that this process may use")
    options = parser.parse_args()
    torch.set_num_threads(rows.use_threads(options.threads))
    for preset in options.preset:
        print(json.dumps(shares_of(preset, options)), flush=True)


if __name__ == "__main__":
    sys.exit(main())
