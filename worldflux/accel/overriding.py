"""Fast paths and the code of users: a fast path is taken only where it goes round nothing that somebody replaced."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

logger = logging.getLogger("worldflux")

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def overridden(thing: Any, *plain: Callable[..., Any]) -> list[str]:
    """Names of the methods that `thing` has in place of those that a fast path stands for.

    A method counts as replaced whether a subclass overrides it, somebody assigned another one to the class, or the
    object itself has an attribute of that name.

    Args:
        thing: Whose methods the fast path does not call.
        *plain: The library's functions. Several of one name are alternatives.
    """
    kind, own = type(thing), vars(thing)
    names = dict.fromkeys(function.__name__ for function in plain)
    return [name for name in names if name in own or getattr(kind, name, None) not in plain]


def newer_than(thing: Any, fast: Sequence[str], *names: str) -> list[str]:
    """Those of the methods `names` that are defined below all methods `fast`: by a subclass, or by `thing` itself."""
    scopes = [vars(thing), *map(vars, type(thing).__mro__)]

    def depth(name: str) -> int:
        return next((level for level, scope in enumerate(scopes) if name in scope), len(scopes))

    newest = min(depth(name) for name in fast)
    return [name for name in names if depth(name) < newest]


def is_untouched(modules: Iterable[Any], *forwards: Callable[..., Any]) -> bool:
    """Whether calling these modules of torch runs nothing but one of the `forwards`: no other method, and no hook."""
    for module in modules:
        own = module.__dict__
        if type(module).forward not in forwards or "forward" in own:
            return False
        for name in _HOOKS:
            if own[name]:
                return False
    return True


def steps_back(fast_path: str, thing: Any, names: Iterable[str]) -> bool:
    """Whether there are `names`, the replaced methods of `thing`; then the log says once that they are called.

    Args:
        fast_path: What is not taken then, as the beginning of a sentence.
        thing: What was changed.
        names: From `overridden`, or what else was changed in it.
    """
    changed = ", ".join(names)
    if changed:
        _say(fast_path, type(thing).__name__, changed)
    return bool(changed)


@cache
def _say(fast_path: str, kind: str, changed: str) -> None:
    logger.info("%s is not used: %s has its own %s, which is called instead", fast_path, kind, changed)
