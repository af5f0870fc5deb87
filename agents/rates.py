"""The learning rate: a number, or a function of what remains of a run, as in stable-baselines3 (SB3)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule, LinearSchedule

from worldflux.agents.numbers import finite_number
from worldflux.errors import ConfigurationError

Rate = float | Callable[[float], float]
"""A learning rate, or its function of the share of the steps that remain: 1 when `learn` begins, 0 at its end."""


class RateSchedule(FloatSchedule):
    """SB3's schedule of a `Rate`, which says so if the function gives no learning rate."""

    def __call__(self, progress_remaining: float) -> float:
        """The learning rate when `progress_remaining` of the steps remain."""
        return _checked(f"learning_rate({progress_remaining:.3g})", self.value_schedule(progress_remaining))


@dataclass(frozen=True)
class UnsavedFunction:
    """Stands for a function of which the file of an agent only knows the name."""

    name: str

    def __call__(self, progress_remaining: float) -> float:
        """Raises, because no learning rate would be the right one.

        Raises:
            ConfigurationError: Says how to pass the function again.
        """
        raise ConfigurationError(
            f"The learning rate of the saved agent followed the function '{self.name}', which its file cannot hold. "
            "Pass it again to learn: WorldFluxAgent.load(path, env, learning_rate=...)."
        )


def checked_rate(value: Any) -> Rate:
    """`value` as a learning rate; SB3's constant schedule becomes its number.

    Raises:
        ConfigurationError: If it is neither a number from 0 nor a function.
    """
    while isinstance(value, FloatSchedule):
        value = value.value_schedule
    if isinstance(value, ConstantSchedule):
        value = value.val
    if callable(value) and not hasattr(value, "__float__"):
        return value
    return _checked("learning_rate", value)


def rate_to_json(rate: Rate | None) -> float | dict[str, Any] | None:
    """What a file says of a learning rate; of a function other than SB3's `LinearSchedule`, no more than its name."""
    if rate is None or isinstance(rate, float):
        return rate
    if type(rate) is LinearSchedule:
        return {"schedule": "linear", "start": rate.start, "end": rate.end, "end_fraction": rate.end_fraction}
    if isinstance(rate, UnsavedFunction):
        return {"schedule": "function", "name": rate.name}
    return {"schedule": "function", "name": getattr(rate, "__name__", type(rate).__name__)}


def rate_from_json(data: Any) -> Any:
    """What `rate_to_json` described; the settings check everything else.

    Raises:
        ConfigurationError: If a schedule is described that there is not.
    """
    if not isinstance(data, Mapping):
        return data
    if data.get("schedule") == "linear":
        numbers = {name: finite_number(name, data[name]) for name in ("start", "end", "end_fraction")}
        if not numbers["end_fraction"] > 0:
            raise ConfigurationError(f"end_fraction is {numbers['end_fraction']}, expected a share above 0.")
        return LinearSchedule(**numbers)
    if data.get("schedule") == "function" and isinstance(data.get("name"), str):
        return UnsavedFunction(data["name"])
    raise ConfigurationError(f"learning_rate is {data!r}, expected a number, or a schedule that save wrote.")


def _checked(name: str, value: Any) -> float:
    rate = finite_number(name, value)
    if rate < 0:
        raise ConfigurationError(f"{name} is {rate}, expected a number of 0 or more.")
    return rate
