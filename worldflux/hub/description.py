"""Environments, observations and actions in words, for cards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec


def env_options(spec: EnvSpec) -> dict[str, Any]:
    """What an environment was made with besides its id, as far as it is numbers or text."""
    registered = gym.registry.get(spec.id)
    usual = {} if registered is None else registered.kwargs
    options = {key: value for key, value in spec.kwargs.items() if key != "render_mode" and usual.get(key) != value}
    if registered is not None and spec.max_episode_steps != registered.max_episode_steps:
        options["max_episode_steps"] = spec.max_episode_steps
    return {key: value for key, value in options.items() if isinstance(value, bool | int | float | str)}


def shown_shapes(shape: Any, dtype: Any) -> str:
    """Observations in words: `float32 [4]`, and with its key each part of a dictionary."""
    if isinstance(shape, Mapping):
        return "; ".join(f"`{key}` {shown_shapes(shape[key], dtype[key])}" for key in shape)
    return f"{np.dtype(dtype).name} {list(shape)}"


def shown_choices(space: spaces.Space[Any]) -> str:
    """The size of an action: `3 choices` or `6 numbers`."""
    if isinstance(space, spaces.Discrete):
        return f"{space.n} choices"
    count = int(np.prod(space.shape or ()))
    return f"{count} number{'s' if count > 1 else ''}" if isinstance(space, spaces.Box) else str(space)
