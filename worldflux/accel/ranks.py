"""Data-parallel training: what the processes of one training, its ranks, average, gather and agree on.

`torchrun` starts the processes and tells each its rank. A single process is rank 0 of 1, for which everything here
returns what it was given, without `torch.distributed`.

Losses call `mean`, `gathered`, `maximum` and `from_first` for what depends on the whole batch. They communicate only
inside of `reducing`, which a gradient step enters on every rank, so that one rank can compute a loss on its own.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from worldflux.errors import ConfigurationError, TrainingError
from worldflux.validation import whole_number

TIMEOUT_VARIABLE = "WORLDFLUX_TIMEOUT"
"""Environment variable with the seconds that a rank waits for the others."""
TIMEOUT = 600
"""Seconds that a rank waits for the others by default. An evaluation on rank 0 may take no longer."""

ResultT = TypeVar("ResultT")

_reduces = False
"""Whether a gradient step is being taken, in which the ranks communicate."""


def join() -> None:
    """Joins the training that `torchrun` has started this process for, if it has.

    A process group that the program has initialised itself is used as it is.

    Raises:
        ConfigurationError: If the other ranks cannot be reached.
    """
    if "RANK" not in os.environ or os.environ.get("WORLD_SIZE", "1") == "1" or dist.is_initialized():
        return
    seconds = os.environ.get(TIMEOUT_VARIABLE, str(TIMEOUT))
    if not seconds.isdecimal() or not int(seconds):
        raise ConfigurationError(f"{TIMEOUT_VARIABLE} is {seconds!r}, expected a number of seconds from 1.")
    has_gpus = torch.cuda.is_available()
    if has_gpus:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    timeout = timedelta(seconds=int(seconds))
    # With GPUs, tensors on the CPU are exchanged as well: flags, and the random states of checkpoints.
    backend = "cpu:gloo,cuda:nccl" if has_gpus else "gloo"
    try:
        store, number, count = next(dist.rendezvous("env://", timeout=timeout))
        # torchrun (torch 2.13) keeps its store when it starts the processes again, with the addresses of those before.
        attempt = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group(backend, store=attempt, rank=number, world_size=count, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        raise ConfigurationError(
            f"Rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} cannot reach the other ranks at "
            f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}: {error}"
        ) from error
    atexit.register(leave)


def leave() -> None:
    """Leaves the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def size() -> int:
    """Returns the number of ranks."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Returns the number of this rank, from 0."""
    return dist.get_rank() if size() > 1 else 0


def is_first() -> bool:
    """Whether this is rank 0, which logs, evaluates and writes checkpoints."""
    return rank() == 0


def say(text: str) -> None:
    """Prints a line on stderr, above any progress bars of tqdm; of several ranks, only the first does.

    Without a stderr that can be written to, the line is lost.
    """
    stream: Any = sys.stderr
    if stream is None or not is_first():  # None: as in a process without a console on Windows
        return
    tqdm: Any = sys.modules.get("tqdm")
    with suppress(OSError, ValueError):  # a terminal that is gone, a closed file: no reason to end a training
        if tqdm is None:
            print(f"worldflux: {text}", file=stream)
        else:
            tqdm.tqdm.write(f"worldflux: {text}", file=stream)
        stream.flush()


def share_of(name: str, whole: int) -> int:
    """Returns this rank's part of a number that counts over all ranks, such as the windows of a batch.

    Raises:
        ConfigurationError: If it cannot be divided by the number of ranks.
    """
    if whole % size():
        raise ConfigurationError(
            f"{name} is {whole}, which counts over all ranks and cannot be divided by {size()} ranks. "
            f"Choose a multiple of {size()}."
        )
    return whole // size()


# In a loss: identities outside of a gradient step


@contextmanager
def reducing() -> Iterator[None]:
    """Lets the losses inside the block communicate. All ranks enter it together and compute the same losses."""
    global _reduces
    before, _reduces = _reduces, size() > 1
    if _reduces:
        _keep_out_of_graphs()
    try:
        yield
    finally:
        _reduces = before


def is_reducing() -> bool:
    """Whether a loss that is computed now is that of one batch over all ranks."""
    return _reduces


def mean(value: Tensor) -> Tensor:
    """Returns the mean of a tensor over the ranks, without gradient."""
    return _reduced(value, dist.ReduceOp.SUM) / size() if _reduces else value


def maximum(value: Tensor) -> Tensor:
    """Returns the elementwise maximum of a tensor over the ranks, without gradient."""
    return _reduced(value, dist.ReduceOp.MAX) if _reduces else value


def gathered(value: Tensor) -> Tensor:
    """Returns the tensors of all ranks, concatenated along the first axis, without gradient."""
    return _gathered(value) if _reduces else value


def from_first(value: Tensor) -> Tensor:
    """Returns the tensor of rank 0."""
    return _from_first(value) if _reduces else value


