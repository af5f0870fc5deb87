"""Autocast where there is any: devices such as `meta`, on which only shapes are computed, have none and raise."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

_AS_IT_IS = nullcontext()


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """Inside the block, products on the device are computed in `dtype`; None: in the precision of their operands."""
    kind = device.type
    if not torch.amp.is_autocast_available(kind) or (dtype is None and not torch.is_autocast_enabled(kind)):
        return _AS_IT_IS  # entering a real one costs as much as a small operation
    return torch.autocast(kind, dtype=dtype, enabled=dtype is not None)


def products(device: torch.device) -> torch.dtype:
    """The dtype in which products on the device are computed at the moment."""
    available = torch.amp.is_autocast_available(device.type)
    if not available or not torch.is_autocast_enabled(device.type):
        return torch.float32
    return torch.get_autocast_dtype(device.type)
