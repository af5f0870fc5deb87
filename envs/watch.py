"""Noticing that somebody else has moved environments that one believes to know the state of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium as gym
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

_MOVES = ("reset", "step", "step_wait")


class EnvWatch:
    """Tells whether environments were reset or stepped since `mark`, through whatever handle.

    A `VecEnv` is shared easily: `get_env()` hands it out, and who made it still holds it, its wrappers and the
    environments in it. All of them end in the same innermost objects, and there the calls are counted. In another
    process nobody but the `VecEnv` reaches an environment, so that it is the innermost object itself.

    Args:
        venv: To watch.
    """

    def __init__(self, venv: VecEnv) -> None:
        base = venv.unwrapped
        owners = [_innermost(env) for env in base.envs] if isinstance(base, DummyVecEnv) else [base]
        self._calls = [_counted(owner, name) for owner in owners for name in _MOVES if hasattr(owner, name)]
        self.mark()

    def mark(self) -> None:
        """What happened until now is known."""
        self._seen = self._count()

    @property
    def moved(self) -> bool:
        """Whether a reset or a step came after the last `mark`."""
        return self._count() != self._seen

    def _count(self) -> int:
        return sum(call.count for call in self._calls)


class _CountedCall:
    """A method of one object. Copies and pickles of the object take one of their own with them."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self.method = method
        self.count = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.count += 1
        return self.method(*args, **kwargs)


def _counted(owner: Any, name: str) -> _CountedCall:
    """Puts a counter in the place of a method; one that is there already serves all who watch."""
    method = getattr(owner, name)
    if not isinstance(method, _CountedCall):
        method = _CountedCall(method)
        setattr(owner, name, method)
    return method


def _innermost(env: gym.Env[Any, Any]) -> gym.Env[Any, Any]:
    while isinstance(env, gym.Wrapper):
        env = env.env
    return env
