"""Draws the tables of RESULTS.md from what `throughput.py` has measured.

    python benchmarks/table.py results.json --out benchmarks/RESULTS.md

Files of the same commit and machine share a section. Ours are medians over all their rounds; beside a peer stands what
was measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import rows

Run = dict[str, Any]
Row = dict[str, Any]

INTRODUCTION = """# How fast worldflux is

Drawn by `python benchmarks/table.py` from files of `python benchmarks/throughput.py`; the command of each run stands
above its tables. One *gradient step* is forward, backward, clipping, optimiser and target networks of one batch; an
*acting step* takes one observation to an action of the policy; a *plan* takes it to an action of the planner (512
candidates, 6 iterations, 3 steps ahead). 6 continuous actions, 24 numbers or 64x64 pixels; DreamerV3 with 16 windows of
64 and 15 imagined steps, TD-MPC2 with 256 windows of 3 transitions.

The *limit* is the time that the step's matrix products and convolutions would take at the speed at which this machine
multiplied large square matrices in the same run. They are counted in worldflux's own plain form, two operations for a
multiplication with its addition; everything else a step does counts for nothing. *Memory* is the peak of the process on
a CPU, PyTorch included, and of what PyTorch allocated on CUDA. *Compiling* is what the first calls took longer than the
median, from a filled cache where the compiler keeps one. Peers run their own code, as installed by
`benchmarks/peers/README.md`, in a process right behind ours.

Nothing stands here that was not measured. To measure again, on an idle machine:

```bash
python benchmarks/throughput.py --out results.json \\
    --peers dreamerv3_jax=DREAMERV3,JAX_PYTHON r2dreamer=R2DREAMER,PYTHON tdmpc2_reference=TDMPC2,TDMPC2_PYTHON
python benchmarks/table.py results.json --out benchmarks/RESULTS.md
```

`bash benchmarks/gpu.sh OUT` measures everything on a machine with a CUDA GPU in ten minutes, without a network: speed
in float32 and bfloat16, captured and plain, and short learning curves. Put `OUT/speed*.json` beside the other files of
the command above.
"""


def _time(ms: float) -> str:
    """Milliseconds with three digits, as seconds from one on."""
    if ms >= 1000:
        return f"{ms / 1000:.3g} s"
    return f"{ms:.3g} ms"


def _markdown(head: list[str], lines: Iterable[list[str]]) -> str:
    """A table; columns of numbers stand to the right."""
    lines = list(lines)
    assert all(len(line) == len(head) for line in lines), (head, lines)
    rule = ["---" if name in ("case", "step", "precision", "peer", "with") else "---:" for name in head]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *lines))


def _medians(measured: list[Row]) -> list[Row]:
    """One row for the rounds of each measurement, in the order of the first ones."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in measured:
        key = tuple(str(row.get(name)) for name in ("who", "case", "what", "dtype", "compile", "threads", "envs"))
        groups.setdefault(key, []).append(row)
    return [
        {
            **group[0],
            "ms": statistics.median(row["ms"] for row in group),
            "ms_quartiles": [
                min(row["ms_quartiles"][0] for row in group),
                max(row["ms_quartiles"][1] for row in group),
            ],
        }
        for group in groups.values()
    ]


def _peaks(found: list[Row]) -> dict[str, float]:
    """Measured TFLOP/s of matrix products, by precision."""
    speeds: dict[str, list[float]] = {}
    for row in found:
        if row["what"] == rows.MATRIX:
            speeds.setdefault(row["dtype"], []).append(row["tflop_per_s"])
    return {dtype: statistics.median(values) for dtype, values in speeds.items()}


def _precision(row: Row) -> str:
    form = row.get("compile")
    return row["dtype"] + (", compiled" if form in (True, "on") else ", plain" if form == "off" else "")


