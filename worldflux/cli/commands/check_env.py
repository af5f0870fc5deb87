"""`worldflux check-env`: the contract of an environment, point by point."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from worldflux.cli.environments import EnvName, find_environment

if TYPE_CHECKING:
    from worldflux.envs.checking.report import CheckReport

_STYLES = {"ok": "green", "failed": "bold red", "advice": "yellow"}


def check_env(env: EnvName, *, steps: int = 200, seed: int = 0, render: bool = False) -> int:
    """Check that an environment keeps the contract that training relies on.

    Args:
        env: An id (CartPole-v1, dmc/walker-walk, atari/pong), or where your class is: module:Class or path.py:Class.
        steps: Random actions to look at; long enough for an episode to end.
        seed: Of the environment and of the actions.
        render: Check its picture, too.

    Returns:
        0 if every check passed, otherwise 1.
    """
    from worldflux.envs.checking import check_env as check
    from worldflux.envs.checking.report import EnvironmentCheckError

    found = find_environment(env)
    try:
        report = check(found, steps=steps, seed=seed, render=render)
    except EnvironmentCheckError as error:
        report = error.report
    print_report(report)
    return 0 if report.passed else 1


def print_report(report: CheckReport) -> None:
    """Prints a line for each check and each advice, in colours where rich is installed and the output shows them."""
    if importlib.util.find_spec("rich") is None:
        print(report)
        return
    from rich.console import Console
    from rich.text import Text

    # Numbers and brackets in the texts are content, not markup; long lines are the terminal's to wrap.
    console = Console(highlight=False, soft_wrap=True)
    console.print(Text(report.name, style="bold"))
    for status, text in report.lines():
        console.print(Text.assemble("  ", (f"{status:<7}", _STYLES[status]), f" {text}"))
