"""The shapes and dtypes of a row, and the conversion of what users pass to NumPy arrays of these, with checks."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from worldflux.errors import BufferError, ConfigurationError, ShapeMismatchError
from worldflux.replay.actions import Classes, as_executed
from worldflux.validation import (
    SINGLE_KEY,
    TASK_KEY,
    ObsShape,
    clean_sizes,
    has_channels_last,
    warn_of_missing_channels,
    whole_number,
)

TASK_FORM = ((), np.dtype(np.int64))
"""Shape and dtype of the number of a row's task."""
MOST_TASKS = 100_000
"""Most tasks that a model has, and a row can be of."""
LARGE = 8192.0
"""The number from which on float32 only tells apart steps of a thousandth and more."""
_NOISE = 1e-13
"""The share of a number below which a change is rounding of float64."""
_LOST_CHANGES = 5
"""The number of lost changes after which a warning is given."""
_BRIGHT = 127
"""Float images with larger values are taken for those from 0 to 255 that were resized or blurred."""


class TransitionSpec:
    """Shapes and dtypes of a row of a replay buffer, with checks of what users pass.

    Attributes:
        is_dict: Whether observations are dictionaries; if not, `shapes` and `dtypes` have the one key `SINGLE_KEY`.
        shapes: Shape of one observation, by key.
        dtypes: Dtype in which observations are stored, by key.
        action_dim: Width of an action vector.
        action_classes: Kind of the actions; None if it was not given.
        extras: Shape and dtype of each further array that is stored with the rows, by name.

    Args:
        obs_shape: As for `ReplayBuffer`.
        action_dim: As for `ReplayBuffer`.
        obs_dtype: As for `ReplayBuffer`.
        extras: As for `ReplayBuffer`.
        action_classes: Kind of the actions; None if it was not given.

    Raises:
        ConfigurationError: If an argument is out of its range.
        ShapeMismatchError: If `obs_shape` is that of a channel-last image.
    """

    def __init__(
        self,
        obs_shape: ObsShape,
        action_dim: int,
        obs_dtype: Any,
        extras: Any,
        action_classes: Classes | None = None,
    ) -> None:
        self.action_dim = whole_number("action_dim", action_dim, 1)
        self.action_classes = action_classes
        self.is_dict = isinstance(obs_shape, Mapping)
        self.shapes = obs_shapes(obs_shape if isinstance(obs_shape, Mapping) else {SINGLE_KEY: obs_shape})
        for key, shape in self.shapes.items():
            warn_of_missing_channels(f"obs_shape['{key}']" if self.is_dict else "obs_shape", shape)
        self.extras = extras_spec(extras)
        self.dtypes = obs_dtypes(obs_dtype, self.shapes)

    @property
    def obs_shape(self) -> ObsShape:
        """Shape of one observation, or a dict of them."""
        return dict(self.shapes) if self.is_dict else self.shapes[SINGLE_KEY]

    @property
    def obs_dtype(self) -> np.dtype | dict[str, np.dtype]:
        """Dtype in which observations are stored, or a dict of them."""
        return dict(self.dtypes) if self.is_dict else self.dtypes[SINGLE_KEY]

    def checked_obs(
        self, name: str, obs: Any, lead: tuple[int, ...], rows: np.ndarray | None = None, *, in_time: bool = False
    ) -> dict[str, np.ndarray]:
        """Observations by key, as `checked` gives them. `[*lead, ...]`, or `[len(rows), ...]`."""
        if isinstance(obs, Mapping) != self.is_dict or (self.is_dict and obs.keys() != self.shapes.keys()):
            given = f"a dict with {sorted(obs)}" if isinstance(obs, Mapping) else "one array"
            wanted = f"a dict with {sorted(self.shapes)}" if self.is_dict else f"one array of {self.obs_shape}"
            raise ShapeMismatchError(f"{name} is {given}, expected {wanted}.")
        return {
            key: checked(
                f"{name}[{key!r}]" if self.is_dict else name,
                obs[key] if self.is_dict else obs,
                (*lead, *shape),
                self.dtypes[key],
                rows,
                in_time=in_time,
            )
            for key, shape in self.shapes.items()
        }

    def checked_actions(self, actions: Any, lead: tuple[int, ...], rows: np.ndarray | None = None) -> np.ndarray:
        """Actions as `checked` gives them, of the kind that is stored. `[*lead, A]`, or `[len(rows), A]`."""
        array = checked("actions", actions, (*lead, self.action_dim), np.dtype(np.float32), rows)
        return as_executed("actions", actions, array, self.action_classes)

    def checked_finals(self, final_obs: Any, n_envs: int, envs: np.ndarray) -> dict[str, np.ndarray]:
        """The rows of these environments of `final_obs`, by key. `[len(envs), ...]`."""
        if final_obs is None:
            raise BufferError(
                f"Episodes ended in environments {envs.tolist()}, but final_obs is missing: pass the observations "
                "after the step, those before the reset."
            )
        return self.checked_obs("final_obs", final_obs, (n_envs,), envs)

    def checked_extra(self, name: str, value: Any, lead: tuple[int, ...], rows: np.ndarray | None = None) -> np.ndarray:
        """What is to be stored beside rows, in its dtype. `[*lead, ...]`, or `[len(rows), ...]`."""
        array = as_numpy(f"extras[{name!r}]", value)
        self.check_extra(name, array.shape, lead)
        if name == TASK_KEY:
            check_tasks(f"extras[{name!r}]", array if rows is None else array[rows])
        return (array if rows is None else array[rows]).astype(self.extras[name][1], copy=False)

    def check_extra(self, name: str, shape: tuple[int, ...], lead: tuple[int, ...]) -> None:
        """Raises an error for extras of another name or shape."""
        if name not in self.extras:
            raise BufferError(f"The buffer was created without extras {name!r}; it has {sorted(self.extras)}.")
        expected = (*lead, *self.extras[name][0])
        if shape != expected:
            raise ShapeMismatchError(f"extras[{name!r}] has shape {shape}, expected {expected}.")


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
    name: str,
    value: Any,
    shape: tuple[int, ...],
    dtype: np.dtype,
    rows: np.ndarray | None = None,
    *,
    in_time: bool = False,
) -> np.ndarray:
    """`value` as an array of exactly this shape and dtype, all of it finite.

    Numbers are converted where nothing is lost but float precision: integers into uint8 only within 0..255, anything
    into bool only if it is 0 or 1. Images of flags become black and white, 0 and 255.

    Args:
        name: What the array is called in messages.
        value: Array, tensor, list or number.
        shape: Expected shape.
        dtype: Expected dtype.
        rows: Indices along the first axis; only these are checked and returned. None is all of them.
        in_time: Whether the rows follow each other in time. Numbers whose changes float32 loses are warned of then.

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
        given, array = array, _converted(name, array, dtype)
        if in_time and dtype == np.float32 and is_wide(given.dtype):
            _warn_of_lost_changes(name, given, array)
    if dtype.kind == "f" and not all_finite(array):
        where = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        place = where if rows is None else (int(rows[where[0]]), *where[1:])
        raise BufferError(f"{name} has {array[where]} at index {place}, expected finite numbers. Nothing was stored.")
    return array


def _converted(name: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    if array.dtype.kind not in "biuf":
        raise BufferError(f"{name} has dtype {array.dtype}, expected numbers of dtype {dtype}.")
    if dtype == np.uint8:
        return _as_bytes(name, array)
    if dtype == np.bool_ and not ((array == 0) | (array == 1)).all():
        raise BufferError(f"{name} has values other than 0 and 1, expected flags.")
    with np.errstate(over="ignore"):  # what overflows becomes infinite and is reported as such
        return array.astype(dtype)


def is_wide(dtype: np.dtype) -> bool:
    """Whether float32 does not hold all numbers of a dtype."""
    return dtype.itemsize > (4 if dtype.kind == "f" else 2)


def lost_changes(
    before: np.ndarray, after: np.ndarray, stored_before: np.ndarray, stored_after: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns where numbers change, beyond the rounding of float64, and where float32 loses the change of a large one.

    Args:
        before: The numbers of a row. `float64 [..., K]`
        after: Those of the next row. `float64 [..., K]`
        stored_before: What float32 makes of the former. `float32 [..., K]`
        stored_after: What float32 makes of the latter. `float32 [..., K]`
    """
    size = np.abs(after)
    changed = np.abs(after - before) > _NOISE * size
    return changed, changed & (stored_after == stored_before) & (size >= LARGE)


