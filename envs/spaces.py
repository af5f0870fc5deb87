"""Codecs between the spaces of Gymnasium and the form that worldflux stores and learns from.

Everything here is NumPy and works on all environments at once: arrays have a leading axis `[N, ...]`, one row per
environment. Nothing else in the library knows about Gymnasium spaces.

| space | observation in the library | action in the library |
| --- | --- | --- |
| `Box`, numbers | `float32 [prod(shape)]` | `float32 [prod(shape)]`, the bounds mapped to [-1, 1] |
| `Box`, `uint8` with three axes | `uint8 [C, H, W]`, whichever side the channels were on | (as numbers) |
| `Box`, `uint8` with two axes, 0 to 255 | `uint8 [1, H, W]` | (as numbers) |
| `Box`, `uint8` with four axes, 0 to 255: S frames | `uint8 [S * C, H, W]` | (as numbers) |
| `Discrete` | one-hot | one-hot |
| `MultiDiscrete`, `MultiBinary` | one-hots, concatenated | one-hots, concatenated |
| `Dict` of the above | dict of the above | not supported |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from gymnasium import spaces

from worldflux.errors import ConfigurationError, ShapeMismatchError, a_type
from worldflux.validation import SINGLE_KEY

Array = np.ndarray[Any, np.dtype[Any]]
Arrays = Array | dict[str, Array]


_OBSERVATIONS_SUPPORTED = "Box, Discrete, MultiDiscrete, MultiBinary and a flat Dict of these"
_LEAST_SIDE, _LEAST_SIDE_OF_NUMBERS = 16, 40
"""Smallest sides of an array that counts as an image although it is not `uint8`: with up to four channels, and
otherwise."""
_MOST_OPTIONS = 2**16
"""Largest number of options of one-hots: more would take a quarter of a megabyte per row, for numbers that rarely
recur."""
_MOST_FLATTENED = 2**20
"""Largest size of a space for which flattening is advised."""
_ACTIONS_SUPPORTED = "Box with finite bounds, Discrete, MultiDiscrete and MultiBinary"


class OneHots:
    """Concatenated one-hot vectors for several choices, and back.

    Args:
        classes: The number of options of each choice.
        starts: The number of the first option of each choice, as `Discrete(n, start=...)` has it.
    """

    def __init__(self, classes: tuple[int, ...], starts: tuple[int, ...]) -> None:
        self.classes = classes
        self.width = sum(classes)
        self._starts = np.asarray(starts, dtype=np.int64)
        self._sizes = np.asarray(classes, dtype=np.int64)
        self._offsets = np.concatenate([[0], np.cumsum(self._sizes)[:-1]]).astype(np.int64)
        # For each column of the one-hots, the choice that it belongs to and the option that it stands for.
        self._choice = np.repeat(np.arange(len(classes)), self._sizes)
        self._option = np.arange(self.width) - (self._offsets - self._starts)[self._choice]

    def encode(self, values: Array, name: str) -> Array:
        """One-hot vectors of whole numbers.

        Args:
            values: `[N, K]`, each within its choice's options.
            name: What to call them in an error.

        Returns:
            `float32 [N, sum(classes)]`
        """
        given = values if len(self.classes) == 1 else values[:, self._choice]
        chosen = given == self._option
        if np.count_nonzero(chosen) != values.size:
            last = (self._starts + self._sizes - 1).tolist()
            raise ShapeMismatchError(
                f"{name} has values between {values.min()} and {values.max()}, "
                f"expected {self._starts.tolist()} to {last}."
            )
        return chosen.astype(np.float32)

    def decode(self, encoded: Array) -> Array:
        """The most likely option of each choice, `int64 [N, K]`, from vectors `[N, sum(classes)]`."""
        ends = self._offsets + self._sizes
        columns = [
            encoded[:, begin:end].argmax(axis=1) for begin, end in zip(self._offsets, ends, strict=True)
        ]  # K arrays [N]
        return np.stack(columns, axis=1) + self._starts


def _choices(space: spaces.Space[Any], name: str) -> OneHots | None:
    """The one-hot form of a space of whole numbers, or None for other spaces."""
    if isinstance(space, spaces.MultiBinary):
        choices = int(np.prod(space.shape))
        _check_width(space, name, 2 * choices)
        return OneHots((2,) * choices, (0,) * choices)
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
        sizes = space.n if isinstance(space, spaces.Discrete) else space.nvec
        classes = tuple(int(size) for size in np.ravel(sizes))
        _check_width(space, name, sum(classes))
        return OneHots(classes, tuple(int(start) for start in np.ravel(space.start)))
    return None


def _check_width(space: spaces.Space[Any], name: str, width: int) -> None:
    if width > _MOST_OPTIONS:
        raise ConfigurationError(
            f"{name} is {a_type(space)} space with {width:,} options, each of which would be a number of its "
            f"one-hots in every row, expected at most {_MOST_OPTIONS:,}. Give it as a Box of a few numbers instead, "
            "such as its digits or coordinates: gymnasium.wrappers.TransformObservation and TransformAction do that."
        )


def _is_supported(space: spaces.Space[Any]) -> bool:
    return isinstance(space, spaces.Box | spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary)


def _other_form(space: spaces.Space[Any]) -> str:
    """Advice about a space that is not supported, or has such parts."""
    try:
        # The bounds of the flattened space are arrays of its size.
        too_large = _has_images(space) or spaces.utils.flatdim(space) > _MOST_FLATTENED
        flat: Any = None if too_large else spaces.utils.flatten_space(space)
    except (NotImplementedError, ValueError):  # a custom space, or an empty one
        flat = None
    if isinstance(flat, spaces.Box):
        return "gymnasium.wrappers.FlattenObservation(env) makes one Box of everything."
    kept = [key for key, part in space.spaces.items() if _is_supported(part)] if isinstance(space, spaces.Dict) else []
    if kept:
        return f"gymnasium.wrappers.FilterObservation(env, {kept}) leaves the rest out."
    return "gymnasium.wrappers.TransformObservation(env, function, space) makes one of these out of it."


def _has_images(space: Any) -> bool:
    if isinstance(space, spaces.Box):
        return is_image(space)
    parts = getattr(space, "spaces", ())
    return any(_has_images(part) for part in (parts.values() if isinstance(parts, Mapping) else parts))


class _Leaf:
    """The codec of one array of an observation: its shape and dtype in the library, and the checks of what comes in."""

    def __init__(self, space: spaces.Space[Any], key: str | None, whole: spaces.Space[Any]) -> None:
        name = "observation" if key is None else f"observation '{key}'"
        if not _is_supported(space):
            raise ConfigurationError(
                f"{name} is {a_type(space)} space, which is not supported. "
                f"Supported observations are {_OBSERVATIONS_SUPPORTED}. {_other_form(whole)}"
            )
        self.name = name
        self.given_shape: tuple[int, ...] = tuple(space.shape or ())
        self._space = space
        self.choices = _choices(space, name)
        self.is_image = isinstance(space, spaces.Box) and is_image(space)
        self._other_layout: tuple[int, ...] | None = None
        self._channels_last = False
        self.dtype: np.dtype[Any] = np.dtype(np.uint8 if self.is_image else np.float32)
        if self.choices is not None:
            self.shape: tuple[int, ...] = (self.choices.width,)
        elif self.is_image:
            self._set_image_layout()
        else:
            assert isinstance(space, spaces.Box)  # all others are choices
            _reject_other_images(space, name, key)
            self.shape = (int(np.prod(self.given_shape, dtype=np.int64)),)
        self._is_vector = self.choices is None and not self.is_image and len(self.given_shape) == 1
        self._kinds = "biu" if self.choices is not None else "u" if self.is_image else "biuf"

    def _set_image_layout(self) -> None:
        if len(self.given_shape) == 2:
            self.shape = (1, *self.given_shape)
            return
        *stack, first, second, third = self.given_shape
        self._channels_last = int(np.argmin((first, second, third))) != 0
        channels, height, width = (third, first, second) if self._channels_last else (first, second, third)
        self.shape = (int(np.prod(stack, dtype=np.int64)) * channels, height, width)
        if not stack:
            self._other_layout = self.shape if self._channels_last else (height, width, channels)

    def encode(self, value: Any) -> tuple[Array, bool]:
        """The library form `[N, *shape]` as a fresh array, and whether a leading axis was given."""
        try:
            array = np.asarray(value)
        except ValueError as error:  # rows of different lengths
            raise ShapeMismatchError(f"{self.name} is no array: {error}") from error
        if array.dtype.kind not in self._kinds:
            raise ShapeMismatchError(
                f"{self.name} has dtype {array.dtype}, expected {self._expected_dtype()}."
                + (" Images stay whole numbers from 0 to 255; the model scales them." if self.is_image else "")
            )
        channels_last = self._channels_last
        axes = len(self.given_shape)
        if array.shape == self.given_shape:
            array, batched = array[None], False
        elif array.ndim == axes + 1 and array.shape[1:] == self.given_shape:
            batched = True
        elif self._other_layout is not None and array.shape in (self._other_layout, (len(array), *self._other_layout)):
            # The environment was wrapped in VecTransposeImage, and the image comes from the one without it.
            channels_last, batched = not channels_last, array.ndim == axes + 1
            array = array if batched else array[None]
        else:
            raise ShapeMismatchError(
                f"{self.name} has shape {array.shape}, expected {self.given_shape} for one environment "
                f"or (n_envs, {', '.join(map(str, self.given_shape))}) for several."
            )
        if not len(array):
            raise ShapeMismatchError(f"{self.name} has shape {array.shape}, expected at least one row.")
        if self._is_vector:
            return self._as_float32(array), batched
        if self.choices is not None:
            return self.choices.encode(array.reshape(len(array), -1), self.name), batched
        if self.is_image:
            if array.dtype != np.uint8:
                raise ShapeMismatchError(f"{self.name} has dtype {array.dtype}, expected uint8.")
            if channels_last and array.ndim >= 4:
                array = np.moveaxis(array, -1, -3)
            return np.array(array.reshape(len(array), *self.shape), order="C"), batched
        return self._as_float32(array).reshape(len(array), *self.shape), batched

    def decode(self, rows: Array) -> Array:
        """The space's form `[N, *given_shape]` of rows `[N, *shape]` of the library, with numbers within its bounds."""
        if self.choices is not None:
            rows = self.choices.decode(rows)
        elif self._channels_last:
            *stack, height, width, channels = self.given_shape
            rows = np.moveaxis(rows.reshape(len(rows), *stack, channels, height, width), -3, -1)
        rows = rows.reshape(len(rows), *self.given_shape)
        if isinstance(self._space, spaces.Box):
            whole = self._space.dtype.kind in "iu"
            rows = np.clip(np.rint(rows) if whole else rows, self._space.low, self._space.high)
        return rows.astype(self._space.dtype)

    def _as_float32(self, array: Array) -> Array:
        with np.errstate(over="ignore"):
            encoded = array.astype(np.float32)
        if np.count_nonzero(np.isfinite(encoded)) != encoded.size:  # half the time of `all` for a few numbers
            if np.isfinite(array).all():
                raise ShapeMismatchError(
                    f"{self.name} holds {array[np.isinf(encoded)][0]:g}, expected at most 3.4e+38: it is stored as "
                    "float32. Scale it before it is observed."
                )
            raise ShapeMismatchError(
                f"{self.name} contains NaN or infinite values, expected finite numbers. "
                "gymnasium.utils.env_checker.check_env finds where an environment makes them."
            )
        return encoded

    def _expected_dtype(self) -> str:
        return "whole numbers" if self.choices is not None else "uint8" if self.is_image else "numbers"


