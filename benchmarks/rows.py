"""Options, timing and output that are shared by all speed measurements.

worldflux (`cases.py`) and the peers (`peers/*.py`) are measured by scripts of the same form, in a separate process for
each case. This file requires only the standard library, because the virtual environment of a peer may not have PyTorch.
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
"""Calls before the counted ones: the first calls compile, fill caches and, on CUDA, capture graphs."""
LEAST_CALLS = 2
"""Minimum number of counted calls, however long they take."""


def parser(description: str | None, cases: Iterable[str]) -> argparse.ArgumentParser:
    """A parser with the options of every script; adding an option again replaces it."""
    found = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        conflict_handler="resolve",
    )
    names = tuple(cases)
    found.add_argument("--cases", nargs="+", choices=names, default=names, metavar="CASE", help=", ".join(names))
    found.add_argument("--device", default="cpu", help="cpu or cuda")
    found.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    found.add_argument("--threads", type=int, help="CPU threads; default: all cores that this process may use")
    found.add_argument("--repeats", type=int, default=50, help="maximum number of counted calls")
    found.add_argument("--budget", type=float, default=30.0, help="seconds after which no more calls are made")
    return found


def use_threads(asked: int | None) -> int:
    """Restricts this process to one core per thread, before a library counts the cores.

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
    """Times each call of a function until the work that it started is done.

    Args:
        function: Function to measure.
        repeats: Maximum number of counted calls.
        budget: Seconds after which `LEAST_CALLS` counted calls are enough.
        wait: Function that waits until the device has finished; None on a CPU.

    Returns:
        The median, quartiles and minimum in milliseconds; the number of counted calls; and the seconds by which the
        calls before them exceeded the median, which is the cost of compiling and capturing.
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
    """Peak memory of this process in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
    return round(peak / (1 << 20 if sys.platform == "darwin" else 1 << 10), 1)


def cpu_name() -> str:
    """Model name of the CPU."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def print_row(who: str, case: str, what: str, facts: dict[str, Any]) -> None:
    """Prints one measurement as JSON, on a new line even if the measured code printed an incomplete one."""
    print("\n" + json.dumps({"who": who, "case": case, "what": what, **facts}), flush=True)


def rows_in(text: str) -> list[dict[str, Any]]:
    """The rows in the output of a script."""
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
    """Main function of the script of a peer. Calls `measure` for each requested case.

    Args:
        description: Description of the script.
        cases: Cases that the peer has.
        measure: Function that prints the rows of a case, given the options and the number of threads.
        folder: Folder of the checkout that contains the modules of the peer.
        compiles: Whether the peer has a compiled form in addition to a plain one.
        half: Devices on which the peer also supports half precision.
    """
    options_of = parser(description, cases)
    options_of.add_argument("--repo", required=True, help="the peer's checkout")
    options_of.add_argument("--batch", required=True, help="file written by `cases.py --save` for the case")
    if compiles:
        options_of.add_argument("--compile", action="store_true", help="measure the compiled form")
    options = options_of.parse_args()
    if options.dtype != "float32" and options.device not in half:
        options_of.error(f"this peer supports only float32 on {options.device}")
    threads = use_threads(options.threads)
    sys.path.insert(0, os.path.join(options.repo, folder))
    for case in options.cases:
        measure(case, options, threads)
