"""What a check finds: a code, a sentence and the rows that show it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

MOST_ROWS = 100
"""Rows that a finding lists at most."""

Severity = Literal["warning", "note"]


@dataclass(frozen=True)
class Finding:
    """Something in a dataset that is probably wrong, or that is worth knowing.

    Attributes:
        code: A short, stable name of the kind of finding, such as "reward-late".
        message: What was found, the numbers that it was concluded from, and what to do.
        severity: "warning" if the data are probably wrong, "note" if good data can look like this as well.
        rows: Transitions that show it, as indices into the arrays `obs`, `actions` and `rewards` that
            `ReplayBuffer.save` writes: stream by stream, oldest first. The first 100 of them, or for findings about the
            alignment of rows the clearest 10. Empty if the finding is about all rows.
        places: The same rows, each as the number of its episode and its step there, both from 0.
        total: The number of transitions that the finding is about.
    """

    code: str
    message: str
    severity: Severity
    rows: tuple[int, ...] = ()
    places: tuple[tuple[int, int], ...] = ()
    total: int = 0

    def __str__(self) -> str:
        text = f"{self.severity} [{self.code}] {self.message}"
        if not self.rows:
            return text
        shown = [f"{row} (episode {at[0]}, step {at[1]})" for row, at in zip(self.rows, self.places, strict=True)][:5]
        more = f" and {self.total - len(shown):,} more" if self.total > len(shown) else ""
        return f"{text}\n  Rows: {', '.join(shown)}{more}."

    def to_dict(self) -> dict[str, Any]:
        """The finding as JSON has it."""
        return {
            "code": self.code,
            "severity": self.severity,
            "message": self.message,
            "rows": list(self.rows),
            "places": [list(place) for place in self.places],
            "total": self.total,
        }


class Findings:
    """Collects findings about one dataset.

    Attributes:
        found: The findings so far.

    Args:
        first: The first row of each episode, ascending. `[S]`
    """

    def __init__(self, first: np.ndarray) -> None:
        self._first = first
        self.found: list[Finding] = []

    def add(
        self,
        code: str,
        message: str,
        *,
        rows: Sequence[int] | np.ndarray = (),
        total: int | None = None,
        severity: Severity = "warning",
    ) -> None:
        """Adds a finding, with the episode and the step of each row.

        Args:
            code: See `Finding`.
            message: See `Finding`.
            rows: All rows, or those to show. `[K]`
            total: Number of rows, where `rows` are not all of them.
            severity: See `Finding`.
        """
        at = np.asarray(rows, np.int64)
        shown = at[:MOST_ROWS]
        episode = np.searchsorted(self._first, shown, side="right") - 1
        step = shown - self._first[episode] if shown.size else shown
        self.found.append(
            Finding(
                code,
                message,
                severity,
                tuple(shown.tolist()),
                tuple(zip(episode.tolist(), step.tolist(), strict=True)),
                len(at) if total is None else total,
            )
        )
