"""What every measurement of speed here shares: the options, the clock, and the row of JSON that is printed.

Ours (`cases.py`) and the peers' (`peers/*.py`) are measured by scripts of the same form, a process for each case. This
file needs nothing but Python's own library, because a peer's environment need not have PyTorch.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

GRADIENT, ACTING, PLAN, MATRIX = "gradient step", "acting step", "plan", "matrix product"
UNCOUNTED = {"cpu": 2, "cuda": 8}
"""Calls before those that are counted: the first ones compile, fill caches and, on CUDA, are recorded."""
LEAST_CALLS = 2
"""Calls that are counted at least, however long they take."""


def parser(description: str | None, cases: Iterable[str]) -> argparse.ArgumentParser:
    """The options that every script here has; one that is added again replaces its older self."""
    found = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        conflict_handler="resolve",
    )
    names = tuple(cases)
    found.add_argument("--cases", nargs="+", choices=names, default=names, metavar="CASE", help=", ".join(names))
    found.add_argument("--device", default="cpu", help="cpu or cuda")
    found.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    found.add_argument("--threads", type=int, help="of the CPU; default: all cores that this process may use")
    found.add_argument("--repeats", type=int, default=50, help="counted calls at most")
    found.add_argument("--budget", type=float, default=30.0, help="seconds after which a measurement has enough calls")
    return found


def use_threads(asked: int | None) -> int:
    """Restricts this process to as many cores as it may have threads, before a library counts them.

    Returns:
        The number of threads.
    """
    if not hasattr(os, "sched_getaffinity"):  # macOS, Windows
        threads = asked or os.cpu_count() or 1
    else:
        cores = sorted(os.sched_getaffinity(0))
        threads = asked or len(cores)
        os.sched_setaffinity(0, cores[:threads])
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(threads)
    return threads


def clock(
    function: Callable[[], object],
    repeats: int,
    budget: float,
    wait: Callable[[], object] | None = None,
) -> dict[str, Any]:
    """Times calls of a function, each one alone: the clock stops when what it has started is done.

    Args:
        function: What is measured.
        repeats: Counted calls at most.
        budget: Seconds after which `LEAST_CALLS` counted calls are enough.
        wait: Waits until the device has done what `function` has started; None on a CPU.

    Returns:
        Milliseconds: the median, the quartiles, the least; the number of counted calls; and the seconds that the calls
        before them took longer than the median, which is what compiling and recording cost.
    """
    uncounted = UNCOUNTED["cpu" if wait is None else "cuda"]
    times: list[float] = []
    begun = time.perf_counter()
    while len(times) < uncounted + max(repeats, LEAST_CALLS):
        if len(times) >= uncounted + LEAST_CALLS and time.perf_counter() - begun > budget:
            break
        started = time.perf_counter()
        function()
        if wait is not None:
            wait()
        times.append((time.perf_counter() - started) * 1e3)
    early, counted = times[:uncounted], times[uncounted:]
    median = statistics.median(counted)
    low, _, high = statistics.quantiles(counted, n=4, method="inclusive")
    return {
        "ms": round(median, 4),
        "ms_quartiles": [round(low, 4), round(high, 4)],
        "ms_least": round(min(counted), 4),
        "calls": len(counted),
        "compile_s": round(sum(max(0.0, ms - median) for ms in early) / 1e3, 3),
    }


def peak_resident_mib() -> float:
    """The most memory that this process has had, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
    return round(peak / (1 << 20 if sys.platform == "darwin" else 1 << 10), 1)


def cpu_name() -> str:
    """The processor as it calls itself."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def print_row(who: str, case: str, what: str, facts: dict[str, Any]) -> None:
    """Prints one measurement as a line of JSON, on a line of its own whatever the measured code has printed."""
    print("\n" + json.dumps({"who": who, "case": case, "what": what, **facts}), flush=True)


def rows_in(text: str) -> list[dict[str, Any]]:
    """The rows that a script has printed between other things."""
    return [json.loads(line) for line in text.splitlines() if line.startswith('{"who": ')]


def run_peer(
    description: str | None,
    cases: Iterable[str],
    measure: Callable[[str, argparse.Namespace, int], None],
    *,
    folder: str = "",
    compiles: bool = True,
    half: tuple[str, ...] = ("cpu", "cuda"),
) -> None:
    """The main function of a peer's script: `measure` for every case that was asked for.

    Args:
        description: Of the script.
        cases: That it has.
        measure: Prints the rows of a case; is given the options and the number of threads.
        folder: Of the checkout, in which the peer's modules lie.
        compiles: Whether there is a form that a compiler has made faster besides another one.
        half: Devices on which the peer computes in half precision too.
    """
    options_of = parser(description, cases)
    options_of.add_argument("--repo", required=True, help="the peer's checkout")
    options_of.add_argument("--batch", required=True, help="file that `cases.py --save` has written for the case")
    if compiles:
        options_of.add_argument("--compile", action="store_true", help="the form that a compiler has made faster")
    options = options_of.parse_args()
    if options.dtype != "float32" and options.device not in half:
        options_of.error(f"this peer computes in float32 alone on {options.device}")
    threads = use_threads(options.threads)
    sys.path.insert(0, os.path.join(options.repo, folder))
    for case in options.cases:
        measure(case, options, threads)
