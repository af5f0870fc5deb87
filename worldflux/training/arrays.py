"""Arrays at the door: what users hand in becomes NumPy of the expected shape and dtype, or an error says why not."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from worldflux.errors import BufferError, ConfigurationError, ShapeMismatchError

ObsShape = tuple[int, ...] | dict[str, tuple[int, ...]]


def as_numpy(name: str, value: Any) -> np.ndarray:
    """`value` (array, tensor on any device, list or number) as NumPy; `name` is for messages."""
    if isinstance(value, torch.Tensor):
        value = value.detach()
        if value.dtype == torch.bfloat16:
            value = value.float()  # NumPy has no bfloat16
        return value.cpu().numpy()
    try:
        return np.asarray(value)
    except ValueError as error:  # lists of different lengths
        raise ShapeMismatchError(f"{name} is no array: {error}") from error


def all_finite(array: np.ndarray) -> bool:
    """Whether no number is NaN or infinite."""
    return bool(np.count_nonzero(np.isfinite(array)) == array.size)  # half the time of `all` for a few numbers


def checked(
    name: str, value: Any, shape: tuple[int, ...], dtype: np.dtype, rows: np.ndarray | None = None
) -> np.ndarray:
    """`value` as an array of exactly this shape and dtype, all of it finite.

    Numbers are converted where nothing is lost but float precision: integers into uint8 only within 0..255, anything
    into bool only if it is 0 or 1.

    Args:
        name: What the array is called in messages.
        value: Array, tensor, list or number.
        shape: Expected shape.
        dtype: Expected dtype.
        rows: Along the first axis; only these are looked at and returned. None is all of them.

    Raises:
        ShapeMismatchError: If the shape differs.
        BufferError: If the values cannot be stored as `dtype`, or are NaN or infinite.
    """
    array = as_numpy(name, value)
    if array.shape != shape:
        raise ShapeMismatchError(
            f"{name} has shape {array.shape}, expected {shape}.{_shape_hint(name, array.shape, shape)}"
        )
    if rows is not None:
        array = array[rows]
    if array.dtype != dtype:
        array = _converted(name, array, dtype)
    if dtype.kind == "f" and not all_finite(array):
        where = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        place = where if rows is None else (int(rows[where[0]]), *where[1:])
        raise BufferError(f"{name} has {array[where]} at index {place}, expected finite numbers. Nothing was stored.")
    return array


def _converted(name: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    if array.dtype.kind not in "biuf":
        raise BufferError(f"{name} has dtype {array.dtype}, expected numbers of dtype {dtype}.")
    if dtype == np.uint8:
        if array.dtype.kind == "f":
            raise BufferError(
                f"{name} has dtype {array.dtype}, expected uint8 (0 to 255). Convert the images, or create the buffer "
                "with obs_dtype=np.float32 to store floats."
            )
        if array.size and not (0 <= array.min() and array.max() <= 255):
            raise BufferError(f"{name} has values from {array.min()} to {array.max()}, expected 0 to 255 for uint8.")
    if dtype == np.bool_ and not ((array == 0) | (array == 1)).all():
        raise BufferError(f"{name} has values other than 0 and 1, expected flags.")
    with np.errstate(over="ignore"):  # what overflows becomes infinite and is reported as such
        return array.astype(dtype)


def _shape_hint(name: str, got: tuple[int, ...], expected: tuple[int, ...]) -> str:
    lead, image = len(expected) - 3, expected[-3:]
    if lead >= 0 and got == (*expected[:lead], image[1], image[2], image[0]):
        axes = (*range(lead), lead + 2, lead, lead + 1)
        return f" These images are channel-last (HWC): pass np.transpose({name}, {axes}), which has shape {expected}."
    if name == "actions":
        return " Discrete actions are passed one-hot."
    return ""


def obs_shapes(named: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of observations as tuples of whole numbers.

    Raises:
        ConfigurationError: If there is none, or one that is no shape.
        ShapeMismatchError: If one is that of a channel-last image.
    """
    shapes = {}
    for key, given in named.items():
        try:
            shape = tuple(operator.index(size) for size in given)
        except TypeError:
            shape = ()
        if not shape or min(shape) < 1:
            raise ConfigurationError(
                f"obs_shape is {given!r}, expected a tuple of whole numbers of at least 1; that of a number is (1,)."
            )
        if len(shape) == 3 and shape[2] in (1, 3, 4) and min(shape[:2]) >= 8:
            raise ShapeMismatchError(
                f"obs_shape {shape} looks like a channel-last image (HWC). Images are channel-first: "
                f"pass {(shape[2], *shape[:2])}."
            )
        shapes[str(key)] = shape
    if not shapes:
        raise ConfigurationError("obs_shape is an empty dict, expected at least one observation.")
    return shapes


def extras_spec(given: Any) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and dtype of what is stored beside each row, by name; None is nothing.

    Raises:
        ConfigurationError: If an entry is no pair of a shape and a dtype of numbers.
    """
    if given is not None and not isinstance(given, Mapping):
        raise ConfigurationError(f"extras is {given!r}, expected a dict of {{name: (shape, dtype)}}.")
    spec = {}
    for name, entry in (given or {}).items():
        try:
            shape, dtype = entry
            spec[name] = tuple(operator.index(size) for size in shape), np.dtype(dtype)
            fits = min(spec[name][0], default=1) >= 1 and spec[name][1].kind in "biuf"
        except (TypeError, ValueError):
            fits = False
        if not fits:
            raise ConfigurationError(
                f"extras[{name!r}] is {entry!r}, expected a shape of whole numbers of at least 1 and a dtype of "
                "numbers, such as ((3,), 'float32')."
            )
    return spec


def obs_dtypes(given: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.dtype]:
    """The dtype in which each observation is stored: as `given` (for all, or by key), else uint8 for images.

    Raises:
        ConfigurationError: If one is neither uint8 nor float32.
    """
    dtypes = {}
    for key, shape in shapes.items():
        wanted = given.get(key) if isinstance(given, Mapping) else given
        try:
            dtypes[key] = np.dtype(wanted if wanted is not None else np.uint8 if len(shape) == 3 else np.float32)
        except TypeError:
            raise ConfigurationError(f"obs_dtype is {wanted!r}, expected uint8 or float32.") from None
        if dtypes[key] not in (np.uint8, np.float32):
            raise ConfigurationError(f"obs_dtype is {dtypes[key]}, expected uint8 or float32.")
    return dtypes
