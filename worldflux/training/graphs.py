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
from collections.abc import Callable, Hashable, Mapping
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from worldflux.training.transfers import copy_into, to_device

logger = logging.getLogger("worldflux.training")

T = TypeVar("T")
Tensors = Mapping[str, Tensor]

WARM_UP_CALLS = 3
"""Calls before a function is recorded: in these libraries choose their kernels, and compilers compile."""
_WAITS = "called a synchronizing CUDA operation"
_PROTOTYPE = "Synchronization debug mode is a prototype feature"


class NotCapturable(Exception):
    """Raised when a function cannot be recorded; nothing that it computes has been computed by then."""


class Recorder(Protocol):
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


class CudaRecorder:
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
        problem: What keeps it from being recorded; None as long as nothing was found. Calls are plain then.

    Args:
        function: Of tensors by name, to tensors by name.
        like: Tensors of the shapes and dtypes of all its inputs to come.
        device: Where inputs are wanted.
        recorder: Records it.
    """

    def __init__(
        self, function: Callable[[Tensors], dict[str, Tensor]], like: Tensors, device: torch.device, recorder: Recorder
    ) -> None:
        self.problem: str | None = None
        self._inputs = {name: torch.empty(x.shape, dtype=x.dtype, device=device) for name, x in like.items()}
        self._function = function
        self._recorder = recorder
        self._calls = 0
        self._play: Callable[[], None] | None = None
        self._outputs: dict[str, Tensor] = {}

    def __call__(self, inputs: Tensors) -> dict[str, Tensor]:
        """What the function gives; to be read or copied before the next call.

        Raises:
            NotCapturable: If recording failed, before anything was computed; `problem` says why.
        """
        copy_into(self._inputs, inputs)
        if self._play is None:
            if self._calls < WARM_UP_CALLS or self.problem is not None:
                self._calls += 1
                outputs, problem = self._recorder.warm_up(self._bound)
                if self._calls == WARM_UP_CALLS:  # compilers have done their part in the calls before
                    self.problem = problem
                return outputs
            try:
                self._play, self._outputs = self._recorder.record(self._bound)
            except NotCapturable as error:
                self.problem = str(error)
                raise
        self._play()
        return self._outputs

    def _bound(self) -> dict[str, Tensor]:
        return self._function(self._inputs)


class Captures:
    """Recordings of functions, one for each form of their inputs.

    What cannot be recorded is called plainly from then on, and the log says so once.

    Args:
        what: What is computed, for the log.
        device: Where.
        recorder: Records it.
        limit: Most recordings to keep; further forms of inputs are computed plainly.
    """

    def __init__(self, what: str, device: torch.device, recorder: Recorder, limit: int) -> None:
        self._what = what
        self._device = device
        self._recorder = recorder
        self._limit = limit
        self._depend_on: object = None
        self._functions: dict[tuple[Hashable, ...], CapturedFunction] = {}
        self._given_up = False

    def __call__(
        self, key: Hashable, function: Callable[[Tensors], dict[str, Tensor]], inputs: Tensors
    ) -> dict[str, Tensor]:
        """What `function(inputs)` gives; to be read or copied before the next call.

        Args:
            key: Tells functions apart, and forms of inputs where they differ in more than shapes and dtypes.
            function: Of tensors on the device; the same for the same key.
            inputs: On the device or on the CPU.
        """
        form = (key, *((name, x.shape, x.dtype) for name, x in inputs.items()))
        captured = self._functions.get(form)
        if captured is None and not self._given_up:
            if len(self._functions) < self._limit:
                captured = self._functions[form] = CapturedFunction(function, inputs, self._device, self._recorder)
            else:
                logger.debug("%s: more than %d forms of inputs; this one is computed plainly", self._what, self._limit)
        if captured is not None:
            try:
                outputs = captured(inputs)
            except NotCapturable:
                outputs = None
            if captured.problem is not None:
                self._give_up(captured.problem)
            if outputs is not None:
                return outputs
        return function({name: to_device(x, self._device) for name, x in inputs.items()})

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

    def drop(self, key: Hashable) -> None:
        """Drops the recordings of one function."""
        self._functions = {form: function for form, function in self._functions.items() if form[0] != key}

    @property
    def recorded(self) -> int:
        """How many functions are played back by now."""
        return sum(function._play is not None for function in self._functions.values())

    def _give_up(self, problem: str) -> None:
        logger.warning("%s cannot be recorded as a CUDA graph, so it is computed plainly: %s", self._what, problem)
        self.clear()
        self._given_up = True


def places(tensors: list[Tensor]) -> tuple[object, ...]:
    """Where tensors lie and whether they are differentiated: what a recording of their use depends on."""
    return tuple([x.data_ptr() for x in tensors] + [x.requires_grad for x in tensors])


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]
