"""`worldflux check-env`: checks the contract of an environment, point by point."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from worldflux.cli.environments import EnvName, find_environment
from worldflux.cli.options import Count, Flag

if TYPE_CHECKING:
    from worldflux.envs.checking.report import CheckReport

_STYLES = {"ok": "green", "failed": "bold red", "advice": "yellow"}


def check_env(env: EnvName, *, steps: Count = 200, seed: Count = 0, render: Flag = False) -> int:
    """Check that an environment keeps the contract that training relies on.

    Args:
        env: An id (CartPole-v1, dmc/walker-walk, atari/pong), or your class: module:Class or path.py:Class.
        steps: Number of random actions, enough for an episode to end.
        seed: Seed of the environment and of the actions.
        render: Check the rendered image, too.

    Returns:
        0 if every check passed, otherwise 1.
    """
    report = check_report(env, steps=steps, seed=seed, render=render)
    print_report(report)
    return 0 if report.passed else 1


def check_report(env: str, **options: Any) -> CheckReport:
    """The report about an environment, whether it passes the checks or not."""
    from worldflux.envs.checking import check_env as check
    from worldflux.envs.checking.report import EnvironmentCheckError

    found = find_environment(env)
    try:
        return check(found, **options)
    except EnvironmentCheckError as error:
        return error.report


def print_report(report: CheckReport) -> None:
    """Prints one line for each check and each advice, in colours if rich is installed and the output supports them."""
    if importlib.util.find_spec("rich") is None:
        print(report)
        return
    from rich.console import Console
    from rich.text import Text

    # Numbers and brackets in the texts are no markup, and the terminal wraps long lines.
    console = Console(highlight=False, soft_wrap=True)
    console.print(Text(report.name, style="bold"))
    for status, text in report.lines():
        console.print(Text.assemble("  ", (f"{status:<7}", _STYLES[status]), f" {text}"))
