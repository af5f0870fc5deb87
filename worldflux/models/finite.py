"""Checks for values that are not finite."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Describes the first tensor that contains NaN or infinity, or returns None if there is none.

    Args:
        tensors: Tensors on one device. The host waits for the device once.

    Returns:
        The name of the tensor and how many of its values are not finite, as text for an error message.
    """
    if not tensors:
        return None
    whole = torch.stack([torch.isfinite(tensor).all() for tensor in tensors.values()]).tolist()
    if all(whole):
        return None
    name, tensor = list(tensors.items())[whole.index(False)]
    broken = int((~torch.isfinite(tensor)).sum())
    return f"'{name}' has {broken:,} of {tensor.numel():,} values that are NaN or infinite"


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Returns the parameters, then the buffers of a model by name."""
    return {name: x.detach() for name, x in (*model.named_parameters(), *model.named_buffers())}


def largest(tensors: Mapping[str, Tensor]) -> float:
    """Returns the largest magnitude of all values, or 0 if there are none."""
    return max((float(tensor.abs().amax()) for tensor in tensors.values() if tensor.numel()), default=0.0)
