"""A look at a model's health that leaves training as it was."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from worldflux.models.base import WorldModel
from worldflux.models.evaluation import evaluating
from worldflux.models.health import HealthMetric
from worldflux.replay.batch import Batch


@dataclass(frozen=True)
class Health:
    """What a model's health metrics were on one batch.

    Each family says at its `health` method what it measures and from where on a value is bad. One bad value early in
    training may pass; one that stays is a reason to stop.
    """

    health_metrics: tuple[HealthMetric, ...] = ()
    """All that were measured; none for a model that is no `WorldModel`."""

    @property
    def problems(self) -> tuple[HealthMetric, ...]:
        """Those that are beyond their limits."""
        return tuple(metric for metric in self.health_metrics if metric.is_bad)

    @property
    def is_good(self) -> bool:
        """Whether there are no problems; also where nothing was measured."""
        return not self.problems

    def metrics(self) -> dict[str, float]:
        """The values by name, for a log."""
        return {metric.name: metric.value for metric in self.health_metrics}

    def __str__(self) -> str:
        """A line for each metric; bad ones say what to do."""
        if not self.health_metrics:
            return "This model measures no health metrics."
        return "\n".join(f"{'BAD' if metric.is_bad else 'ok ':<4}{metric}" for metric in self.health_metrics)


def check_health(model: nn.Module, batch: Batch, *, seed: int) -> Health:
    """Measures a model's health metrics on a batch, in evaluation mode.

    Training is not affected: mode, parameters and torch's random streams are as before. The same model, batch and seed
    give the same numbers.

    Args:
        model: Any module; one that is no `WorldModel` has no health metrics.
        batch: Windows as for `loss`; moved to the model's device. The more there are, the less chance has a part in it.
        seed: Of the random numbers that the losses draw.

    Raises:
        ShapeMismatchError: If the batch does not fit the model.
    """
    if not isinstance(model, WorldModel):
        return Health()
    with evaluating(model, model.device, seed):
        return Health(model.health(batch.to(model.device)))
