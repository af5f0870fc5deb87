"""Functions of tensors that are recorded once and then played back: CUDA graphs.

A function of this kind launches hundreds of kernels, and launching them from Python takes longer than most of them run.
A recording is launched as one. It repeats the same kernels on the same memory, so what a function reads besides its
inputs has to stay where it is, what it changes is changed in place, and nothing in it may wait for the device.
"""

from __future__ import annotations

import gc
import logging
import warnings
import weakref
from collections.abc import Callable, Hashable
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from worldflux.accel.guard import RandomState, Tensors, Work, compared, precision_of, report
from worldflux.accel.transfers import copy_into

logger = logging.getLogger("worldflux.training")

T = TypeVar("T")

WARM_UP_CALLS = 3
"""Calls before a function is recorded: in these libraries choose their kernels, and compilers compile."""
_WAITS = "called a synchronizing CUDA operation"
_PROTOTYPE = "Synchronization debug mode is a prototype feature"


class NotCapturable(Exception):
    """Raised when a function cannot be recorded; nothing that it computes has been computed by then."""


class GraphCapturer(Protocol):
    """Records functions of no arguments."""

    def warm_up(self, function: Callable[[], T]) -> tuple[T, str | None]:
        """Calls a function as it will be recorded.

        Returns:
            What it returned, and what keeps it from being recorded; None if nothing was seen.
        """
        ...

    def record(self, function: Callable[[], T]) -> tuple[Callable[[], None], T]:
        """Records a function without computing anything.

        Returns:
            What plays it back, and what it returned: each playback writes into these tensors.

        Raises:
            NotCapturable: If it cannot be recorded.
        """
        ...


class _Recording:
    """A graph that was captured."""

    def __init__(self, graph: torch.cuda.CUDAGraph) -> None:
        self._graph = graph

    def play(self) -> None:
        """Queues its kernels on the current stream."""
        self._graph.replay()


