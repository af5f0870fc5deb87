"""Compares what worldflux and the references have learned, from the rows that `online.py` has written.

    python benchmarks/online.py --cases dreamerv3-cartpole --seeds 0 1 2 --losses 25 --dreamerv3 ... --out learned.jsonl
    python benchmarks/parity.py learned.jsonl

For every case, prints several measures for each seed, their mean and standard deviation on both sides, and the p-value
of an exact permutation test of the difference between the means; the same is printed for the losses at equal gradient
steps. Writes the curves to `benchmarks/results/parity_<case>_<side>.csv` (`step,score,seed`).
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import learning
import numpy as np
import rows

Episodes = list[tuple[int, float]]
LOSSES = {
    "critic": "loss/value",
    "replay_critic": "loss/repval",
    "reward": "loss/rew",
    "dynamics": "loss/dyn",
    "continue": "loss/con",
    "actor": "loss/policy",
}
"""Losses of worldflux, and their names in danijar/dreamerv3."""
AT = (50, 75, 100, 125, 200, 400, 700)
"""Gradient steps at which the losses are compared."""


def mean_between(first: int, last: int) -> Callable[[Episodes], float]:
    """A measure: the mean return of the episodes that end between two steps."""

    def measure(episodes: Episodes) -> float:
        scores = [score for step, score in episodes if first < step <= last]
        return float(np.mean(scores)) if scores else float("nan")

    return measure


def first_of(score: float, steps: int) -> Callable[[Episodes], float]:
    """A measure: the step at which the first episode with this score ends, or the length of the run."""
    return lambda episodes: float(next((step for step, found in episodes if found >= score), steps))


MEASURES: dict[str, dict[str, Callable[[Episodes], float]]] = {
    "dreamerv3-cartpole": {
        "mean return, steps 1,500 to 2,700": mean_between(1500, 2700),
        "mean return, steps 2,700 to 4,000": mean_between(2700, 4000),
        "first episode of 100": first_of(100, 4000),
        "first episode of 195": first_of(195, 4000),
    },
    "dreamerv3-pixelseek": {
        "mean return, steps 1,500 to 3,000": mean_between(1500, 3000),
        "mean return, steps 3,000 to 4,500": mean_between(3000, 4500),
        "first episode of 20": first_of(20, 4500),
    },
    "tdmpc2-walker-stand": {
        "return of the random episodes": mean_between(0, 1000),
        "mean return, steps 1,000 to 2,000": mean_between(1000, 2000),
        "mean return, steps 2,000 to 3,000": mean_between(2000, 3000),
    },
}


def permutation_p(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Share of all splits of the values whose means differ by at least as much as the means of this split."""
    everything, size = np.concatenate([ours, theirs]), len(ours)
    total, seen = everything.sum(), abs(ours.mean() - theirs.mean())
    chosen = np.array([everything[list(c)].sum() for c in itertools.combinations(range(len(everything)), size)])
    differences = np.abs(chosen / size - (total - chosen) / len(theirs))
    return float(np.mean(differences >= seen - 1e-9))


def spread(values: np.ndarray) -> str:
    """Mean and standard deviation as text."""
    return f"{values.mean():.4g} ± {values.std(ddof=1):.2g}" if len(values) > 1 else f"{values.mean():.4g}"


def line(name: str, ours: np.ndarray, theirs: np.ndarray) -> str:
    """A table row with both sides, their difference, and every seed."""
    seeds = " / ".join(", ".join(f"{value:.4g}" for value in side) for side in (ours, theirs))
    difference = ours.mean() - theirs.mean()
    p = f"{permutation_p(ours, theirs):.2f}"
    return f"| {name} | {spread(ours)} | {spread(theirs)} | {difference:+.3g} | {p} | {seeds} |"


def compare(case: str, found: list[dict[str, Any]]) -> str:
    """The Markdown table of one case."""
    sides = [
        sorted((row for row in found if (row["who"] == "worldflux") is own), key=lambda r: r["seed"])
        for own in (True, False)
    ]
    if not all(sides):
        return f"{case}: one side is missing."
    head = [
        "| measure | worldflux | reference | difference | p | seeds, worldflux / reference |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines = [f"{case}, {len(sides[0])} and {len(sides[1])} seeds", "", *head]
    for name, measure in MEASURES[case].items():
        ours, theirs = (np.array([measure(row["episodes"]) for row in side]) for side in sides)
        lines.append(line(name, ours, theirs))
    for own, their in LOSSES.items():
        for updates in AT:
            pair = [np.array(losses_at(side, updates, name)) for side, name in zip(sides, (own, their), strict=True)]
            if all(len(values) for values in pair):
                lines.append(line(f"{own}, gradient step {updates}", *pair))
    return "\n".join(lines)


def losses_at(side: list[dict[str, Any]], updates: int, name: str) -> list[float]:
    """A loss of every seed at one gradient step."""
    return [e[name] for row in side for e in row["losses"] if name in e and e["updates"] == updates]


def main() -> int:
    """Compares all cases in the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, nargs="+", help="files written by online.py")
    parser.add_argument("--curves", type=Path, default=learning.RESULTS, help="directory for the curves")
    options = parser.parse_args()
    found = [row for path in options.rows for row in rows.rows_in(path.read_text(encoding="utf-8"))]
    for case in MEASURES:
        some = [row for row in found if row["case"] == case]
        if not some:
            continue
        print(compare(case, some), end="\n\n")
        for row in some:
            side = "worldflux" if row["who"] == "worldflux" else "reference"
            path = options.curves / f"parity_{case.replace('-', '_')}_{side}.csv"
            learning.append(path, row["seed"], row["episodes"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
