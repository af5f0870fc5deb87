"""Counting the resets and steps of environments, to notice that somebody else has moved them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gymnasium.vector import SyncVectorEnv
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from worldflux.envs.taps import Tap, tapped
from worldflux.envs.vector import base_of, parts_of

_MOVES = ("reset", "step", "step_wait", "reset_wait", "recv")


class EnvWatch:
    """Tells whether environments were reset or stepped since `mark`, through whatever handle.

    A `VecEnv` is shared easily: `get_env()` hands it out, and whoever made it still holds it, its wrappers and the
    environments in it. All of these handles end in the same innermost objects, whose calls are counted. An environment
    in another process is reached through the `VecEnv` or the vector environment alone, which is the innermost object
    then; there `env_method` counts if it calls `reset` or `step`. Other methods and `set_attr` do not count: they ask
    questions, or change what the next episodes are like.

    Args:
        venv: The environments to watch.
    """

    def __init__(self, venv: VecEnv) -> None:
        self._calls: list[_CountedCall] = []
        for base in map(base_of, parts_of(venv)):
            is_reachable = isinstance(base, DummyVecEnv | SyncVectorEnv)
            owners = [env.unwrapped for env in base.envs] if is_reachable else [base]
            self._calls += [tapped(one, name, _CountedCall) for one in owners for name in _MOVES if hasattr(one, name)]
            if isinstance(base, VecEnv) and not is_reachable:
                self._calls.append(tapped(base, "env_method", _CountedCall, "reset", "step"))
        self.mark()

    def mark(self) -> None:
        """Takes note of the calls so far."""
        self._seen = self._count()

    @property
    def moved(self) -> bool:
        """Whether a reset or a step came after the last `mark`."""
        return self._count() != self._seen

    def _count(self) -> int:
        return sum(call.count for call in self._calls)


class _CountedCall(Tap):
    """Counts the calls of a method.

    Args:
        method: The method that is called.
        *only: First arguments of the calls to count; without any, all calls are counted.
    """

    def __init__(self, method: Callable[..., Any], *only: str) -> None:
        super().__init__(method)
        self.only = only
        self.count = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.only or (args[0] if args else kwargs.get("method_name")) in self.only:
            self.count += 1
        return self.method(*args, **kwargs)
