"""Experiment trackers: Weights & Biases and MLflow behind one interface.

A tracker writes into the run that is open in this process, if there is one, and otherwise into a run of its own.
"""

from __future__ import annotations

import importlib
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from worldflux.errors import ConfigurationError, MissingDependencyError, install_hint, nearest

logger = logging.getLogger("worldflux")

Ending = Literal["finished", "stopped", "failed"]

PROJECT = "worldflux"
"""Name of the project of W&B, or of the experiment of MLflow, if the user gives none."""


class Tracker(ABC):
    """A run of an experiment tracker.

    Attributes:
        run_id: Id of the run, by which it can be continued; None before `start`, unless one was given.

    Args:
        project: Project of W&B or experiment of MLflow. None takes it from the tool's environment variables, or else
            "worldflux".
        name: Name of the run; None leaves it to the tool.
        tags: Tags of the run.
        run_id: Id of a run to continue.
        directory: Directory for local files of the tool; None leaves it to the tool.

    Raises:
        MissingDependencyError: If the package is not installed.
    """

    package: ClassVar[str]
    """Package to import, which is also the name of the tracker and of the extra that installs it."""
    title: ClassVar[str]
    """Name of the tool in messages."""
    advice: ClassVar[str]
    """What to do if no run can be started."""

    def __init__(
        self,
        *,
        project: str | None = None,
        name: str | None = None,
        tags: Sequence[str] = (),
        run_id: str | None = None,
        directory: Path | None = None,
    ) -> None:
        try:
            self._tool: Any = importlib.import_module(self.package)
        except ImportError as error:
            raise MissingDependencyError(
                f"Tracking with {self.title} needs {self.package}. Install it with: {install_hint(self.package)}."
            ) from error
        self.project, self.name, self.tags, self.run_id, self.directory = project, name, tuple(tags), run_id, directory
        self._opened = False
        self._failed = False

    def start(self, config: Mapping[str, Any]) -> None:
        """Opens the run, or joins the one that is open.

        Args:
            config: Settings to show with the run; nested ones are joined by dots.

        Raises:
            ConfigurationError: If the tool cannot start the run.
        """
        try:
            self._start(flattened(config))
        except Exception as error:
            first = str(error).strip().partition("\n")[0]
            raise ConfigurationError(f"{self.title} cannot start a run: {first} {self.advice}") from error

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Logs numbers. A tool that fails, for example without a network, is reported once and stops no training."""
        try:
            self._log(values, step)
        except Exception as error:
            if not self._failed:
                logger.warning("%s cannot log step %d: %s. Training continues.", self.title, step, error)
            self._failed = True

    def finish(self, ending: Ending) -> None:
        """Closes the run if it was opened here. A tool that fails is reported."""
        if self._opened:
            self._opened = False
            try:
                self._finish(ending)
            except Exception as error:
                logger.warning("%s cannot close run %s: %s", self.title, self.run_id, error)

    @abstractmethod
    def _start(self, config: Mapping[str, Any]) -> None: ...

    @abstractmethod
    def _log(self, values: Mapping[str, float], step: int) -> None: ...

    @abstractmethod
    def _finish(self, ending: Ending) -> None: ...


class WandbTracker(Tracker):
    """A run of Weights & Biases. Charts have the axis `global_step`, as with `sync_tensorboard` of SB3 runs."""

    package, title = "wandb", "Weights & Biases"
    advice = "Log in with: wandb login. Or work without the server: WANDB_MODE=offline."

    def _start(self, config: Mapping[str, Any]) -> None:
        if self._tool.run is not None:
            self._run = self._tool.run
            self._run.config.update(dict(config), allow_val_change=True)
        else:
            self._run = self._tool.init(
                project=self.project or os.environ.get("WANDB_PROJECT") or PROJECT,
                name=os.environ.get("WANDB_NAME") or self.name,
                tags=self.tags or None,
                config=dict(config),
                id=self.run_id,
                resume=None if self.run_id is None else "allow",
                dir=None if self.directory is None or "WANDB_DIR" in os.environ else str(self.directory),
            )
            self._opened = True
            # A run that is resumed repeats the steps after its checkpoint; W&B's own step can only grow.
            self._run.define_metric("global_step")
            self._run.define_metric("*", step_metric="global_step")
        self.run_id = self._run.id

    def _log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, "global_step": step})

    def _finish(self, ending: Ending) -> None:
        self._run.finish(exit_code=0 if ending == "finished" else 1)


class MlflowTracker(Tracker):
    """A run of MLflow, in the place that `MLFLOW_TRACKING_URI` names."""

    package, title = "mlflow", "MLflow"
    advice = "Check MLFLOW_TRACKING_URI."

    def _start(self, config: Mapping[str, Any]) -> None:
        active, resumed = self._tool.active_run(), self.run_id is not None
        if active is None:
            if self.project is not None or not {"MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"} & set(os.environ):
                self._tool.set_experiment(self.project or PROJECT)
            pairs = (tag.partition("=") for tag in self.tags)
            tags = {name: value or "true" for name, _, value in pairs}
            active = self._tool.start_run(run_id=self.run_id, run_name=self.name, tags=tags or None)
            self._opened = True
        self.run_id = active.info.run_id
        params = list(config.items())
        for first in range(0, 0 if resumed else len(params), _MOST_PARAMS):  # parameters cannot be changed later
            self._tool.log_params(dict(params[first : first + _MOST_PARAMS]))

    def _log(self, values: Mapping[str, float], step: int) -> None:
        self._tool.log_metrics(dict(values), step=step)

    def _finish(self, ending: Ending) -> None:
        self._tool.end_run({"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}[ending])


_MOST_PARAMS = 100
"""Largest number of parameters that MLflow takes at once."""

TRACKERS: dict[str, type[Tracker]] = {kind.package: kind for kind in (WandbTracker, MlflowTracker)}
"""All trackers by name."""


def find_tracker(name: str) -> type[Tracker]:
    """The class of a tracker.

    Raises:
        ConfigurationError: If there is none of that name.
    """
    if name not in TRACKERS:
        raise ConfigurationError(
            f"tracker is {name!r}{nearest(str(name), TRACKERS)} It is one of: {', '.join(TRACKERS)}."
        )
    return TRACKERS[name]


def flattened(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The entries of nested mappings, with names joined by dots. Values are numbers, text, truth values or None."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            found |= flattened(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value if isinstance(value, int | float | str | None) else str(value)
    return found