def space_like(shape: Sequence[int], dtype: Any) -> spaces.Box:
    """The space of numbers that are stored as such arrays: pixels from 0 to 255, or numbers without bounds."""
    dtype = np.dtype(dtype)
    if dtype == np.uint8 and len(shape) >= 2:
        return spaces.Box(0, 255, tuple(shape), np.uint8)
    return spaces.Box(-np.inf, np.inf, tuple(shape), np.float32)


def is_image(space: spaces.Box) -> bool:
    """Whether the numbers of a space are pixels."""
    if space.dtype != np.uint8:
        return False
    full_range = bool(np.all(space.low == 0) and np.all(space.high == 255))
    return len(space.shape) == 3 or (len(space.shape) in (2, 4) and full_range)


def _reject_other_images(space: spaces.Box, name: str, key: str | None) -> None:
    """Refuses pictures that are not `uint8`: flattened, they would get an MLP over every pixel, which nobody wants."""
    shape = space.shape
    if not _has_sides_of_a_picture(shape):
        return
    numbers = int(np.prod(shape, dtype=np.int64))
    if space.dtype == np.uint8:
        given, expected = f"with bounds {space.low.min()} to {space.high.max()}", "the bounds 0 to 255"
        how = f"If it is one, {_as_pixels(space, key)} says so"
    else:
        given = f"of {'floats' if space.dtype.kind == 'f' else space.dtype}"
        expected = "uint8 with values from 0 to 255"
        how = (
            f"Remove the wrapper that scales it, or use {_as_pixels(space, key)}; the model scales it itself. "
            "Frames that are stacked are its channels"
        )
    raise ConfigurationError(
        f"{name} looks like an image {shape} {given}, expected {expected}: it would become a vector of {numbers:,} "
        f"float32 numbers. {how}. If it is no picture, gymnasium.wrappers.FlattenObservation(env) makes that vector."
    )


