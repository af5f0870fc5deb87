"""Noticing that somebody else has moved environments that one believes to know the state of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium as gym
from gymnasium.vector import SyncVectorEnv
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from worldflux.envs.taps import Tap, tapped
from worldflux.envs.vector import GymnasiumVecEnv, innermost

_MOVES = ("reset", "step", "step_wait", "reset_wait", "recv")


class EnvWatch:
    """Tells whether environments were reset or stepped since `mark`, through whatever handle.

    A `VecEnv` is shared easily: `get_env()` hands it out, and who made it still holds it, its wrappers and the
    environments in it. All of them end in the same innermost objects, and there the calls are counted. In another
    process nobody but the `VecEnv` or the vector environment reaches an environment, so that it is the innermost
    object itself; there `env_method` counts if it calls `reset` or `step`. Other methods and `set_attr` do not: they
    are for asking and for what the next episodes are like.

    Args:
        venv: To watch.
    """

    def __init__(self, venv: VecEnv) -> None:
        base: Any = innermost(venv)
        if isinstance(base, GymnasiumVecEnv):
            base = base.vector_env.unwrapped
        reachable = isinstance(base, DummyVecEnv | SyncVectorEnv)
        owners = [_innermost(env) for env in base.envs] if reachable else [base]
        self._calls = [tapped(owner, name, _CountedCall) for owner in owners for name in _MOVES if hasattr(owner, name)]
        if isinstance(base, VecEnv) and not reachable:
            self._calls.append(tapped(base, "env_method", _CountedCall, "reset", "step"))
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


class _CountedCall(Tap):
    """Counts the calls of a method.

    Args:
        method: That is called.
        *only: Count calls with one of these as first argument; without any, all are counted.
    """

    def __init__(self, method: Callable[..., Any], *only: str) -> None:
        super().__init__(method)
        self.only = only
        self.count = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.only or (args[0] if args else kwargs.get("method_name")) in self.only:
            self.count += 1
        return self.method(*args, **kwargs)


def _innermost(env: gym.Env[Any, Any]) -> gym.Env[Any, Any]:
    while isinstance(env, gym.Wrapper):
        env = env.env
    return env