class CudaGraphCapturer:
    """Records CUDA graphs.

    All graphs of one recorder share memory, so they are played back one after another, and what one returned is read
    before the next one plays.

    Args:
        device: A CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # Libraries keep workspaces for each stream: warming up on this one makes those of the recording.
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._recordings: weakref.WeakSet[_Recording] = weakref.WeakSet()

    def warm_up(self, function: Callable[[], T]) -> tuple[T, str | None]:
        """Calls a function on the stream of the recordings, watching for what waits for the device."""
        current = torch.cuda.current_stream(self.device)
        before = torch.cuda.get_sync_debug_mode()
        self._stream.wait_stream(current)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                with torch.cuda.stream(self._stream):
                    result = function()
            finally:
                torch.cuda.set_sync_debug_mode(before)
                current.wait_stream(self._stream)
        problem = None
        for warning in caught:
            if _WAITS in str(warning.message):
                problem = f"it waits for the device at {warning.filename}:{warning.lineno}"
            elif _PROTOTYPE not in str(warning.message):
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        return result, problem

    def record(self, function: Callable[[], T]) -> tuple[Callable[[], None], T]:
        """Captures a CUDA graph. What other threads do meanwhile is no part of it."""
        graph = torch.cuda.CUDAGraph()
        gc.collect()  # a cycle that is collected during the capture would free memory in the middle of it
        if not self._recordings:  # the memory of graphs that are all gone cannot be taken up again
            self._pool = torch.cuda.graph_pool_handle()
        # Casts that autocast has kept from outside would be constants of the graph, those from inside outlive it.
        torch.clear_autocast_cache()
        random = torch.cuda.get_rng_state(self.device)
        current = torch.cuda.current_stream(self.device)
        try:
            # The outer context brings the stream back where the inner one fails to.
            with torch.cuda.stream(current):
                with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                    result = function()
        except BaseException as error:
            self._clean_up(random)
            if not isinstance(error, Exception):
                raise
            cause = error.__context__ if error.__context__ is not None else error
            raise NotCapturable(f"{type(cause).__name__}: {_first_line(cause)}") from error
        finally:
            torch.clear_autocast_cache()
        recording = _Recording(graph)
        self._recordings.add(recording)
        return recording.play, result

    def _clean_up(self, random: Tensor) -> None:
        """After a capture that failed: the allocator and the generator still wait for its end."""
        index = torch.cuda.current_device() if self.device.index is None else self.device.index
        try:
            torch._C._cuda_endAllocateToPool(index, self._pool)
        except (AttributeError, RuntimeError):  # the capture did end
            pass
        self._recordings.clear()  # so that the next graph begins a memory of its own
        torch.cuda.default_generators[index].graphsafe_set_state(torch.Generator(torch.device("cuda", index)))
        torch.cuda.set_rng_state(random, self.device)


class CapturedFunction:
    """A function that is called plainly at first, then recorded, then played back.

    Attributes:
        problem: What was seen to keep it from being recorded; None as long as nothing was.

    Args:
        function: Of tensors by name, to tensors by name.
        device: Where inputs are wanted.
        recorder: Records it.
    """

    def __init__(
        self, function: Callable[[Tensors], dict[str, Tensor]], device: torch.device, recorder: GraphCapturer
    ) -> None:
        self.problem: str | None = None
        self._function = function
        self._device = device
        self._recorder = recorder
        self._calls = 0
        self._inputs: dict[str, Tensor] = {}
        self._play: Callable[[], None] | None = None
        self._outputs: dict[str, Tensor] = {}

    @property
    def is_due(self) -> bool:
        """Whether it is to be recorded before the next call."""
        return self._calls == WARM_UP_CALLS and self._play is None

    def __call__(self, inputs: Tensors) -> dict[str, Tensor]:
        """What the function gives; to be read or copied before the next call."""
        if not self._inputs:
            self._inputs = {
                name: torch.empty(x.shape, dtype=x.dtype, device=self._device) for name, x in inputs.items()
            }
        copy_into(self._inputs, inputs)
        if self._play is not None:
            self._play()
            return self._outputs
        self._calls += 1
        outputs, problem = self._recorder.warm_up(self._bound)
        if self._calls == WARM_UP_CALLS:  # compilers have done their part in the calls before
            self.problem = problem
        return outputs

    def record(self) -> None:
        """Records it, on the inputs of the call before: what a recording keeps of them is then wrong at once.

        Raises:
            NotCapturable: If that failed; nothing was computed.
        """
        self._play, self._outputs = self._recorder.record(self._bound)

    def _bound(self) -> dict[str, Tensor]:
        return self._function(self._inputs)


class Captures:
    """Recordings of functions, one for each form of their inputs.

    Each is compared with the plain computation when it is played back for the first time. What cannot be recorded, or
    differs, is called plainly from then on, and the log says so once.

    Attributes:
        given_up: Whether nothing is recorded any more.

    Args:
        what: What is computed, for the log.
        model: By which it is computed.
        device: Where.
        recorder: Records it.
        limit: Most recordings to keep; further forms of inputs are computed plainly.
    """

    def __init__(self, what: str, model: nn.Module, device: torch.device, recorder: GraphCapturer, limit: int) -> None:
        self.given_up = False
        self._what = f"{what} of {type(model).__name__}"
        self._model = model
        self._device = device
        self._recorder = recorder
        self._limit = limit
        self._depend_on: object = None
        self._functions: dict[Hashable, CapturedFunction] = {}

    def takes(self, form: Hashable) -> bool:
        """Whether calls of a form are recorded: until this was given up, as many forms as there is room for."""
        if form in self._functions or (not self.given_up and len(self._functions) < self._limit):
            return True
        if not self.given_up:
            logger.debug("%s: more than %d forms of inputs; this one is computed plainly", self._what, self._limit)
        return False

    def __call__(self, form: Hashable, work: Work) -> dict[str, Tensor]:
        """What a computation gives; to be read or copied before the next call.

        Args:
            form: Tells functions and the shapes and dtypes of their inputs apart; `takes` said yes to it.
            work: This call.
        """
        captured = self._functions.get(form)
        if captured is None:
            captured = self._functions[form] = CapturedFunction(work.function, self._device, self._recorder)
        if captured.is_due:
            return self._first_playback(captured, work)
        outputs = captured(work.inputs())
        if captured.problem is not None:
            self._give_up_recording(captured.problem)
        return outputs

    def _first_playback(self, captured: CapturedFunction, work: Work) -> dict[str, Tensor]:
        """Records, and gives what the recording or, if that is not the same, the plain computation gives."""
        random = RandomState(self._device)
        try:
            captured.record()
        except NotCapturable as error:
            self._give_up_recording(str(error))
        finally:
            random.restore()
        if self.given_up:
            return work.plain()
        play = lambda: captured(work.inputs())  # noqa: E731
        outputs, difference = compared(work, play, self._device, precision_of(self._model, self._device))
        if difference is not None:
            self._give_up(report(self._what, difference, self._device))
        return outputs

    def keep_while(self, same: object) -> bool:
        """Drops all recordings if what they depend on besides their inputs is not the same as at the last call.

        Returns:
            Whether they were kept.
        """
        if same == self._depend_on:
            return True
        self._depend_on = same
        self.clear()
        return False

    def clear(self) -> None:
        """Drops all recordings."""
        self._functions.clear()

    @property
    def recorded(self) -> int:
        """How many functions are played back by now."""
        return sum(function._play is not None for function in self._functions.values())

    def _give_up_recording(self, problem: str) -> None:
        self._give_up(f"{self._what} cannot be recorded as a CUDA graph, so it is computed plainly: {problem}")

    def _give_up(self, message: str) -> None:
        logger.warning("%s", message)
        self.clear()
        self.given_up = True


def signature_of(tensors: Tensors) -> Hashable:
    """What recordings need of their inputs to be the same."""
    return tuple((name, x.shape, x.dtype) for name, x in tensors.items())


def places(tensors: list[Tensor]) -> tuple[object, ...]:
    """Where tensors lie and whether they are differentiated: what a recording of their use depends on."""
    return tuple([x.data_ptr() for x in tensors] + [x.requires_grad for x in tensors])


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]
