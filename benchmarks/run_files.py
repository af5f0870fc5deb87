"""The files of a benchmark run, and the check whether a run may be resumed.

run.json       settings, versions, time of each start, and finally the result
scores.csv     step,score,seed: one line per training episode or evaluation, as they finish
logs/          logs of the agent, one part per start
checkpoints/   until the run is finished
agent.zip      written at the end
.lock          held by the process that works on the run
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from protocols import PROTOCOLS
from score_files import Score, read_scores, write_scores

from worldflux.errors import CheckpointError, ConfigurationError
from worldflux.files import write_atomically
from worldflux.locks import DirectoryLock

RUN_FILE, SCORES_FILE, AGENT_FILE, CHECKPOINTS, LOGS = "run.json", "scores.csv", "agent.zip", "checkpoints", "logs"
FORMAT = 1
"""Version of the format of run.json."""


@dataclass(frozen=True)
class RunSettings:
    """Everything that determines the scores of a run; directories and devices are not included."""

    protocol: str
    model: str
    task: str
    seed: int
    steps: int
    """Steps of the simulator."""
    envs: int
    action_repeat: int
    options: dict[str, Any]
    """Options of `make_env`."""
    eval_every: int
    """Steps of the simulator between evaluations; 0 if training episodes are scored."""
    eval_episodes: int
    agent: dict[str, Any] = field(default_factory=dict)
    """Settings of `WorldFluxAgent` that differ from the defaults of the family."""
    model_fields: dict[str, Any] = field(default_factory=dict)
    """Fields of the configuration that differ from the preset."""

    @property
    def agent_steps(self) -> int:
        """Number of actions of the agent in the whole run."""
        return -(-self.steps // self.action_repeat)


@dataclass
class RunRecord:
    """The contents of run.json."""

    settings: RunSettings
    versions: dict[str, str]
    parts: list[dict[str, Any]]
    """Time, machine, first and last step (at its last checkpoint) and duration in seconds of each start."""
    result: dict[str, Any] | None = None
    """Result of a finished run, otherwise None."""

    @property
    def seconds(self) -> float:
        """Duration of training, including evaluations."""
        return float(sum(part["seconds"] for part in self.parts))

    def write(self, directory: Path) -> None:
        """Writes run.json atomically."""
        text = json.dumps({"benchmark_run": FORMAT, **asdict(self)}, indent=1)
        write_atomically(directory / RUN_FILE, f"{text}\n".encode())

    @classmethod
    def read(cls, directory: Path) -> RunRecord | None:
        """Reads run.json; None if no run has started.

        Raises:
            CheckpointError: If the file is damaged.
        """
        path = directory / RUN_FILE
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            assert data["benchmark_run"] == FORMAT, f"its format is {data['benchmark_run']}"
            settings = RunSettings(**data["settings"])
            assert settings.protocol in PROTOCOLS, f"its protocol is {settings.protocol!r}"
            return cls(settings, dict(data["versions"]), list(data["parts"]), data["result"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, LookupError, TypeError, AssertionError) as error:
            raise CheckpointError(
                f"{path} is damaged: {error!r}. Restore it, or remove the run's directory."
            ) from error


def run_directory(out: Path, task: str, seed: int) -> Path:
    """The directory of a run in the directory of a benchmark."""
    return out / task / f"seed-{seed}"


def find_runs(out: Path) -> Iterator[Path]:
    """The directories of all runs of one or several benchmarks, in order."""
    found = [path.parent for path in out.rglob(f"seed-*/{RUN_FILE}")]
    yield from sorted(found, key=lambda path: (path.parent, int(path.name.removeprefix("seed-"))))


def check_settings(out: Path, wanted: Sequence[RunSettings]) -> None:
    """Rejects a directory that contains runs with different settings.

    Raises:
        ConfigurationError: If a run has different settings; the message names them.
    """
    by_task = {settings.task: settings for settings in wanted}
    for directory in find_runs(out):
        record = RunRecord.read(directory)
        assert record is not None, directory
        theirs, own = asdict(record.settings), asdict(by_task.get(record.settings.task, wanted[0]))
        compared = ["protocol", "model"] if record.settings.task not in by_task else [name for name in own]
        differing = [name for name in compared if name not in ("seed", "task") and theirs[name] != own[name]]
        if differing:
            there = ", ".join(f"{name} {theirs[name]!r}" for name in differing)
            here = ", ".join(f"{name} {own[name]!r}" for name in differing)
            raise ConfigurationError(
                f"{directory} was run with {there}; now it is {here}. "
                "Use the same settings to resume, or another --out."
            )


def merge(task_directory: Path) -> None:
    """Writes the scores of all seeds of a task next to its directory, such as `walker-walk.csv`."""
    rows: list[Score] = []
    for directory in find_runs(task_directory):
        rows += read_scores(directory / SCORES_FILE, in_progress=True)
    write_scores(task_directory.with_name(f"{task_directory.name}.csv"), rows)


@contextmanager
def held(directory: Path) -> Iterator[bool]:
    """Locks a run against other processes; yields False if another process has locked it.

    The lock is released when its process ends, however it ends.
    """
    lock = DirectoryLock(directory)
    try:
        yield lock.take()
    finally:
        lock.release()


def settings_in_words(settings: Mapping[str, Any]) -> str:
    """The settings that differ from the defaults, as text."""
    return ", ".join(f"{name}={value}" for name, value in settings.items()) or "the defaults of the algorithm"
