"""Checks of values that users pass: each returns the value in its canonical form or raises an error."""

from __future__ import annotations

import logging
import math
import operator
from collections.abc import Mapping
from enum import Enum
from typing import Any, TypeVar

from worldflux.errors import ConfigurationError, WorldFluxError, nearest

ObsShape = tuple[int, ...] | dict[str, tuple[int, ...]]
"""Shape of one observation without batch or time, or one such shape per key."""

SINGLE_KEY = "obs"
"""Key that stands for an observation that is a single array, where observations are kept by key."""

TASK_KEY = "task"
"""Name of a row's task: in infos of environments, in a model's state, and beside the rows of a replay buffer."""

RESIZE_OR_FLATTEN = (
    "Resize it, to 64x64 for example: worldflux.envs.ResizeImages(env, 64). If it is no picture but the cells of a "
    "grid, gymnasium.wrappers.FlattenObservation(env) makes a vector of it."
)
"""Advice for an image that is too small, or whose sides an encoder cannot halve."""

logger = logging.getLogger("worldflux")

_LEAST_PICTURE_SIDE = 16
"""Side from which two dimensions are more likely to be an image than a table; encoders accept no smaller images."""

EnumT = TypeVar("EnumT", bound=Enum)


def clean_obs_shape(shape: Any, *, any_shape: bool = False) -> ObsShape:
    """Returns a shape of observations as a tuple, or as a dict of tuples sorted by key.

    Args:
        shape: Shape that the user passed.
        any_shape: Whether to accept shapes for which no family has an encoder.
    """
    if isinstance(shape, Mapping):
        if not shape or not all(isinstance(key, str) and key for key in shape):
            raise ConfigurationError(f"obs_shape is {shape!r}, expected at least one key, each a name, with its shape.")
        return {key: _clean_shape(f"obs_shape['{key}']", shape[key], any_shape) for key in sorted(shape)}
    return _clean_shape("obs_shape", shape, any_shape)


def _clean_shape(name: str, shape: Any, any_shape: bool) -> tuple[int, ...]:
    cleaned = clean_sizes(name, shape)
    if any_shape:
        return cleaned
    warn_of_missing_channels(name, cleaned)
    if len(cleaned) > 3:
        raise ConfigurationError(
            f"{name} is {cleaned}, expected at most 3 dimensions: a vector (n,) or an image (C, H, W). "
            "Fold further dimensions, such as stacked frames, into the channels."
        )
    if has_channels_last(cleaned):
        height, width, channels = cleaned
        raise ConfigurationError(
            f"{name} is {cleaned}, which looks like an image with its channels last; expected channels first (CHW). "
            f"Transpose the images and use ({channels}, {height}, {width})."
        )
    return cleaned


def warn_of_missing_channels(name: str, shape: tuple[int, ...]) -> None:
    """Warns that an image without a channel dimension is treated as a vector."""
    if len(shape) == 2 and min(shape) >= _LEAST_PICTURE_SIDE:
        logger.warning(
            "%s is %s, which is taken as a vector of %s numbers. An image has its channels first: (1, %d, %d).",
            name,
            shape,
            f"{math.prod(shape):,}",
            *shape,
        )


def is_vector(shape: Any) -> bool:
    """Returns whether an observation shape is that of a vector, rather than of an image or a dictionary."""
    return isinstance(shape, tuple) and len(shape) == 1


def has_channels_last(shape: tuple[int, ...]) -> bool:
    """Returns whether a shape looks like that of an image `(H, W, C)`, possibly of stacked frames."""
    if len(shape) != 3:
        return False
    usual = (1, 3, 4)
    return (shape[2] in usual and shape[0] not in usual) or shape[2] < _LEAST_PICTURE_SIDE <= min(shape[:2])


def clean_sizes(name: str, sizes: Any) -> tuple[int, ...]:
    """Returns `sizes` as a tuple of positive integers."""
    try:
        cleaned = tuple(whole_number(name, size) for size in sizes) if not isinstance(sizes, str) else None
    except TypeError:
        cleaned = None
    if cleaned is None or any(size < 1 for size in cleaned):
        example = f" Write ({sizes},) for a single one." if isinstance(sizes, int) else ""
        raise ConfigurationError(f"{name} is {sizes!r}, expected a tuple of integers above 0.{example}")
    return cleaned


def clean_enum(name: str, value: Any, kind: type[EnumT]) -> EnumT:
    """Returns `value` as a member of an enumeration, ignoring case."""
    try:
        return kind(value.lower() if isinstance(value, str) and not isinstance(value, Enum) else value)
    except ValueError:
        options = [str(member.value) for member in kind]
        raise ConfigurationError(
            f"{name} is '{value}'{nearest(value, options)} It is one of: {', '.join(options)}."
        ) from None


def check_choice(name: str, value: Any, options: tuple[str, ...]) -> None:
    """Raises a `ConfigurationError` unless the value is one of the options."""
    if not isinstance(value, str) or value not in options:
        raise ConfigurationError(f"{name} is '{value}'{nearest(value, options)} It is one of: {', '.join(options)}.")


def whole_number(
    name: str,
    value: Any,
    least: int | None = None,
    *,
    below: int = 2**63,
    error: type[WorldFluxError] = ConfigurationError,
) -> int:
    """Returns `value` as an `int` if it is an integer of Python, NumPy or torch within the bounds.

    Booleans are refused, and so are floats such as 3.0.

    Args:
        name: Name of the value in the error message.
        value: Value to check.
        least: Smallest allowed value; any integer if omitted.
        below: Upper bound, exclusive, a power of two.
        error: Class of the error that is raised.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or (least is not None and number < least):
        expected = "an integer" if least is None else f"a whole number from {least}"
        raise error(f"{name} is {value!r}, expected {expected}.")
    if number >= below:
        limit = f"{below:.0e}".replace("e+", "e")
        raise error(f"{name} is above {limit}, expected a whole number below 2**{below.bit_length() - 1}.")
    return number


def check_flag(name: str, value: Any, hint: str = "") -> bool:
    """Returns a flag of Python or NumPy as a `bool`; nothing else is one, not even 0, 1 or "no".

    Args:
        name: Name of the flag in the error message.
        value: Value to check.
        hint: A further sentence of the message, with a space in front.
    """
    if type(value).__name__ not in ("bool", "bool_"):  # NumPy is not imported here
        raise ConfigurationError(f"{name} is {value!r}, expected True or False.{hint}")
    return bool(value)


def finite_number(name: str, value: Any, *, or_infinite: bool = False) -> float:
    """Returns `value` as a `float` if it is a finite number of Python, NumPy or torch.

    Booleans and strings are refused, and so are arrays of several numbers.

    Args:
        name: Name of the value in the error message.
        value: Value to check.
        or_infinite: Whether infinity is allowed, too.
    """
    is_bool = isinstance(value, bool) or getattr(getattr(value, "dtype", None), "kind", None) == "b"
    try:
        number = float(value) if hasattr(value, "__float__") and not is_bool else math.nan
    except (OverflowError, TypeError, ValueError):
        number = math.nan
    if math.isnan(number) or (math.isinf(number) and not or_infinite):
        raise ConfigurationError(f"{name} is {value!r}, expected a {'' if or_infinite else 'finite '}number.")
    return number