def _as_pixels(space: spaces.Box, key: str | None) -> str:
    """Code of a wrapper that scales numbers to pixels from 0 to 255; unbounded ones are taken to lie in 0 to 1."""
    low, high = float(space.low.min()), float(space.high.max())
    if not (np.isfinite([low, high]).all() and low < high):
        low, high = 0.0, 1.0
    given = "obs" if key is None else f"obs[{key!r}]"
    # Unlike arithmetic, this neither overflows in small integers nor leaves 0 to 255 where bounds are not kept.
    scaled = given if (low, high) == (0.0, 255.0) else f"numpy.interp({given}, ({low:.7g}, {high:.7g}), (0, 255))"
    pixels, box = f"{scaled}.round().astype(numpy.uint8)", f"Box(0, 255, {space.shape}, numpy.uint8)"
    if key is not None:
        pixels, box = f"{{**obs, {key!r}: {pixels}}}", f"Dict({{**env.observation_space, {key!r}: {box}}})"
    return f"gymnasium.wrappers.TransformObservation(env, lambda obs: {pixels}, {box})"


def _has_sides_of_a_picture(shape: tuple[int, ...]) -> bool:
    if not 2 <= len(shape) <= 4:
        return False
    few_channels = len(shape) > 2 and min(shape[-3:]) <= 4 and sorted(shape[-3:])[1] >= _LEAST_SIDE
    short, long = sorted(shape)[-2:]
    return few_channels or (short >= _LEAST_SIDE_OF_NUMBERS and long <= 2 * short)


