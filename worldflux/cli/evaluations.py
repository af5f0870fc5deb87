"""The learning curve of a run, as a file: `evaluations.csv`."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from worldflux.errors import CheckpointError
from worldflux.files import write_atomically
from worldflux.reading import open_regular


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
                Evaluation(**{name: kind(row[name]) for name, kind in kinds.items()}) for row in csv.DictReader(file)
            ]
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise CheckpointError(f"{path} is not a file of evaluations: {error!r}. Remove it, or restore it.") from error


def write_evaluations(path: Path, rows: list[Evaluation]) -> None:
    """Writes all rows, whole or not at all."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [item.name for item in fields(Evaluation)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    write_atomically(path, text.getvalue().encode())
