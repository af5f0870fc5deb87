"""Helpers of `check_env`: what is wrong with a value, and how to show it in a message."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from gymnasium import spaces

from worldflux.envs.spaces import ActionCodec
from worldflux.errors import a_type

MOST_ACTIONS = 1000
"""The largest number of options that are tried."""


def parts(space: spaces.Space[Any]) -> list[tuple[str, spaces.Space[Any]]]:
    """The spaces of the arrays that an observation consists of, with their names for messages."""
    if isinstance(space, spaces.Dict):
        return [(f"observation '{key}'", part) for key, part in space.spaces.items()]
    return [("observation", space)]


def mismatch(space: spaces.Space[Any], obs: Any) -> str | None:
    """Why an observation is not one of the space, or None if it is one."""
    if not isinstance(space, spaces.Dict):
        return _array_mismatch(space, obs, "observation")
    if not isinstance(obs, Mapping) or set(obs) != set(space.spaces):
        given = f"the keys {sorted(map(str, obs))}" if isinstance(obs, Mapping) else kind(obs)
        return f"the observation has {given}, expected a dictionary with the keys {sorted(space.spaces)}."
    problems = (_array_mismatch(part, obs[key], f"observation '{key}'") for key, part in space.spaces.items())
    return next((problem for problem in problems if problem is not None), None)


def _array_mismatch(space: spaces.Space[Any], value: Any, name: str) -> str | None:
    if isinstance(space, spaces.Box | spaces.MultiDiscrete | spaces.MultiBinary):
        if not isinstance(value, np.ndarray):
            return f"the {name} is {kind(value)}, expected a NumPy array {space.shape} of {space.dtype}."
        if value.shape != space.shape:
            return f"the {name} has shape {value.shape}, expected {space.shape}. Change it, or observation_space."
        if not np.can_cast(value.dtype, space.dtype):
            return f"the {name} has dtype {value.dtype}, expected {space.dtype}: use .astype, or change the space."
    if isinstance(space, spaces.Box):
        if not np.isfinite(value).all():
            return f"the {name} contains NaN or infinite values, expected finite numbers."
        outside = np.argwhere((value < space.low) | (value > space.high))
        if len(outside):
            at = tuple(int(index) for index in outside[0])
            return (
                f"the {name} is {value[at]} at index {list(at)}, expected {space.low[at]} to {space.high[at]}. "
                "Widen the space's bounds, or clip."
            )
    return None if space.contains(value) else f"the {name} is {value!r}, expected one of {space}."


def extreme_actions(codec: ActionCodec) -> Iterator[Any]:
    """Actions at both ends of all bounds at once, or with each option of each choice."""
    if codec.action_type == "continuous":
        rows = np.stack([np.full(codec.action_dim, value, np.float32) for value in (-1.0, 0.0, 1.0)])
    else:
        starts = np.concatenate([[0], np.cumsum(codec.action_classes)[:-1]])
        rows = np.zeros((min(codec.action_dim, MOST_ACTIONS), codec.action_dim), np.float32)
        rows[:, starts] = 0.5  # the first option of each choice, unless another one is set
        rows[np.arange(len(rows)), np.arange(len(rows))] = 1.0
    yield from codec.to_env(rows)


def same_bytes(one: Any, other: Any) -> bool:
    """Whether two copies of an observation or an action are equal, NaN for NaN."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(same_bytes(one[key], other[key]) for key in one)
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return one.shape == other.shape and one.dtype == other.dtype and one.tobytes() == other.tobytes()
    return True  # other values cannot be changed in place, or are not supported


def is_number(value: Any) -> bool:
    """Whether a value is one finite number."""
    try:
        return np.ndim(value) == 0 and bool(np.isfinite(float(value)))
    except (TypeError, ValueError):
        return False


def kind(value: Any) -> str:
    """A short description of a value."""
    if isinstance(value, np.ndarray):
        return f"an array {value.shape} of {value.dtype}"
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}"
    return a_type(value)


def one_line(error: BaseException) -> str:
    """The kind and the message of an error."""
    message = plain_text(error)
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def plain_text(message: Warning | BaseException | str) -> str:
    """A message on one line, without the colours and the prefix that Gymnasium adds."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(message))
    return " ".join(re.sub(r"^(WARN|ERROR): ", "", text).split()).rstrip(".")
