"""How long one gradient step and one acting step take; median of many after a warm-up, as lines of JSON.

    python benchmarks/throughput.py --preset dreamerv3:reference-1m --device cpu --threads 2
    python benchmarks/throughput.py --preset dreamerv3:tiny --obs vector --batch 16 --length 16
    python benchmarks/throughput.py --preset tdmpc2:tiny tdmpc2:reference-5m
    python benchmarks/throughput.py --preset tdmpc2:tiny --online dmc/walker-walk --steps 100

The gradient step is the whole of `Trainer.step`: forward, backward, clipping, optimiser, target networks. Sampling from
the buffer and copying to the device are not in it. The acting step takes an observation to an action as the family does
by itself: DreamerV3 with its policy, TD-MPC2 with its planner. With `--online` an agent learns in an environment
instead, and the shares of its time are printed: acting (state and plan), sampling, training, stepping, recording.
Run it on an idle machine, and compare only what one run printed.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gymnasium import spaces

from worldflux import WorldFluxAgent, create_world_model
from worldflux.agents.acting import Actor
from worldflux.envs import ActionCodec, ObservationCodec, make_vec_env
from worldflux.models.base import WorldModel
from worldflux.models.planning import Planner, PlannerConfig
from worldflux.training import Batch, Trainer, TrainingConfig

OBSERVATIONS = {"vector": (24,), "image": (3, 64, 64)}
ACTION_DIM = 6


def median_ms(function: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Median time of a call in milliseconds, after one call that is not counted."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times[1:])


def random_batch(model: WorldModel, obs_shape: tuple[int, ...], batch: int, length: int) -> Batch:
    """Windows of random experience; with stored latents, one context row more than `length`."""
    rows = length + bool(model.replay_extras())
    obs = torch.rand(batch, rows, *obs_shape)
    if len(obs_shape) == 3:
        obs = (obs * 255).to(torch.uint8)
    extras = {
        name: torch.zeros(batch, rows, *shape, dtype=torch.from_numpy(dtype.type([0])).dtype)
        for name, (shape, dtype) in model.replay_extras().items()
    }
    return Batch(
        obs=obs,
        actions=torch.rand(batch, rows, ACTION_DIM) * 2 - 1,
        rewards=torch.rand(batch, rows),
        terminations=torch.zeros(batch, rows, dtype=torch.bool),
        is_first=torch.zeros(batch, rows, dtype=torch.bool),
        extras=extras,
    )


def measure(preset: str, options: argparse.Namespace) -> dict[str, object]:
    """Times of one model."""
    obs_shape = OBSERVATIONS[options.obs]
    torch.manual_seed(0)
    model = create_world_model(
        preset, obs_shape=obs_shape, action_dim=ACTION_DIM, device=options.device, dtype=options.dtype
    )
    trainer = Trainer(model, TrainingConfig(device=options.device, grad_clip=0.0))
    family = model.online_defaults()
    batch_size, length = options.batch or family.batch_size, options.length or family.seq_len
    batch = random_batch(model, obs_shape, batch_size, length).to(trainer.device)
    assert isinstance(batch.obs, torch.Tensor)
    obs = batch.obs[:1, 0].expand(options.envs, *obs_shape).contiguous()
    planner = None
    if family.planner is not None:
        planner = Planner(model, PlannerConfig.from_model(model.config))
    codecs = ObservationCodec(spaces.Box(-1, 1, (24,))), ActionCodec(spaces.Box(-1, 1, (ACTION_DIM,)))
    actor = Actor(model, *codecs, planner)
    acting, starts = actor.start(options.envs), np.zeros(options.envs, dtype=bool)
    arrays = obs.cpu().numpy()

    def act() -> object:
        return actor.act(actor.observe(acting, arrays, starts, deterministic=False), starts, deterministic=False)

    return {
        "preset": preset,
        "obs": options.obs,
        "batch": [batch_size, length],
        "params": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "gradient_step_ms": round(median_ms(lambda: trainer.step(batch), options.repeats, trainer.device), 2),
        "acting_step_ms": round(median_ms(act, (2 if planner else 20) * options.repeats, trainer.device), 3),
        "envs": options.envs,
        "device": torch.cuda.get_device_name() if trainer.device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "dtype": options.dtype,
        "torch": torch.__version__,
    }


class Stopwatch:
    """Sums the time spent in functions, each under a name."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()

    def wrapped(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[name] += time.perf_counter() - started

        return timed


def measure_online(preset: str, options: argparse.Namespace) -> dict[str, object]:
    """Where the time goes while an agent learns in an environment."""
    env = make_vec_env(options.online, options.envs, seed=0)
    settings = {"batch_size": options.batch, "seq_len": options.length, "device": options.device}
    agent = WorldFluxAgent(preset, env, seed=0, learning_starts=300, **settings)
    agent.learn(320 + options.envs)  # the start and the training that it owes are not counted
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
        "env": options.online,
        "envs": options.envs,
        "env_steps_per_s": round(options.steps / total, 2),
        "gradient_steps_per_env_step": round((agent.trainer.step_count - updates) / options.steps, 3),
        "share_of_time": {**shares, "other": round(1 - sum(shares.values()), 4)},
        "device": torch.cuda.get_device_name() if agent.device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    """Measures every preset that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", nargs="+", default=["dreamerv3:tiny", "dreamerv3:reference-1m"])
    parser.add_argument("--obs", choices=OBSERVATIONS, default="vector")
    parser.add_argument("--batch", type=int, help="windows; default: the family's")
    parser.add_argument("--length", type=int, help="trained time steps per window; default: the family's")
    parser.add_argument("--online", metavar="ENV", help="learn in this environment, and print the shares of the time")
    parser.add_argument("--steps", type=int, default=100, help="environment steps that --online measures")
    parser.add_argument("--envs", type=int, default=1, help="environments that act together")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=None, help="of the CPU; default: torch's choice")
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    for preset in options.preset:
        print(json.dumps((measure_online if options.online else measure)(preset, options)), flush=True)


if __name__ == "__main__":
    main()
