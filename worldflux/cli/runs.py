"""The directory of a run: what is in it, and how it is found again.

config.json        what was started: enough to start it again
logs/              progress.csv, progress.json, TensorBoard; further parts (progress-2.csv) for each resumption
evaluations.csv    the learning curve
checkpoints/       step-00010000, ...: what the run is resumed from
best_agent.zip     of the best evaluation
agent.zip          at the end (model/ for a training without an environment)
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
from importlib import metadata
from pathlib import Path
from typing import Any

from worldflux.errors import CheckpointError, ConfigurationError
from worldflux.files import checked_path, write_atomically
from worldflux.locks import LOCK_FILE
from worldflux.reading import open_regular, read_json

CONFIG_FILE = "config.json"
LOGS = "logs"
CHECKPOINTS = "checkpoints"
EVALUATIONS_FILE = "evaluations.csv"
AGENT_FILE = "agent.zip"
BEST_AGENT_FILE = "best_agent.zip"
MODEL_DIRECTORY = "model"
ROOT = Path("runs")
"""Of runs whose directory nobody has named."""

FORMAT = 1
"""Of `config.json`; a change that older versions cannot read raises it."""


@dataclass(frozen=True)
class RunConfig:
    """What a run was started with."""

    kind: str
    """The command: "train" or "train-offline"."""
    model: str
    """MODEL of the command line."""
    task: str
    """ENV of the command line; the data file of a training without one."""
    settings: dict[str, Any]
    """The options, as JSON has them."""
    frames_per_step: int = 1
    """Frames of the environment in each of its steps."""
    command: str = ""
    """What does the same again; for people."""
    versions: dict[str, str] = field(default_factory=dict)
    """Of what the run was started with."""
    started: str = ""
    """When."""

    def write(self, directory: Path) -> None:
        """Writes `config.json`, whole or not at all."""
        write_atomically(
            directory / CONFIG_FILE, (json.dumps({"run": FORMAT, **asdict(self)}, indent=2) + "\n").encode()
        )

    @classmethod
    def read(cls, directory: Path) -> RunConfig:
        """What `write` wrote.

        Raises:
            ConfigurationError: If the directory is none of a run.
            CheckpointError: If its `config.json` is damaged, or of a newer version.
        """
        path = directory / CONFIG_FILE
        if not is_run(directory):
            given = shown(directory)
            what = f"There is no '{given}'" if not directory.exists() else f"{given} is no directory of a run"
            raise ConfigurationError(f"{what}. Pass one that worldflux train has made.")
        data = read_json(path, finite=False)
        if data.pop("run") != FORMAT:
            raise CheckpointError(f"{path} is of another version of worldflux than this one. Use a newer one.")
        types = {"kind": str, "model": str, "task": str, "settings": dict, "frames_per_step": int}
        types |= {"command": str, "versions": dict, "started": str}
        for name, expected in types.items():
            if not isinstance(data.get(name), expected) or isinstance(data[name], bool):
                raise CheckpointError(f"{path} is damaged: {name} is {data.get(name)!r}.")
        return cls(**{name: data[name] for name in types})


def is_run(directory: Path) -> bool:
    """Whether a directory is one of a run; the checkpoint of an agent has a `config.json`, too, of its model."""
    try:
        data = read_json(directory / CONFIG_FILE, finite=False)
    except (FileNotFoundError, CheckpointError):
        return False
    return isinstance(data, dict) and "run" in data


def find_runs(directory: Path) -> Iterator[Path]:
    """The directory itself, if it is one of a run, else all of runs in it, in the order of their names.

    Links are followed, and each directory is looked at once: a link may lead back.

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
    """The run that a file or a checkpoint belongs to; None for others."""
    absolute = path.absolute()
    return next((place for place in (absolute, *absolute.parents[:2]) if is_run(place)), None)


def check_free(run: Path | None) -> None:
    """Raises a `ConfigurationError` unless a run can begin in this directory; None is one that is chosen later."""
    if run is None:
        return
    if is_run(run):
        raise ConfigurationError(
            f"{shown(run)} has a run already. Go on with it (--resume {shown(run)}), or choose another directory."
        )
    if run.exists() and not (run.is_dir() and all(entry.name == LOCK_FILE for entry in run.iterdir())):
        raise ConfigurationError(f"{shown(run)} exists and is no empty directory. Choose another one for the run.")


def lasting(option: str, path: Path | None) -> Path | None:
    """A path of the command line that stays when an environment changes the working directory.

    One that is below the working directory is shown as the user has given it, by `shown`.

    Raises:
        ConfigurationError: If it can be none.
    """
    return None if path is None else checked_path(option, path)


def shown(path: Path) -> Path:
    """A path as it is shown: from the working directory, if it is below it."""
    here = Path(os.path.abspath("."))
    return path.relative_to(here) if path.is_relative_to(here) else path


def make_directory(run: Path | None, task: str, model: str, root: Path) -> Path:
    """Makes the directory of a new run.

    Args:
        run: Where the user wants it; None is the first free number in `<root>/<task>/<model>`.
        task: Environment or data of the run.
        model: Its model.
        root: Of all runs.

    Raises:
        ConfigurationError: If it cannot be made.
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
                # Runs that are started together must not share one.
                (parent / str(number)).mkdir()
                return parent / str(number)
            except FileExistsError:
                number += 1
    except OSError as error:
        raise ConfigurationError(
            f"The directory of the run cannot be made: {error}. Choose another one with --run."
        ) from error


def newest_step(directory: Path) -> int | None:
    """The step of a run's newest checkpoint; None if it has none."""
    from worldflux.training.checkpoint import newest_checkpoint

    newest = newest_checkpoint(directory / CHECKPOINTS)
    return None if newest is None else int(newest.name.removeprefix("step-"))


