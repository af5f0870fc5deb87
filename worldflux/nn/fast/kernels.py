"""Access to the functions of `kernels.c`, which compute DreamerV3's small operations."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules import module as torch_module
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from worldflux.accel import native
from worldflux.nn.definitions import fast_forms

_LARGE, _FEW_THREADS = 2**18, 4
_KINDS = (Tensor, torch.nn.Parameter)
_GLOBAL_HOOKS: Callable[[], Any] = getattr(torch_module, "_has_any_global_hook", lambda: False)


def kernels(*tensors: Tensor, elements: int = 0) -> Any:
    """Returns the compiled functions if they can be used for these tensors, otherwise None.

    Args:
        *tensors: Some of the inputs.
        elements: Number of values to compute. Large ones are left to torch where it has many threads: it shares
            everything among them, the kernels only the matrix products.
    """
    if elements > _LARGE and torch.get_num_threads() > _FEW_THREADS:
        return None
    return library() if native_code_applies(tensors) else None


def native_code_applies(tensors: Iterable[Tensor]) -> bool:
    """Returns whether native code may compute with these tensors.

    It requires float32 tensors on a CPU, and that no autocast, compiler, tracing, dispatch mode or global module hook
    is active.
    """
    # The order matters: torch.compile cannot trace `fast_forms`.
    return (
        not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and fast_forms()
        and native.switched_on()
        and all(x.is_cpu and x.dtype is torch.float32 and type(x) in _KINDS for x in tensors)
        and not is_in_torch_dispatch_mode()
        and not torch.jit.is_tracing()
        and not _GLOBAL_HOOKS()
    )


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
