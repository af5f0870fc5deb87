"""Autocast for devices that support it. `torch.autocast` raises for others, such as `meta`, which has shapes only."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

_AS_IT_IS = nullcontext()


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """Returns a context in which products on the device are computed in `dtype`; None disables autocast."""
    kind = device.type
    if not torch.amp.is_autocast_available(kind) or (dtype is None and not torch.is_autocast_enabled(kind)):
        return _AS_IT_IS  # entering torch.autocast costs as much as a small operation
    return torch.autocast(kind, dtype=dtype, enabled=dtype is not None)


def products(device: torch.device) -> torch.dtype:
    """Returns the dtype in which products on the device are currently computed."""
    available = torch.amp.is_autocast_available(device.type)
    if not available or not torch.is_autocast_enabled(device.type):
        return torch.float32
    return torch.get_autocast_dtype(device.type)
