"""Taps, which stand in the place of methods of environments and notice calls, whoever makes them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

TapType = TypeVar("TapType", bound="Tap")


class Tap:
    """Stands in the place of a method of one object; copies and pickles of the object have a tap of their own.

    Args:
        method: The method that is called.
    """

    def __init__(self, method: Callable[..., Any]) -> None:
        self.method = method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the method."""
        return self.method(*args, **kwargs)


def tapped(owner: Any, name: str, make: type[TapType], *arguments: Any) -> TapType:
    """Returns the tap at a method, put there unless one of the same kind, which serves everybody, is there already.

    Args:
        owner: The owner of the method.
        name: The name of the method.
        make: The kind of tap, made from the method and `arguments`.
        *arguments: Further arguments of `make`.
    """
    method = layer = getattr(owner, name)
    while isinstance(layer, Tap):
        if type(layer) is make:
            return layer
        layer = layer.method
    tap = make(method, *arguments)
    with suppress(AttributeError, TypeError):  # an object of an engine takes no attributes; its calls go unnoticed
        setattr(owner, name, tap)
    return tap
