"""Losses between two dumps of the log."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class MeanLosses:
    """Means of the losses since they were last read, kept on the device until then."""

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._sum: Tensor | None = None
        self._count = 0

    def add(self, losses: Mapping[str, Tensor]) -> None:
        """Takes in the losses of one gradient step, without reading them."""
        values = torch.stack([value.detach().float() for value in losses.values()])
        if self._names != tuple(losses):
            self._names, self._sum, self._count = tuple(losses), None, 0
        self._sum = values if self._sum is None else self._sum.add_(values)
        self._count += 1

    def take(self) -> dict[str, float]:
        """The means, empty if nothing was trained; then starts anew. Waits for the device."""
        if self._sum is None:
            return {}
        means = (self._sum / self._count).tolist()
        self._sum, self._count = None, 0
        return dict(zip(self._names, means, strict=True))
