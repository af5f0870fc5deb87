"""The experiment trackers of a run (`--track`), which continue the same tracked run when it is resumed."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from worldflux.cli import runs
from worldflux.cli.runs import RunConfig
from worldflux.errors import CheckpointError
from worldflux.files import write_atomically
from worldflux.reading import read_json
from worldflux.tracking import Ending, find_tracker

if TYPE_CHECKING:
    from stable_baselines3.common.logger import KVWriter

TRACKING_FILE = "tracking.json"
FORMAT = 1
"""Version of `tracking.json`. A change that older versions cannot read increases it."""


class RunTracking:
    """The trackers of a run.

    Args:
        names: Names of the trackers.
        project: Project of W&B and experiment of MLflow; None for the one of the environment variables.

    Raises:
        MissingDependencyError: If the package of a tracker is not installed.
    """

    def __init__(self, names: Sequence[str], project: str | None) -> None:
        self._trackers = [find_tracker(name)(project=project) for name in dict.fromkeys(names)]

    def start(self, directory: Path) -> list[KVWriter]:
        """Opens the runs, or continues those of a run that is resumed.

        Args:
            directory: Directory of the run, with its `config.json`.

        Returns:
            What SB3's `Logger` writes to.

        Raises:
            ConfigurationError: If a tool cannot start a run.
        """
        from worldflux.agents.callbacks import TrackerOutput

        if not self._trackers:
            return []
        config, ids, shown = RunConfig.read(directory), _read_ids(directory), runs.shown(directory)
        content: dict[str, Any] = {"model": config.model, "task": config.task, **config.settings}
        content |= {"command": config.command, "versions": config.versions}
        for tracker in self._trackers:
            tracker.name, tracker.directory = shown.as_posix().removeprefix(f"{runs.ROOT}/"), directory
            tracker.run_id = ids.get(tracker.package)
            tracker.start(content)
            ids[tracker.package] = str(tracker.run_id)
            print(f"worldflux: logging to {tracker.title}, run {tracker.run_id}", file=sys.stderr)
            text = json.dumps({"tracking": FORMAT, **ids}, indent=2) + "\n"
            write_atomically(directory / TRACKING_FILE, text.encode())
        return [TrackerOutput(tracker) for tracker in self._trackers]

    def finish(self, ending: Ending) -> None:
        """Closes the runs."""
        for tracker in self._trackers:
            tracker.finish(ending)


def _read_ids(directory: Path) -> dict[str, str]:
    """The ids of the tracked runs, by tracker; empty if there are none yet."""
    path = directory / TRACKING_FILE
    try:
        found = read_json(path)
    except FileNotFoundError:
        return {}
    if not isinstance(found, dict) or found.pop("tracking", None) != FORMAT:
        raise CheckpointError(f"{path} was written by another version of worldflux. Use that version.")
    if not all(isinstance(value, str) for value in found.values()):
        raise CheckpointError(f"{path} is damaged: its ids are {found!r}. Remove it to log to a new run.")
    return found
