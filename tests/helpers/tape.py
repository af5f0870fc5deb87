"""A recorder for tests without a GPU: it plays operations back as a CUDA graph plays back kernels.

A tape keeps every operation of torch with the very tensors that it read and wrote. Playing it back runs no Python of
the recorded function: what was a Python number then stays one, and everything is read and written where it was. So what
would be wrong in a CUDA graph is wrong here.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from worldflux.accel.cuda_graphs import NotCapturable

T = TypeVar("T")

aten = torch.ops.aten
WAITING = {
    aten._local_scalar_dense, aten.item, aten.nonzero, aten.masked_select, aten._unique2, aten.unique_dim,
    aten.unique_consecutive, aten.is_nonzero, aten.equal, aten.bincount, aten.repeat_interleave,
}  # fmt: skip
"""Operations that wait for the device, or the shape of whose result does."""


class _Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []
        self.waits: list[str] = []
        self.checking = 0
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        """Previous values of memory that was written in place, by address."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.checking and (func.overloadpacket in WAITING or _indexed_by_mask(func, args)):
            here = [line for line in traceback.extract_stack() if "worldflux" in line.filename][-1]
            self.waits.append(f"{func} in {here.filename}:{here.lineno}")
        for argument, given in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for x in tree_leaves(given):
                    whole = x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)
                    self.before.setdefault(whole.data_ptr(), (whole, whole.clone()))
        result = func(*args, **kwargs)
        self.operations.append((func, args, kwargs, result))
        return result

    def undo(self) -> None:
        """Restores the memory that was written."""
        with torch.no_grad():
            for whole, value in self.before.values():
                whole.copy_(value)

    def play(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, result in self.operations:
                again = func(*args, **kwargs)
                read = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
                for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                    # What was changed in place or is a view of something that was read is up to date.
                    if isinstance(old, Tensor) and old.untyped_storage().data_ptr() not in read:
                        old.copy_(new)


def _indexed_by_mask(func: Any, args: Any) -> bool:
    if func.overloadpacket not in (aten.index, aten.index_put, aten.index_put_, aten._unsafe_index):
        return False
    masks = [x for x in args[1] if isinstance(x, Tensor) and x.dtype == torch.bool]
    written = func.overloadpacket is not aten.index and len(args) > 2 and args[2].numel() == 1  # a masked fill
    return bool(masks) and not written


@contextmanager
def _on_tape() -> Iterator[_Tape]:
    """Records, except for the reads of values that these functions make on a CPU but not on CUDA."""
    tape = _Tape()

    def checked(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            tape.checking += 1
            try:
                return function(*args, **kwargs)
            finally:
                tape.checking -= 1

        return call

    with (
        mock.patch.object(torch, "quantile", checked(torch.quantile)),
        mock.patch.object(torch, "nanquantile", checked(torch.nanquantile)),
        mock.patch.object(F, "one_hot", checked(F.one_hot)),
        tape,
    ):
        yield tape


class TapeCapturer:
    """Records tapes; `tapes` holds all of them, `waits` what waited for the device in the last call."""

    def __init__(self, device: torch.device) -> None:
        self.tapes: list[_Tape] = []
        self.waits: list[str] = []

    def warm_up(self, function: Callable[[], T]) -> tuple[T, str | None]:
        with _on_tape() as tape:
            result = function()
        self.waits = tape.waits
        return result, f"it waits at {tape.waits[0]}" if tape.waits else None

    def capture(self, function: Callable[[], T]) -> tuple[Callable[[], None], T]:
        """Returns the replay of a tape, and undoes its effects: capturing computes nothing."""
        random = torch.get_rng_state()
        with _on_tape() as tape:
            result = function()
        tape.undo()
        torch.set_rng_state(random)
        if tape.waits:
            raise NotCapturable(f"it waits at {tape.waits[0]}")
        for x in tree_leaves(result):
            x.fill_(0)  # outputs of a captured function exist only after a replay
        self.tapes.append(tape)
        return tape.play, result


# Recordings that are wrong

Spoil = Callable[[Any, dict[str, Tensor]], None]
RANDOM = ("rand", "randn", "uniform_", "normal_", "exponential_", "bernoulli_", "randperm")


def stale(*names: str) -> Spoil:
    """Makes a recording read copies of inputs, which are not updated; without names, of all inputs."""

    def spoil(tape: Any, inputs: dict[str, Tensor]) -> None:
        inputs.update({name: inputs[name].clone() for name in names or inputs})

    return spoil


def without(*names: str) -> Spoil:
    """Leaves operations out of the playback."""

    def spoil(tape: Any, inputs: dict[str, Tensor]) -> None:
        kept = [entry for entry in tape.operations if entry[0].overloadpacket.__name__ not in names]
        if len(kept) == len(tape.operations):
            raise KeyError(names)
        tape.operations = kept

    return spoil


def the_same_draws_again(tape: Any, inputs: dict[str, Tensor]) -> None:
    """Makes each playback draw the same random numbers."""
    play = tape.play

    def and_back() -> None:
        before = torch.get_rng_state()
        play()
        torch.set_rng_state(before)

    tape.play = and_back


class SpoiledCapturer(TapeCapturer):
    """Captures tapes that are wrong in one way, if they contain the operation that is to be spoiled."""

    def __init__(self, device: torch.device, spoil: Spoil) -> None:
        super().__init__(device)
        self.spoil = spoil

    def capture(self, function: Callable[[], Any]) -> Any:
        result = super().capture(function)[1]
        with suppress(KeyError):
            self.spoil(self.tapes[-1], function.__self__._inputs)  # type: ignore[attr-defined]
        return self.tapes[-1].play, result
