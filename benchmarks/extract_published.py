"""Creates the files in `benchmarks/published/` from checkouts of the authors' repositories.

    python benchmarks/extract_published.py --dreamerv3 DIR --tdmpc2 DIR

The value of a run at a step is the mean of its scores in the window that ends at this step, as in the benchmarks. If
the window is empty, the last score before it is used; a run that ended before the window has no value.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from worldflux.envs.suites import atari_name, dmc_name

TARGET = Path(__file__).parent / "published"
LICENSE = {
    "dreamerv3": "MIT, Copyright (c) 2023 Danijar Hafner",
    "tdmpc2": "MIT (licence of the repository)",
}


@dataclass(frozen=True)
class Table:
    """A file in `benchmarks/published/`."""

    name: str
    source: str
    """Path in the authors' repository."""
    steps: str
    scores: str
    window: int
    grid: int
    last: int


DREAMERV3 = "returns of training episodes, whose actions are sampled"
TDMPC2 = "mean returns of ten evaluation episodes"
TABLES = {
    "dreamerv3": (
        Table(
            "dreamerv3_dmc_proprio",
            "scores/dmc_proprio-dreamerv3.json.gz",
            "steps of the simulator, action repeat 1; the source has means over 10,000 of them, up to 490,000",
            DREAMERV3,
            25_000,
            10_000,
            500_000,
        ),
        Table(
            "dreamerv3_dmc_vision",
            "scores/dmc_vision-dreamerv3.json.gz",
            "steps of the simulator, action repeat 2, 8 environments",
            DREAMERV3,
            25_000,
            10_000,
            1_000_000,
        ),
        Table(
            "dreamerv3_atari100k",
            "scores/atari100k-dreamerv3.json.gz",
            "frames, action repeat 4",
            DREAMERV3,
            40_000,
            10_000,
            400_000,
        ),
        Table(
            "dreamerv3_atari57",
            "scores/atari57-dreamerv3.json.gz",
            "frames, action repeat 4; the source has means over 400,000 of them",
            DREAMERV3,
            4_000_000,
            4_000_000,
            200_000_000,
        ),
    ),
    "tdmpc2": (
        Table(
            "tdmpc2_dmc_proprio",
            "results/tdmpc2",
            "steps of the simulator, action repeat 2; 5M parameters, single task",
            TDMPC2,
            0,
            100_000,
            14_000_000,
        ),
        Table(
            "tdmpc2_dmc_vision",
            "results/tdmpc2-pixels",
            "steps of the simulator, action repeat 2; single task",
            TDMPC2,
            0,
            100_000,
            14_000_000,
        ),
    ),
}

Runs = dict[str, list[tuple[np.ndarray, np.ndarray]]]
"""Steps and scores of each run, keyed by the name of the task in worldflux."""


def at_steps(steps: np.ndarray, scores: np.ndarray, grid: np.ndarray, window: int) -> list[float | None]:
    """Windowed means of a run.

    Args:
        steps: Steps of the scores `[N]`, ascending.
        scores: Scores `[N]`.
        grid: Steps `[M]` at which the windows end.
        window: Length of the windows; 0 uses scores exactly at a step.
    """
    found: list[float | None] = []
    for end in grid:
        inside = scores[(steps > end - window) & (steps <= end)] if window else scores[steps == end]
        if len(inside):
            found.append(round(float(inside.mean()), 1))
        elif window and len(steps) and steps[0] <= end and steps[-1] > end - window:
            found.append(round(float(scores[steps <= end][-1]), 1))
        else:
            found.append(None)
    return found


def read_dreamerv3(path: Path) -> Runs:
    """Reads a file of `scores/` in danijar/dreamerv3."""
    runs: Runs = {}
    with gzip.open(path) as file:
        for run in json.load(file):
            suite, _, name = run["task"].partition("_")
            task = dmc_name(name) if suite == "dmc" else atari_name(name)
            known = [(x, y) for x, y in zip(run["xs"], run["ys"], strict=True) if y is not None]
            steps, scores = np.array(known, dtype=float).T
            runs.setdefault(task, []).append((steps, scores))
    return runs


def read_tdmpc2(folder: Path, tasks: set[str]) -> Runs:
    """Reads a folder of `results/` in nicklashansen/tdmpc2."""
    runs: Runs = {}
    for path in sorted(folder.glob("*.csv")):
        task = dmc_name(path.stem)
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        if task not in tasks:  # the authors' own tasks, and other suites
            continue
        for seed in sorted({row["seed"] for row in rows}):
            points = sorted((float(row["step"]), float(row["reward"])) for row in rows if row["seed"] == seed)
            steps, scores = np.array(points).T
            runs.setdefault(task, []).append((steps, scores))
    return runs


def write(table: Table, runs: Runs, origin: Mapping[str, Any]) -> None:
    """Writes a file with one line per run."""
    entries = []
    for task, curves in sorted(runs.items()):
        first = 0 if not table.window else table.grid
        grid = np.arange(first, table.last + 1, table.grid)
        rows = [at_steps(steps, scores, grid, table.window) for steps, scores in curves]
        used = [i for i in range(len(grid)) if any(row[i] is not None for row in rows)]
        lines = [json.dumps([row[i] for i in used]) for row in rows]
        steps = json.dumps([int(grid[i]) for i in used])
        curves_text = ",\n    ".join(lines)
        entries.append(f'  "{task}": {{"steps": {steps},\n   "runs": [{curves_text}]}}')
    head = {**origin, "steps": table.steps, "scores": table.scores, "window": table.window}
    fields = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in head.items()]
    text = "{\n" + ",\n".join(fields) + ',\n "tasks": {\n' + ",\n".join(entries) + "\n }\n}\n"
    (TARGET / f"{table.name}.json").write_text(text, encoding="utf-8")


def main() -> None:
    """Writes the files whose source is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dreamerv3", type=Path, help="checkout of danijar/dreamerv3")
    parser.add_argument("--tdmpc2", type=Path, help="checkout of nicklashansen/tdmpc2")
    options = parser.parse_args()
    from worldflux.envs.suites import DMC_TDMPC2

    TARGET.mkdir(exist_ok=True)
    owners = {"dreamerv3": "danijar/dreamerv3", "tdmpc2": "nicklashansen/tdmpc2"}
    for family, tables in TABLES.items():
        checkout: Path | None = getattr(options, family)
        if checkout is None:
            continue
        commit = subprocess.run(
            ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"], check=True, capture_output=True, text=True
        ).stdout.strip()
        for table in tables:
            source = f"https://github.com/{owners[family]}, {table.source}, commit {commit}"
            place = checkout / table.source
            tasks = set(DMC_TDMPC2)
            runs = read_dreamerv3(place) if family == "dreamerv3" else read_tdmpc2(place, tasks)
            write(table, runs, {"source": source, "license": LICENSE[family]})


if __name__ == "__main__":
    main()
