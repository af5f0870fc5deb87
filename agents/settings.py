"""The settings of a `WorldFluxAgent`, in types that its file can hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule, LinearSchedule

from worldflux.accel.compilation import checked_compile
from worldflux.config import PlannerConfig
from worldflux.config.planner import OPTIONAL
from worldflux.errors import ConfigurationError, nearest
from worldflux.files import checked_path
from worldflux.models.base import WorldModel
from worldflux.replay.backends import lasting_place
from worldflux.validation import check_flag, finite_number, whole_number

_COUNTS = {"batch_size": 1, "seq_len": 1, "buffer_size": 1, "learning_starts": 0, "seed": 0}
"""Smallest value of each count. None is allowed as well."""

PLANNERS = ("auto", "mppi", "cem", None)


@dataclass(frozen=True)
class AgentSettings:
    """Settings as described in `WorldFluxAgent`; None stands for the default of the model's family.

    Numbers of NumPy and torch become Python's.

    Raises:
        ConfigurationError: If a value has the wrong type or is out of range.
    """

    learning_rate: Rate | None = None
    train_ratio: float | None = None
    batch_size: int | None = None
    seq_len: int | None = None
    buffer_size: int | None = None
    buffer_storage: str | None = None
    learning_starts: int | None = None
    replay_context: bool = True
    planner: str | None = "auto"
    planner_kwargs: Mapping[str, Any] | None = None
    stats_window_size: int = 100
    tensorboard_log: str | None = None
    verbose: int = 0
    seed: int | None = None
    compile: bool | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {
            name: whole_number(
                name, getattr(self, name), least, below=2**32 if name == "seed" else 2**63
            )  # NumPy's limit
            for name, least in _COUNTS.items()
            if getattr(self, name) is not None
        }
        if self.learning_rate is not None:
            checked["learning_rate"] = checked_rate(self.learning_rate)
        if self.train_ratio is not None:
            checked["train_ratio"] = ratio = finite_number("train_ratio", self.train_ratio)
            if not 0 <= ratio <= 1e9:
                raise ConfigurationError(f"train_ratio is {ratio}, expected a number of 0 or more, up to 1e9.")
        if self.buffer_storage is not None:
            if not isinstance(self.buffer_storage, str | Path | torch.device):
                raise ConfigurationError(
                    f"buffer_storage is {self.buffer_storage!r}, expected a directory, a device or None for memory."
                )
            checked["buffer_storage"] = str(self.buffer_storage)
        checked["replay_context"] = check_flag("replay_context", self.replay_context)
        if self.planner not in PLANNERS:
            raise ConfigurationError(
                f"planner is {self.planner!r}, expected 'mppi' or 'cem' to plan, None to act with the policy, or "
                "'auto' for the family's default."
            )
        if self.planner_kwargs is not None:
            checked["planner_kwargs"] = _planner_fields(self.planner_kwargs)
        checked["stats_window_size"] = whole_number("stats_window_size", self.stats_window_size, 1)
        # SB3 takes numbers; other projects take True.
        verbose = int(self.verbose) if isinstance(self.verbose, bool | np.bool_) else self.verbose
        checked["verbose"] = whole_number("verbose", verbose, 0)
        if self.tensorboard_log is not None:
            if not isinstance(self.tensorboard_log, str | Path):
                raise ConfigurationError(f"tensorboard_log is {self.tensorboard_log!r}, expected a directory or None.")
            checked["tensorboard_log"] = str(self.tensorboard_log)
        checked["compile"] = checked_compile(self.compile)
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def with_lasting_paths(self) -> AgentSettings:
        """The same settings with absolute paths, which stay valid when the working directory changes.

        Raises:
            ConfigurationError: If a path cannot be that of a directory.
        """
        storage, log = self.buffer_storage, self.tensorboard_log
        return replace(
            self,
            buffer_storage=None if storage is None else lasting_place("buffer_storage", storage),
            tensorboard_log=None if log is None else str(checked_path("tensorboard_log", log, directory=True)),
        )

    def with_defaults(self, model: WorldModel, n_envs: int) -> AgentSettings:
        """The same settings with the defaults of the model's family in place of None."""
        defaults = model.online_defaults()
        own = {"learning_rate": model.optimizer_spec.learning_rate, **vars(defaults)}
        taken = {name: own[name] for name, value in vars(self).items() if value is None and name in own}
        filled = {**vars(self), **taken}
        if filled["train_ratio"] is None:
            taken["train_ratio"] = float(filled["batch_size"] * filled["seq_len"])
        if filled["learning_starts"] is None:
            # As many windows as a batch has time steps; the first one of each environment has a row of context, too.
            taken["learning_starts"] = (filled["batch_size"] + n_envs) * filled["seq_len"]
        taken["planner"] = defaults.planner if self.planner == "auto" else self.planner
        return replace(self, **taken)


