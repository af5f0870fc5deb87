"""Compares complete training loops with those of the peers: acting, stepping, storing, sampling and training.

    python benchmarks/online.py --dreamerv3 path/to/dreamerv3,path/to/python --tdmpc2 path/to/tdmpc2,path/to/python
    python benchmarks/online.py --cases dreamerv3-cartpole --seeds 0 1 2 3 4 5 --losses 25 --out learning.jsonl

`loops.py` defines the cases: environments, settings and lengths. Each run has its own process, and runs of worldflux
and of the peer alternate, seed by seed. The row of JSON of a run contains its gradient steps, the CPU time and
wall-clock time from the first counted gradient step to the last action (without startup and compilation), and the
return of every episode.

Rows are appended to `--out`. At the end, a table with the medians of all rows in this file is printed.
`peers/README.md` describes how to install the peers; without them, only worldflux is run. The exit code is 1 if a run
failed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import loops
import rows
import throughput

HERE = Path(__file__).parent
PEERS = {"dreamerv3": "danijar/dreamerv3", "tdmpc2": "nicklashansen/tdmpc2"}


def commands(options: argparse.Namespace) -> Iterator[list[str]]:
    """The commands in order: for every case and seed the loop of worldflux, then that of the peer."""
    for case in options.cases:
        for seed in options.seeds:
            same = ["--case", case, "--seed", str(seed), "--threads", str(options.threads)]
            same += ["--losses", str(options.losses)]
            yield [sys.executable, str(HERE / "loop.py"), *same]
            family = loops.LOOPS[case].family
            place = getattr(options, family)
            if place is not None:
                repo, _, python = place.partition(",")
                script = str(HERE / "peers" / f"{family}_loop.py")
                yield [python or sys.executable, script, "--repo", repo, *same]


def table(found: Iterable[dict[str, Any]]) -> str:
    """A Markdown table with the medians of each case for worldflux and the peer."""
    by_case: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in found:
        by_case.setdefault(row["case"], {}).setdefault(row["who"], []).append(row)
    lines = [
        "| case | who | runs | gradient steps | CPU, ms per step | range | wall clock, ms | worldflux / peer |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for case, sides in by_case.items():
        cpu = {who: [row["cpu_ms_per_update"] for row in some] for who, some in sides.items()}
        for who, some in sides.items():
            ratio = ""
            if who != "worldflux" and "worldflux" in sides:
                ratio = f"{statistics.median(cpu['worldflux']) / statistics.median(cpu[who]):.2f}"
            wall = statistics.median(1e3 * row["wall_s"] / max(row["updates"], 1) for row in some)
            times = f"{statistics.median(cpu[who]):.1f} | {min(cpu[who]):.1f}, {max(cpu[who]):.1f} | {wall:.1f}"
            lines.append(f"| {case} | {who} | {len(some)} | {some[0]['updates']} | {times} | {ratio} |")
    return "\n".join(lines)


def main() -> int:
    """Runs the requested cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=tuple(loops.LOOPS), default=tuple(loops.SPEED), metavar="CASE")
    parser.add_argument(
        "--seeds", type=int, nargs="*", default=[0, 1, 2], help="seeds to run; without any, only the table is printed"
    )
    parser.add_argument("--threads", type=int, default=1, help="number of CPU threads per run")
    parser.add_argument(
        "--losses", type=int, default=0, metavar="N", help="print the losses of every N-th gradient step"
    )
    for family, name in PEERS.items():
        parser.add_argument(f"--{family}", metavar="CHECKOUT[,PYTHON]", help=f"also run {name}")
    parser.add_argument("--limit", type=float, default=7200.0, help="seconds after which a run is aborted")
    parser.add_argument("--out", type=Path, help="file to which the rows are appended, one line of JSON each")
    options = parser.parse_args()
    options.device = "cpu"
    found = rows.rows_in(options.out.read_text()) if options.out is not None and options.out.exists() else []
    failed = False
    about = throughput.facts(options)
    for command in commands(options):
        made, failure = throughput.run(command, options.limit)
        for row in made:
            row |= {name: about[name] for name in ("date", "commit", "changed_files")}
            print(json.dumps(row), flush=True)
            if options.out is not None:
                options.out.parent.mkdir(parents=True, exist_ok=True)
                with options.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
        found += made
        if failure is not None:
            failed = True
            print(f"{' '.join(command)}\n{failure}", file=sys.stderr, flush=True)
    print(table(found))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
