"""Copies between host and device for which the host does not wait, however much work is queued on the device.

This module imports only NumPy and torch, like `worldflux.replay.batch`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies a tensor to a device; for CUDA through pinned memory and in the order of the current stream.

    Without pinned memory the host would wait for all work that is queued before the copy.
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def copy_into(targets: Mapping[str, Tensor], sources: Mapping[str, Tensor]) -> None:
    """Copies each source into the target of the same name."""
    for name, target in targets.items():
        source = sources[name]
        if target.is_cuda and source.device.type == "cpu":
            source = source.pin_memory()
        target.copy_(source, non_blocking=True)


def to_host(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Copies tensors to NumPy arrays, for which the host waits once. bfloat16, which NumPy lacks, becomes float32."""
    tensors = {name: tensor.detach() for name, tensor in tensors.items()}
    tensors = {name: x.float() if x.dtype == torch.bfloat16 else x for name, x in tensors.items()}
    devices = {tensor.device for tensor in tensors.values() if tensor.is_cuda}
    if not devices:
        return {name: tensor.cpu().numpy() for name, tensor in tensors.items()}
    copies = {name: torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        copies[name].copy_(tensor, non_blocking=True)
    for device in devices:
        torch.cuda.current_stream(device).synchronize()
    return {name: copy.numpy() for name, copy in copies.items()}
