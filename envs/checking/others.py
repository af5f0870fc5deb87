"""What Gymnasium's and Stable-Baselines3's checkers insist on, and what of it does not matter here."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

_UNIMPORTANT = (
    "is different from the unwrapped version",
    "Not able to test alternative render modes",
    "value is -infinity",
    "value is infinity",
    # worldflux maps any finite bounds to [-1, 1] and any numbering of options to one-hots.
    "symmetric and normalized",
    "with a non-zero start",
    "we recommend using np.float32",
    # The encoder is not SB3's, and numbers of any shape are flattened.
    "minimal resolution for an image",
    "has an unconventional shape",
    # Said by this module already, in its own words.
    "It seems that your observation",
    "is not within the observation space",
    # One-step episodes are fine.
    "truncates after 1 step",
)
"""Parts of what the two checkers say that do not matter here."""


def is_unimportant(text: str) -> bool:
    """Whether a sentence of the two checkers is about what does not matter here."""
    return any(part in text for part in _UNIMPORTANT)


class PlainNumbers(gym.Wrapper[Any, Any, Any, Any]):
    """Rewards and flags of NumPy as Python's own, which the two checkers insist on.

    If `keep_scalars` is False, numbers in boxes of shape `()` become arrays of one: SB3's checker looks for indices.
    """

    def __init__(self, env: gym.Env[Any, Any], keep_scalars: bool = True) -> None:
        super().__init__(env)
        self._keep_scalars = keep_scalars
        if not keep_scalars:
            self.observation_space = _without_scalars(env.observation_space)
        if env.has_wrapper_attr("compute_reward"):  # SB3's checker asks the outermost environment
            self.compute_reward = env.get_wrapper_attr("compute_reward")

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        """As the environment does."""
        result = self.env.reset(seed=seed, options=options)
        if self._keep_scalars or not isinstance(result, tuple) or len(result) != 2:
            return result
        return _scalars_as_arrays(result[0]), result[1]

    def step(self, action: Any) -> Any:
        """As the environment does, with plain numbers."""
        result = self.env.step(action)
        if not isinstance(result, tuple) or not result:
            return result
        obs, *rest = result
        plain = (item.item() if isinstance(item, np.generic) else item for item in rest)
        return (obs if self._keep_scalars else _scalars_as_arrays(obs), *plain)


def _scalars_as_arrays(obs: Any) -> Any:
    if isinstance(obs, dict):
        return {key: _scalars_as_arrays(part) for key, part in obs.items()}
    return obs[None] if isinstance(obs, np.ndarray) and not obs.shape else obs


def _without_scalars(space: spaces.Space[Any]) -> spaces.Space[Any]:
    if isinstance(space, spaces.Dict):
        return spaces.Dict({key: _without_scalars(part) for key, part in space.spaces.items()})
    if not isinstance(space, spaces.Box) or space.shape:
        return space
    return spaces.Box(space.low[None], space.high[None], dtype=space.dtype.type)
