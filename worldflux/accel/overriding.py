"""Detection of overridden methods and hooks, so that a fast path is only taken if it bypasses none of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

logger = logging.getLogger("worldflux")

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def overridden(thing: Any, *plain: Callable[..., Any]) -> list[str]:
    """Returns the names of the methods of `thing` that differ from those that a fast path assumes.

    A method counts as overridden if a subclass overrides it, another function was assigned to the class, or the object
    itself has an attribute of that name.

    Args:
        thing: Object whose methods the fast path does not call.
        *plain: The library's own functions. Several functions of the same name are alternatives.
    """
    kind, own = type(thing), vars(thing)
    names = dict.fromkeys(function.__name__ for function in plain)
    return [name for name in names if name in own or getattr(kind, name, None) not in plain]


def newer_than(thing: Any, fast: Sequence[str], *names: str) -> list[str]:
    """Returns those of the methods `names` that are defined in a subclass of all classes that define `fast`.

    An attribute of the object `thing` itself counts as the lowest subclass.
    """
    scopes = [vars(thing), *map(vars, type(thing).__mro__)]

    def depth(name: str) -> int:
        return next((level for level, scope in enumerate(scopes) if name in scope), len(scopes))

    newest = min(depth(name) for name in fast)
    return [name for name in names if depth(name) < newest]


def is_untouched(modules: Iterable[Any], *forwards: Callable[..., Any]) -> bool:
    """Returns whether calling each of these torch modules runs only one of `forwards`, with no override and no hook."""
    for module in modules:
        own = module.__dict__
        if type(module).forward not in forwards or "forward" in own:
            return False
        for name in _HOOKS:
            if own[name]:
                return False
    return True


def steps_back(fast_path: str, thing: Any, names: Iterable[str]) -> bool:
    """Returns whether a fast path must not be taken because of overridden methods, and logs this once.

    Args:
        fast_path: Name of the fast path, as the subject of a sentence.
        thing: Object with overridden methods.
        names: Overridden methods as returned by `overridden`, or other changes; empty if the fast path can be taken.
    """
    changed = ", ".join(names)
    if changed:
        _say(fast_path, type(thing).__name__, changed)
    return bool(changed)


@cache
def _say(fast_path: str, kind: str, changed: str) -> None:
    logger.info("%s is not used: %s has its own %s, which is called instead", fast_path, kind, changed)
