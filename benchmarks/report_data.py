"""The numbers of a report: scores of the runs of a benchmark, and the published scores."""

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
"""Share of the published score, minus its noise, that a run has to reach."""


@dataclass(frozen=True)
class Run:
    """A finished or unfinished run."""

    directory: Path
    record: RunRecord
    steps: np.ndarray
    """Steps `[N]` of its scores, ascending."""
    scores: np.ndarray
    """Scores `[N]`."""

    @classmethod
    def read(cls, directory: Path) -> Run:
        """Reads the directory of a run.

        Raises:
            CheckpointError: If a file is damaged, or lacks scores of a finished run.
        """
        record = RunRecord.read(directory)
        assert record is not None, directory
        path = directory / SCORES_FILE
        rows = read_scores(path, in_progress=record.result is None)
        if record.result is not None and len(rows) != record.result["scores"]:
            raise CheckpointError(
                f"{path} has {len(rows)} scores, but the finished run had {record.result['scores']}. Restore the file."
            )
        if any(row.seed != record.settings.seed for row in rows):
            raise CheckpointError(f"{path} has scores of other seeds than {record.settings.seed}. Restore the file.")
        steps = np.array([row.step for row in rows], dtype=float)
        return cls(directory, record, steps, np.array([row.score for row in rows], dtype=float))

    @property
    def finished(self) -> bool:
        """Whether the run has completed all of its steps."""
        return self.record.result is not None

    @property
    def last_step(self) -> float:
        """Last step of the simulator; for unfinished runs and for evaluations, the step of the last score."""
        if self.record.result is not None and self.protocol.score == "training":
            return float(self.record.result["step"])
        return float(self.steps[-1]) if len(self.steps) else 0.0

    @property
    def protocol(self) -> Protocol:
        """The protocol of its suite and model family."""
        return PROTOCOLS[self.record.settings.protocol]

    def at(self, step: float) -> float | None:
        """Its score at a step, averaged as the protocol specifies."""
        return windowed(self.steps, self.scores, step, self.protocol.window)


@dataclass(frozen=True)
class Task:
    """The seeds of a task that the table shows: the finished ones, or all if none is finished."""

    name: str
    protocol: Protocol
    runs: list[Run]
    waiting: list[Run] = field(default_factory=list)
    """Unfinished runs, if others are finished."""

    @cached_property
    def step(self) -> float:
        """The last step that all of these seeds have reached."""
        return min(run.last_step for run in self.runs)

    @cached_property
    def scores(self) -> np.ndarray:
        """Scores `[S]` of the seeds at that step, without seeds that have none yet."""
        found = [run.at(self.step) for run in self.runs]
        return np.array([score for score in found if score is not None], dtype=float)

    @property
    def finished(self) -> bool:
        """Whether all of these seeds are finished."""
        return all(run.finished for run in self.runs)

    @cached_property
    def curves(self) -> PublishedCurves | None:
        """The published curves of the task."""
        return published(self.protocol.name, self.name)

    @cached_property
    def published(self) -> np.ndarray | None:
        """Scores `[R]` of the published runs at the same step, and at no other step."""
        return None if self.curves is None else self.curves.at(self.step)

    def normalised(self, scores: np.ndarray) -> np.ndarray:
        """Scores scaled so that 0 and 1 are the anchors of the protocol: 0 and 1000, or random actions and a human."""
        low, high = self.protocol.anchors(self.name)
        return (scores - low) / (high - low)


@dataclass(frozen=True)
class Experiment:
    """The tasks in the directory of one benchmark."""

    directory: Path
    tasks: list[Task]

    @property
    def protocol(self) -> Protocol:
        """The protocol of all tasks."""
        return self.tasks[0].protocol

    @property
    def settings(self) -> RunRecord:
        """The record of the first run."""
        return self.tasks[0].runs[0].record


def read_experiments(directories: Sequence[Path]) -> list[Experiment]:
    """Reads all benchmarks in the given directories.

    Raises:
        ConfigurationError: If a directory contains no run.
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
    """A statistic over all tasks and seeds with its interval, also for the published runs at the same steps."""

    ours: float
    interval: tuple[float, float] | None
    published: float
    published_interval: tuple[float, float] | None


def aggregate(tasks: Sequence[Task], statistic: Callable[[np.ndarray], float]) -> Aggregate:
    """Aggregates the normalised scores of tasks that have both measured and published scores.

    Args:
        tasks: At least one task.
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
    """The rule for accepted scores."""

    share: float = SHARE
    scores: dict[str, float] = field(default_factory=dict)
    """Accepted scores, keyed by task, that replace a share of the published score."""

    @classmethod
    def parse(cls, given: Sequence[str], task_name: Callable[[str], str]) -> Acceptance:
        """Parses the values of `--accept`: a share, and `task=score`.

        Raises:
            ConfigurationError: If a value is invalid.
        """
        share, scores = SHARE, {}
        for text in given:
            task, equals, number = text.rpartition("=")
            try:
                value = float(number)
            except ValueError:
                value = float("nan")
            if value != value or (equals and not task):
                raise ConfigurationError(f"--accept {text} is invalid, expected a number or TASK=SCORE.")
            if equals:
                scores[task_name(task)] = value
            else:
                share = value
        return cls(share, scores)

    def least(self, task: Task) -> float | None:
        """The lowest accepted mean over seeds, or None if nothing was published for that step.

        The noise of a published score is the standard deviation of its runs. Shares are measured from the score of
        random actions (0 in DeepMind Control).
        """
        if task.name in self.scores:
            return self.scores[task.name]
        scores = task.published
        if scores is None:
            return None
        noise = float(np.std(scores, ddof=1)) if len(scores) > 1 else 0.0
        low = task.protocol.anchors(task.name)[0]
        return low + self.share * max(float(scores.mean()) - noise - low, 0.0)
