"""What the C library does with memory that a training step frees."""

from __future__ import annotations

import ctypes
import os
import platform
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
"""Numbers of glibc's `mallopt`."""
_KEPT = 2**31 - 1
_GROWTH = 512 * 2**20
_LARGEST_MMAP_THRESHOLD = 32 * 2**20


def keep_freed_memory() -> bool:
    """Lets the process keep the memory that it frees, for the next gradient step.

    A step on a CPU makes and frees the same hundreds of megabytes each time. By default glibc gives them back to the
    system, which hands them out again page by page, cleared: a fifth of the time of DreamerV3's smallest step. The
    process stays as large as its largest step in return. Tensors above 32 MB are out of reach (glibc's limit).

    It does nothing where the C library is another one, or where the environment sets one of its `MALLOC_` variables.

    Returns:
        Whether the library was told so.
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc" or any(k.startswith("MALLOC_") for k in os.environ):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD), (_M_TRIM_THRESHOLD, _KEPT), (_M_TOP_PAD, _GROWTH))
    return all(mallopt(name, value) == 1 for name, value in settings)
