"""The calls that bring files to the disk and to their places: recorded, or refused as a broken disk does."""

from __future__ import annotations

import os
from typing import Any

import pytest


class Disk:
    """Stands between a test and `os`; the fixture `disk` undoes it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch

    def recorded(self) -> list[tuple[str, int]]:
        """The calls of `fsync`, `rename` and `replace` from now on, each with the inode that it brings or moves."""
        calls: list[tuple[str, int]] = []
        for name in ("fsync", "rename", "replace"):
            self._monkeypatch.setattr(os, name, _recording(name, getattr(os, name), calls))
        return calls

    def refuse(self, number: int, *names: str) -> None:
        """Makes these functions of `os` fail from now on."""

        def refused(*args: Any, **keywords: Any) -> None:
            raise OSError(number, os.strerror(number))

        for name in names:
            self._monkeypatch.setattr(os, name, refused)


def _recording(name: str, function: Any, calls: list[tuple[str, int]]) -> Any:
    def call(what: Any, *where: Any) -> None:
        calls.append((name, os.stat(what).st_ino))
        function(what, *where)

    return call
