"""The directory of a run: its entries, and how they are written and found.

config.json        settings of the run, enough to start it again
config.yaml        the same settings for --config, to start another run with them
logs/              progress.csv, progress.json, TensorBoard; each time the run is resumed, a new part (progress-2.csv)
evaluations.csv    the learning curve
checkpoints/       step-00010000, ...: the run is resumed from the newest one
best_agent.zip     the agent with the best evaluation
agent.zip          the agent at the end of the run (model/ for a run of worldflux train-offline)
"""

from __future__ import annotations

import csv
import io
import json
import os
import platform
import re
import sys
import time
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from worldflux.errors import CheckpointError, ConfigurationError
from worldflux.files import write_atomically
from worldflux.hub.addresses import is_address
from worldflux.hub.client import model_path
from worldflux.locks import LOCK_FILE
from worldflux.reading import open_regular, read_json
from worldflux.run_directory import BEST_AGENT_FILE as BEST_AGENT_FILE
from worldflux.run_directory import CHECKPOINTS, CONFIG_FILE, MODEL_DIRECTORY, agent_of_run, is_run

LAUNCH_FILE = "launch.json"
LOGS = "logs"
EVALUATIONS_FILE = "evaluations.csv"
AGENT_FILE = "agent.zip"
ROOT = Path("runs")
"""Parent of all runs that were started without --run."""

FORMAT = 2
"""Version of `config.json`. A change that older versions cannot read increases it."""


@dataclass(frozen=True)
class RunConfig:
    """What a run was started with."""

    kind: str
    """Name of the command, "train" or "train-offline"."""
    model: str
    """MODEL of the command line."""
    task: str
    """ENV of the command line, or the data file of `train-offline`."""
    settings: dict[str, Any]
    """Options of the command, as JSON values."""
    frames_per_step: int = 1
    """Number of frames of the environment in each step."""
    command: str = ""
    """Command that starts the same run again, for people to read."""
    versions: dict[str, str] = field(default_factory=dict)
    """Versions of Python and the packages with which the run was started."""
    commits: dict[str, str] = field(default_factory=dict)
    """Git commits of worldflux, and of the environment if it is the user's own code; without those not known."""
    machine: dict[str, str] = field(default_factory=dict)
    """Platform, processor, threads and device with which the run was started."""
    started: str = ""
    """Time at which the run was started."""
    resumed: list[dict[str, Any]] = field(default_factory=list)
    """For each time that the run was resumed: `started`, `step`, `versions`, `commits` and `machine`."""

    def write(self, directory: Path) -> None:
        """Writes `config.json`. The file is replaced as a whole."""
        write_atomically(
            directory / CONFIG_FILE, (json.dumps({"run": FORMAT, **asdict(self)}, indent=2) + "\n").encode()
        )

    @classmethod
    def read(cls, directory: Path) -> RunConfig:
        """Reads what `write` wrote.

        Raises:
            ConfigurationError: If this is not the directory of a run.
            CheckpointError: If its `config.json` is damaged, or has another version.
        """
        path = directory / CONFIG_FILE
        if not is_run(directory):
            given = shown(directory)
            what = f"There is no '{given}'" if not directory.exists() else f"{given} is not the directory of a run"
            raise ConfigurationError(f"{what}. Pass a directory that worldflux train has written.")
        data = read_json(path, finite=False)
        if data.pop("run") != FORMAT:
            raise CheckpointError(f"{path} was written by another version of worldflux. Use that version.")
        types = {"kind": str, "model": str, "task": str, "settings": dict, "frames_per_step": int}
        types |= {"command": str, "versions": dict, "commits": dict, "machine": dict, "started": str, "resumed": list}
        for name, expected in types.items():
            if not isinstance(data.get(name), expected) or isinstance(data[name], bool):
                raise CheckpointError(f"{path} is damaged: {name} is {data.get(name)!r}.")
        for part in (data, *data["resumed"]):
            for name in ("versions", "commits", "machine"):
                found = part.get(name) if isinstance(part, dict) else None
                if not isinstance(found, dict) or not all(isinstance(text, str) for text in found.values()):
                    raise CheckpointError(f"{path} is damaged: {name} is {found!r}.")
        return cls(**{name: data[name] for name in types})


