"""The directory of a benchmark's run: what is in it, and whether it may go on there.

run.json       settings, versions, when it was started and went on, and at the end the result
scores.csv     step,score,seed; a line for each training episode or evaluation, as they come
logs/          of the agent, a part for each start
checkpoints/   while it is unfinished
agent.zip      at the end
.lock          held by the process that works on it
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
"""Of run.json."""


@dataclass(frozen=True)
class RunSettings:
    """All that decides over the scores of a run; directories and devices are not in here."""

    protocol: str
    model: str
    task: str
    seed: int
    steps: int
    """Of the simulator."""
    envs: int
    action_repeat: int
    options: dict[str, Any]
    """Of `make_env`."""
    eval_every: int
    """Steps of the simulator; 0 where training episodes count."""
    eval_episodes: int
    agent: dict[str, Any] = field(default_factory=dict)
    """Settings of `WorldFluxAgent` that differ from the family's own."""
    model_fields: dict[str, Any] = field(default_factory=dict)
    """Fields of the preset's configuration that differ from it."""

    @property
    def agent_steps(self) -> int:
        """Actions of the agent in the whole run."""
        return -(-self.steps // self.action_repeat)


@dataclass
class RunRecord:
    """Content of run.json."""

    settings: RunSettings
    versions: dict[str, str]
    parts: list[dict[str, Any]]
    """Of each start: when, on what, from which step to which (until its last checkpoint), and the seconds it took."""
    result: dict[str, Any] | None = None
    """Of a finished run."""

    @property
    def seconds(self) -> float:
        """Of training, with the evaluations."""
        return float(sum(part["seconds"] for part in self.parts))

    def write(self, directory: Path) -> None:
        """Writes run.json, whole or not at all."""
        text = json.dumps({"benchmark_run": FORMAT, **asdict(self)}, indent=1)
        write_atomically(directory / RUN_FILE, f"{text}\n".encode())

    @classmethod
    def read(cls, directory: Path) -> RunRecord | None:
        """What `write` wrote; None where no run has begun.

        Raises:
            CheckpointError: If it is damaged.
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
    """Where a run lies in the directory of a benchmark."""
    return out / task / f"seed-{seed}"


def find_runs(out: Path) -> Iterator[Path]:
    """The directories of all runs in a directory of one or several benchmarks, in order."""
    found = [path.parent for path in out.rglob(f"seed-*/{RUN_FILE}")]
    yield from sorted(found, key=lambda path: (path.parent, int(path.name.removeprefix("seed-"))))


def check_settings(out: Path, wanted: Sequence[RunSettings]) -> None:
    """Refuses a directory whose runs were made with other settings.

    Raises:
        ConfigurationError: If one of them was; the message names the settings.
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
                "Give the same settings to go on, or another --out."
            )


def merge(task_directory: Path) -> None:
    """Writes a task's file of all seeds beside its directory: `walker-walk.csv`."""
    rows: list[Score] = []
    for directory in find_runs(task_directory):
        rows += read_scores(directory / SCORES_FILE, in_progress=True)
    write_scores(task_directory.with_name(f"{task_directory.name}.csv"), rows)


@contextmanager
def held(directory: Path) -> Iterator[bool]:
    """Keeps other processes from working on a run; False if one of them does already.

    The lock ends with its process, however that ends.
    """
    lock = DirectoryLock(directory)
    try:
        yield lock.take()
    finally:
        lock.release()


def settings_in_words(settings: Mapping[str, Any]) -> str:
    """What differs from the defaults, for a table's head."""
    return ", ".join(f"{name}={value}" for name, value in settings.items()) or "the family's own numbers"