def are_lost(changed: np.ndarray, lost: np.ndarray) -> np.ndarray:
    """Returns which numbers to warn of, given how often each has changed and how often that was lost. `[K]`"""
    return (lost >= _LOST_CHANGES) & (2 * lost > changed)


def _warn_of_lost_changes(name: str, array: np.ndarray, stored: np.ndarray) -> None:
    """Warns if most changes of a large number from one row to the next are lost in float32."""
    if np.abs(stored).max(initial=0) < LARGE:
        return
    rows, kept = array.reshape(len(array), -1).astype(np.float64), stored.reshape(len(array), -1)
    with np.errstate(invalid="ignore"):  # infinite numbers are refused later
        changed, lost = lost_changes(rows[:-1], rows[1:], kept[:-1], kept[1:])
    constant = are_lost(changed.sum(0), lost.sum(0))
    if constant.any():
        number = rows[-1, int(np.argmax(constant))]
        warnings.warn(
            f"{name} has values such as {number:.10g} whose changes are lost: they are stored as float32, which tells "
            f"apart steps of {np.spacing(np.float32(number)):g} there. Subtract what stays the same, such as the time "
            "at which a recording began, or divide them.",
            UserWarning,
            stacklevel=2,
        )


def _as_bytes(name: str, array: np.ndarray) -> np.ndarray:
    """Rows of another dtype in bytes: whole numbers from 0 to 255, and images `[N, C, H, W]` of flags."""
    is_image = array.ndim == 4
    if array.dtype.kind == "b":
        return array.astype(np.uint8) * np.uint8(255 if is_image else 1)
    if not all_finite(array):
        raise BufferError(f"{name} has NaN or infinite values, expected {'images of ' * is_image}finite numbers.")
    low, high = (float(bound) for bound in (array.min(initial=0), array.max(initial=0)))
    remedy = f" Convert the images: {image_line(low, high, bool((array == np.rint(array)).all()))}" * is_image
    if array.dtype.kind == "f":
        raise BufferError(
            f"{name} has dtype {array.dtype}, expected uint8 (0 to 255).{remedy} Or create the buffer with "
            f"obs_dtype=np.float32 to store floats{', which the models here do not take for images' * is_image}."
        )
    if low < 0 or high > 255:
        raise BufferError(
            f"{name} has values from {array.min()} to {array.max()}, expected 0 to 255 for uint8.{remedy}"
        )
    return array.astype(np.uint8)


