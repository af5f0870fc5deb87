"""Settings of the C library's memory allocator."""

from __future__ import annotations

import ctypes
import os
import platform
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
"""Parameter numbers of glibc's `mallopt`."""
_KEPT = 2**31 - 1
_GROWTH = 512 * 2**20
_LARGEST_MMAP_THRESHOLD = 32 * 2**20


def keep_freed_memory() -> bool:
    """Lets the process keep freed memory for the next gradient step.

    A step on a CPU allocates and frees the same hundreds of megabytes each time. By default glibc returns them to the
    operating system, which provides them again page by page and cleared; this took a fifth of the time of DreamerV3's
    smallest step. In return, the process stays as large as its largest step. Tensors above 32 MB are not affected (a
    limit of glibc).

    The function does nothing with another C library or if a `MALLOC_` environment variable is set.

    Returns:
        Whether the settings were applied.
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc" or any(k.startswith("MALLOC_") for k in os.environ):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD), (_M_TRIM_THRESHOLD, _KEPT), (_M_TOP_PAD, _GROWTH))
    return all(mallopt(name, value) == 1 for name, value in settings)
