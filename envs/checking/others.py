"""What Gymnasium's and Stable-Baselines3's checkers insist on, and what of it does not matter here."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np

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
    # SB3's checker fails at observations that are a single number (2.9, `_check_obs`).
    "Calling nonzero on 0d arrays",
    # These are reported by checks of our own.
    "It seems that your observation",
    "is not within the observation space",
    # One-step episodes are fine.
    "truncates after 1 step",
)
"""Parts of the messages of the two checkers that do not matter here."""


def is_unimportant(text: str) -> bool:
    """Whether a message of the two checkers is about something that does not matter here."""
    return any(part in text for part in _UNIMPORTANT)


class PlainNumbers(gym.Wrapper[Any, Any, Any, Any]):
    """Turns NumPy's rewards and flags into Python's own, which the two checkers insist on."""

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        if env.has_wrapper_attr("compute_reward"):  # SB3's checker asks the outermost environment
            self.compute_reward = env.get_wrapper_attr("compute_reward")

    def step(self, action: Any) -> Any:
        """The result of the environment's step with plain numbers."""
        result = self.env.step(action)
        if not isinstance(result, tuple):
            return result
        return tuple(item.item() if i and isinstance(item, np.generic) else item for i, item in enumerate(result))