@dataclass(frozen=True)
class Saved:
    """Something saved that acts."""

    path: Path
    """What is to be read."""
    is_agent: bool
    """Whether it is a whole agent, and no model alone, which needs an environment to act in."""


def saved_agent(path: Path, *, newest: bool = False) -> Saved:
    """What to read where the user names an agent or a model.

    Args:
        path: A zip, a checkpoint, the directory of a run or one that `WorldModel.save_pretrained` wrote.
        newest: Of a run, take the newest checkpoint, and not the agent of its best evaluation or the model at its end.

    Raises:
        ConfigurationError: If there is neither.
    """
    from worldflux.training.checkpoint import newest_checkpoint

    if is_run(path):
        return _of_run(path, newest)
    if not path.exists() and path.with_name(f"{path.name}.zip").is_file():
        return Saved(path, True)
    if path.is_file():
        if not zipfile.is_zipfile(path):
            raise ConfigurationError(f"{path} is no file of WorldFluxAgent.save. {_AGENT}")
        return Saved(path, True)
    if not path.exists():
        raise ConfigurationError(f"There is no '{path}'. {_AGENT}")
    for place in (path, newest_checkpoint(path)):
        if place is not None and (place / "agent.json").is_file():
            return Saved(path, True)
        if place is not None and _is_model(place):
            return Saved(place, False)
    raise ConfigurationError(f"{path} holds no checkpoint of an agent, and no model. {_AGENT}")


_AGENT = (
    "AGENT is a zip of WorldFluxAgent.save, a checkpoint, the directory of a run, or of a model that save_pretrained "
    "wrote."
)


def _of_run(run: Path, newest: bool) -> Saved:
    """What a run has saved."""
    from worldflux.training.checkpoint import newest_checkpoint

    checkpoint = newest_checkpoint(run / CHECKPOINTS)
    if RunConfig.read(run).kind == "train":
        if (run / BEST_AGENT_FILE).is_file() and not newest:
            return Saved(run / BEST_AGENT_FILE, True)
        if checkpoint is not None:
            return Saved(run / CHECKPOINTS, True)
        raise ConfigurationError(f"{run} has no agent yet. Wait for the first checkpoint or evaluation of this run.")
    for place in (checkpoint, run / MODEL_DIRECTORY) if newest else (run / MODEL_DIRECTORY, checkpoint):
        if place is not None and _is_model(place):
            return Saved(place, False)
    raise ConfigurationError(f"{run} has no model yet. Wait for the first checkpoint of this run.")


def _is_model(directory: Path) -> bool:
    return all((directory / name).is_file() for name in ("config.json", "model.safetensors"))


def versions() -> dict[str, str]:
    """Of what a run depends on."""
    names = ("worldflux", "torch", "numpy", "gymnasium", "stable-baselines3")
    return {"python": platform.python_version(), **{name: installed_version(name) or "?" for name in names}}


def installed_version(package: str) -> str | None:
    """The version of an installed package; None for one that is not."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def now() -> str:
    """The time, as `config.json` has it."""
    return time.strftime("%Y-%m-%d %H:%M:%S %z")


def _place(entry: Path) -> tuple[int, str]:
    """Numbers in their order, then words in theirs."""
    name = entry.name
    return (int(name), "") if name.isdecimal() else (sys.maxsize, name)


def _plain(name: str) -> str:
    """A name as a directory can have it on every system: `dmc/walker-walk` is `dmc-walker-walk`."""
    if ".py:" in name:  # path/to/file.py:MyEnv
        name = re.split(r"[\\/]", name)[-1].replace(".py:", "-")
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.") or "run"


@dataclass(frozen=True)
class Evaluation:
    """What some episodes earned that were played for this purpose, with the likeliest actions."""

    step: int
    """Environment steps of the training before."""
    score: float
    """Mean return."""
    std: float
    """Standard deviation of the returns."""
    length: float
    """Mean number of steps."""
    episodes: int
    """How many."""
    seconds: float
    """Since the training began, without the time between an interruption and its resumption."""
    seed: int
    """Of the run."""


def read_evaluations(path: Path) -> list[Evaluation]:
    """The rows of a file; none where there is no file.

    Raises:
        CheckpointError: If the file is damaged.
    """
    if not path.is_file():
        return []
    kinds = {item.name: {"int": int, "float": float}[str(item.type)] for item in fields(Evaluation)}
    try:
        with io.TextIOWrapper(open_regular(path), encoding="utf-8", newline="") as file:
            return [
                Evaluation(**{name: _number(kind, row[name]) for name, kind in kinds.items()})
                for row in csv.DictReader(file)
            ]
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise CheckpointError(f"{path} is not a file of evaluations: {error!r}. Remove it, or restore it.") from error


def _number(kind: type[int] | type[float], text: str) -> Any:
    number = kind(text)
    if kind is int and not 0 <= number < 2**63:
        raise ValueError(f"{text[:20]} is no count")
    return number


def write_evaluations(path: Path, rows: list[Evaluation]) -> None:
    """Writes all rows, whole or not at all."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [item.name for item in fields(Evaluation)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    write_atomically(path, text.getvalue().encode())
