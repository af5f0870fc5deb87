"""Predicts how long training takes on more ranks, from constants that it measures on this machine.

    python benchmarks/cost_model.py dreamerv3:tiny dmc/walker-walk --ranks 1 2 4 --check 1 2
    python benchmarks/cost_model.py dreamerv3:size12m dmc/walker-walk --device cuda --ranks 1 8 64
    python benchmarks/cost_model.py dreamerv3:size12m dmc/walker-walk --ranks 1 8 64 --assume a100 a100-ethernet

With batches of B windows in all, N ranks with E environments each, and a gradient step every k environment steps:

    gradient step  = fixed + per_window * B / N + messages * latency * log2(N) + 2 (N-1)/N * bytes / bandwidth
    vector step    = acting + environments                    of N * E environment steps
    environment step = (vector step + N * E / k * gradient step) / (N * E)

`fixed` and `per_window` come from gradient steps of `Trainer.train` with several batch sizes, `latency` and
`bandwidth` from messages between two ranks of this machine, and the others from the agent's own acting and a vector
of the environments. `--check` trains with `WorldFluxAgent.learn` on so many ranks, and prints what was measured beside
what was predicted. The output is one line of JSON for each row.

`--assume` predicts for GPUs that are not at hand, from assumptions (`GPUS`) instead of measurements. `fixed` is then
the number of operations of a gradient step times the seconds of each: in the CUDA graph of a single process, or
launched from Python on several ranks, which use no graphs. The same applies to `acting`, and `per_window` is the number
of floating-point operations divided by the rate that is reached. Only the environments are measured.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from cases import flops_of
from scaling import Clock, launch
from stable_baselines3.common.callbacks import BaseCallback
from torch.utils._python_dispatch import TorchDispatchMode

from worldflux import WorldFluxAgent
from worldflux.accel import ranks
from worldflux.envs import make_vec_env
from worldflux.training import Trainer, TrainingConfig

MESSAGES = (2**8, 2**16, 2**20, 2**23)
"""Numbers in the messages from which latency and bandwidth are estimated."""


@dataclass(frozen=True)
class Gpu:
    """Assumptions about a GPU and its connection to the others."""

    launched: float
    """Seconds of a small operation that Python launches."""
    captured: float
    """Seconds of a small operation in a CUDA graph."""
    flops: float
    """Floating-point operations per second that training reaches."""
    latency: float
    """Seconds of a short message between two of them."""
    bandwidth: float
    """Bytes per second between two of them."""


GPUS = {
    "a100": Gpu(launched=8e-6, captured=2.5e-6, flops=0.3 * 156e12, latency=3e-5, bandwidth=0.7 * 300e9),
    "a100-ethernet": Gpu(launched=8e-6, captured=2.5e-6, flops=0.3 * 156e12, latency=1e-4, bandwidth=0.7 * 12.5e9),
}
"""A100s of one machine, and of machines with 100 Gbit/s: 30 % of the peak in TF32, and 70 % of that of the links."""


@dataclass(frozen=True)
class Constants:
    """What a model, an environment and a machine contribute to the time of a training."""

    fixed: float
    """Seconds of a gradient step that do not depend on the batch size."""
    per_window: float
    """Seconds of a gradient step for each window."""
    acting: float
    """Seconds in which the agent chooses the actions of a vector step."""
    environments: float
    """Seconds in which the environments take a vector step."""
    messages: float
    """Messages in which the ranks exchange numbers, for each gradient step."""
    bytes: int
    """Bytes of the gradients."""
    latency: float
    """Seconds of a short message between two ranks."""
    bandwidth: float
    """Bytes per second of a long message between two ranks."""
    graph: float = 1.0
    """What a CUDA graph leaves of `fixed` and `acting` in a single process."""

    def alone(self) -> Constants:
        """The constants of a single process."""
        return replace(self, fixed=self.fixed * self.graph, acting=self.acting * self.graph)

    def gradient_step(self, batch: int, count: int) -> float:
        """Seconds of a gradient step on `count` ranks."""
        return self.fixed + self.per_window * batch / count + self.exchange(count)

    def exchange(self, count: int) -> float:
        """Seconds of the exchanges in a gradient step on `count` ranks."""
        if count == 1:
            return 0.0
        return self.messages * self.latency * math.log2(count) + 2 * (count - 1) / count * self.bytes / self.bandwidth


def timed(function: Callable[[], object], calls: int = 200) -> float:
    """Median seconds of a call. All ranks make the same number of calls."""
    times = []
    for _ in range(calls):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def make_agent(options: argparse.Namespace) -> WorldFluxAgent:
    """An agent with its environments."""
    settings = {} if options.batch is None else {"batch_size": options.batch}
    env = make_vec_env(options.env, n_envs=options.envs)
    return WorldFluxAgent(options.model, env, device=options.device, seed=0, **settings)


def collected(options: argparse.Namespace) -> WorldFluxAgent:
    """An agent that has collected enough for its batches, without training."""
    agent = make_agent(options)
    ratio, agent.train_ratio = agent.train_ratio, 0
    agent.learn(agent.n_envs * ranks.size() * (agent.batch_size + agent.seq_len + 1))
    agent.train_ratio = ratio
    return agent


def train(agent: WorldFluxAgent, batch: int, steps: int) -> Clock:
    """Takes gradient steps with `Trainer.train` on what the agent has collected."""
    clock, ignored = Clock(), min(steps, 5)
    config = TrainingConfig(
        total_steps=steps + ignored, batch_size=batch, sequence_length=agent.seq_len, device=agent.device
    )
    trainer = Trainer(agent.model, config, [clock])
    trainer.train(agent.replay_buffer, num_steps=ignored)
    clock.steps.clear()
    clock.messages = 0
    trainer.train(agent.replay_buffer)
    return clock


def alone(options: argparse.Namespace) -> dict[str, Any]:
    """What a single rank can tell of the constants."""
    agent = collected(options)
    env = agent.get_env()
    assert env is not None
    env.reset()
    actions = np.stack([env.action_space.sample() for _ in range(env.num_envs)])
    found = {
        "environments": timed(lambda: env.step(actions)),
        "bytes": 4 * sum(weight.numel() for weight in agent.model.parameters() if weight.requires_grad),
    }
    if options.assume:
        return found | counts(agent)
    batch = agent.batch_size
    seconds = {
        size: statistics.median(train(agent, size, options.steps).steps)
        for size in sorted({max(1, batch // part) for part in (8, 4, 2, 1)})
    }
    per_window, fixed = np.polyfit(list(seconds), list(seconds.values()), 1)
    return found | {
        "fixed": max(float(fixed), 0.0),
        "per_window": float(per_window),
        "acting": timed(acting(agent), 50),
    }


def acting(agent: WorldFluxAgent) -> Callable[[], object]:
    """A function that chooses the actions of a vector step, as the agent does once it has learned something."""
    env, starts, state = agent.get_env(), np.zeros(agent.n_envs, dtype=bool), None
    assert env is not None
    obs = env.reset()

    def act() -> None:
        nonlocal state
        _, state = agent.predict(obs, state, starts)

    return act


def _all_reduce(message: torch.Tensor) -> None:
    dist.all_reduce(message)
    if message.is_cuda:
        torch.cuda.synchronize(message.device)


def together(options: argparse.Namespace) -> dict[str, Any]:
    """What it takes several ranks to measure: messages of a gradient step, and how long they take."""
    torch.set_num_threads(1)
    ranks.join()
    seconds = []
    for numbers in MESSAGES:
        message = torch.zeros(numbers, device=options.device)
        seconds.append(timed(partial(_all_reduce, message), 100 if numbers > 2**20 else 400))
    per_byte, latency = np.polyfit([4 * numbers for numbers in MESSAGES], seconds, 1, w=1 / np.array(seconds))
    messages = train(collected(options), ranks.size(), 3).messages / 3
    ranks.leave()
    return {"latency": max(float(latency), seconds[0] / 2), "bandwidth": 1 / float(per_byte), "messages": messages}


class Steps(BaseCallback):
    """The time at which each vector step has ended."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[tuple[int, float]] = []

    def _on_step(self) -> bool:
        self.times.append((self.num_timesteps, time.perf_counter()))
        return True


