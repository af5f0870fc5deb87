"""Gymnasium spaces as JSON, so that a saved agent knows its environment without a pickle."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces

from worldflux.errors import CheckpointError, ConfigurationError


def space_to_json(space: spaces.Space[Any]) -> dict[str, Any]:
    """What `space_from_json` builds an equal space from."""
    if isinstance(space, spaces.Box):
        bounds = {"low": _bound_to_json(space.low), "high": _bound_to_json(space.high)}
        return {"type": "Box", **bounds, "shape": list(space.shape), "dtype": str(space.dtype)}
    if isinstance(space, spaces.Discrete):
        return {"type": "Discrete", "n": int(space.n), "start": int(space.start)}
    if isinstance(space, spaces.MultiDiscrete):
        return {
            "type": "MultiDiscrete",
            "nvec": space.nvec.tolist(),
            "start": space.start.tolist(),
            "dtype": str(space.dtype),
        }
    if isinstance(space, spaces.MultiBinary):
        return {"type": "MultiBinary", "shape": list(space.shape)}
    if isinstance(space, spaces.Dict):
        return {"type": "Dict", "spaces": {key: space_to_json(part) for key, part in space.spaces.items()}}
    raise ConfigurationError(
        f"A {type(space).__name__} space cannot be saved, expected Box, Discrete, MultiDiscrete, MultiBinary or Dict."
    )


def space_from_json(data: dict[str, Any]) -> spaces.Space[Any]:
    """The space that `space_to_json` described.

    Raises:
        CheckpointError: If the description is damaged.
    """
    try:
        return _from_json(data)
    except Exception as error:  # what Gymnasium and NumPy make of invented numbers is not a closed list
        raise CheckpointError(f"The description of a space is damaged ({error!r}): {str(data)[:200]}.") from error


def _from_json(data: dict[str, Any]) -> spaces.Space[Any]:
    kind = data["type"]
    if kind == "Box":
        dtype, shape = np.dtype(data["dtype"]).type, tuple(data["shape"])
        low = _bound_from_json(data["low"], shape, dtype)
        return spaces.Box(low, _bound_from_json(data["high"], shape, dtype), shape, dtype)
    if kind == "Discrete":
        return spaces.Discrete(data["n"], start=data["start"])
    if kind == "MultiDiscrete":
        dtype = np.dtype(data["dtype"]).type
        return spaces.MultiDiscrete(data["nvec"], dtype=dtype, start=np.array(data["start"], dtype))
    if kind == "MultiBinary":
        shape = data["shape"]
        return spaces.MultiBinary(shape[0] if len(shape) == 1 else shape)
    if kind == "Dict":
        return spaces.Dict({key: _from_json(part) for key, part in data["spaces"].items()})
    raise ValueError(f"unknown type '{kind}'")


def _bound_to_json(bound: np.ndarray) -> Any:
    """One number for a bound that is the same everywhere (images), else a flat list; infinities as strings."""
    values = bound.reshape(-1)
    if values.size and np.all(values == values[0]):
        return _number_to_json(values[0])
    return [_number_to_json(value) for value in values]


def _number_to_json(value: Any) -> Any:
    number = value.item()
    return number if np.isfinite(number) else str(number)


def _bound_from_json(bound: Any, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    if not isinstance(bound, list):
        return np.full(shape, float(bound) if isinstance(bound, str) else bound, dtype)
    return np.array([float(v) if isinstance(v, str) else v for v in bound], dtype).reshape(shape)