def image_line(low: float, high: float, whole: bool) -> str:
    """The line of code that converts images to bytes.

    Args:
        low: The smallest of their values, or 0.
        high: The largest, or 0.
        whole: Whether all values are whole numbers.
    """
    if low >= 0 and high <= 1:
        return "(obs * 255).round().astype(np.uint8)."
    if low >= 0 and high <= 255 and (whole or high > _BRIGHT):
        return "obs.round().astype(np.uint8)."
    black, white = (-1, 1) if low >= -1 and high <= 1 else (f"{low:.7g}", f"{high:.7g}")
    return (
        f"np.interp(obs, ({black}, {white}), (0, 255)).round().astype(np.uint8), where {black} is black and {white} "
        "is white."
    )


def check_tasks(name: str, tasks: np.ndarray, count: int = MOST_TASKS) -> None:
    """Raises a `BufferError` if an array has values that are no numbers of tasks.

    Args:
        name: What the array is called in the message.
        tasks: The array.
        count: Number of the tasks that there are.
    """
    if tasks.dtype.kind not in "biuf":
        raise BufferError(f"{name} has dtype {tasks.dtype}, expected numbers of tasks.")
    wrong = ~((tasks >= 0) & (tasks < count))  # NaN is neither
    wrong |= ~wrong & (np.where(wrong, 0, tasks) % 1 != 0)
    if wrong.any():
        raise BufferError(
            f"{name} has {tasks[wrong][0]}, expected whole numbers from 0 to {count - 1:,}: the numbers of tasks."
        )


def _shape_hint(name: str, got: tuple[int, ...], expected: tuple[int, ...]) -> str:
    lead, image = len(expected) - 3, expected[-3:]
    if lead >= 0 and got == (*expected[:lead], image[1], image[2], image[0]):
        axes = (*range(lead), lead + 2, lead, lead + 1)
        return f" These images are channel-last (HWC): pass np.transpose({name}, {axes}), which has shape {expected}."
    if name == "actions":
        return " Discrete actions are passed one-hot."
    return ""


def obs_shapes(named: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of observations as tuples of whole numbers, by key.

    Raises:
        ConfigurationError: If there is none, or one is no shape.
        ShapeMismatchError: If one is that of a channel-last image.
    """
    if not named:
        raise ConfigurationError("obs_shape is an empty dict, expected at least one observation.")
    shapes = {str(key): clean_sizes("obs_shape", given) for key, given in named.items()}
    for shape in shapes.values():
        if not shape:
            raise ConfigurationError("obs_shape is (), expected at least one size; that of a number is (1,).")
        if has_channels_last(shape):
            raise ShapeMismatchError(
                f"obs_shape {shape} looks like a channel-last image (HWC). Images are channel-first: "
                f"pass {(shape[2], *shape[:2])}."
            )
    return shapes


def extras_spec(given: Any) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and dtype of what is stored beside each row, by name; None means nothing.

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
            torch.from_numpy(np.zeros(0, spec[name][1]))  # not every dtype of NumPy is one of torch
            fits = fits and (name != TASK_KEY or spec[name] == TASK_FORM)
        except (TypeError, ValueError):
            fits = False
        if not fits:
            raise ConfigurationError(
                f"extras[{name!r}] is {entry!r}, expected a shape of whole numbers of at least 1 and a dtype of "
                f"numbers, such as {((), 'int64') if name == TASK_KEY else ((3,), 'float32')}."
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
