"""How fast worldflux is, beside other implementations of the same algorithms on the same machine.

    python benchmarks/throughput.py --out results.json
    python benchmarks/throughput.py --cases tdmpc2-5m-state --device cuda --dtype float32 bfloat16 --compile auto off
    python benchmarks/throughput.py --peers r2dreamer=~/src/r2dreamer dreamerv3_jax=~/src/dreamerv3,~/jax/bin/python
    python benchmarks/table.py results.json

Every case is measured in a process of its own (`cases.py` says what is in a step), a peer's right behind ours, and the
machine's speed at multiplying matrices in the same run; `online.py` measures whole training loops. Run it on an idle
machine, and compare only what one run printed. `peers/README.md` says how to install the peers. The exit code is 1 if a
measurement failed; the others are written nevertheless.
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
    """What a script in `peers/` can measure."""

    cases: tuple[str, ...]
    half: tuple[str, ...]
    """Devices on which it computes in bfloat16 too."""
    compiles: bool
    """Whether it has a form that a compiler has made faster besides another one."""


PEERS = {
    "dreamerv3_jax": Script(DREAMER, ("cpu", "cuda"), False),
    "r2dreamer": Script(DREAMER, ("cpu", "cuda"), True),
    "torchrl_dreamerv3": Script(DREAMER, ("cuda",), True),
    "tdmpc2_reference": Script(TDMPC2, (), True),
}


@dataclass(frozen=True)
class Peer:
    """A peer of the command line: `NAME[+compile]=CHECKOUT[,PYTHON]`."""

    name: str
    compile: bool
    repo: str
    python: str

    @classmethod
    def parse(cls, text: str) -> Peer:
        """A peer as it was asked for.

        Raises:
            argparse.ArgumentTypeError: If there is no such script.
        """
        form, _, place = text.partition("=")
        name, _, compiled = form.partition("+")
        forms = [*PEERS, *(f"{peer}+compile" for peer, script in PEERS.items() if script.compiles)]
        if form not in forms or not place:
            raise argparse.ArgumentTypeError(
                f"'{text}' is no FORM=CHECKOUT[,PYTHON] with a FORM of {', '.join(forms)}."
            )
        repo, _, python = place.partition(",")
        return cls(name, bool(compiled), str(Path(repo).expanduser()), str(Path(python or sys.executable).expanduser()))

    def command(self, case: str, dtype: str, device: str) -> list[str] | None:
        """What to run for a case; None where the peer has no such case."""
        can = PEERS[self.name]
        if case not in can.cases or (dtype != "float32" and device not in can.half):
            return None
        script = str(HERE / "peers" / f"{self.name}.py")
        return [self.python, script, "--repo", self.repo, *(["--compile"] if self.compile else [])]


def commands(options: argparse.Namespace) -> Iterator[list[str]]:
    """Everything to be run, in order: the peaks, and then for each case ours and the peers' in turn."""
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
    """The rows that a command printed, and what went wrong."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired as expired:
        printed = expired.stdout or ""
        text = printed.decode() if isinstance(printed, bytes) else printed
        return rows.rows_in(text), f"no end within {limit:g} s"
    failure = None if done.returncode == 0 else f"exit code {done.returncode}: {done.stderr.strip()[-2000:]}"
    return rows.rows_in(done.stdout), failure


def facts(options: argparse.Namespace) -> dict[str, Any]:
    """What a reader needs to judge the numbers or to measure them again."""
    import numpy
    import torch

    def git(*arguments: str) -> str:
        asked = subprocess.run(["git", "-C", str(HERE), *arguments], capture_output=True, text=True)
        return asked.stdout.strip()

    measured = ("--", ":/worldflux", ":/agents", ":/envs")  # commits of anything else leave the results as they are
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
    """The arguments with only the names of the files and folders that they lead to."""
    return [
        f"{form}={','.join(Path(part).name for part in place.split(','))}" if place else Path(form).name
        for form, _, place in (argument.partition("=") for argument in arguments)
    ]


def main() -> int:
    """Measures everything that was asked for."""
    parser = rows.parser(__doc__, cases.CASES)
    parser.set_defaults(cases=tuple(cases.REFERENCE))
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32"])
    parser.add_argument("--compile", nargs="+", choices=tuple(cases.COMPILE), default=["auto"], help="forms of ours")
    parser.add_argument("--envs", type=int, default=1, help="environments that act together")
    parser.add_argument("--peers", nargs="+", type=Peer.parse, default=[], metavar="NAME[+compile]=CHECKOUT[,PYTHON]")
    parser.add_argument("--rounds", type=int, default=1, help="times that ours and the peers' take turns in each case")
    parser.add_argument("--limit", type=float, default=1800.0, help="seconds after which a measurement is given up")
    parser.add_argument("--out", type=Path, help="file for the results as JSON; they are printed as well")
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
            if options.out is not None:  # after each, so that a run that is cut short has its rows
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 1 if found["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