class ObservationCodec:
    """Turns observations of a Gymnasium space into the library's form.

    Attributes:
        obs_shape: The shape of one observation in the library, or a dict of shapes.
        obs_dtype: The NumPy dtype, or a dict of dtypes: `uint8` for images, `float32` for all else.
        obs_classes: For observations that became one-hots: the number of options of each choice. The key of an
            observation that is one array is `"obs"`.

    Args:
        space: The observation space of a single environment.

    Raises:
        ConfigurationError: If the space is not supported; the message lists those that are.
    """

    def __init__(self, space: spaces.Space[Any]) -> None:
        self.space = space
        self._is_dict = isinstance(space, spaces.Dict)
        if isinstance(space, spaces.Dict):
            if not space.spaces:
                raise ConfigurationError("The observation is an empty Dict space, expected at least one key.")
            self._leaves = {key: _Leaf(part, key, space) for key, part in space.spaces.items()}
        else:
            self._leaves = {SINGLE_KEY: _Leaf(space, None, space)}
        self.obs_shape: tuple[int, ...] | dict[str, tuple[int, ...]] = self._merge(
            {key: leaf.shape for key, leaf in self._leaves.items()}
        )
        self.obs_dtype: np.dtype[Any] | dict[str, np.dtype[Any]] = self._merge(
            {key: leaf.dtype for key, leaf in self._leaves.items()}
        )
        self.obs_classes: dict[str, tuple[int, ...]] = {
            key: leaf.choices.classes for key, leaf in self._leaves.items() if leaf.choices is not None
        }

    def encode(self, obs: Any) -> Arrays:
        """The library form of a batch of observations.

        Args:
            obs: As the environments gave it, with a leading axis `[N, ...]` (a dict of such arrays for `Dict`).

        Returns:
            Fresh arrays `[N, *obs_shape]`; changing what was passed in does not change them.

        Raises:
            ShapeMismatchError: If shape, dtype or values cannot be an observation of the space.
        """
        encoded, batched = self.encode_any(obs)
        if not batched:
            raise ShapeMismatchError("The observation has no leading axis, expected one row per environment.")
        return encoded

    def encode_any(self, obs: Any) -> tuple[Arrays, bool]:
        """The library form `[N, *obs_shape]` of one observation or a batch, and whether it was a batch."""
        if isinstance(obs, tuple) and len(obs) == 2 and isinstance(obs[1], Mapping):
            raise ShapeMismatchError(
                "The observation is a tuple of two, expected the observation alone. Gymnasium's reset returns it with "
                "an info: obs, info = env.reset()."
            )
        if not self._is_dict:
            if not isinstance(obs, np.ndarray) and isinstance(obs, Mapping):
                raise ShapeMismatchError(
                    f"The observation is a dictionary with keys {sorted(map(str, obs))}, expected an array."
                )
            return self._leaves[SINGLE_KEY].encode(obs)
        if not isinstance(obs, Mapping) or set(obs) != set(self._leaves):
            given = f"keys {sorted(map(str, obs))}" if isinstance(obs, Mapping) else a_type(obs)
            raise ShapeMismatchError(
                f"The observation is {given}, expected a dictionary with keys {sorted(self._leaves)}."
            )
        parts = {key: leaf.encode(obs[key]) for key, leaf in self._leaves.items()}
        rows = {key: len(array) if batched else None for key, (array, batched) in parts.items()}
        if len(set(rows.values())) > 1:
            raise ShapeMismatchError(
                f"The keys of the observation disagree on the number of environments: {rows} (None: no leading axis)."
            )
        return {key: array for key, (array, _) in parts.items()}, next(iter(rows.values())) is not None

    def decode(self, rows: Mapping[str, Array]) -> Arrays:
        """Observations of the space, given the library's form `[N, *shape]` of each key (`"obs"` if it is one array).

        One-hots may be probabilities: the most likely option counts.
        """
        return self._merge({key: leaf.decode(rows[key]) for key, leaf in self._leaves.items()})

    def _merge(self, parts: dict[str, Any]) -> Any:
        return parts if self._is_dict else parts[SINGLE_KEY]


