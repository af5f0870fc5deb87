"""`lint` says what is probably wrong with recorded data, and why."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from worldflux.datasets.checks import alignment, episodes, values
from worldflux.datasets.checks.findings import Finding, Findings
from worldflux.datasets.checks.sample import take_sample
from worldflux.datasets.checks.sources import BufferSource, FileSource, Source
from worldflux.datasets.detection import detect
from worldflux.datasets.loading import load, source_name
from worldflux.errors import BufferError
from worldflux.hub.addresses import is_address
from worldflux.hub.client import dataset_path
from worldflux.replay.buffer import ReplayBuffer

__all__ = ["Finding", "Report", "lint"]


@dataclass(frozen=True)
class Report:
    """What `lint` found.

    Attributes:
        name: The data, as messages call it.
        transitions: Number of transitions.
        episodes: Number of episodes.
        findings: What is probably wrong, warnings first.
    """

    name: str
    transitions: int
    episodes: int
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is probably wrong: there may be notes, but no warnings."""
        return all(finding.severity == "note" for finding in self.findings)

    def __str__(self) -> str:
        head = f"{self.name}: {self.transitions:,} transitions in {self.episodes:,} episodes"
        if not self.findings:
            return f"{head}, nothing found."
        warnings = sum(finding.severity == "warning" for finding in self.findings)
        notes = len(self.findings) - warnings
        counts = [
            f"{count} {word}{'s' * (count > 1)}" for count, word in ((warnings, "warning"), (notes, "note")) if count
        ]
        return "\n".join([f"{head}, {' and '.join(counts)}.", *map(str, self.findings)])

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON has it."""
        return {
            "name": self.name,
            "ok": self.ok,
            "transitions": self.transitions,
            "episodes": self.episodes,
            "findings": [finding.to_dict() for finding in self.findings],
        }


def lint(data: Any, **options: Any) -> Report:
    """Says what is probably wrong with recorded data, with the rows that show it.

        >>> report = lint("walker.npz")
        >>> print(report)
        >>> assert report.ok

    Args:
        data: A replay buffer, or anything that `load` reads. A file of `ReplayBuffer.save`'s schema is read as it is,
            so that NaN or actions out of range are findings with their rows, where `load` raises an error.
        options: Options of `load`.

    Returns:
        The report.

    Raises:
        FileNotFoundError: If there is no such file.
        BufferError: If the data cannot be read, or there is no transition.
    """
    if isinstance(data, ReplayBuffer):
        return _lint(BufferSource(data), "the replay buffer")
    name = source_name(data)
    if is_address(data):
        data = dataset_path("data", data)
    is_file = isinstance(data, str | Path) and not Path(data).is_dir()
    if not options and is_file and detect(data) == "worldflux":
        return _lint(FileSource(data), name)
    return _lint(BufferSource(load(data, **options)), name)


def _lint(source: Source, name: str) -> Report:
    if not len(source.rewards):
        raise BufferError(f"{name} has no transitions. Record some first.")
    findings = Findings(np.cumsum(source.lengths) - source.lengths)
    values.check_finite(source, findings)
    values.check_actions(source, findings)
    episodes.check_time_limits(source, findings)
    sample = take_sample(source)
    values.check_columns(source, sample, findings)
    values.check_images(source, sample, findings)
    if any(finding.code == "integer-actions" for finding in findings.found):
        sample = sample.with_one_hots()
    shift = alignment.check_actions(sample, findings)
    if shift:  # what follows is about the actions where they belong
        sample = sample.with_actions_moved(shift)
    episodes.check_ends(source, sample, findings)
    alignment.check_rewards(source, sample, findings)
    found = sorted(findings.found, key=lambda finding: finding.severity == "note")
    return Report(name, len(source.rewards), len(source.lengths), tuple(found))
