"""Reads the learning curves that the authors of the models published, run by run, from `benchmarks/published/`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from protocols import PROTOCOLS

FOLDER = Path(__file__).parent / "published"
SAME_STEP = 0.005
"""Relative difference up to which two steps count as the same, because parallel environments overshoot."""


@dataclass(frozen=True)
class PublishedCurves:
    """The published curves of one task."""

    steps: np.ndarray
    """Steps of the simulator `[M]`, ascending."""
    runs: np.ndarray
    """Scores `[R, M]`, NaN where a run has none."""
    window: int
    """Steps over which each score is averaged; 0 for evaluations."""
    source: str

    def at(self, step: float) -> np.ndarray | None:
        """The scores `[R']` of the runs at a step, and at no other step.

        Between two published steps, runs are interpolated if the distance of these steps is at most the window over
        which scores are averaged. Otherwise, the result is None.
        """
        near = np.abs(self.steps - step) <= SAME_STEP * step
        if near.any():
            found = self.runs[:, int(np.argmin(np.abs(self.steps - step)))]
        else:
            after = int(np.searchsorted(self.steps, step))
            if after in (0, len(self.steps)) or self.steps[after] - self.steps[after - 1] > self.window:
                return None
            share = (step - self.steps[after - 1]) / (self.steps[after] - self.steps[after - 1])
            found = (1 - share) * self.runs[:, after - 1] + share * self.runs[:, after]
        found = found[~np.isnan(found)]
        return found if len(found) else None


def published(protocol: str, task: str) -> PublishedCurves | None:
    """The published curves of a task in a protocol, or None if there are none."""
    table = _table(protocol)
    entry = table["tasks"].get(task)
    if entry is None:
        return None
    return PublishedCurves(
        np.array(entry["steps"], dtype=float), np.array(entry["runs"], dtype=float), table["window"], table["source"]
    )


def source(protocol: str) -> str:
    """The source of the published curves of a protocol."""
    return str(_table(protocol)["source"])


@cache
def _table(protocol: str) -> dict[str, Any]:
    assert protocol in PROTOCOLS, protocol
    table: dict[str, Any] = json.loads((FOLDER / f"{protocol}.json").read_text(encoding="utf-8"))
    return table
