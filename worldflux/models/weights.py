"""What weights from a file must be before a model takes them over."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from worldflux.errors import CheckpointError


def check_finite(where: object, tensors: Mapping[str, Tensor]) -> None:
    """Raises a `CheckpointError` that names the first tensor with a number that is not finite.

    Args:
        where: What the tensors were read from.
        tensors: On any device.
    """
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        # The smallest and the largest number are NaN where any number is, and finding them takes no further memory.
        if not torch.isfinite(torch.stack(torch.aminmax(tensor.detach()))).all():
            broken = int((~torch.isfinite(tensor)).sum())
            raise CheckpointError(
                f"{where}: {broken:,} of the {tensor.numel():,} numbers in '{name}' are NaN or infinite. A model of "
                "them predicts NaN. Load an earlier checkpoint, or pass allow_nonfinite=True to look into this one."
            )
