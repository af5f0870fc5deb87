"""Plants faults in good data, and counts which of them `worldflux.datasets.lint` finds.

Records several tasks with several policies, lints each recording as it is, and again with each fault. Writes one row
for each to a csv file, and prints a table of the faults, the false alarms, and the datasets where a fault was missed.

    python benchmarks/lint.py --seeds 0 1 2
    python benchmarks/lint.py --seeds 1 --groups other --faults none      # false alarms alone
    python benchmarks/lint.py --table benchmarks/results/lint.csv
"""

from __future__ import annotations

import csv
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from lint_faults import FAULTS, Data, episodes_of
from lint_recordings import CASES, Case, recorded

from worldflux.datasets import lint

COLUMNS = (
    "group", "task", "policy", "episodes", "seed", "fault", "expected", "found", "warnings", "notes", "planted",
    "reported", "right", "transitions", "seconds",
)  # fmt: skip


def examine(case: Case, episodes: int, seed: int, cache: Path | None, only: Sequence[str]) -> list[dict[str, Any]]:
    """Lints a case's data, as they are and with each fault."""
    buffer = recorded(case, episodes, seed, cache)
    good = Data(episodes_of(buffer), classes=buffer.action_classes)
    results = []
    planted: Any = None
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "data.npz"
        for fault, (plant, expected) in {"none": (lambda data, rng: data, ""), **FAULTS}.items():
            if only and not any(word in fault for word in only):
                continue
            data = plant(good, np.random.default_rng(seed))
            if not data.changed:
                continue
            if plant is not planted:  # two rows of the table may be about the same data
                data.save(path)
                started = time.process_time()
                report = lint(path if expected else buffer)
                seconds = time.process_time() - started
                planted = plant
            found = [finding for finding in report.findings if finding.code == expected]
            reported = set(found[0].rows) if found else set()
            results.append(
                {
                    "group": case.group,
                    "task": case.task,
                    "policy": case.policy,
                    "episodes": episodes,
                    "seed": seed,
                    "fault": fault,
                    "expected": expected,
                    "found": int(bool(found)),
                    "warnings": " ".join(sorted(f.code for f in report.findings if f.severity == "warning")),
                    "notes": " ".join(sorted(f.code for f in report.findings if f.severity == "note")),
                    "planted": len(data.rows),
                    "reported": len(reported) if data.rows else 0,
                    "right": len(reported & data.rows),
                    "transitions": report.transitions,
                    "seconds": round(seconds, 2),
                }
            )
    return results


def table(results: Sequence[dict[str, Any]]) -> str:
    """The tables of faults and of false alarms, as Markdown."""
    lines = [
        "| fault | finding | datasets | found | rows reported that are right |",
        "| --- | --- | --- | --- | --- |",
    ]
    missed: dict[str, list[str]] = defaultdict(list)
    for fault, (_, expected) in FAULTS.items():
        rows = [row for row in results if row["fault"] == fault]
        if not rows:
            continue
        found = sum(int(row["found"]) for row in rows)
        reported = sum(int(row["reported"]) for row in rows)
        right = f"{sum(int(row['right']) for row in rows) / reported:.1%}" if reported else ""
        lines.append(f"| {fault} | `{expected}` | {len(rows)} | {found / len(rows):.0%} | {right} |")
        for row in rows:
            if not int(row["found"]):
                missed[fault].append(f"{row['task']} {row['policy']} ({row['episodes']} episodes)")
    for group in ("own", "other"):
        good = [row for row in results if row["fault"] == "none" and row["group"] == group]
        if not good:
            continue
        alarms = [row for row in good if row["warnings"]]
        notes = [row for row in good if row["notes"]]
        lines += [
            "",
            f"Good data, {group} tasks: {len(alarms)} of {len(good)} datasets with a warning, {len(notes)} with a "
            f"note. {np.median([float(row['seconds']) for row in good]):.1f} s of one core in the median, "
            f"{max(float(row['seconds']) for row in good):.1f} s at most.",
        ]
        for row in good:
            if row["warnings"] or row["notes"]:
                lines.append(f"- {row['task']} {row['policy']}: {row['warnings']} {row['notes']}".rstrip())
    lines += ["", "Missed:"]
    for fault, names in missed.items():
        counts = {name: names.count(name) for name in dict.fromkeys(names)}
        lines.append(f"- {fault}: " + "; ".join(f"{name} x{count}" for name, count in counts.items()))
    return "\n".join(lines)


@dataclass(frozen=True)
class Settings:
    """Settings of the benchmark."""

    seeds: tuple[int, ...] = (0, 1, 2)
    out: Path = Path("benchmarks/results/lint.csv")
    """The csv file; rows are added to it."""
    cache: Path | None = None
    """A directory that keeps the recordings."""
    groups: tuple[str, ...] = ("own", "other")
    """Tasks that the checks were developed on, and others."""
    most_episodes: int = 100
    """Only the recordings of at most so many episodes."""
    cases: tuple[str, ...] = ()
    """Only the tasks and policies whose names contain one of these."""
    faults: tuple[str, ...] = ()
    """Only the faults whose names contain one of these; "none" is the good data."""
    processes: int = 1
    table: Path | None = None
    """Print the table of this csv file, and do nothing else."""


def main() -> None:
    """Runs the benchmark."""
    settings = tyro.cli(Settings, description=__doc__)
    if settings.table is not None:
        with settings.table.open(newline="") as file:
            print(table(list(csv.DictReader(file))))
        return
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    jobs = [
        (case, episodes, seed, settings.cache, settings.faults)
        for seed in settings.seeds
        for case in CASES
        for episodes in case.sizes
        if case.group in settings.groups and episodes <= settings.most_episodes
        if not settings.cases or any(word in f"{case.task} {case.policy}" for word in settings.cases)
    ]
    results = []
    is_new = not settings.out.exists()
    with settings.out.open("a", newline="") as file, ProcessPoolExecutor(settings.processes) as pool:
        writer = csv.DictWriter(file, COLUMNS)
        if is_new:
            writer.writeheader()
        for rows in pool.map(examine, *zip(*jobs, strict=True)):
            writer.writerows(rows)
            file.flush()
            results += rows
    print(table(results))


if __name__ == "__main__":
    main()
