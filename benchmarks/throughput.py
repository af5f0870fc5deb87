"""Measures the speed of worldflux and of other implementations of the same algorithms on the same machine.

    python benchmarks/throughput.py --out results.json
    python benchmarks/throughput.py --cases tdmpc2-5m-state --device cuda --dtype float32 bfloat16 --compile auto off
    python benchmarks/throughput.py --peers r2dreamer=~/src/r2dreamer dreamerv3_jax=~/src/dreamerv3,~/jax/bin/python
    python benchmarks/table.py results.json

Each case is measured in its own process (`cases.py` defines what a step includes). Each peer is measured directly after
worldflux, and the speed of matrix products is measured in the same run; `online.py` measures complete training loops.
Use an idle machine, and compare only results of the same run. `peers/README.md` describes how to install the peers. The
exit code is 1 if a measurement failed; the others are written nevertheless.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import cases
import rows

HERE = Path(__file__).parent
DREAMER, TDMPC2 = ("dreamerv3-1m-proprio", "dreamerv3-12m-pixels"), ("tdmpc2-5m-state", "tdmpc2-5m-pixels")


class Script(NamedTuple):
    """Capabilities of a script in `peers/`."""

    cases: tuple[str, ...]
    half: tuple[str, ...]
    """Devices on which it also supports bfloat16."""
    compiles: bool
    """Whether it has a compiled form in addition to a plain one."""


PEERS = {
    "dreamerv3_jax": Script(DREAMER, ("cpu", "cuda"), False),
    "r2dreamer": Script(DREAMER, ("cpu", "cuda"), True),
    "torchrl_dreamerv3": Script(DREAMER, ("cuda",), True),
    "tdmpc2_reference": Script(TDMPC2, (), True),
}


@dataclass(frozen=True)
class Peer:
    """A peer on the command line: `NAME[+compile]=CHECKOUT[,PYTHON]`."""

    name: str
    compile: bool
    repo: str
    python: str

    @classmethod
    def parse(cls, text: str) -> Peer:
        """Parses an argument of `--peers`.

        Raises:
            argparse.ArgumentTypeError: If there is no such script.
        """
        form, _, place = text.partition("=")
        name, _, compiled = form.partition("+")
        forms = [*PEERS, *(f"{peer}+compile" for peer, script in PEERS.items() if script.compiles)]
        if form not in forms or not place:
            raise argparse.ArgumentTypeError(
                f"'{text}' is not FORM=CHECKOUT[,PYTHON] with a FORM of {', '.join(forms)}."
            )
        repo, _, python = place.partition(",")
        return cls(name, bool(compiled), str(Path(repo).expanduser()), str(Path(python or sys.executable).expanduser()))

    def command(self, case: str, dtype: str, device: str) -> list[str] | None:
        """The command for a case, or None if the peer does not have the case."""
        can = PEERS[self.name]
        if case not in can.cases or (dtype != "float32" and device not in can.half):
            return None
        script = str(HERE / "peers" / f"{self.name}.py")
        return [self.python, script, "--repo", self.repo, *(["--compile"] if self.compile else [])]


def commands(options: argparse.Namespace) -> Iterator[list[str]]:
    """All commands in order: the matrix products, then worldflux and the peers in turn for each case."""
    same = ["--device", options.device, "--repeats", str(options.repeats), "--budget", str(options.budget)]
    if options.threads:
        same += ["--threads", str(options.threads)]
    ours = [sys.executable, str(HERE / "cases.py")]
    for dtype in options.dtype:
        yield [*ours, "--peak", *same, "--dtype", dtype]
    for case in options.cases:
        batch = str(options.batches / f"{case}.npz")
        for _ in range(options.rounds):
            for dtype in options.dtype:
                one = [*same, "--dtype", dtype, "--cases", case]
                for form in options.compile:
                    yield [*ours, *one, "--compile", form, "--envs", str(options.envs), "--save", batch]
                for peer in options.peers:
                    command = peer.command(case, dtype, options.device.partition(":")[0])
                    if command is not None:
                        yield [*command, "--batch", batch, *one]


def run(command: list[str], limit: float) -> tuple[list[dict[str, Any]], str | None]:
    """Runs a command, and returns the rows that it printed and a description of its failure, if any."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired as expired:
        printed = expired.stdout or ""
        text = printed.decode() if isinstance(printed, bytes) else printed
        return rows.rows_in(text), f"timed out after {limit:g} s"
    failure = None if done.returncode == 0 else f"exit code {done.returncode}: {done.stderr.strip()[-2000:]}"
    return rows.rows_in(done.stdout), failure


def facts(options: argparse.Namespace) -> dict[str, Any]:
    """Facts that are needed to interpret the results or to repeat the measurement."""
    import numpy
    import torch

    def git(*arguments: str) -> str:
        asked = subprocess.run(["git", "-C", str(HERE), *arguments], capture_output=True, text=True)
        return asked.stdout.strip()

    measured = ("--", ":/worldflux", ":/agents", ":/envs")  # other commits do not affect the results
    cuda = options.device.startswith("cuda")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": git("log", "-1", "--format=%H", *measured) or "unknown",
        "changed_files": len(git("status", "--porcelain", *measured).splitlines()),
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *_without_folders(sys.argv[1:])]),
        "machine": {
            "cpu": rows.cpu_name(),
            "threads": rows.use_threads(options.threads),
            "gpu": torch.cuda.get_device_name() if cuda else None,
            "system": platform.platform(),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda if cuda else None,
            "numpy": numpy.__version__,
        },
    }


def _without_folders(arguments: list[str]) -> list[str]:
    """The arguments with paths reduced to the names of their files and folders."""
    return [
        f"{form}={','.join(Path(part).name for part in place.split(','))}" if place else Path(form).name
        for form, _, place in (argument.partition("=") for argument in arguments)
    ]


def main() -> int:
    """Runs the requested measurements."""
    parser = rows.parser(__doc__, cases.CASES)
    parser.set_defaults(cases=tuple(cases.REFERENCE))
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32"])
    parser.add_argument("--compile", nargs="+", choices=tuple(cases.COMPILE), default=["auto"], help="forms to measure")
    parser.add_argument("--envs", type=int, default=1, help="number of environments that act in one batch")
    parser.add_argument("--peers", nargs="+", type=Peer.parse, default=[], metavar="NAME[+compile]=CHECKOUT[,PYTHON]")
    parser.add_argument("--rounds", type=int, default=1, help="alternations of worldflux and the peers per case")
    parser.add_argument("--limit", type=float, default=1800.0, help="seconds after which a measurement is aborted")
    parser.add_argument("--out", type=Path, help="JSON file for the results, which are also printed")
    options = parser.parse_args()
    found: dict[str, Any] = {**facts(options), "rows": [], "failures": []}
    with tempfile.TemporaryDirectory() as folder:
        options.batches = Path(folder)
        for command in commands(options):
            measured, failure = run(command, options.limit)
            for row in measured:
                print(json.dumps(row), flush=True)
            found["rows"] += measured
            if failure is not None:
                name = shlex.join(["python", *_without_folders(command[1:])])
                found["failures"].append({"command": name, "error": failure})
                print(f"{name}\n{failure}", file=sys.stderr, flush=True)
            if options.out is not None:  # after each command, so that an interrupted run keeps its rows
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 1 if found["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
