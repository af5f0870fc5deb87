"""Measures the speed and memory of the replay buffer, compared with TorchRL's buffer with a SliceSampler.

    python benchmarks/replay.py                                # everything; 1,000,000 images take 13 GB of memory
    python benchmarks/replay.py --kind vector --rows 10000 100000
    python benchmarks/replay.py --memory                       # peak memory of full buffers instead
    python benchmarks/replay.py --show                         # the table of the stored results

TorchRL is not a dependency of worldflux: install it with `pip install torchrl`, preferably into a separate virtual
environment. Without it, only worldflux is measured. Both run on one core of one process and alternate, so that other
load affects both; values are medians of CPU time over the turns. If memory does not suffice for both, each has its own
process; sizes that do not fit at all are skipped with the reason.

Both store episodes of 500 transitions with observations, actions, rewards and episode ends. TorchRL has the fastest
settings: `ReplayBuffer` with `LazyTensorStorage`, `end_key`, `strict_length` and no key for truncations. In the column
`cached` it has `cache_values=True`, which computes the bounds of the episodes only once and is meant for data to which
nothing is added. Unlike worldflux, TorchRL does not store the observation after the last step.

    step       transitions stored per second, one step of one environment at a time, in a full buffer
    episode    the same, in whole episodes
    16x50      rows sampled per second, in batches of 16 windows of 50 rows; 256x4 accordingly

The results are written to `benchmarks/results/replay.csv`, replacing older results of the same sizes. The exit code is
1 if any measured number of sampled rows per second is below `--least` times that of TorchRL without `cached`.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import math
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from worldflux.accel.memory import free_memory, human
from worldflux.training import ReplayBuffer

RESULTS = Path(__file__).parent / "results" / "replay.csv"
SHAPES = {"vector": (24,), "image": (3, 64, 64)}
ACTION_DIM = 6
EPISODE = 500
BATCHES = ((16, 50), (256, 4))
LIBRARIES = ("worldflux", "torchrl", "torchrl cached")
COLUMNS = ("kind", "rows", "library", "what", "per_second")
Turn = tuple[Callable[[], object], int]
"""A function to repeat, and the number of rows that it processes."""


def episode_of(kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Observations `[T+1, ...]`, actions `[T, A]`, rewards `[T]` and truncations `[T]` of an episode."""
    rng, shape = np.random.default_rng(0), SHAPES[kind]
    obs = rng.integers(256, size=(EPISODE + 1, *shape), dtype=np.uint8)
    observed = obs if kind == "image" else obs.astype(np.float32)
    actions, rewards = rng.random((EPISODE, ACTION_DIM), np.float32), rng.random(EPISODE, np.float32)
    return observed, actions, rewards, np.arange(EPISODE) == EPISODE - 1


