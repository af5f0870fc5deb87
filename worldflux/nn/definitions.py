"""Switch between the fast implementations and the plain definitions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_plain = ContextVar("plain", default=False)


def fast_forms() -> bool:
    """Returns whether fast implementations may be used."""
    return not _plain.get()


@contextmanager
def by_definition() -> Iterator[None]:
    """Disables the fast implementations inside the block, to compare them with the plain definitions."""
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)
