"""The `worldflux` command: a module for each of its commands, each a typed function from which tyro makes the options.

The modules import what is heavy when a command runs, so that `worldflux --help` answers at once.
"""
