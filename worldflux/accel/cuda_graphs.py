"""Functions of tensors that are captured in a CUDA graph once and then replayed.

A gradient step launches hundreds of kernels, and launching them from Python takes longer than most of them run. A graph
is launched as one. It repeats the same kernels on the same memory, so what a function reads besides its inputs has to
stay where it is, what it changes is changed in place, and nothing in it may wait for the device.
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
"""Calls before a function is captured, in which libraries choose their kernels and compilers compile."""
_WAITS = "called a synchronizing CUDA operation"
_PROTOTYPE = "Synchronization debug mode is a prototype feature"


class NotCapturable(Exception):
    """Raised when a function cannot be captured; nothing that it computes has been computed by then."""


class GraphCapturer(Protocol):
    """Captures functions of no arguments."""

    def warm_up(self, function: Callable[[], T]) -> tuple[T, str | None]:
        """Calls a function as it will be captured.

        Returns:
            The result of the function, and the reason why it cannot be captured; None if no reason was seen.
        """
        ...

    def capture(self, function: Callable[[], T]) -> tuple[Callable[[], None], T]:
        """Captures a function without computing anything.

        Returns:
            The function that replays the graph, and the result of the captured function: each replay writes into these
            tensors.

        Raises:
            NotCapturable: If it cannot be captured.
        """
        ...


class _Graph:
    """A graph that was captured."""

    def __init__(self, graph: torch.cuda.CUDAGraph) -> None:
        self._graph = graph

    def replay(self) -> None:
        """Queues the kernels of the graph on the current stream."""
        self._graph.replay()


class CudaGraphCapturer:
    """Captures CUDA graphs.

    All graphs of a capturer share memory. They are therefore replayed one after another, and the results of one are
    read before the next one is replayed.

    Args:
        device: A CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # Libraries keep workspaces for each stream: warming up on this one allocates those of the capture.
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: weakref.WeakSet[_Graph] = weakref.WeakSet()

    def warm_up(self, function: Callable[[], T]) -> tuple[T, str | None]:
        """Calls a function on the stream of the captures, watching for operations that wait for the device."""
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

    def capture(self, function: Callable[[], T]) -> tuple[Callable[[], None], T]:
        """Captures a CUDA graph. Work of other threads is not part of it."""
        graph = torch.cuda.CUDAGraph()
        gc.collect()  # a cycle that is collected during the capture would free memory in the middle of it
        if not self._graphs:  # the memory pool of graphs that are all gone cannot be used again
            self._pool = torch.cuda.graph_pool_handle()
        # Casts that autocast has cached outside would be constants of the graph, those from inside would outlive it.
        torch.clear_autocast_cache()
        random = torch.cuda.get_rng_state(self.device)
        current = torch.cuda.current_stream(self.device)
        try:
            # The outer context restores the stream where the inner one fails to.
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
        captured = _Graph(graph)
        self._graphs.add(captured)
        return captured.replay, result

    def _clean_up(self, random: Tensor) -> None:
        """Ends a capture that failed for the allocator and the generator, which still wait for its end."""
        index = torch.cuda.current_device() if self.device.index is None else self.device.index
        try:
            torch._C._cuda_endAllocateToPool(index, self._pool)
        except (AttributeError, RuntimeError):  # the capture did end
            pass
        self._graphs.clear()  # so that the next graph begins a memory pool of its own
        torch.cuda.default_generators[index].graphsafe_set_state(torch.Generator(torch.device("cuda", index)))
        torch.cuda.set_rng_state(random, self.device)


class CapturedFunction:
    """A function that is called plainly at first, then captured, then replayed.

    Attributes:
        problem: Reason why the function cannot be captured; None as long as none was seen.

    Args:
        function: Takes tensors by name and returns tensors by name.
        device: Device of the inputs that the function gets.
        capturer: Captures the function.
    """

    def __init__(
        self, function: Callable[[Tensors], dict[str, Tensor]], device: torch.device, capturer: GraphCapturer
    ) -> None:
        self.problem: str | None = None
        self._function = function
        self._device = device
        self._capturer = capturer
        self._calls = 0
        self._inputs: dict[str, Tensor] = {}
        self._replay: Callable[[], None] | None = None
        self._outputs: dict[str, Tensor] = {}

    @property
    def is_due(self) -> bool:
        """Whether the function is to be captured before the next call."""
        return self._calls == WARM_UP_CALLS and not self.is_captured

    @property
    def is_captured(self) -> bool:
        """Whether the function is replayed."""
        return self._replay is not None

    def __call__(self, inputs: Tensors) -> dict[str, Tensor]:
        """Returns the results of the function, which have to be read or copied before the next call."""
        if not self._inputs:
            self._inputs = {
                name: torch.empty(x.shape, dtype=x.dtype, device=self._device) for name, x in inputs.items()
            }
        copy_into(self._inputs, inputs)
        if self._replay is not None:
            self._replay()
            return self._outputs
        self._calls += 1
        outputs, problem = self._capturer.warm_up(self._bound)
        if self._calls == WARM_UP_CALLS:  # compilers have done their part in the calls before
            self.problem = problem
        return outputs

    def capture(self) -> None:
        """Captures the function on the inputs of the previous call, so that a graph that keeps them is wrong at once.

        Raises:
            NotCapturable: If that failed; nothing was computed.
        """
        self._replay, self._outputs = self._capturer.capture(self._bound)

    def _bound(self) -> dict[str, Tensor]:
        return self._function(self._inputs)


