"""Entry point of the `worldflux` command."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import tyro

from worldflux.cli.check_env import check_env
from worldflux.cli.collect import collect
from worldflux.errors import WorldFluxError

COMMANDS: dict[str, Callable[..., int]] = {"check-env": check_env, "collect": collect}


def main(args: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        args: Of the command line; None takes those of the process.

    Returns:
        The exit status: 0, 1 where a check failed, 2 where the command could not be carried out, 130 after Ctrl-C.

    Raises:
        SystemExit: After `--help`, and where the arguments cannot be understood.
    """
    try:
        return tyro.extras.subcommand_cli_from_dict(
            COMMANDS,
            prog="worldflux",
            description="World models on any Gymnasium environment.",
            args=args,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
    except WorldFluxError as error:
        print("worldflux:", *str(error).split(), file=sys.stderr)  # on one line
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
