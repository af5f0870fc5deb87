"""Ctrl-C and SIGTERM: finish the step, save, then stop."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from worldflux.accel import ranks

_SLOW = 3.0
"""Seconds of a step that the notice mentions."""


class StopRequest:
    """A request to stop, which is true once a signal has arrived.

    Attributes:
        signal: Number of the signal; None as long as there was none.
        seconds_per_step: Seconds that a step takes; None if unknown. The code that runs the steps sets it.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.seconds_per_step: float | None = None

    @contextmanager
    def timing(self) -> Iterator[None]:
        """Takes the time of the block as that of a step."""
        began = time.perf_counter()
        yield
        self.seconds_per_step = time.perf_counter() - began

    @property
    def notice(self) -> str:
        """What a user is told who has asked to stop."""
        seconds = self.seconds_per_step or 0.0
        slow = f", which takes about {seconds:.0f} seconds" if seconds >= _SLOW else ""
        return (
            f"\nStopping after this step{slow}; checkpoint callbacks then save. Press Ctrl-C again to stop at once.\n"
        )

    def shared(self, flag: bool) -> tuple[bool, bool]:
        """Tells the other ranks of a training of a signal, and of a flag; all of them ask together.

        A signal that another rank has received is set here, too.

        Returns:
            Whether any rank has received a signal, and whether the flag is set on any.
        """
        number, flagged = ranks.largest(self.signal or 0, int(flag))
        if number:  # otherwise one may have arrived here meanwhile, of which the others are told the next time
            self.signal = number
        return bool(number), bool(flagged)

    def __bool__(self) -> bool:
        return self.signal is not None


def agreed(keep_going: bool, stop: StopRequest) -> bool:
    """Whether training continues: nobody wants it to end, and no signal has arrived, on any rank.

    The ranks of a training ask together after each step, so that all of them end with the same step.

    Args:
        keep_going: Whether the callbacks of this rank continue.
        stop: The request to stop of this rank.
    """
    return not any(stop.shared(not keep_going))


@contextmanager
def stopping_on_signals() -> Iterator[StopRequest]:
    """Makes Ctrl-C and SIGTERM wait for the end of a step.

    Inside the block the first of these signals only sets the request; a second one acts as it would without the
    block. The code that runs the steps checks the request after each step, saves and leaves the block. The block then
    ends as the signal asks: with `KeyboardInterrupt`, or with `SystemExit(143)` for SIGTERM, as shells and schedulers
    expect.

    The same signal may have ended processes that this one communicates with, as Ctrl-C in a terminal ends environments
    in processes of their own, and the C++ compiler of `torch.compile`. Errors about these are then not reported: the
    block ends as the signal asks.

    Handlers that a program has set itself are kept, and nothing is changed outside of the main thread, where Python
    allows no handlers.

    Yields:
        The request.
    """
    request = StopRequest()
    owner = os.getpid()
    hung_up: Exception | None = None
    replaced: dict[int, Any] = {}

    def restore() -> None:
        while replaced:
            signal.signal(*replaced.popitem())

    def handle(number: int, frame: FrameType | None) -> None:
        restore()
        if os.getpid() != owner:  # forked inside the block, with this handler, and no step of its own to wait for
            os.kill(os.getpid(), number)
            return
        request.signal = number
        with suppress(OSError):  # stderr may be closed
            os.write(2, request.notice.encode())  # a print could meet another one halfway

    if threading.current_thread() is threading.main_thread():
        for number, default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
            if signal.getsignal(number) == default:
                replaced[number] = signal.signal(number, handle)
    try:
        yield request
    except Exception as error:
        if not (request and _of_ended_process(error)):
            raise
        hung_up = error
    finally:
        restore()
    if hung_up is not None and not isinstance(hung_up, EOFError | ConnectionError):
        hung_up = None  # pages about a compiler
    if request.signal == signal.SIGINT:
        raise KeyboardInterrupt from hung_up
    if request.signal is not None:
        raise SystemExit(128 + request.signal) from hung_up


def _of_ended_process(error: Exception) -> bool:
    """Whether an error can come from a process that was ended: an environment behind a pipe, or a compiler."""
    compiling = type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))
    return compiling or isinstance(error, EOFError | ConnectionError)
