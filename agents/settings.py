"""The settings of a `WorldFluxAgent`, in the types that its file can hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from worldflux.agents.numbers import count, finite_number
from worldflux.agents.rates import Rate, checked_rate
from worldflux.errors import ConfigurationError, nearest
from worldflux.files import checked_path
from worldflux.models.base import WorldModel
from worldflux.models.planning import PlannerConfig
from worldflux.training.compiling import checked_compile
from worldflux.training.storage import lasting_place

_COUNTS = {"batch_size": 1, "seq_len": 1, "buffer_size": 1, "learning_starts": 0, "seed": 0}

PLANNERS = ("auto", "mppi", None)


@dataclass(frozen=True)
class AgentSettings:
    """Settings as they are described in `WorldFluxAgent`; None stands for the model family's own number.

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
            name: count(name, getattr(self, name), least)
            for name, least in _COUNTS.items()
            if getattr(self, name) is not None
        }
        if checked.get("seed", 0) >= 2**32:
            raise ConfigurationError(f"seed is {self.seed}, expected a whole number below 2**32, which NumPy can take.")
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
        if not isinstance(self.replay_context, bool | np.bool_):
            raise ConfigurationError(f"replay_context is {self.replay_context!r}, expected True or False.")
        checked["replay_context"] = bool(self.replay_context)
        if self.planner not in PLANNERS:
            raise ConfigurationError(
                f"planner is {self.planner!r}, expected 'mppi' to plan, None to act with the policy, or 'auto' for the "
                "family's own way."
            )
        if self.planner_kwargs is not None:
            checked["planner_kwargs"] = _planner_fields(self.planner_kwargs)
        checked["stats_window_size"] = count("stats_window_size", self.stats_window_size, 1)
        # SB3 counts, and others say True.
        verbose = int(self.verbose) if isinstance(self.verbose, bool | np.bool_) else self.verbose
        checked["verbose"] = count("verbose", verbose, 0)
        if self.tensorboard_log is not None:
            if not isinstance(self.tensorboard_log, str | Path):
                raise ConfigurationError(f"tensorboard_log is {self.tensorboard_log!r}, expected a directory or None.")
            checked["tensorboard_log"] = str(self.tensorboard_log)
        checked["compile"] = checked_compile(self.compile)
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def with_lasting_paths(self) -> AgentSettings:
        """The same settings with paths that stay when the working directory changes.

        Raises:
            ConfigurationError: If one can be none of a directory.
        """
        storage, log = self.buffer_storage, self.tensorboard_log
        return replace(
            self,
            buffer_storage=None if storage is None else lasting_place("buffer_storage", storage),
            tensorboard_log=None if log is None else str(checked_path("tensorboard_log", log, directory=True)),
        )

    def with_defaults(self, model: WorldModel, n_envs: int) -> AgentSettings:
        """The same settings with the numbers of a model's family where none were given."""
        defaults = model.online_defaults()
        own = {"learning_rate": model.optimizer_spec.learning_rate, **vars(defaults)}
        taken = {name: own[name] for name, value in vars(self).items() if value is None and name in own}
        filled = {**vars(self), **taken}
        if filled["train_ratio"] is None:
            taken["train_ratio"] = float(filled["batch_size"] * filled["seq_len"])
        if filled["learning_starts"] is None:
            # As many windows as a batch has time steps; the first one of each environment takes a row for context, too.
            taken["learning_starts"] = (filled["batch_size"] + n_envs) * filled["seq_len"]
        taken["planner"] = defaults.planner if self.planner == "auto" else self.planner
        return replace(self, **taken)


def _planner_fields(given: Any) -> dict[str, int | float | None]:
    """Fields of `PlannerConfig` as Python's numbers; the planner checks their ranges."""
    names = [item.name for item in fields(PlannerConfig)]
    if not isinstance(given, Mapping):
        raise ConfigurationError(f"planner_kwargs is {given!r}, expected a dictionary with some of {names}.")
    found: dict[str, int | float | None] = {}
    for name, value in given.items():
        if name not in names:
            raise ConfigurationError(f"Unknown field '{name}' in planner_kwargs{nearest(name, names)}")
        if name == "discount" and value is None:  # the model's own
            found[name] = None
            continue
        whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
        found[name] = int(value) if whole else finite_number(name, value)
    return found
