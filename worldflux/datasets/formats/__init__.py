"""Readers of data sets, one for each format: `open_source` returns a `Recording`."""
