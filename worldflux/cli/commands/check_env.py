"""`worldflux check-env`: checks the contract of an environment, point by point."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from worldflux.cli.environments import EnvName, find_environment, make_environment
from worldflux.cli.options import Count, EnvOptions, Flag

if TYPE_CHECKING:
    import gymnasium as gym

    from worldflux.envs.checking.report import CheckReport

_NO_OPTIONS = EnvOptions()
_STYLES = {"ok": "green", "failed": "bold red", "advice": "yellow"}


def check_env(
    env: EnvName,
    *,
    steps: Count = 200,
    seed: Count = 0,
    render: Flag = False,
    options: Annotated[EnvOptions, tyro.conf.arg(name="")] = _NO_OPTIONS,
) -> int:
    """Check that an environment keeps the contract that training relies on.

    Args:
        env: An id (CartPole-v1, dmc/walker-walk, atari/pong), or your class: module:Class or path.py:Class.
        steps: Number of random actions, enough for an episode to end.
        seed: Seed of the environment and of the actions.
        render: Check the rendered image, too.
        options: Options of ENV.

    Returns:
        0 if every check passed, otherwise 1.
    """
    report = check_report(env, options, steps=steps, seed=seed, render=render)
    print_report(report)
    return 0 if report.passed else 1


def check_report(
    env: str, options: EnvOptions = _NO_OPTIONS, *, steps: int = 200, seed: int = 0, render: bool = False
) -> CheckReport:
    """The report about an environment, whether it passes the checks or not."""
    from worldflux.envs.checking import check_env as check
    from worldflux.envs.checking.report import EnvironmentCheckError

    found = find_environment(env)
    if options != _NO_OPTIONS:
        found = _with_options(env, options, render_mode="rgb_array" if render and isinstance(found, str) else None)
    try:
        return check(found, steps=steps, seed=seed, render=render)
    except EnvironmentCheckError as error:
        return error.report


def _with_options(env: str, options: EnvOptions, render_mode: str | None) -> Callable[[], gym.Env[Any, Any]]:
    """A function that makes the environment. The report shows its name."""

    def make() -> gym.Env[Any, Any]:
        return make_environment(env, options, render_mode)

    make.__name__ = env
    return make


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
