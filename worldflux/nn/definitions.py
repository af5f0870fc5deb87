"""The switch between the fast forms of computations and the plain ones that define them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_plain = ContextVar("plain", default=False)


def fast_forms() -> bool:
    """Whether fast forms may be used."""
    return not _plain.get()


@contextmanager
def by_definition() -> Iterator[None]:
    """Inside the block everything is computed as its definition says, to compare with the fast forms."""
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)
