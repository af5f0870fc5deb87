"""What the runs of a benchmark have scored, beside what was published: the numbers of a report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from protocols import PROTOCOLS, Protocol
from published_curves import PublishedCurves, published
from run_files import SCORES_FILE, RunRecord, find_runs
from score_files import read_scores
from suite_statistics import iqm, mean, stratified_interval, windowed

from worldflux.errors import CheckpointError, ConfigurationError

SHARE = 0.8
"""Of the published score less its noise, which a run is to reach."""


@dataclass(frozen=True)
class Run:
    """A run, finished or not."""

    directory: Path
    record: RunRecord
    steps: np.ndarray
    """Of its scores, ascending. `[N]`"""
    scores: np.ndarray
    """`[N]`"""

    @classmethod
    def read(cls, directory: Path) -> Run:
        """What is in a run's directory.

        Raises:
            CheckpointError: If a file is damaged, or is not the whole of a finished run.
        """
        record = RunRecord.read(directory)
        assert record is not None, directory
        path = directory / SCORES_FILE
        rows = read_scores(path, in_progress=record.result is None)
        if record.result is not None and len(rows) != record.result["scores"]:
            raise CheckpointError(
                f"{path} has {len(rows)} scores, and the finished run had {record.result['scores']}. Restore the file."
            )
        if any(row.seed != record.settings.seed for row in rows):
            raise CheckpointError(f"{path} has scores of other seeds than {record.settings.seed}. Restore the file.")
        steps = np.array([row.step for row in rows], dtype=float)
        return cls(directory, record, steps, np.array([row.score for row in rows], dtype=float))

    @property
    def finished(self) -> bool:
        """Whether it has all of its steps."""
        return self.record.result is not None

    @property
    def last_step(self) -> float:
        """Of the simulator; of an unfinished run, and where evaluations count, the one of its last score."""
        if self.record.result is not None and self.protocol.score == "training":
            return float(self.record.result["step"])
        return float(self.steps[-1]) if len(self.steps) else 0.0

    @property
    def protocol(self) -> Protocol:
        """Of its suite and family."""
        return PROTOCOLS[self.record.settings.protocol]

    def at(self, step: float) -> float | None:
        """Its score at a step, as the protocol has it."""
        return windowed(self.steps, self.scores, step, self.protocol.window)


@dataclass(frozen=True)
class Task:
    """The seeds of a task that stand in the table: the finished ones, or all if none is finished."""

    name: str
    protocol: Protocol
    runs: list[Run]
    waiting: list[Run] = field(default_factory=list)
    """Unfinished ones beside finished ones."""

    @cached_property
    def step(self) -> float:
        """The last one that all of these seeds have reached."""
        return min(run.last_step for run in self.runs)

    @cached_property
    def scores(self) -> np.ndarray:
        """Of the seeds at that step; without those that have none yet. `[S]`"""
        found = [run.at(self.step) for run in self.runs]
        return np.array([score for score in found if score is not None], dtype=float)

    @property
    def finished(self) -> bool:
        """Whether these seeds are."""
        return all(run.finished for run in self.runs)

    @cached_property
    def curves(self) -> PublishedCurves | None:
        """What was published for it."""
        return published(self.protocol.name, self.name)

    @cached_property
    def published(self) -> np.ndarray | None:
        """The published runs' scores at the same step, and at no other. `[R]`"""
        return None if self.curves is None else self.curves.at(self.step)

    def normalised(self, scores: np.ndarray) -> np.ndarray:
        """0 and 1 are the protocol's anchors: nothing and 1000, or random actions and a human."""
        low, high = self.protocol.anchors(self.name)
        return (scores - low) / (high - low)


@dataclass(frozen=True)
class Experiment:
    """The tasks in one directory of a benchmark."""

    directory: Path
    tasks: list[Task]

    @property
    def protocol(self) -> Protocol:
        """Of all of them."""
        return self.tasks[0].protocol

    @property
    def settings(self) -> RunRecord:
        """Of its first run."""
        return self.tasks[0].runs[0].record


def read_experiments(directories: Sequence[Path]) -> list[Experiment]:
    """All benchmarks in some directories.

    Raises:
        ConfigurationError: If a directory has none.
        CheckpointError: If a file is damaged.
    """
    by_place: dict[Path, dict[str, list[Run]]] = {}
    for given in directories:
        found = list(find_runs(given))
        if not found:
            raise ConfigurationError(f"There is no run in {given}. Pass the --out of benchmarks/dmc.py or atari.py.")
        for directory in found:
            run = Run.read(directory)
            tasks = by_place.setdefault(directory.parent.parent, {})
            of_task = tasks.setdefault(run.record.settings.task, [])
            if directory not in (other.directory for other in of_task):
                of_task.append(run)
    return [
        Experiment(place, [_task(name, runs) for name, runs in sorted(tasks.items())])
        for place, tasks in by_place.items()
    ]


def _task(name: str, runs: list[Run]) -> Task:
    finished = [run for run in runs if run.finished]
    waiting = [run for run in runs if not run.finished] if finished else []
    return Task(name, runs[0].protocol, finished or runs, waiting)


@dataclass(frozen=True)
class Aggregate:
    """A number of all tasks and seeds, with its interval and the published runs' at the same steps."""

    ours: float
    interval: tuple[float, float] | None
    published: float
    published_interval: tuple[float, float] | None


def aggregate(tasks: Sequence[Task], statistic: Callable[[np.ndarray], float]) -> Aggregate:
    """Over normalised scores of tasks that have both ours and published ones.

    Args:
        tasks: At least one.
        statistic: `iqm` or `mean`.
    """
    ours = [task.normalised(task.scores) for task in tasks]
    theirs = [task.normalised(scores) for task in tasks if (scores := task.published) is not None]
    assert len(ours) == len(theirs) > 0
    return Aggregate(
        statistic(np.concatenate(ours)),
        stratified_interval(ours, statistic),
        statistic(np.concatenate(theirs)),
        stratified_interval(theirs, statistic),
    )


STATISTICS: dict[str, Callable[[np.ndarray], float]] = {"mean": mean, "IQM": iqm}


@dataclass(frozen=True)
class Acceptance:
    """Which scores are no failure."""

    share: float = SHARE
    scores: dict[str, float] = field(default_factory=dict)
    """By task, in place of a share of the published score."""

    @classmethod
    def parse(cls, given: Sequence[str], task_name: Callable[[str], str]) -> Acceptance:
        """What `--accept` says: a share, and `task=score`.

        Raises:
            ConfigurationError: If it is not understood.
        """
        share, scores = SHARE, {}
        for text in given:
            task, equals, number = text.rpartition("=")
            try:
                value = float(number)
            except ValueError:
                value = float("nan")
            if value != value or (equals and not task):
                raise ConfigurationError(f"--accept {text} is not understood, expected a number, or TASK=SCORE.")
            if equals:
                scores[task_name(task)] = value
            else:
                share = value
        return cls(share, scores)

    def least(self, task: Task) -> float | None:
        """The least mean over seeds; None where nothing was published for that step.

        The noise of a published score is the standard deviation of its runs. Shares are taken of what lies above the
        score of random actions (0 in DeepMind Control).
        """
        if task.name in self.scores:
            return self.scores[task.name]
        scores = task.published
        if scores is None:
            return None
        noise = float(np.std(scores, ddof=1)) if len(scores) > 1 else 0.0
        low = task.protocol.anchors(task.name)[0]
        return low + self.share * max(float(scores.mean()) - noise - low, 0.0)
