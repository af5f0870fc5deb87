"""Ctrl-C and SIGTERM: finish the step, save, then stop."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_NOTICE = b"\nStopping after this step, then saving. Press Ctrl-C again to stop at once.\n"


class StopRequest:
    """A request to stop, which is true once a signal has arrived.

    Attributes:
        signal: Number of the signal; None as long as there was none.
    """

    def __init__(self) -> None:
        self.signal: int | None = None

    def __bool__(self) -> bool:
        return self.signal is not None


@contextmanager
def stopping_on_signals() -> Iterator[StopRequest]:
    """Makes Ctrl-C and SIGTERM wait for the end of a step.

    Inside the block the first of these signals only sets the request; a second one acts as it would without the
    block. The code that runs the steps checks the request after each step, saves and leaves the block. The block then
    ends as the signal asks: with `KeyboardInterrupt`, or with `SystemExit(143)` for SIGTERM, as shells and schedulers
    expect.

    The same signal may have ended processes that this one communicates with, as Ctrl-C in a terminal ends environments
    in processes of their own. Errors about their closed pipes are then not reported: the block ends as the signal asks.

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
        os.write(2, _NOTICE)  # a print could meet another one halfway

    if threading.current_thread() is threading.main_thread():
        for number, default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
            if signal.getsignal(number) == default:
                replaced[number] = signal.signal(number, handle)
    try:
        yield request
    except (EOFError, ConnectionError) as error:
        if not request:
            raise
        hung_up = error
    finally:
        restore()
    if request.signal == signal.SIGINT:
        raise KeyboardInterrupt from hung_up
    if request.signal is not None:
        raise SystemExit(128 + request.signal) from hung_up
