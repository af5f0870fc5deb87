"""Access to the functions of `kernels.c`, which compute DreamerV3's small operations."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from worldflux.accel import native
from worldflux.nn.definitions import fast_forms

_LARGE, _FEW_THREADS = 2**18, 4
_KINDS = (Tensor, torch.nn.Parameter)


def kernels(*tensors: Tensor, elements: int = 0) -> Any:
    """Returns the compiled functions if they can be used for these tensors, otherwise None.

    They require float32 tensors on a CPU, and that neither autocast, a compiler, tracing nor a dispatch mode is active.

    Args:
        *tensors: Input tensors to check.
        elements: Number of elements of the result. Large results are left to torch if it has many threads, because
            torch parallelises everything, the kernels only the matrix products.
    """
    if elements > _LARGE and torch.get_num_threads() > _FEW_THREADS:
        return None
    # The order matters: torch.compile cannot trace `fast_forms`.
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return None
    if not native.switched_on() or not fast_forms():
        return None
    if not all(x.device.type == "cpu" and x.dtype == torch.float32 and type(x) in _KINDS for x in tensors):
        return None
    return None if is_in_torch_dispatch_mode() or torch.jit.is_tracing() else library()


@cache
def library() -> Any:
    """Returns the compiled library, or None if it cannot be compiled or torch's BLAS is not found."""
    sgemm, compiled = native.sgemm(), native.load(Path(__file__).with_name("kernels.c"))
    if sgemm is None or compiled is None:
        return None
    compiled.set_sgemm(ctypes.c_void_p(sgemm))
    return compiled if compiled.works() else None


def addresses(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    """Returns the addresses of contiguous tensors."""
    return (ctypes.c_void_p * len(tensors))(*[x.data_ptr() for x in tensors])