def learn(options: argparse.Namespace) -> dict[str, Any]:
    """Trains an agent, and returns the seconds of an environment step of all ranks, once gradient steps are taken."""
    torch.set_num_threads(1)
    ranks.join()
    agent, steps = make_agent(options), Steps()
    begin = agent.learning_starts + agent.n_envs * ranks.size() + 1
    end = begin + math.ceil(options.steps * agent.batch_size * agent.seq_len / agent.train_ratio)
    agent.learn(begin)  # with the burst of TD-MPC2
    agent.learn(end - begin, callback=steps, reset_num_timesteps=False)
    (first, began), *_, (last, ended) = steps.times
    ranks.leave()
    return {"env_step": (ended - began) / (last - first)}


def counts(agent: WorldFluxAgent) -> dict[str, float]:
    """The operations of gradient steps and acting, for an agent that has collected enough for a batch."""
    config = TrainingConfig(total_steps=1, batch_size=agent.batch_size, sequence_length=agent.seq_len)
    trainer, buffer, act = Trainer(agent.model, config), agent.replay_buffer, acting(agent)
    batch = buffer.sample(agent.batch_size, agent.seq_len + bool(agent.model.replay_extras()))

    def step() -> None:
        trainer.step(batch, buffer)

    step()
    act()
    with Operations() as in_step:
        step()
    with Operations() as in_acting:
        act()
    return {
        "operations": in_step.count,
        "acting_operations": in_acting.count,
        "flops": flops_of(step) / agent.batch_size,
    }


