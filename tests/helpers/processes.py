"""Processes that tests start, wait for and kill."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
"""Its server loads torch once, so that each process starts in a fraction of a second."""
CONTEXT.set_forkserver_preload(["worldflux.agents", "worldflux.training.trainer", "torch._dynamo"])


def start(run: Callable[..., None], *args: Any) -> Any:
    """Starts a process that calls `run(*args)`."""
    process = CONTEXT.Process(target=run, args=args)
    process.start()
    return process


def finish(process: Any, timeout: float = 60) -> int:
    """Waits for the end of a process and returns its exit code, which is negative for a signal."""
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"still running after {timeout} seconds")
    return int(process.exitcode)


def wait_for(condition: Callable[[], Any], process: Any, timeout: float = 60) -> None:
    """Waits until a condition holds, or the process has ended."""
    until = time.monotonic() + timeout
    while not condition() and process.exitcode is None:
        if time.monotonic() > until:
            process.kill()
            raise TimeoutError(f"nothing after {timeout} seconds")
        time.sleep(0.002)


def kill(process: Any) -> None:
    """Kills a process at once, as the system does when memory runs out."""
    if process.exitcode is None:
        os.kill(process.pid, signal.SIGKILL)
    process.join()


def strays(directory: Path) -> list[str]:
    """The names in a directory of checkpoints that are not checkpoints."""
    return sorted(entry.name for entry in directory.iterdir() if not entry.name.startswith("step-"))
