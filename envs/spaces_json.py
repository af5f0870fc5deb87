"""Gymnasium spaces as JSON, so that a saved agent knows its environment without a pickle."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from gymnasium import spaces

from worldflux.errors import CheckpointError, ConfigurationError

_MOST_NUMBERS = 2**24
"""The most numbers of all boxes in a description. Their bounds take 0.3 GB; a 1024 x 1024 picture has a fifth."""
_MOST_CHOICES = 2**22
"""The most options of all choices in a description."""


def space_to_json(space: spaces.Space[Any]) -> dict[str, Any]:
    """A description of a space, from which `space_from_json` builds an equal one."""
    if isinstance(space, spaces.Box):
        # Spaces of whole numbers hold an infinite bound as the least or greatest number, with a mark beside it.
        low = _bound_to_json(space.low, ~space.bounded_below, -np.inf)
        high = _bound_to_json(space.high, ~space.bounded_above, np.inf)
        return {"type": "Box", "low": low, "high": high, "shape": list(space.shape), "dtype": str(space.dtype)}
    if isinstance(space, spaces.Discrete):
        return {"type": "Discrete", "n": int(space.n), "start": int(space.start), "dtype": str(space.dtype)}
    if isinstance(space, spaces.MultiDiscrete):
        return {
            "type": "MultiDiscrete",
            "nvec": space.nvec.tolist(),
            "start": space.start.tolist(),
            "dtype": str(space.dtype),
        }
    if isinstance(space, spaces.MultiBinary):
        # MultiBinary(4) and MultiBinary([4]) have the same shape and are not equal.
        return {"type": "MultiBinary", "n": space.n if isinstance(space.n, int) else list(space.n)}
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
        numbers, choices = _sizes(data)
        if numbers > _MOST_NUMBERS or choices > _MOST_CHOICES:
            raise ValueError(
                f"it has {numbers:,} numbers and {choices:,} choices, expected at most {_MOST_NUMBERS:,} and "
                f"{_MOST_CHOICES:,}"
            )
        return _from_json(data)
    except Exception as error:  # Gymnasium and NumPy raise all kinds of errors for invented numbers
        raise CheckpointError(f"The description of a space is damaged ({error!r}): {str(data)[:200]}.") from error


def _sizes(data: dict[str, Any]) -> tuple[int, int]:
    """The numbers and the options of a described space, counted before anything is made of it."""
    kind = data["type"]
    if kind == "Dict":
        parts = [_sizes(part) for part in data["spaces"].values()]
        return sum(numbers for numbers, _ in parts), sum(choices for _, choices in parts)
    if kind == "Box":
        return math.prod(_flat(data["shape"])), 0
    if kind == "Discrete":
        return 0, int(data["n"])
    if kind == "MultiDiscrete":
        return 0, sum(_flat(data["nvec"]))
    return 0, 2 * math.prod(_flat(data["n"]))


def _flat(sizes: Any) -> list[int]:
    """The whole numbers in nested lists."""
    if isinstance(sizes, list):
        return [size for part in sizes for size in _flat(part)]
    if isinstance(sizes, bool) or not isinstance(sizes, int) or sizes < 0:
        raise ValueError(f"a size is {sizes!r}")
    return [sizes]


def _from_json(data: dict[str, Any]) -> spaces.Space[Any]:
    kind = data["type"]
    if kind == "Box":
        dtype, shape = np.dtype(data["dtype"]), tuple(data["shape"])
        low, high = (_bound_from_json(data[name], shape, dtype) for name in ("low", "high"))
        return spaces.Box(low, high, shape, dtype)
    if kind == "Discrete":
        return spaces.Discrete(data["n"], start=data["start"], dtype=data["dtype"])
    if kind == "MultiDiscrete":
        dtype = np.dtype(data["dtype"])
        return spaces.MultiDiscrete(data["nvec"], dtype=dtype, start=np.array(data["start"], dtype))
    if kind == "MultiBinary":
        return spaces.MultiBinary(data["n"])
    if kind == "Dict":
        # Pairs keep their order; a dictionary would be sorted.
        return spaces.Dict([(key, _from_json(part)) for key, part in data["spaces"].items()])
    raise ValueError(f"unknown type '{kind}'")


def _bound_to_json(bound: np.ndarray, is_infinite: np.ndarray, infinity: float) -> Any:
    """A bound as one number where it is the same everywhere (images), else as a flat list; infinities are strings."""
    values = bound.reshape(-1)
    marks = np.broadcast_to(is_infinite, bound.shape).reshape(-1)
    if values.size and np.all(values == values[0]) and np.all(marks == marks[0]):
        values, marks = values[:1], marks[:1]
    numbers = [str(infinity) if mark else _number_to_json(value) for value, mark in zip(values, marks, strict=True)]
    return numbers[0] if len(numbers) == 1 else numbers


def _number_to_json(value: Any) -> Any:
    number = float(value) if value.dtype.kind == "f" else value.item()
    return number if np.isfinite(number) else str(number)


def _bound_from_json(bound: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
    """A bound as `Box` takes it: an array, or an infinite number."""
    if isinstance(bound, str):
        return float(bound)
    if not isinstance(bound, list):
        return np.full(shape, bound, dtype)
    # For spaces of whole numbers, Gymnasium takes infinities only as floats.
    as_floats = dtype.kind != "f" and any(isinstance(value, str) for value in bound)
    values = [float(value) if isinstance(value, str) else value for value in bound]
    return np.array(values, np.float64 if as_floats else dtype).reshape(shape)