def assumed(gpu: Gpu, counted: dict[str, float]) -> Constants:
    """The constants of a GPU that is not at hand."""
    return Constants(
        fixed=counted["operations"] * gpu.launched,
        per_window=counted["flops"] / gpu.flops,
        acting=counted["acting_operations"] * gpu.launched,
        environments=counted["environments"],
        messages=counted["messages"],
        bytes=int(counted["bytes"]),
        latency=gpu.latency,
        bandwidth=gpu.bandwidth,
        graph=gpu.captured / gpu.launched,
    )


class Operations(TorchDispatchMode):
    """Counts the operations that PyTorch executes, each of which is a kernel or more on a GPU."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Counts one, unless it only gives a tensor another shape."""
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def prediction(agent: WorldFluxAgent, constants: Constants, count: int) -> dict[str, Any]:
    """What takes how long on `count` ranks, in seconds, and environment steps per hour."""
    constants = constants.alone() if count == 1 else constants
    steps, updates = agent.n_envs * count, agent.train_ratio / (agent.batch_size * agent.seq_len)
    update = constants.gradient_step(agent.batch_size, count)
    parts = {
        "gradient steps": steps * updates * (update - constants.exchange(count)),
        "exchange": steps * updates * constants.exchange(count),
        "acting": constants.acting,
        "environments": constants.environments,
    }
    parts = {name: seconds / steps for name, seconds in parts.items()}
    whole = sum(parts.values())
    return {
        "ranks": count,
        "gradient_step": update,
        "exchange": constants.exchange(count),
        "env_step": whole,
        "million_steps_in_hours": whole * 1e6 / 3600,
        "shares": {name: round(seconds / whole, 3) for name, seconds in parts.items()},
    }


def main() -> None:
    """Measures the constants, and prints them and what follows from them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("env")
    parser.add_argument("--envs", type=int, default=1, help="environments of each rank")
    parser.add_argument("--batch", type=int, help="windows in the batch of all ranks (default: that of the model)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--check", nargs="*", type=int, default=[], help="numbers of ranks to train with")
    parser.add_argument("--steps", type=int, default=20, help="gradient steps of each measurement")
    parser.add_argument(
        "--assume", nargs="+", choices=tuple(GPUS), help="GPUs to assume instead of measuring on this machine"
    )
    parser.add_argument("--measure", choices=tuple(MEASURED), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.measure:
        print(json.dumps(MEASURED[options.measure](options)))
        return
    measured = launch(2, ["together", *sys.argv[1:]], __file__) | launch(1, ["alone", *sys.argv[1:]], __file__)
    if options.assume:
        print(json.dumps({name: rounded(value) for name, value in measured.items()}), flush=True)
        machines = {name: assumed(GPUS[name], measured) for name in options.assume}
    else:
        machines = {"this machine": Constants(**measured)}
    agent = make_agent(options)
    for name, constants in machines.items():
        print(json.dumps({"machine": name} | {name: rounded(value) for name, value in asdict(constants).items()}))
        for count in sorted({*options.ranks, *options.check}):
            row = prediction(agent, constants, count)
            if count in options.check:
                row["measured_env_step"] = launch(count, ["learn", *sys.argv[1:]], __file__)["env_step"]
            print(json.dumps({name: rounded(value) for name, value in row.items()}), flush=True)


def rounded(value: Any) -> Any:
    """The value; a number with three digits."""
    return float(f"{value:.3g}") if isinstance(value, float) else value


MEASURED = {"alone": alone, "together": together, "learn": learn}
"""Measurements that each need processes of their own."""

if __name__ == "__main__":
    main()