def _reduced(value: Tensor, operation: Any) -> Tensor:
    result = value.detach().clone()
    with _in_contact():
        dist.all_reduce(result, operation)
    return result


def _gathered(value: Tensor) -> Tensor:
    value = value.detach().contiguous()
    parts = [torch.empty_like(value) for _ in range(size())]
    with _in_contact():
        dist.all_gather(parts, value)
    return torch.cat(parts)


def _from_first(value: Tensor) -> Tensor:
    with _in_contact():
        dist.broadcast(value, 0)
    return value


@cache
def _keep_out_of_graphs() -> None:
    """Excludes what communicates from compiled graphs.

    It is not a decorator because `torch.compiler.disable` imports the compiler, a third of what importing this package
    takes.
    """
    for function in (_reduced, _gathered, _from_first):
        globals()[function.__name__] = torch.compiler.disable(function)


@contextmanager
def _in_contact() -> Iterator[None]:
    """Turns the errors of a communication that has failed into a `TrainingError`."""
    try:
        yield
    except RuntimeError as error:
        raise TrainingError(
            f"Rank {rank()} has lost contact with the others: one of them has stopped with an error of its own, which "
            "is the one to look at, or the network between them has failed. Training goes on from the newest "
            f"checkpoint when all ranks are started again. ({str(error).strip().splitlines()[0][:200]})"
        ) from error


# Around the gradient steps


class GradientAverage:
    """Averages gradients over the ranks, in one message for all parameters.

    A step of a world model has several losses, some with hand-written gradients, and reads the model's functions one by
    one rather than through one `forward`. `DistributedDataParallel` supports neither.

    Args:
        parameters: Parameters whose gradients are averaged.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        self._is_checked = False

    def __call__(self) -> None:
        """Averages the gradients in place. Parameters without a gradient have none on any rank."""
        if size() == 1:
            return
        with_gradient = [p for p in self._parameters if p.grad is not None]
        if not self._is_checked:
            _check_same("The parameters with a gradient", [p.grad is not None for p in self._parameters])
            self._is_checked = True
        for dtype in sorted({p.dtype for p in with_gradient}, key=str):
            gradients = [p.grad for p in with_gradient if p.dtype == dtype and p.grad is not None]
            flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
            with _in_contact():
                dist.all_reduce(flat)
            flat /= size()
            averaged = flat.split([gradient.numel() for gradient in gradients])
            torch._foreach_copy_(gradients, [a.view_as(g) for a, g in zip(averaged, gradients, strict=True)])


@torch.no_grad()
def spread(module: nn.Module) -> None:
    """Gives every rank the parameters and buffers of rank 0.

    Raises:
        ConfigurationError: If the ranks have built different models.
    """
    if size() == 1:
        return
    tensors = module.state_dict()
    _check_same("The models", [(name, tuple(t.shape), str(t.dtype)) for name, t in tensors.items()])
    with _in_contact():
        for tensor in tensors.values():
            dist.broadcast(tensor, 0)


def largest(*numbers: int) -> list[int]:
    """Returns the largest of each number over the ranks. All ranks ask together."""
    if size() == 1:
        return list(numbers)
    values = torch.tensor(numbers)
    with _in_contact():
        dist.all_reduce(values, dist.ReduceOp.MAX)
    return values.tolist()


def every(value: Any) -> list[Any]:
    """Returns the values of all ranks, in their order. A value is what JSON can hold."""
    if size() == 1:
        return [value]
    values: list[Any] = [None] * size()
    with _in_contact():
        dist.all_gather_object(values, value)
    return values


def on_first(function: Callable[[], ResultT]) -> ResultT:
    """Calls a function on rank 0 and returns its result on every rank.

    The others wait. If the function raises an error, rank 0 raises it and the others a `TrainingError` that quotes it.

    Args:
        function: Function whose result JSON can hold.
    """
    if size() == 1:
        return function()
    answer: list[Any] = [None, None]
    failed: BaseException | None = None
    if is_first():
        try:
            answer[0] = function()
        except BaseException as error:
            failed, answer[1] = error, f"{type(error).__name__}: {error}"
    with _in_contact():
        dist.broadcast_object_list(answer, 0)
    if failed is not None:
        raise failed
    if answer[1] is not None:
        raise TrainingError(f"Rank 0 has failed, so that rank {rank()} stops: {answer[1]}")
    result: ResultT = answer[0]
    return result


def _check_same(what: str, value: Any) -> None:
    """Raises a `ConfigurationError` if a value differs between the ranks."""
    values = every(value)
    if different := [number for number, other in enumerate(values) if other != values[0]]:
        raise ConfigurationError(
            f"{what} of rank {different[0]} differ from those of rank 0. Start all ranks with the same script, "
            "arguments and environment."
        )


def seed_of_rank(seed: int) -> int:
    """Returns a seed for the random streams of this rank; rank 0 keeps the seed.

    Args:
        seed: Seed of the whole training.
    """
    return (whole_number("seed", seed, 0) + 1_000_003 * rank()) % 2**32
