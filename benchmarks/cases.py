"""Times a gradient step, an acting step and a plan at the reference sizes, and prints each as a line of JSON.

    python benchmarks/cases.py --cases dreamerv3-1m-proprio --device cuda --dtype bfloat16
    python benchmarks/cases.py --cases dreamerv3-size12m-decoder dreamerv3-size12m-redundancy --in-turn --threads 1

The sizes are the authors' own: 6 continuous actions; observations of 24 numbers or 64x64 pixels; 16 windows of 64 steps
and 15 imagined steps for DreamerV3; 256 windows of 3 transitions for TD-MPC2; plans of 512 candidates, 6 iterations and
3 steps. A gradient step is the agent's complete step: forward, backward, clipping, optimiser, target networks. Its
batch comes from a replay buffer that the agent has filled; sampling and copying to the device are not included. An
acting step goes from a NumPy observation to a NumPy action of the policy, and a plan to an action of the planner.
`throughput.py` runs this script in a separate process for each case.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import gymnasium
import numpy as np
import rows


@dataclass(frozen=True)
class Case:
    """A size at which implementations are compared."""

    preset: str
    obs_shape: tuple[int, ...]
    """Shape of an observation; images have their channels last."""
    batch: int
    """Windows per gradient step."""
    length: int
    """Time steps per window; TD-MPC2 forms one transition fewer from them."""
    fields: dict[str, Any] = field(default_factory=dict)
    """Fields of the model's configuration that differ from the preset."""


IMAGE, STACKED = (64, 64, 3), (64, 64, 9)
REFERENCE = {
    "dreamerv3-1m-proprio": Case("dreamerv3:reference-1m", (24,), 16, 64),
    "dreamerv3-12m-pixels": Case("dreamerv3:reference-12m", IMAGE, 16, 64),
    "tdmpc2-5m-state": Case("tdmpc2:reference-5m", (24,), 256, 4),
    "tdmpc2-5m-pixels": Case("tdmpc2:reference-5m", STACKED, 256, 4),
}
TINY = {
    "dreamerv3-tiny": Case("dreamerv3:tiny", (24,), 16, 16),
    "tdmpc2-tiny": Case("tdmpc2:tiny", (24,), 256, 4),
}
"""Sizes that are not compared, because no peer has them."""
DECODER = {
    "dreamerv3-size12m-decoder": Case("dreamerv3:size12m", IMAGE, 4, 16),
    "dreamerv3-size12m-redundancy": Case("dreamerv3:size12m", IMAGE, 4, 16, {"representation": "redundancy"}),
}
"""DreamerV3 with and without a decoder, for `--in-turn`, in windows that a CPU can train on in a second."""
CASES = {**REFERENCE, **TINY, **DECODER}
ACTION_DIM = 6
MATRIX_SIZES = {"cpu": (1024, 2048), "cuda": (4096, 8192)}
COMPILE = {"auto": "auto", "on": True, "off": False}