class ActionCodec:
    """Turns actions of the library into those of a Gymnasium space, and back.

    Attributes:
        action_type: `"continuous"`, `"discrete"` or `"multi_discrete"`.
        action_dim: The width of an action vector in the library.
        action_classes: The number of options of each choice; `()` for continuous actions.

    Args:
        space: The action space of a single environment.

    Raises:
        ConfigurationError: If the space is not supported; the message lists those that are.
    """

    def __init__(self, space: spaces.Space[Any]) -> None:
        if isinstance(space, spaces.Box):
            low, high = space.low.astype(np.float64).reshape(-1), space.high.astype(np.float64).reshape(-1)
            # The range itself overflows for a box that spans all of float64.
            if not (np.isfinite(low).all() and np.isfinite(high).all() and np.isfinite(high / 2 - low / 2).all()):
                raise ConfigurationError(
                    f"The action space {space} has no finite bounds, expected {_ACTIONS_SUPPORTED}. "
                    "gymnasium.wrappers.TransformAction(env, lambda action: action, Box(low, high, shape)) sets them; "
                    "ClipAction takes them away, and is not needed: actions stay within bounds."
                )
            self._low, self._high = low, high
            self._center, self._half = low / 2 + high / 2, high / 2 - low / 2
            # An axis whose bounds coincide carries no choice: it is 0 in the library.
            self._is_fixed = self._half <= 0
            self._half[self._is_fixed] = 1.0
            self._has_fixed = bool(self._is_fixed.any())
        elif not isinstance(space, spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary):
            raise ConfigurationError(
                f"The action space is {a_type(space)} space, which is not supported. "
                f"Supported actions are {_ACTIONS_SUPPORTED}."
            )
        self.space = space
        self._shape: tuple[int, ...] = tuple(space.shape or ())
        self._dtype = np.dtype(space.dtype)
        self._choices = _choices(space, "The action space")
        self.action_classes: tuple[int, ...] = () if self._choices is None else self._choices.classes
        self.action_dim: int = self._half.size if self._choices is None else self._choices.width
        if self._choices is None:
            self.action_type = "continuous"
        else:
            self.action_type = "discrete" if isinstance(space, spaces.Discrete) else "multi_discrete"

    @property
    def rounds(self) -> bool:
        """Whether `to_env` may give other actions than it was asked for, besides clipping: whole or fixed numbers."""
        return self._choices is None and (self._dtype.kind in "iu" or self._has_fixed)

    def to_env(self, actions: Array) -> Array:
        """Turns actions into those of the environments.

        Args:
            actions: The library form `[N, A]`; continuous ones are clipped to [-1, 1].

        Returns:
            `[N, *space.shape]` in the space's dtype.
        """
        if self._choices is not None:
            values = self._choices.decode(actions)
        else:
            values = self._center + np.clip(actions, -1.0, 1.0).astype(np.float64) * self._half
            if self._dtype.kind in "iu":
                values = np.rint(values)
            # Rounding must not leave the box: env.step may check that the action is inside.
            values = np.clip(values, self._low, self._high)
        return values.astype(self._dtype).reshape(len(actions), *self._shape)

    def from_env(self, actions: Any) -> Array:
        """The library form of actions that somebody else chose, as they are carried out and stored.

        Continuous actions outside the space's bounds become the nearest ones inside, which is what environments execute
        that keep to their space.

        Args:
            actions: `[N, *space.shape]`

        Returns:
            A fresh array. `float32 [N, A]`

        Raises:
            ShapeMismatchError: If these are no actions of the space.
        """
        array = np.asarray(actions)
        if array.ndim != len(self._shape) + 1 or array.shape[1:] != self._shape:
            raise ShapeMismatchError(
                f"actions have shape {array.shape}, expected (n_envs, {', '.join(map(str, self._shape))})."
            )
        flat = array.reshape(len(array), -1)
        if self._choices is not None:
            return self._choices.encode(flat, "action")
        scaled = (flat - self._center) / self._half
        if self._has_fixed:
            scaled[:, self._is_fixed] = 0.0
        return scaled.clip(-1.0, 1.0).astype(np.float32)
