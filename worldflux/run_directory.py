"""Where a run of `worldflux train` keeps its agents. This module loads neither torch nor SB3."""

from __future__ import annotations

from pathlib import Path

from worldflux.errors import CheckpointError, ConfigurationError
from worldflux.reading import read_json

CONFIG_FILE = "config.json"
CHECKPOINTS = "checkpoints"
BEST_AGENT_FILE = "best_agent.zip"
MODEL_DIRECTORY = "model"


def is_run(directory: Path) -> bool:
    """Whether this is the directory of a run. Checkpoints of an agent also have a `config.json`, that of the model."""
    try:
        data = read_json(directory / CONFIG_FILE, finite=False)
    except (FileNotFoundError, CheckpointError):
        return False
    return isinstance(data, dict) and "run" in data


def first_run_in(directory: Path) -> Path | None:
    """The first run in a directory such as `runs`, with at most two directories between them; None without runs."""
    for depth in range(1, 4) if directory != directory.parent else ():  # not all of a file system
        for path in sorted(directory.glob("/".join(["*"] * depth + [CONFIG_FILE]))):
            if is_run(path.parent):
                return path.parent
    return None


def agent_of_run(run: Path, *, newest: bool) -> Path:
    """Finds the agent of a run: the one with the best evaluation, otherwise the directory of its checkpoints.

    Args:
        run: Directory of the run.
        newest: Prefer the checkpoints, of which the newest continues the run.

    Raises:
        ConfigurationError: If the run has no agent.
    """
    if (run / BEST_AGENT_FILE).is_file() and not newest:
        return run / BEST_AGENT_FILE
    if read_json(run / CONFIG_FILE, finite=False).get("kind") == "train-offline":
        raise ConfigurationError(
            f"{run} is a run of worldflux train-offline, which trains a model and no agent. Act with the model: "
            f"WorldFluxAgent({str(run / MODEL_DIRECTORY)!r}, env)."
        )
    if not any((run / CHECKPOINTS).glob("step-*")):
        raise ConfigurationError(f"{run} has no agent yet. Wait for the first checkpoint or evaluation of this run.")
    return run / CHECKPOINTS