class Noise(gymnasium.Env[Any, Any]):
    """An environment with the shapes of a case, random observations and rewards, and both kinds of episode ends."""

    def __init__(self, case: Case) -> None:
        images = len(case.obs_shape) == 3
        limits, dtype = ((0, 255), np.uint8) if images else ((-np.inf, np.inf), np.float32)
        self.observation_space = gymnasium.spaces.Box(*limits, case.obs_shape, dtype)
        self.action_space = gymnasium.spaces.Box(-1, 1, (ACTION_DIM,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Starts an episode."""
        super().reset(seed=seed)
        self.left = int(self.np_random.integers(20, 60))
        return self._noise(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Accepts any action."""
        self.left -= 1
        over, terminated = self.left == 0, bool(self.np_random.integers(2))
        return self._noise(), float(self.np_random.random()), over and terminated, over and not terminated, {}

    def _noise(self) -> np.ndarray:
        space = self.observation_space
        if space.dtype == np.uint8:
            return self.np_random.integers(0, 256, space.shape, np.uint8)
        return self.np_random.standard_normal(space.shape, np.float32)


def batch_of(agent: Any, case: Case) -> Any:
    """Windows from the replay buffer that the agent filled by acting, as its own gradient steps use them."""
    window = case.length + bool(agent.model.replay_extras())  # an additional row holds the latents to start from
    agent.learn(case.batch + window + 20)
    return agent.replay_buffer.sample(case.batch, window, agent.device)


def save(batch: Any, path: str) -> None:
    """Writes a batch for the peers, which may not have PyTorch; `peers/batches.py` reads it."""
    np.savez(path, **{name: tensor.cpu().numpy() for name, tensor in batch.named_tensors().items()})


def flops_of(function: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products and convolutions in one call, including the backward pass.

    They are counted as PyTorch executes them, with the formulas of `torch.utils.flop_counter`, that is, two operations
    per multiply-add. Operations inside compiled code or a captured graph are not counted.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import flop_registry

    class Counter(TorchDispatchMode):
        # FlopCounterMode also tracks modules, with hooks that fail for modules called under no_grad.
        total = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            formula = flop_registry.get(func._overloadpacket)
            if formula is None and func is not torch.ops.prim.device.default:
                with self:  # without autograd, a composite of counted operations may arrive as one
                    result = func.decompose(*args, **kwargs)
                if result is not NotImplemented:
                    return result
            result = func(*args, **kwargs)
            if formula is not None:
                self.total += formula(*args, **kwargs, out_val=result)
            return result

    with Counter() as counter:
        function()
    return int(counter.total)


def make_agent(
    case: Case, options: argparse.Namespace, *, compiled: str, planner: str | None, model: Any = None
) -> Any:
    """An agent that acts with the planner (`"mppi"`) or the policy (None), with a new or a given model."""
    from worldflux import WorldFluxAgent

    # Omitted if it is the default.
    settings = {} if compiled == "auto" else {"compile": COMPILE[compiled]}
    if model is None:
        settings["model_kwargs"] = {"dtype": options.dtype, **case.fields}
    return WorldFluxAgent(
        case.preset if model is None else model,
        Noise(case),
        planner=planner,
        batch_size=case.batch,
        seq_len=case.length,
        buffer_size=4096,  # more than a batch, but fits into memory
        learning_starts=4096,  # only fills the buffer; gradient steps are taken here
        device=options.device,
        seed=0,
        **settings,
    )


def acting(agent: Any, case: Case, envs: int) -> Callable[[], object]:
    """A function that computes actions for the next observations."""
    rng = np.random.default_rng(0)
    shape = (envs, *agent.model.config.obs_shape)
    images = len(case.obs_shape) == 3
    obs = rng.integers(0, 256, shape, np.uint8) if images else rng.standard_normal(shape).astype(np.float32)
    actor, starts = agent.actor, np.zeros(envs, dtype=bool)
    memory = actor.start(envs)

    def act() -> None:
        nonlocal memory
        memory = actor.observe(memory, obs, starts, deterministic=False)
        memory = actor.act(memory, starts, deterministic=False)
        memory.actions.cpu().numpy()

    return act


def measure(name: str, options: argparse.Namespace, threads: int) -> None:
    """Measures one case and prints its rows."""
    import torch

    case, cuda = CASES[name], options.device.startswith("cuda")
    torch.set_num_threads(threads)
    wait = torch.cuda.synchronize if cuda else None
    agent = make_agent(case, options, compiled=options.compile, planner=None)
    facts = {
        "device": torch.cuda.get_device_name() if cuda else rows.cpu_name(),
        "threads": threads,
        "dtype": options.dtype,
        "compile": options.compile,
        "params": sum(p.numel() for p in agent.model.parameters() if p.requires_grad),
        "versions": {"torch": torch.__version__},
    }

    def report(what: str, times: dict[str, Any], flops: int, more: dict[str, Any]) -> None:
        speed = {"gflop": flops / 1e9, "tflop_per_s": flops / times["ms"] / 1e9}
        rows.print_row("worldflux", name, what, {**times, **speed, **facts, **more})

    batch = batch_of(agent, case)
    if options.save is not None:
        save(batch, options.save)
    times = rows.clock(lambda: agent.trainer.step(batch), options.repeats, options.budget, wait)
    peak = torch.cuda.max_memory_allocated() / (1 << 20) if cuda else rows.peak_resident_mib()
    agent.trainer.check_finite()
    plain = make_agent(case, options, compiled="off", planner=None) if options.compile != "auto" or cuda else agent
    report(rows.GRADIENT, times, flops_of(lambda: plain.trainer.step(batch)), {"peak_mib": round(peak, 1)})
    for what, planner in ((rows.ACTING, None), (rows.PLAN, "mppi")):
        one = make_agent(case, options, compiled=options.compile, planner=planner, model=agent.model)
        act = acting(one, case, options.envs)
        times = rows.clock(act, 4 * options.repeats, options.budget / 3, wait)
        counted = (
            make_agent(case, options, compiled="off", planner=planner, model=plain.model) if plain is not agent else one
        )
        report(what, times, flops_of(acting(counted, case, options.envs)), {"envs": options.envs})


def in_turn(names: Sequence[str], options: argparse.Namespace, threads: int) -> None:
    """Takes gradient steps of several cases in turn, and prints the time of each, also as a share of the first one's.

    A share depends less than two times on what else the machine does. Times are processor time on a CPU.
    """
    import torch

    torch.set_num_threads(threads)
    cuda = options.device.startswith("cuda")
    agents = [make_agent(CASES[name], options, compiled=options.compile, planner=None) for name in names]
    batches = [batch_of(agent, CASES[name]) for agent, name in zip(agents, names, strict=True)]
    times: list[list[float]] = [[] for _ in names]
    for _ in range(rows.UNCOUNTED["cuda" if cuda else "cpu"] + options.repeats):
        for agent, batch, taken in zip(agents, batches, times, strict=True):
            started = time.perf_counter() if cuda else time.process_time()
            agent.trainer.step(batch)
            if cuda:
                torch.cuda.synchronize()
            taken.append(1e3 * ((time.perf_counter() if cuda else time.process_time()) - started))
    counted = [taken[-options.repeats :] for taken in times]
    for name, agent, taken in zip(names, agents, counted, strict=True):
        shares = [mine / first for mine, first in zip(taken, counted[0], strict=True)]
        facts = {
            "ms": round(statistics.median(taken), 2),
            "ms_least": round(min(taken), 2),
            "share_of_first": round(statistics.median(shares), 3),
            "calls": len(taken),
            "params": sum(p.numel() for p in agent.model.parameters() if p.requires_grad),
            "device": torch.cuda.get_device_name() if cuda else rows.cpu_name(),
            "threads": threads,
            "dtype": options.dtype,
            "compile": options.compile,
        }
        rows.print_row("worldflux", name, rows.GRADIENT, facts)


def matrix_peak(options: argparse.Namespace, threads: int) -> None:
    """Prints the speed at which this machine multiplies square matrices, for the fastest of several sizes."""
    import torch

    torch.set_num_threads(threads)
    cuda = options.device.startswith("cuda")
    wait = torch.cuda.synchronize if cuda else None
    best: dict[str, Any] = {"tflop_per_s": 0.0}
    for size in MATRIX_SIZES["cuda" if cuda else "cpu"]:
        a, b = (torch.rand(size, size, device=options.device).to(getattr(torch, options.dtype)) for _ in range(2))
        times = rows.clock(lambda a=a, b=b: a @ b, options.repeats, 3.0, wait)  # type: ignore[misc]
        speed = 2 * size**3 / times["ms_least"] / 1e9
        if speed > best["tflop_per_s"]:
            best = {"size": size, "tflop_per_s": speed, "ms": times["ms_least"]}
    facts = {"device": options.device, "threads": threads, "dtype": options.dtype}
    rows.print_row("worldflux", "peak", rows.MATRIX, {**best, **facts})


def main() -> None:
    """Measures the requested cases."""
    parser = rows.parser(__doc__, CASES)
    parser.set_defaults(cases=tuple(REFERENCE))
    parser.add_argument("--compile", choices=tuple(COMPILE), default="auto", help="auto: on CUDA")
    parser.add_argument("--envs", type=int, default=1, help="number of environments that act in one batch")
    parser.add_argument("--save", metavar="FILE", help="file for the batch of a case, for the peers")
    parser.add_argument("--in-turn", action="store_true", help="only gradient steps of all cases, one after the other")
    parser.add_argument("--peak", action="store_true", help="only measure matrix multiplication")
    options = parser.parse_args()
    threads = rows.use_threads(options.threads)
    if options.peak:
        return matrix_peak(options, threads)
    if options.in_turn:
        return in_turn(options.cases, options, threads)
    for name in options.cases:
        measure(name, options, threads)


if __name__ == "__main__":
    sys.exit(main())
