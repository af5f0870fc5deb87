"""`python -m worldflux`: the `worldflux` command, also where its script is not on the PATH."""

from __future__ import annotations

import sys


def main() -> int:
    """Runs the command line. Ctrl-C also ends it quietly while its modules are being imported."""
    try:
        from worldflux.cli.main import main as run
    except KeyboardInterrupt:
        return 130
    return run()


if __name__ == "__main__":
    sys.exit(main())
