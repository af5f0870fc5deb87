"""A random walk whose every part can be replaced, for tests of `check_env`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

Result = tuple[Any, Any, Any, Any, Any]
Maker = Callable[[], gym.Env[Any, Any]]

PIXELS = spaces.Box(0, 255, (64, 64, 3), np.uint8)
BOUNDLESS = spaces.Box(-np.inf, np.inf, (1,), np.float32)


class Walk(gym.Env[Any, Any]):
    """Noise with a number that grows by the action; an episode ends where it is large, or after 30 steps.

    Args:
        obs_space: The space of the observations; by default `float32 [2]`.
        action_space: The space of the actions.
        **methods: Methods that replace those of the class.
    """

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012

    def __init__(self, obs_space: Any = None, action_space: Any = None, **methods: Callable[..., Any]) -> None:
        self.observation_space = obs_space or spaces.Box(-100.0, 100.0, (2,), np.float32)
        self.action_space = action_space or spaces.Box(-2.0, 2.0, (1,), np.float32)
        self.total, self.array = 0, np.zeros(2, np.float32)
        for name, method in methods.items():
            setattr(self, name, MethodType(method, self))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.t, self.x = 0, self.start()
        return self.obs(), {}

    def step(self, action: Any) -> Result:
        self.before(action)
        self.t, self.x, self.total = self.t + 1, self.x + float(np.sum(action)), self.total + 1
        result = self.every((self.obs(), self.x, bool(abs(self.x) > 8.0), bool(self.t >= 30), {}))
        return self.fifth(result) if self.t == 5 else result

    def start(self) -> float:
        return float(self.np_random.normal())

    def obs(self) -> Any:
        return np.array([self.x, self.t], np.float32)

    def before(self, action: Any) -> None:
        """Is called with the action before every step."""

    def every(self, result: Result) -> Any:
        """Changes the result of every step."""
        return result

    def fifth(self, result: Result) -> Any:
        """Changes the result of the fifth step of an episode."""
        return result


def camera(shape: tuple[int, ...], dtype: Any = np.uint8, **options: Any) -> Maker:
    """An environment that shows pictures."""
    space = spaces.Box(0, 255, shape, dtype)
    return partial(Walk, space, obs=lambda self: np.full(shape, self.t, dtype), **options)


def reset_itself(self: Walk, result: Result) -> Result:
    return (self.reset()[0], *result[1:]) if result[2] or result[3] else result


def numbers(dtype: Any = np.float64) -> spaces.Box:
    """A space of two numbers from 0 to infinity."""
    return spaces.Box(0, np.inf, (2,), dtype)
