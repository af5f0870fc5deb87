"""Wrappers that Gymnasium does not have in this form: a counted action repeat, and resizing of all images."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.wrappers import RepeatAction

from worldflux.errors import ConfigurationError, MissingDependencyError

Size = int | tuple[int, int]
"""The side of a square, or height and width."""

_MOST_CHANNELS = 4
"""The number of channels that OpenCV averages over areas at a time."""


class ActionRepeat(RepeatAction[Any, Any]):
    """Repeats each action and sums the rewards; `action_repeat` says how many frames a step takes.

    `ActionRepeat(env, num_repeats)`, as Gymnasium's `RepeatAction`: so many steps of `env` for each step of the
    wrapper, and fewer where the episode ends.
    """

    @property
    def action_repeat(self) -> int:
        """The number of frames in a step, including the repeats of the wrapped environment."""
        return self.num_repeats * frames_per_step(self.env)

    @property
    def max_episode_steps(self) -> int | None:
        """The number of steps after which an episode is cut; None without a limit."""
        steps = max_episode_steps(self.env)
        return None if steps is None else -(-steps // self.num_repeats)


def frames_per_step(env: gym.Env[Any, Any]) -> int:
    """The number of frames (steps of the simulator) in one step, from the attribute `action_repeat`."""
    return stated_frames(env.get_wrapper_attr("action_repeat") if env.has_wrapper_attr("action_repeat") else None)


def max_episode_steps(env: gym.Env[Any, Any]) -> int | None:
    """The number of steps after which an environment cuts its episodes; None where it does not say.

    It is the smallest of all that the environment and its wrappers state: in an attribute of this name, in a
    specification, and in Gymnasium's `TimeLimit`, which keeps it private and may wrap an environment that has no
    specification.
    """
    stated: list[Any] = []
    layer: Any = env
    while layer is not None:
        stated += (getattr(layer, name, None) for name in LIMIT_NAMES)
        stated.append(getattr(getattr(layer, "spec", None), "max_episode_steps", None))
        layer = layer.env if isinstance(layer, gym.Wrapper) else None
    return smallest_limit(stated)


LIMIT_NAMES = ("max_episode_steps", "_max_episode_steps")
"""The attributes that hold a time limit."""


def stated_frames(repeat: Any) -> int:
    """The number of frames that an attribute `action_repeat` says; 1 where it is none."""
    return whole_steps(repeat) or 1


_NO_LIMIT = 1_000_000
"""The number of steps from which on a limit stands for none, such as `sys.maxsize`."""


def smallest_limit(stated: Iterable[Any]) -> int | None:
    """The time limit that comes first; None where nothing that was stated is one."""
    limits = (steps for each in stated if (steps := whole_steps(each)) is not None and steps < _NO_LIMIT)
    return min(limits, default=None)


def whole_steps(value: Any) -> int | None:
    """A positive whole number of any type; None for whatever else an attribute of such a name may hold."""
    if isinstance(value, np.ndarray | np.generic) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf or value % 1:
        return None
    return int(value)


class ResizeImages(gym.ObservationWrapper[Any, Any, Any]):
    """Resizes every image of the observations, also in dictionaries and with channels first.

    Pixels are averaged over areas, which is how both Atari protocols make their frames smaller.

    Args:
        env: An environment with at least one image: a `uint8` Box of three axes, of two, or of four (stacked frames).
        size: The size of the resized images.

    Raises:
        ConfigurationError: If no observation is an image.
        MissingDependencyError: If opencv-python cannot be imported.
    """

    def __init__(self, env: gym.Env[Any, Any], size: Size) -> None:
        super().__init__(env)
        self._size = checked_size(size)
        space = env.observation_space
        parts = space.spaces if isinstance(space, spaces.Dict) else {"": space}
        self._heights = {key: axis for key, part in parts.items() if (axis := _height_axis(part)) is not None}
        if not self._heights:
            raise ConfigurationError(
                f"size is {size}, but the observation {space} has no image (a uint8 Box with two to four axes). "
                "Leave size out, or pass pixels=True to observe what the environment renders."
            )
        resized: dict[str, spaces.Space[Any]] = {
            **parts,
            **{key: spaces.Box(0, 255, self._new_shape(parts[key]), np.uint8) for key in self._heights},
        }
        self.observation_space = spaces.Dict(resized) if isinstance(space, spaces.Dict) else resized[""]
        try:
            import cv2
        except ImportError as error:
            raise MissingDependencyError(
                f"Resizing images needs opencv-python, which cannot be imported: {error}. "
                'pip install opencv-python; on slim Linux machines also "apt-get install libgl1 libglib2.0-0".'
            ) from error
        self._resize, self._interpolation = cv2.resize, cv2.INTER_AREA

    def observation(self, observation: Any) -> Any:
        """Resizes the images of an observation; everything else is passed on."""
        if isinstance(self.observation_space, spaces.Dict):
            resized = {key: self._resized(observation[key], axis) for key, axis in self._heights.items()}
            return {**observation, **resized}
        return self._resized(observation, self._heights[""])

    def _resized(self, image: np.ndarray, height_axis: int) -> np.ndarray:
        sides = (height_axis, height_axis + 1)
        image = np.moveaxis(image, sides, (0, 1))
        layers = image.reshape(*image.shape[:2], -1)  # [H, W, everything else]
        small = np.concatenate(
            [
                self._resize(
                    np.ascontiguousarray(layers[..., first : first + _MOST_CHANNELS]),
                    self._size[::-1],
                    interpolation=self._interpolation,
                ).reshape(*self._size, -1)  # a single channel's axis is dropped by the resize
                for first in range(0, layers.shape[-1], _MOST_CHANNELS)
            ],
            axis=-1,
        )
        return np.ascontiguousarray(np.moveaxis(small.reshape(*self._size, *image.shape[2:]), (0, 1), sides))

    def _new_shape(self, space: spaces.Space[Any]) -> tuple[int, ...]:
        height_axis = _height_axis(space)
        assert space.shape is not None and height_axis is not None
        return (*space.shape[:height_axis], *self._size, *space.shape[height_axis + 2 :])


def checked_size(size: Any, name: str = "size") -> tuple[int, int]:
    """Height and width, from one number or two.

    Raises:
        ConfigurationError: If it is no such size.
    """
    sides = (size, size) if isinstance(size, int) else size
    if (
        not isinstance(sides, tuple | list)
        or len(sides) != 2
        or not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in sides)
    ):
        raise ConfigurationError(f"{name} is {size!r}, expected a number of pixels such as 64, or (height, width).")
    return sides[0], sides[1]


def _height_axis(space: spaces.Space[Any]) -> int | None:
    """The axis of an image's height, None for other spaces; the shortest of three axes has the channels."""
    if not isinstance(space, spaces.Box) or space.dtype != np.uint8 or len(space.shape) not in (2, 3, 4):
        return None
    if len(space.shape) == 2:
        return 0
    stacked = len(space.shape) - 3
    return stacked + (int(np.argmin(space.shape[stacked:])) == 0)