SETTINGS = tuple(item.name for item in fields(AgentSettings))
"""The names of all settings."""


def _planner_fields(given: Any) -> dict[str, int | float | None]:
    """`planner_kwargs` with Python's numbers; the planner checks their ranges."""
    names = [item.name for item in fields(PlannerConfig)]
    if not isinstance(given, Mapping):
        raise ConfigurationError(f"planner_kwargs is {given!r}, expected a dictionary with some of {names}.")
    found: dict[str, int | float | None] = {}
    for name, value in given.items():
        if name not in names:
            raise ConfigurationError(f"Unknown field '{name}' in planner_kwargs{nearest(name, names)}")
        if value is None and name in OPTIONAL:
            found[name] = None
            continue
        whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
        found[name] = int(value) if whole else finite_number(name, value)
    return found


Rate = float | Callable[[float], float]
"""A learning rate, or a function of the share of the steps that remain: 1 when `learn` begins, 0 at its end."""


class RateSchedule(FloatSchedule):
    """SB3's schedule of a `Rate`, with an error of ours if a function returns no learning rate."""

    def __call__(self, progress_remaining: float) -> float:
        """The learning rate when `progress_remaining` of the steps remain."""
        return _checked(f"learning_rate({progress_remaining:.3g})", self.value_schedule(progress_remaining))


@dataclass(frozen=True)
class UnsavedFunction:
    """Stands for a function of which an agent's file holds only the name."""

    name: str

    def __call__(self, progress_remaining: float) -> float:
        """Asks for the function.

        Raises:
            ConfigurationError: Always.
        """
        raise ConfigurationError(
            f"The learning rate of the saved agent followed the function '{self.name}', which its file cannot hold. "
            "Pass it again to learn: WorldFluxAgent.load(path, env, learning_rate=...)."
        )


def checked_rate(value: Any) -> Rate:
    """`value` as a learning rate; SB3's constant schedule becomes its number.

    Raises:
        ConfigurationError: If it is neither a number of 0 or more nor a function.
    """
    while isinstance(value, FloatSchedule):
        value = value.value_schedule
    if isinstance(value, ConstantSchedule):
        value = value.val
    if callable(value) and not hasattr(value, "__float__"):
        return value
    return _checked("learning_rate", value)


def rate_to_json(rate: Rate | None) -> float | dict[str, Any] | None:
    """A learning rate as JSON; of a function other than SB3's `LinearSchedule`, only its name."""
    if rate is None or isinstance(rate, float):
        return rate
    if type(rate) is LinearSchedule:
        return {"schedule": "linear", "start": rate.start, "end": rate.end, "end_fraction": rate.end_fraction}
    if isinstance(rate, UnsavedFunction):
        return {"schedule": "function", "name": rate.name}
    return {"schedule": "function", "name": getattr(rate, "__name__", type(rate).__name__)}


def rate_from_json(data: Any) -> Any:
    """The learning rate that `rate_to_json` described; `checked_rate` checks numbers.

    Raises:
        ConfigurationError: If there is no such schedule.
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