def find_runs(directory: Path) -> Iterator[Path]:
    """The directory itself if it is that of a run, otherwise all runs in it, sorted by name.

    Links are followed, and each directory is visited once, because a link may lead back to a parent.

    Raises:
        ConfigurationError: If a directory cannot be read.
    """
    seen: set[str] = set()
    waiting = [directory]
    while waiting:
        place = waiting.pop()
        real = os.path.realpath(place)
        if real in seen:
            continue
        seen.add(real)
        if is_run(place):
            yield place
            continue
        try:
            inside = [entry for entry in place.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise ConfigurationError(f"{shown(place)} cannot be read: {error.strerror}.") from error
        waiting += sorted(inside, key=_place, reverse=True)


def run_of(path: Path) -> Path | None:
    """The run that a file or a checkpoint belongs to; None if it belongs to no run."""
    absolute = path.absolute()
    return next((place for place in (absolute, *absolute.parents[:2]) if is_run(place)), None)


def check_free(run: Path | None) -> None:
    """Raises a `ConfigurationError` if a run cannot start in this directory; None stands for one chosen later."""
    if run is None:
        return
    if is_run(run):
        raise ConfigurationError(
            f"{shown(run)} already contains a run. Resume it (--resume {shown(run)}), or choose another directory."
        )
    if run.exists() and not (run.is_dir() and all(entry.name == LOCK_FILE for entry in run.iterdir())):
        raise ConfigurationError(f"{shown(run)} exists and is not an empty directory. Choose another directory.")


def note_launch(directory: Path) -> None:
    """Notes which `torchrun` has started a run, so that it goes on with it if it has to start its processes again."""
    if "TORCHELASTIC_RESTART_COUNT" in os.environ:
        write_atomically(directory / LAUNCH_FILE, json.dumps({"launcher": _launcher()}).encode())


def begun_before_restart(run: Path | None, root: Path) -> str | None:
    """The directory of the run that these processes had begun before `torchrun` started them again; None at first.

    Args:
        run: Directory that the user has chosen for the run; None if it is one below `root`.
        root: Parent directory of all runs.
    """
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return None
    found = [place for place in find_runs(run or root) if _launcher_of(place) == _launcher()]
    return str(max(found, key=lambda place: (place / LAUNCH_FILE).stat().st_mtime_ns)) if found else None


def _launcher() -> str:
    return f"{platform.node()}:{os.getppid()}"


def _launcher_of(run: Path) -> str | None:
    try:
        data = read_json(run / LAUNCH_FILE)
    except (FileNotFoundError, CheckpointError):
        return None
    launcher = data.get("launcher") if isinstance(data, dict) else None
    return launcher if isinstance(launcher, str) else None


def shown(path: Path) -> Path:
    """A path as it is printed: relative to the working directory if it lies below it."""
    here = Path(os.path.abspath("."))
    return path.relative_to(here) if path.is_relative_to(here) else path


def make_directory(run: Path | None, task: str, model: str, root: Path) -> Path:
    """Creates the directory of a new run.

    Args:
        run: Directory that the user has chosen; None for the first free number in `<root>/<task>/<model>`.
        task: Environment or data of the run.
        model: Model of the run.
        root: Parent directory of all runs.

    Raises:
        ConfigurationError: If it cannot be created.
    """
    try:
        if run is not None:
            run.mkdir(parents=True, exist_ok=True)
            return run
        parent = root / _plain(task) / _plain(model)
        parent.mkdir(parents=True, exist_ok=True)
        number = 1 + max((int(entry.name) for entry in parent.iterdir() if entry.name.isdecimal()), default=0)
        while True:
            try:
                # Runs that are started at the same time must not share a directory.
                (parent / str(number)).mkdir()
                return parent / str(number)
            except FileExistsError:
                number += 1
    except OSError as error:
        raise ConfigurationError(
            f"The directory of the run cannot be created: {error}. Choose another one with --run."
        ) from error


def newest_step(directory: Path) -> int | None:
    """The step of a run's newest checkpoint; None if it has no checkpoint."""
    newest = _newest(directory)
    return None if newest is None else int(newest.name.removeprefix("step-"))


def has_result(directory: Path, name: str) -> bool:
    """Whether a run has written its result after its newest checkpoint.

    A run that was resumed with more steps and killed before its end still has the result of fewer steps.
    """
    newest, result = _newest(directory), directory / name
    return result.exists() and (newest is None or result.stat().st_mtime_ns >= newest.stat().st_mtime_ns)


def _newest(run: Path) -> Path | None:
    """The newest checkpoint of a run; None if it has no checkpoint."""
    from worldflux.training.checkpoint import newest_checkpoint

    return newest_checkpoint(run / CHECKPOINTS)


@dataclass(frozen=True)
class Saved:
    """A saved agent, or a saved model that can act."""

    path: Path
    """File or directory to read."""
    is_agent: bool
    """Whether it is a complete agent. A model alone needs an environment to act in."""


def saved_agent(path: Path, *, newest: bool = False) -> Saved:
    """Finds the agent or model that a user names.

    Args:
        path: A zip, a checkpoint, the directory of a run or of `WorldModel.save_pretrained`, or an address on the
            Hugging Face Hub.
        newest: For a run, choose the newest checkpoint instead of the agent with the best evaluation or the final
            model.

    Raises:
        ConfigurationError: If there is no agent and no model.
        HubError: If it cannot be downloaded.
    """
    from worldflux.training.checkpoint import newest_checkpoint

    if is_address(path):
        path = model_path("AGENT", path)
    if is_run(path):
        return _of_run(path, newest)
    if not path.exists() and path.with_name(f"{path.name}.zip").is_file():
        return Saved(path, True)
    if path.is_file():
        if not zipfile.is_zipfile(path):
            raise ConfigurationError(f"{path} was not written by WorldFluxAgent.save. {_AGENT}")
        return Saved(path, True)
    if not path.exists():
        raise ConfigurationError(f"There is no '{path}'. {_AGENT}")
    for place in (path, newest_checkpoint(path)):
        if place is not None and (place / "agent.json").is_file():
            return Saved(place, True)
        if place is not None and _is_model(place):
            return Saved(place, False)
    raise ConfigurationError(f"{path} contains neither a checkpoint of an agent nor a model. {_AGENT}")


_AGENT = (
    "AGENT is a zip of WorldFluxAgent.save, a checkpoint, the directory of a run, the directory of a model written by "
    "save_pretrained, or an address on the Hugging Face Hub (hf://user/name)."
)


def _of_run(run: Path, newest: bool) -> Saved:
    """The agent or model that a run has saved."""
    checkpoint = _newest(run)
    if RunConfig.read(run).kind == "train":
        found = agent_of_run(run, newest=newest)
        return Saved(checkpoint if checkpoint is not None and found.is_dir() else found, True)
    for place in (checkpoint, run / MODEL_DIRECTORY) if newest else (run / MODEL_DIRECTORY, checkpoint):
        if place is not None and _is_model(place):
            return Saved(place, False)
    raise ConfigurationError(f"{run} has no model yet. Wait for the first checkpoint of this run.")


def _is_model(directory: Path) -> bool:
    return all((directory / name).is_file() for name in ("config.json", "model.safetensors"))


def now() -> str:
    """The current time in the format of `config.json`."""
    return time.strftime("%Y-%m-%d %H:%M:%S %z")


def _place(entry: Path) -> tuple[int, str]:
    """Sorts numbers by value, before names."""
    name = entry.name
    return (int(name), "") if name.isdecimal() else (sys.maxsize, name)


def _plain(name: str) -> str:
    """A directory name that is valid on every system: `dmc/walker-walk` becomes `dmc-walker-walk`."""
    if ".py:" in name:  # path/to/file.py:MyEnv
        name = re.split(r"[\\/]", name)[-1].replace(".py:", "-")
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.") or "run"


@dataclass(frozen=True)
class Evaluation:
    """Result of evaluating an agent with its most likely actions."""

    step: int
    """Environment steps of training before the evaluation."""
    score: float
    """Mean return."""
    std: float
    """Standard deviation of the returns."""
    length: float
    """Mean number of steps in an episode."""
    episodes: int
    """Number of episodes."""
    seconds: float
    """Seconds since the training began, not counting the time in which the run was stopped."""
    seed: int
    """Seed of the run."""
    tasks: dict[str, float] = field(default_factory=dict)
    """Mean return in each task, of an agent that learns several."""


_COLUMNS = [item for item in fields(Evaluation) if item.name != "tasks"]
_OF_TASK = "score/"
"""Beginning of the column with the scores in a task."""


def read_evaluations(path: Path) -> list[Evaluation]:
    """The rows of a file; empty if there is no file.

    Raises:
        CheckpointError: If the file is damaged.
    """
    if not path.is_file():
        return []
    kinds = {item.name: {"int": int, "float": float}[str(item.type)] for item in _COLUMNS}
    try:
        with io.TextIOWrapper(open_regular(path), encoding="utf-8", newline="") as file:
            return [
                Evaluation(
                    **{name: _number(kind, row[name]) for name, kind in kinds.items()},
                    tasks={name[len(_OF_TASK) :]: float(row[name]) for name in row if str(name).startswith(_OF_TASK)},
                )
                for row in csv.DictReader(file)
            ]
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise CheckpointError(f"{path} is not a file of evaluations: {error!r}. Remove it, or restore it.") from error


def _number(kind: type[int] | type[float], text: str) -> Any:
    number = kind(text)
    if kind is int and not 0 <= number < 2**63:
        raise ValueError(f"{text[:20]} is not a count")
    return number


def write_evaluations(path: Path, rows: list[Evaluation]) -> None:
    """Writes all rows. The file is replaced as a whole."""
    text = io.StringIO()
    tasks = [_OF_TASK + name for name in (rows[0].tasks if rows else ())]
    writer = csv.DictWriter(text, [*(item.name for item in _COLUMNS), *tasks], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        numbers = {item.name: getattr(row, item.name) for item in _COLUMNS}
        writer.writerow(numbers | {_OF_TASK + name: score for name, score in row.tasks.items()})
    write_atomically(path, text.getvalue().encode())