def worldflux_turns(kind: str, rows: int) -> dict[str, dict[str, Turn]]:
    """The measured operations of worldflux's buffer, which is full."""
    obs, actions, rewards, ends = episode_of(kind)
    buffer = ReplayBuffer(rows, SHAPES[kind], ACTION_DIM, seed=0)
    for _ in range(written_until_full(rows) // EPISODE):
        buffer.add_episode(obs, actions, rewards, truncations=ends)
    never = np.zeros(1, np.bool_)

    def step() -> None:
        buffer.add(obs[:1], actions[:1], rewards[:1], never, never)

    def whole_episode() -> None:
        buffer.end_episodes()
        buffer.add_episode(obs, actions, rewards, truncations=ends)

    turns: dict[str, Turn] = {
        f"{count}x{length}": (partial(buffer.sample, count, length), count * length) for count, length in BATCHES
    }
    return {"worldflux": {**turns, "step": (step, 1), "episode": (whole_episode, EPISODE)}}


def torchrl_turns(kind: str, rows: int) -> dict[str, dict[str, Turn]]:
    """The measured operations of TorchRL's buffer, which is full."""
    logging.disable(logging.INFO)  # it logs every storage
    from tensordict import TensorDict
    from torchrl.data import LazyTensorStorage
    from torchrl.data import ReplayBuffer as TorchRLBuffer
    from torchrl.data.replay_buffers.samplers import SliceSampler

    obs, actions, rewards, ends = (torch.from_numpy(array) for array in episode_of(kind))
    done = ends[:, None]
    following = {"done": done, "truncated": done, "terminated": torch.zeros_like(done)}
    is_first = torch.arange(EPISODE) == 0
    episode = TensorDict(
        {
            "obs": obs[:-1],
            "actions": actions,
            "rewards": rewards,
            "is_first": is_first,
            "next": TensorDict(following, [EPISODE]),
        },
        [EPISODE],
    )
    storage = LazyTensorStorage(rows)

    def buffer_for(count: int, length: int, cached: bool) -> Any:
        sampler = SliceSampler(
            num_slices=count, end_key=("next", "done"), truncated_key=None, strict_length=True, cache_values=cached
        )
        return TorchRLBuffer(storage=storage, sampler=sampler, batch_size=count * length)

    plain = {size: buffer_for(*size, cached=False) for size in BATCHES}
    cached = {size: buffer_for(*size, cached=True) for size in BATCHES}
    first = plain[BATCHES[0]]
    for _ in range(written_until_full(rows) // EPISODE):
        first.extend(episode)
    one = episode[1]
    turns: dict[str, dict[str, Turn]] = {
        name: {f"{count}x{length}": (buffers[count, length].sample, count * length) for count, length in BATCHES}
        for name, buffers in (("torchrl", plain), ("torchrl cached", cached))
    }
    turns["torchrl"] |= {"step": (lambda: first.add(one), 1), "episode": (lambda: first.extend(episode), EPISODE)}
    return turns


def written_until_full(rows: int) -> int:
    """Number of transitions after which every row of a buffer has been written, including spare ones."""
    return rows + max(rows // 10, 6000)


def per_second(turns: dict[str, dict[str, Turn]], repeats: int, least_seconds: float) -> dict[str, dict[str, float]]:
    """Median rows per second of each operation, measured in alternating turns of at least `least_seconds`."""
    measured: dict[str, dict[str, list[float]]] = {name: {what: [] for what in of} for name, of in turns.items()}
    for what in turns[next(iter(turns))]:
        sides = {name: of[what] for name, of in turns.items() if what in of}
        calls = {}
        for name, (function, _) in sides.items():
            function()  # the first call of some functions differs from later ones
            started = time.process_time()
            function()
            calls[name] = max(1, math.ceil(least_seconds / max(1e-6, time.process_time() - started)))
        for _ in range(repeats):
            for name, (function, rows) in sides.items():
                started = time.process_time()
                for _ in range(calls[name]):
                    function()
                measured[name][what].append(calls[name] * rows / (time.process_time() - started))
    return {name: {what: statistics.median(of[what]) for what in of} for name, of in measured.items()}


def one_case(options: argparse.Namespace) -> None:
    """Measures the given libraries in this process, and prints a line of JSON."""
    torch.set_num_threads(1)
    kind, rows = options.kind[0], options.rows[0]
    turns: dict[str, dict[str, Turn]] = {}
    for library in options.one:
        turns |= {"worldflux": worldflux_turns, "torchrl": torchrl_turns}[library](kind, rows)
    print(json.dumps(per_second(turns, options.repeats, options.seconds)))


def in_own_process(arguments: list[str]) -> Any:
    """Runs this script with the given arguments in a new process, and returns the JSON that it prints."""
    done = subprocess.run([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(kind: str, rows: int, libraries: list[str], options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """All results of one size; empty if memory does not suffice."""
    # Address space that is never written uses no memory.
    needed, free = int(1.05 * ReplayBuffer(rows, SHAPES[kind], ACTION_DIM).nbytes) + 10**9, free_memory()
    groups = [libraries] if free is None or needed * len(libraries) <= free else [[library] for library in libraries]
    if free is not None and needed > free:
        print(f"{kind}, {rows:,} rows: skipped, needs {human(needed)} of memory, but {human(free)} are free")
        return {}
    found: dict[str, dict[str, float]] = {}
    for group in groups:
        arguments = ["--one", *group, "--kind", kind, "--rows", str(rows)]
        found |= in_own_process([*arguments, "--repeats", str(options.repeats), "--seconds", str(options.seconds)])
    return found


def show(results: list[dict[str, Any]]) -> None:
    """Prints a table of the results and the ratios of worldflux to TorchRL."""
    figures = {(r["kind"], int(r["rows"]), r["library"], r["what"]): float(r["per_second"]) for r in results}
    print("| rows per second | stored | worldflux | TorchRL | ratio | TorchRL cached | ratio |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for kind, rows, what in dict.fromkeys((kind, rows, what) for kind, rows, _, what in figures):
        ours, *theirs = (figures.get((kind, rows, library, what)) for library in LIBRARIES)
        cells = [f"{ours:,.0f}" if ours else ""]
        for other in theirs:
            cells += [f"{other:,.0f}", f"{ours / other:.1f}"] if ours and other else ["", ""]
        print(f"| {kind}, {what} | {rows:,} | " + " | ".join(cells) + " |")


def memory(options: argparse.Namespace) -> None:
    """Prints the peak memory of full buffers, each in its own process, and the size of their raw data."""
    print("| buffer | filled by | raw data | peak | ratio |\n| --- | --- | --- | --- | --- |")
    for kind, rows in (("vector", 1_000_000), ("image", 100_000)):
        for way in ("step", "episode"):
            found = in_own_process(["--fill", way, "--kind", kind, "--rows", str(rows)])
            raw, peak = found["raw"], found["peak"]
            print(f"| {rows:,} {kind} rows | {way} | {human(raw)} | {human(peak)} | {peak / raw:.3f} |", flush=True)


def fill(kind: str, rows: int, way: str) -> None:
    """Fills a buffer, and prints by how much the peak memory exceeded the memory of the process before."""
    obs, actions, rewards, ends = episode_of(kind)
    n_envs = 8 if way == "step" else 1
    before = resident()
    buffer = ReplayBuffer(rows, SHAPES[kind], ACTION_DIM, n_envs=n_envs)
    if way == "episode":
        for _ in range(written_until_full(rows) // EPISODE):
            buffer.add_episode(obs, actions, rewards, truncations=ends)
    else:
        no = np.zeros(n_envs, np.bool_)
        for t in range(written_until_full(rows) // n_envs):
            i = t % (EPISODE - n_envs)
            at = slice(i, i + n_envs)
            end = no | (t % EPISODE == EPISODE - 1)
            buffer.add(obs[at], actions[at], rewards[at], no, end, final_obs=obs[at])
    assert len(buffer) == rows
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(json.dumps({"raw": rows * transition_bytes(kind), "peak": peak - before}))


def transition_bytes(kind: str) -> int:
    """Raw bytes of a transition: observation, action, reward and two flags."""
    return math.prod(SHAPES[kind]) * (1 if kind == "image" else 4) + 4 * ACTION_DIM + 4 + 2


def resident() -> int:
    """Resident memory of this process in bytes (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def main() -> int:
    """Runs the requested measurements, and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rows", nargs="+", type=int, default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--repeats", type=int, default=15, help="number of turns")
    parser.add_argument("--seconds", type=float, default=0.05, help="minimum CPU time per turn")
    parser.add_argument("--least", type=float, default=5.0, help="lowest accepted ratio of sampled rows")
    parser.add_argument("--memory", action="store_true", help="measure peak memory instead")
    parser.add_argument("--show", action="store_true", help="only print the table of the stored results")
    parser.add_argument("--one", nargs="+", choices=("worldflux", "torchrl"), help=argparse.SUPPRESS)
    parser.add_argument("--fill", choices=("step", "episode"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        one_case(options)
    elif options.fill:
        fill(options.kind[0], options.rows[0], options.fill)
    elif options.memory:
        memory(options)
    elif options.show:
        show(stored())
    else:
        return compare(options)
    return 0


def compare(options: argparse.Namespace) -> int:
    """Measures, writes and prints all sizes, and returns the exit code."""
    libraries = ["worldflux", "torchrl"] if find_spec("torchrl") else ["worldflux"]
    if len(libraries) == 1:
        print("TorchRL is not installed (pip install torchrl): only worldflux is measured")
    results: list[dict[str, Any]] = []
    least = math.inf
    for kind in options.kind:
        for rows in options.rows:
            found = measure(kind, rows, libraries, options)
            for library, figures in found.items():
                results += [dict(zip(COLUMNS, (kind, rows, library, *item), strict=True)) for item in figures.items()]
            if "torchrl" in found:
                sampled = [f"{count}x{length}" for count, length in BATCHES]
                least = min(least, *(found["worldflux"][size] / found["torchrl"][size] for size in sampled))
    measured = {(row["kind"], row["rows"]) for row in results}
    kept = [row for row in stored() if (row["kind"], int(row["rows"])) not in measured] if RESULTS.exists() else []
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(kept + [{**row, "per_second": round(row["per_second"])} for row in results])
    show(results)
    return int(least < options.least)


def stored() -> list[dict[str, Any]]:
    """The stored results."""
    with RESULTS.open(newline="") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    sys.exit(main())
