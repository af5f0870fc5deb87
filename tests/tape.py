"""A recorder for tests without a GPU: it plays operations back as a CUDA graph plays back kernels.

A tape keeps every operation of torch with the very tensors that it read and wrote. Playing it back runs no Python of
the recorded function: what was a Python number then stays one, and everything is read and written where it was. So what
would be wrong in a CUDA graph is wrong here.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from worldflux.training.graphs import NotCapturable

T = TypeVar("T")

aten = torch.ops.aten
WAITING = {
    aten._local_scalar_dense, aten.item, aten.nonzero, aten.masked_select, aten._unique2, aten.unique_dim,
    aten.unique_consecutive, aten.is_nonzero, aten.equal, aten.bincount, aten.repeat_interleave,
}  # fmt: skip
"""Operations that wait for the device, or whose result's shape does."""


class _Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []
        self.waits: list[str] = []
        self.checking = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.checking and (func.overloadpacket in WAITING or _indexed_by_mask(func, args)):
            here = [line for line in traceback.extract_stack() if "worldflux" in line.filename][-1]
            self.waits.append(f"{func} in {here.filename}:{here.lineno}")
        result = func(*args, **kwargs)
        self.operations.append((func, args, kwargs, result))
        return result

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
    """Records, without the looks at values that these functions take on a CPU and not on CUDA."""
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


class TapeRecorder:
    """Records tapes; `tapes` holds all of them, `waits` what waited for the device in the last call."""

    def __init__(self, device: torch.device) -> None:
        self.tapes: list[_Tape] = []
        self.waits: list[str] = []

    def warm_up(self, function: Callable[[], T]) -> tuple[T, str | None]:
        with _on_tape() as tape:
            result = function()
        self.waits = tape.waits
        return result, f"it waits at {tape.waits[0]}" if tape.waits else None

    def record(self, function: Callable[[], T]) -> tuple[Callable[[], None], T]:
        """Computes while it records, so the first playback is left out."""
        with _on_tape() as tape:
            result = function()
        if tape.waits:
            raise NotCapturable(f"it waits at {tape.waits[0]}")
        self.tapes.append(tape)
        computed = True

        def play() -> None:
            nonlocal computed
            if not computed:
                tape.play()
            computed = False

        return play, result
