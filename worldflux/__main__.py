"""`python -m worldflux`: the `worldflux` command, also where its script is not on the PATH."""

import sys

from worldflux.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
