"""Entry point of the `worldflux` command."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

import tyro

from worldflux.cli.check_env import check_env
from worldflux.cli.collect import collect
from worldflux.cli.doctor import doctor
from worldflux.cli.eval import evaluate
from worldflux.cli.imagine import imagine
from worldflux.cli.models import models
from worldflux.cli.plot import plot
from worldflux.cli.train import train
from worldflux.cli.train_offline import train_offline
from worldflux.errors import WorldFluxError

COMMANDS: dict[str, Callable[..., int]] = {
    "train": train,
    "eval": evaluate,
    "imagine": imagine,
    "plot": plot,
    "collect": collect,
    "train-offline": train_offline,
    "models": models,
    "check-env": check_env,
    "doctor": doctor,
}


def main(args: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        args: Of the command line; None takes those of the process.

    Returns:
        The exit status: 0, 1 where a check failed, 2 where the command could not be carried out, 130 after Ctrl-C, 143
        where SIGTERM ended a training, 141 where nobody reads what is printed.

    Raises:
        SystemExit: After `--help`, and where the arguments cannot be understood.
    """
    given = sys.argv[1:] if args is None else list(args)
    chosen = given[0] if given else None
    try:
        return tyro.extras.subcommand_cli_from_dict(
            {name: command if name == chosen else _named(command) for name, command in COMMANDS.items()},
            prog="worldflux",
            description="World models on any Gymnasium environment.",
            args=given,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
    except WorldFluxError as error:
        print("worldflux:", *str(error).split(), file=sys.stderr)  # on one line
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        return 141


def _nobody_reads() -> bool:
    """Whether stdout is a pipe that its reader has closed, as `head` does; then nothing more is written there."""
    try:
        sys.stdout.flush()
        return False
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True


def _named(command: Callable[..., int]) -> Callable[[], int]:
    """A command without its options, from which tyro makes a parser in no time: only its name and purpose are shown."""

    def unchosen() -> int:
        raise AssertionError(f"{command.__name__} was not chosen")

    unchosen.__doc__ = (command.__doc__ or "").partition("\n")[0]
    return unchosen


if __name__ == "__main__":
    sys.exit(main())
