"""Listening at the methods of environments, which others hold and call, too."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

TapType = TypeVar("TapType", bound="Tap")


class Tap:
    """Stands in the place of a method of one object. Copies and pickles of the object take one of their own with them.

    Args:
        method: That is called.
    """

    def __init__(self, method: Callable[..., Any]) -> None:
        self.method = method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the method gives."""
        return self.method(*args, **kwargs)


def tapped(owner: Any, name: str, make: type[TapType], *arguments: Any) -> TapType:
    """The tap at a method, put there unless one of the same kind is there already, which serves all who listen.

    Args:
        owner: Of the method.
        name: Of the method.
        make: Kind of the tap, made from the method and `arguments`.
        *arguments: What else it is made from.
    """
    method = layer = getattr(owner, name)
    while isinstance(layer, Tap):
        if type(layer) is make:
            return layer
        layer = layer.method
    tap = make(method, *arguments)
    with suppress(AttributeError, TypeError):  # an engine's own object, which takes no attributes and is not heard
        setattr(owner, name, tap)
    return tap
