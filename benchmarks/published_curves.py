"""Learning curves that the models' authors have published, run by run, from `benchmarks/published/`."""

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
"""Share of a step by which two may differ and be called the same: environments that are stepped together overshoot."""


@dataclass(frozen=True)
class PublishedCurves:
    """Of one task."""

    steps: np.ndarray
    """Of the simulator, ascending. `[M]`"""
    runs: np.ndarray
    """Scores; NaN where a run has none. `[R, M]`"""
    window: int
    """Steps over which each score is a mean; 0 for evaluations."""
    source: str

    def at(self, step: float) -> np.ndarray | None:
        """The runs' scores at a step, and at no other one. `[R']`

        Between two published steps, runs are interpolated if these lie no further apart than the window over which
        they average; else there is nothing.
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
    """What a protocol's authors have published for a task; None where there is nothing."""
    table = _table(protocol)
    entry = table["tasks"].get(task)
    if entry is None:
        return None
    return PublishedCurves(
        np.array(entry["steps"], dtype=float), np.array(entry["runs"], dtype=float), table["window"], table["source"]
    )


def source(protocol: str) -> str:
    """Where a protocol's published curves come from."""
    return str(_table(protocol)["source"])


@cache
def _table(protocol: str) -> dict[str, Any]:
    assert protocol in PROTOCOLS, protocol
    table: dict[str, Any] = json.loads((FOLDER / f"{protocol}.json").read_text(encoding="utf-8"))
    return table