def ours_table(run: Run) -> str:
    """What worldflux takes, how far that is from the machine's limit, and what it costs otherwise."""
    peaks = _peaks(run["rows"])
    lines = []
    for row in _medians([row for row in run["rows"] if row["who"] == "worldflux" and row["what"] != rows.MATRIX]):
        low, high = row["ms_quartiles"]
        peak = peaks.get(row["dtype"])
        limit = None if peak is None else row["gflop"] / peak
        lines.append(
            [
                row["case"],
                row["what"],
                _precision(row),
                _time(row["ms"]),
                f"{_time(low)} to {_time(high)}",
                f"{row['gflop'] / row['ms']:.3g}",
                "" if limit is None else _time(limit),
                "" if limit is None else f"{100 * limit / row['ms']:.0f} %",
                "" if "peak_mib" not in row else f"{row['peak_mib']:.0f} MiB",
                f"{row['compile_s']:.1f} s",
            ]
        )
    head = ["case", "step", "precision", "time", "quartiles", "TFLOP/s", "limit", "limit / time", "memory", "compiling"]
    return _markdown(head, lines)


def peers_table(run: Run) -> str:
    """Each peer's time beside the fastest form of ours in the same precision, and beside ours in bfloat16."""
    found = _medians([row for row in run["rows"] if row["what"] != rows.MATRIX])
    ours: dict[tuple[str, str, bool], float] = {}
    for row in found:
        if row["who"] == "worldflux":
            key = (row["case"], row["what"], row["dtype"] == "float32")
            ours[key] = min(row["ms"], ours.get(key, row["ms"]))
    lines = []
    for row in found:
        full = row["dtype"].startswith("float32")
        mine, half = (ours.get((row["case"], row["what"], precise)) for precise in (full, False))
        if row["who"] == "worldflux" or mine is None:
            continue
        lines.append(
            [
                row["case"],
                row["what"],
                row["who"],
                _precision(row),
                " ".join(f"{name} {version}" for name, version in row["versions"].items()),
                _time(row["ms"]),
                _time(mine),
                f"{row['ms'] / mine:.2f}",
                "" if half is None else _time(half),
                "" if "peak_mib" not in row else f"{row['peak_mib']:.0f} MiB",
                f"{row['compile_s']:.1f} s",
            ]
        )
    head = ["case", "step", "peer", "precision", "with", "peer's", "ours", "peer's / ours", "ours in bfloat16"]
    head += ["peer's memory", "compiling"]
    return _markdown(head, lines) if lines else ""


def section(runs: list[Run]) -> str:
    """The tables of runs of one commit on one machine."""
    first = runs[0]
    joined: Run = {**first, "rows": [row for run in runs for row in run["rows"]]}
    machine = first["machine"]
    name = machine["gpu"] or machine["cpu"]
    changed = f" with {first['changed_files']} changed files" if first["changed_files"] else ""
    text = [
        f"## {name}, {machine['threads']} threads",
        f"{first['date']}, library as of commit `{first['commit'][:12]}`{changed}, "
        + ", ".join(f"{key} {value}" for key, value in first["versions"].items() if value)
        + f", {machine['system']}. Matrix products: "
        + ", ".join(f"{speed:.3g} TFLOP/s in {dtype}" for dtype, speed in _peaks(joined["rows"]).items())
        + ".",
        "```bash\n" + "\n".join(run["command"] for run in runs) + "\n```",
        ours_table(joined),
    ]
    beside = _join([peers_table(run) for run in runs])
    if beside:
        text += ["Beside the peers:", beside]
    failures = [failure for run in runs for failure in run["failures"]]
    if failures:
        text.append("Not measured, because it failed: " + ", ".join(f"`{one['command']}`" for one in failures) + ".")
    return "\n\n".join(text)


def _join(tables: list[str]) -> str:
    """Tables with the same head as one."""
    tables = [table for table in tables if table]
    return "\n".join([tables[0], *("\n".join(table.splitlines()[2:]) for table in tables[1:])]) if tables else ""


def document(runs: list[Run]) -> str:
    """The whole of RESULTS.md."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps([run[key] for key in ("commit", "machine", "versions")]), []).append(run)
    return "\n".join([INTRODUCTION, *(section(group) + "\n" for group in groups.values())])


def main() -> int:
    """Prints or writes the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="files that throughput.py has written")
    parser.add_argument("--out", type=Path, help="default: printed")
    options = parser.parse_args()
    text = document([json.loads(path.read_text(encoding="utf-8")) for path in options.results])
    if options.out is None:
        print(text, end="")
    else:
        options.out.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
