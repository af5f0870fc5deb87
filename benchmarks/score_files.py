"""Score files: CSV with the columns step, score and seed."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from worldflux.errors import CheckpointError
from worldflux.files import write_atomically

HEADER = "step,score,seed"


class Score(NamedTuple):
    """The return of a training episode, or the mean return of an evaluation."""

    step: int
    """Number of simulator steps of the run so far."""
    score: float
    seed: int


def read_scores(path: Path, *, in_progress: bool = False) -> list[Score]:
    """Reads all rows of a file.

    Args:
        path: Score file of a run or of a task.
        in_progress: Whether the file may still be written. An incomplete last line is then ignored, and a missing file
            has no rows.

    Raises:
        CheckpointError: If the file is missing or damaged; the message names the line.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError as error:
        if in_progress:
            return []
        raise CheckpointError(f"{path} is missing. Restore it, or remove the run's directory.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error
    lines = text.split("\n")
    if lines.pop() and not in_progress:
        raise CheckpointError(f"{path} is damaged: its last line is incomplete.")
    if not lines:
        if in_progress:
            return []
        raise CheckpointError(f"{path} is empty.")
    if lines[0] != HEADER:
        raise CheckpointError(f"{path} is damaged: line 1 is {lines[0]!r}, expected {HEADER!r}.")
    rows: list[Score] = []
    last: dict[int, int] = {}
    for number, line in enumerate(lines[1:], start=2):
        row = _row(line)
        if row is None or row.step < last.get(row.seed, 0):
            raise CheckpointError(
                f"{path} is damaged: line {number} is {line!r}, expected a step (not before the seed's last one), a "
                "finite score and a seed. Restore the file, or remove the run's directory."
            )
        last[row.seed] = row.step
        rows.append(row)
    return rows


def _row(line: str) -> Score | None:
    """The score in a line; None if the line is invalid."""
    fields = line.split(",")
    if len(fields) != 3 or not (fields[0].isdecimal() and fields[2].isdecimal()):
        return None
    try:
        score = float(fields[1])
    except ValueError:
        return None
    return Score(int(fields[0]), score, int(fields[2])) if math.isfinite(score) else None


def as_text(rows: Iterable[Score]) -> str:
    """The rows as lines of text, without the header."""
    text = io.StringIO()
    for row in rows:
        text.write(f"{row.step},{row.score:.6g},{row.seed}\n")
    return text.getvalue()


def write_scores(path: Path, rows: Iterable[Score]) -> None:
    """Writes a score file atomically."""
    write_atomically(path, f"{HEADER}\n{as_text(rows)}".encode())


def append_scores(path: Path, rows: Iterable[Score]) -> None:
    """Appends rows to an existing file. A concurrent reader sees complete lines, except possibly the last."""
    with path.open("a", encoding="utf-8", newline="") as file:
        file.write(as_text(rows))
        file.flush()
        os.fsync(file.fileno())  # a checkpoint written next must not be newer than the scores
