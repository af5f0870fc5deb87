"""Processes in which environments run: starting them, and saying why one of them ended."""

from __future__ import annotations

import multiprocessing
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from weakref import finalize

import gymnasium as gym
from stable_baselines3.common.vec_env import SubprocVecEnv

from worldflux.errors import ConfigurationError, WorkerError

MAIN_GUARD = (
    "A new process imports the script again, so a script that starts processes needs a main guard. Put what starts "
    "them into a function main(), and call it in the last two lines:\n\n"
    '    if __name__ == "__main__":\n        main()\n'
)
"""Advice about scripts that start processes whenever they are imported."""


class ProcessVecEnv(SubprocVecEnv):
    """SB3's `SubprocVecEnv`, whose processes are not forked and say why they could not make their environment.

    Args:
        makers: Functions that each make one environment, in a process of their own.

    Raises:
        ConfigurationError: If this process is itself one that imports a script without a main guard.
        WorkerError: If a process ends before it has made its environment. The message holds the cause if it is known.
    """

    def __init__(self, makers: list[Callable[[], gym.Env[Any, Any]]]) -> None:
        # The mark that multiprocessing sets while a new process imports the main module.
        if getattr(multiprocessing.process.current_process(), "_inheriting", False):
            raise ConfigurationError(f"Environments cannot be started while a new process is starting. {MAIN_GUARD}")
        folder = Path(tempfile.mkdtemp(prefix="worldflux-"))
        finalize(self, shutil.rmtree, folder, ignore_errors=True)
        causes = [folder / str(number) for number in range(len(makers))]
        methods = multiprocessing.get_all_start_methods()
        try:
            super().__init__(
                [_with_cause(make, cause) for make, cause in zip(makers, causes, strict=True)],
                start_method="forkserver" if "forkserver" in methods else "spawn",
            )
            for remote in self.remotes:  # SB3 waits only for the first one
                remote.send(("get_spaces", None))
            for remote in self.remotes:
                remote.recv()
        except (EOFError, ConnectionError) as error:
            raise WorkerError(_why_not_made(causes)) from error


def _with_cause(make: Callable[[], gym.Env[Any, Any]], cause: Path) -> Callable[[], gym.Env[Any, Any]]:
    """A function for a new process, which writes why the environment could not be made to a file."""

    def make_one() -> gym.Env[Any, Any]:
        # Ctrl-C reaches all processes. The main one ends the others; if it handles the interrupt, they go on.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            return make()
        except BaseException as error:
            with suppress(OSError):
                cause.write_text(f"{type(error).__name__}: {error}", encoding="utf-8")
            raise

    return make_one


def _why_not_made(causes: list[Path]) -> str:
    for number, cause in enumerate(causes):
        with suppress(OSError):
            said = cause.read_text(encoding="utf-8")
            advice = ""
            if said.startswith("ConfigurationError: Unknown environment"):
                advice = (
                    "\nThe process has imported the script again, without what stands under "
                    '`if __name__ == "__main__":`. Register the id above that line, or pass '
                    "a function that makes the environment instead of its id."
                )
            return f"The process of environment {number} could not make it. {said}{advice}"
    return (
        "A process ended before it could make its environment; its own error is printed above. The most common reason "
        f"is that the script has no main guard. {MAIN_GUARD}"
    )


@contextmanager
def naming_the_ended(processes: Mapping[int, Any]) -> Iterator[None]:
    """Turns a closed pipe into an error that says which process ended.

    Args:
        processes: The processes that may have closed it, by the numbers of their environments.

    Raises:
        WorkerError: Instead of `EOFError` and `ConnectionError`.
    """
    try:
        yield
    except WorkerError:
        raise
    except (EOFError, ConnectionError) as error:
        raise WorkerError(_which_ended(processes)) from error


def _which_ended(processes: Mapping[int, Any]) -> str:
    for number, process in processes.items():
        process.join(timeout=1.0 if len(processes) == 1 else 0.2)  # the pipe closes shortly before the process ends
        code = process.exitcode
        if code is None:
            continue
        if code < 0:
            name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
            memory = " The system does that when memory runs out." if name == "SIGKILL" else ""
            return f"The process of environment {number} was ended by {name}.{memory}"
        return (
            f"The process of environment {number} ended with exit code {code}. If the environment raised an error, its "
            "traceback is printed above; make_vec_env without processes=True raises it here instead."
        )
    return "The connection to the process of an environment was closed."


def not_sent(name: str) -> WorkerError:
    """An error about an attribute that a process could not send, which has ended it."""
    return WorkerError(
        f"The environments have an attribute {name!r} that cannot be sent from their processes, such as a method of an "
        "environment that cannot be pickled; asking for it has ended them. Give it another name, or step the "
        "environments in one process (DummyVecEnv, SyncVectorEnv)."
    )
