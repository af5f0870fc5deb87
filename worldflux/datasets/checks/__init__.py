"""The checks of `worldflux.datasets.lint`."""
