"""`python -m worldflux.agents.zoo train ...` is `python -m rl_zoo3.train ...` with our two algorithms.

rl_zoo3 reads its command line before it imports anything that a user names there, so `worldflux.agents.zoo` has to be
imported before.
"""

from __future__ import annotations

import runpy
import sys

import worldflux.agents.zoo  # noqa: F401

COMMANDS = ("train", "enjoy", "record_video")
"""Modules of rl_zoo3 that have to know the algorithms; its plots only read files."""


def main() -> None:
    """Runs the module of rl_zoo3 that the first argument names, with the others."""
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command not in COMMANDS:
        raise SystemExit(
            f"usage: python -m worldflux.agents.zoo {{{','.join(COMMANDS)}}} ...\n"
            "Runs that module of rl_zoo3 with what follows; `train --help` shows its options."
        )
    del sys.argv[1]
    runpy.run_module(f"rl_zoo3.{command}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
