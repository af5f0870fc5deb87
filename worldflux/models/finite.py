"""Values that are not finite: where they are first."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Says which tensor is the first that holds NaN or infinity, and of how many values; None if none does.

    Args:
        tensors: On one device, for which the host waits once.
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
    """Parameters, then buffers, by name."""
    return {name: x.detach() for name, x in (*model.named_parameters(), *model.named_buffers())}


def largest(tensors: Mapping[str, Tensor]) -> float:
    """Largest magnitude of all values; 0 if there are none."""
    return max((float(tensor.abs().amax()) for tensor in tensors.values() if tensor.numel()), default=0.0)
