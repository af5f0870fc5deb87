"""What an optimiser offers so that its updates can be recorded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

Alike = list[list[Tensor]]
"""Parameters of a group, in lists of those that have been updated equally often."""


@runtime_checkable
class CapturableOptimizer(Protocol):
    """An optimiser whose update can be recorded, in two halves: the host counts it, the device carries it out.

    The two together do what `step` does, up to rounding.
    """

    param_groups: list[dict[str, Any]]
    state: dict[Any, Any]
    updated: Sequence[Alike]
    """What the last `step` updated, by group."""

    def make_capturable(self, capturable: bool = True) -> None:
        """Prepares for this kind of updates, or takes that back; `step` works in both cases."""

    def are_alike(self, parameters: Sequence[Alike]) -> bool:
        """Whether the parameters in each list have been updated equally often, so that they can be counted together."""
        ...

    def count(self, parameters: Sequence[Alike]) -> list[float]:
        """Counts an update of these parameters, by group; they are alike.

        Returns:
            The numbers that this update needs.
        """
        ...

    def update(self, numbers: Tensor, parameters: Sequence[Alike]) -> None:
        """Carries the update out.

        Args:
            numbers: What `count` returned, on the device of the parameters. `[n]`
            parameters: As given to `count`.
        """
