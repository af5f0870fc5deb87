"""The entry point of the `worldflux` command."""

from __future__ import annotations

import os
import platform
import select
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TextIO

import tyro

from worldflux.cli.commands.check_env import check_env
from worldflux.cli.commands.collect import collect
from worldflux.cli.commands.data import convert, lint, push_data
from worldflux.cli.commands.doctor import doctor
from worldflux.cli.commands.envs import envs
from worldflux.cli.commands.eval import evaluate
from worldflux.cli.commands.imagine import imagine
from worldflux.cli.commands.models import models
from worldflux.cli.commands.plot import plot
from worldflux.cli.commands.push import push
from worldflux.cli.commands.report import report
from worldflux.cli.commands.reproduce import reproduce
from worldflux.cli.commands.train import TrainSettings, train
from worldflux.cli.commands.train_offline import OfflineSettings, train_offline
from worldflux.cli.config_file import path_in, read_settings
from worldflux.cli.options import words_in
from worldflux.cli.provenance import installed_version
from worldflux.errors import ConfigurationError, WorldFluxError, nearest

COMMANDS: dict[str, Callable[..., int]] = {
    "train": train,
    "eval": evaluate,
    "imagine": imagine,
    "plot": plot,
    "report": report,
    "reproduce": reproduce,
    "push": push,
    "collect": collect,
    "train-offline": train_offline,
    "data convert": convert,
    "data lint": lint,
    "data push": push_data,
    "models": models,
    "envs": envs,
    "check-env": check_env,
    "doctor": doctor,
}


_GROUPS = {name.partition(" ")[0] for name in COMMANDS if " " in name}
"""First words of the commands that have two."""
_TYRO = (tyro.conf.FlagCreatePairsOff,)
_TASKS: dict[str, tuple[str, Any]] = {"train": ("env", TrainSettings()), "train-offline": ("data", OfflineSettings())}
"""The commands with `--config`: the name of their task in the file, and their options."""

_IN_SHELL = {
    "list_models() shows all": "worldflux models shows all",
    "gymnasium.pprint_registry() shows all": "worldflux envs shows all",
}
"""Advice of the library, and its counterpart on the command line."""

_FIRST_HELP = """usage: worldflux COMMAND ...

Train an agent, then watch what it has learned:
  worldflux train tdmpc2:tiny Pendulum-v1 --steps 5000
  worldflux eval runs/Pendulum-v1/tdmpc2-tiny/1 --video pendulum.mp4

worldflux --help lists all commands, and worldflux train --help the options of one."""


def main(args: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        args: Arguments of the command line; None takes those of the process.

    Returns:
        The exit status: 0 on success, 1 if a check failed, 2 if the command could not be carried out, 130 after Ctrl-C,
        143 if SIGTERM ended a training, 141 if the reader of a pipe has closed it.

    Raises:
        SystemExit: After `--help`, and if the arguments cannot be parsed.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller, as in `worldflux ... 2>&-`
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
    try:
        try:
            return _run(sys.argv[1:] if args is None else list(args))
        finally:
            # A closed pipe is noticed here. When Python exits, it would print a traceback.
            for stream in (sys.stdout, sys.stderr):
                if stream is not None:
                    stream.flush()
    except BrokenPipeError:
        if not _silence_closed_pipes():
            raise
        return 141


def _run(given: list[str]) -> int:
    """Runs the command named by the arguments."""
    if not given:
        print(_FIRST_HELP, file=sys.stderr)
        return 2
    if given[0] == "help":  # worldflux help, worldflux help train
        given = [*given[1:], "--help"]
    name, *rest = given
    if rest and f"{name} {rest[0]}" in COMMANDS:
        name, rest = f"{name} {rest[0]}", rest[1:]
    if name in ("-V", "--version"):
        print(_version())
        return 0
    try:
        if name in COMMANDS:
            command, markers = _configured(name, rest)
            return tyro.cli(command, prog=f"worldflux {name}", args=rest, config=markers)
        if name in _GROUPS:
            return _listed(f"worldflux {name}", f"{name} ", "Work on files of recorded data.", rest or ["--help"])
        if not name.startswith("-"):
            raise ConfigurationError(
                f"There is no command '{name}'{nearest(name, COMMANDS)} worldflux --help lists all commands."
            )
        about = "World models on any Gymnasium environment. worldflux --version (or -V) prints the versions."
        return _listed("worldflux", "", about, given)
    except WorldFluxError as error:
        text = " ".join(str(error).split())  # on one line
        for call, command_line in _IN_SHELL.items():
            text = text.replace(call, command_line)
        print(f"worldflux: {text}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _listed(prog: str, prefix: str, about: str, given: list[str]) -> int:
    """Shows the commands whose names begin with `prefix`, or says what is wrong with the arguments."""
    named = {name.removeprefix(prefix): _named(one) for name, one in COMMANDS.items() if name.startswith(prefix)}
    return tyro.extras.subcommand_cli_from_dict(named, prog=prog, description=about, args=given, config=_TYRO)


def _configured(name: str, rest: list[str]) -> tuple[Callable[..., int], Sequence[Any]]:
    """The command, with the settings of `--config` in place of its defaults, and how tyro builds its options."""
    path = path_in(rest) if name in _TASKS else None
    if path is None:
        return COMMANDS[name], _TYRO
    task, defaults = _TASKS[name]
    found = read_settings(path, task, defaults, rest)
    places = () if found.task is None else tuple(words_in(found.task))
    values = {"model": found.model, task: places, "seeds": found.seeds, "settings": found.options}
    # Flags that the file sets can be given in both forms, such as --pixels and --no-pixels.
    return partial(COMMANDS[name], **values), ()


def _version() -> str:
    """The versions of worldflux, torch and Python."""
    return (
        f"worldflux {installed_version('worldflux') or 'not installed'} "
        f"(torch {installed_version('torch') or 'not installed'}, Python {platform.python_version()})"
    )


def _silence_closed_pipes() -> bool:
    """Whether stdout or stderr is a pipe that its reader has closed, as `head` does. Later output is discarded."""
    closed = [stream for stream in (sys.stdout, sys.stderr) if stream is not None and _is_closed(stream)]
    for stream in closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return bool(closed)


def _is_closed(stream: TextIO) -> bool:
    try:
        stream.flush()
    except BrokenPipeError:
        return True
    if not hasattr(select, "poll"):  # Windows, where a closed pipe raises another error
        return False
    # The stream may already have dropped what could not be written, so that there is nothing to flush.
    poll = select.poll()
    poll.register(stream, select.POLLERR)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _named(command: Callable[..., int]) -> Callable[[], int]:
    """A command without its options, for which tyro builds a parser quickly: only its name and summary are shown."""

    def unchosen() -> int:
        raise AssertionError(f"{command.__name__} was not chosen")

    unchosen.__doc__ = (command.__doc__ or "").partition("\n")[0]
    return unchosen


if __name__ == "__main__":
    sys.exit(main())
