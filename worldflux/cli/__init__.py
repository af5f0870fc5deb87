"""The `worldflux` command. Each command is a typed function in its own module, from which tyro builds the options.

Heavy packages are imported when a command runs, so that `worldflux --help` answers at once.
"""