class Captures:
    """Captured functions, one for each signature of their inputs.

    Each graph is compared with the plain computation when it is replayed for the first time. A function that cannot be
    captured, or whose graph gives other results, is called plainly from then on, and the log says so once.

    Attributes:
        given_up: Whether everything is computed plainly from here on.

    Args:
        what: Name of the computation in the log.
        model: The model that computes.
        device: Device of the model.
        capturer: Captures the functions.
        limit: Largest number of graphs to keep; inputs with further signatures are computed plainly.
    """

    def __init__(self, what: str, model: nn.Module, device: torch.device, capturer: GraphCapturer, limit: int) -> None:
        self.given_up = False
        self._what = f"{what} of {type(model).__name__}"
        self._model = model
        self._device = device
        self._capturer = capturer
        self._limit = limit
        self._depend_on: object = None
        self._functions: dict[Hashable, CapturedFunction] = {}

    def takes(self, signature: Hashable) -> bool:
        """Whether calls with a signature are captured: unless given up, as many signatures as there is room for."""
        if signature in self._functions or (not self.given_up and len(self._functions) < self._limit):
            return True
        if not self.given_up:
            logger.debug("%s: more than %d signatures of inputs; this one is computed plainly", self._what, self._limit)
        return False

    def __call__(self, signature: Hashable, work: Work) -> dict[str, Tensor]:
        """Returns the results of a computation, which have to be read or copied before the next call.

        Args:
            signature: Tells functions and the shapes and dtypes of their inputs apart; `takes` accepts it.
            work: The computation to do in this call.
        """
        function = self._functions.get(signature)
        if function is None:
            function = self._functions[signature] = CapturedFunction(work.function, self._device, self._capturer)
        if function.is_due:
            return self._first_replay(function, work)
        outputs = function(work.inputs())
        if function.problem is not None:
            self._give_up_capturing(function.problem)
        return outputs

    def _first_replay(self, function: CapturedFunction, work: Work) -> dict[str, Tensor]:
        """Captures a function and returns the results of its graph or, if they differ, of the plain computation."""
        random = RandomState(self._device)
        try:
            function.capture()
        except NotCapturable as error:
            self._give_up_capturing(str(error))
        finally:
            random.restore()
        if self.given_up:
            return work.plain()
        replay = lambda: function(work.inputs())  # noqa: E731
        outputs, difference = compared(work, replay, self._device, precision_of(self._model, self._device))
        if difference is not None:
            self._give_up(report(self._what, difference, self._device))
        return outputs

    def keep_while(self, same: object) -> None:
        """Drops all graphs if what they depend on besides their inputs is not the same as at the last call."""
        if same != self._depend_on:
            self._depend_on = same
            self.clear()

    def clear(self) -> None:
        """Drops all graphs."""
        self._functions.clear()

    @property
    def count(self) -> int:
        """Number of graphs."""
        return sum(function.is_captured for function in self._functions.values())

    def _give_up_capturing(self, problem: str) -> None:
        self._give_up(f"{self._what} cannot be captured in a CUDA graph, so it is computed plainly: {problem}")

    def _give_up(self, message: str) -> None:
        logger.warning("%s", message)
        self.clear()
        self.given_up = True


def signature_of(tensors: Tensors) -> Hashable:
    """Names, shapes and dtypes of inputs, which have to be the same for each replay of a graph."""
    return tuple((name, x.shape, x.dtype) for name, x in tensors.items())


def places(tensors: list[Tensor]) -> tuple[object, ...]:
    """Addresses of tensors and whether they require a gradient, on which a graph that uses them depends."""
    return tuple([x.data_ptr() for x in tensors] + [x.requires_grad for x in tensors])


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]
