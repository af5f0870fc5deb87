"""Checking a model's health without affecting its training."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from worldflux.models.base import WorldModel
from worldflux.models.evaluation import evaluating
from worldflux.models.health import HealthMetric
from worldflux.replay.batch import Batch


@dataclass(frozen=True)
class Health:
    """A model's health metrics on one batch.

    The `health` method of each family documents its metrics and their thresholds. A bad value early in training may
    pass; one that stays is a reason to stop.
    """

    health_metrics: tuple[HealthMetric, ...] = ()
    """All measured metrics; empty for a model that is not a `WorldModel`."""

    @property
    def problems(self) -> tuple[HealthMetric, ...]:
        """The metrics that are beyond their thresholds."""
        return tuple(metric for metric in self.health_metrics if metric.is_bad)

    @property
    def is_good(self) -> bool:
        """Whether there are no problems. Also True if nothing was measured."""
        return not self.problems

    def metrics(self) -> dict[str, float]:
        """The values by name, for logging."""
        return {metric.name: metric.value for metric in self.health_metrics}

    def __str__(self) -> str:
        """One line for each metric; those of bad metrics say what to do."""
        if not self.health_metrics:
            return "This model measures no health metrics."
        return "\n".join(f"{'BAD' if metric.is_bad else 'ok ':<4}{metric}" for metric in self.health_metrics)


def check_health(model: nn.Module, batch: Batch, *, seed: int) -> Health:
    """Measures a model's health metrics on a batch, in evaluation mode.

    Training is not affected: the mode, the parameters and torch's random state stay as they are. The same model, batch
    and seed give the same numbers.

    Args:
        model: Any module. One that is not a `WorldModel` has no health metrics.
        batch: Windows as for `loss`; moved to the model's device. More windows give less noisy metrics.
        seed: Seed of the random numbers that the losses draw.

    Raises:
        ShapeMismatchError: If the batch does not fit the model.
    """
    if not isinstance(model, WorldModel):
        return Health()
    with evaluating(model, model.device, seed):
        return Health(model.health(batch.to(model.device)))
