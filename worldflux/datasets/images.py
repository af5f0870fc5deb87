"""Smaller pictures for recordings whose cameras see more than a model needs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from gymnasium import spaces

from worldflux.datasets.recording import Arrays, Block, Recording
from worldflux.diagnostics.plots.frames import import_cv2
from worldflux.envs.spaces import is_image
from worldflux.errors import ConfigurationError
from worldflux.validation import SINGLE_KEY


def with_resized_images(recording: Recording, size: tuple[int, int]) -> Recording:
    """The same recording with all its images in another size; pixels are averaged over areas.

    Args:
        recording: The recording.
        size: The new height and width.

    Raises:
        ConfigurationError: If it has no images.
        MissingDependencyError: If opencv-python cannot be imported.
    """
    height, width = size
    resize, averaging = import_cv2().resize, import_cv2().INTER_AREA
    space = recording.obs_space
    parts: dict[str, spaces.Space[Any]] = dict(space.spaces) if isinstance(space, spaces.Dict) else {SINGLE_KEY: space}
    images = [key for key, part in parts.items() if isinstance(part, spaces.Box) and is_image(part)]
    images = [key for key in images if len(parts[key].shape or ()) == 3]
    if not images:
        raise ConfigurationError(f"image_size is {size}, but {recording.name} has no images. Leave it out.")
    channels_first = {key for key in images if int(np.argmin(parts[key].shape or ())) == 0}
    for key in images:
        shape = parts[key].shape or ()
        channels = shape[0] if key in channels_first else shape[2]
        parts[key] = spaces.Box(0, 255, (height, width, channels), np.uint8)

    def resized(obs: Arrays) -> Arrays:
        found = dict(obs)
        for key in images:
            given = np.moveaxis(obs[key], 1, -1) if key in channels_first else obs[key]
            found[key] = np.empty((len(given), *(parts[key].shape or ())), np.uint8)
            for number, image in enumerate(given):
                small = resize(np.ascontiguousarray(image), (width, height), interpolation=averaging)
                found[key][number] = small.reshape(found[key].shape[1:])  # one channel's axis is dropped
        return found

    def blocks() -> Iterator[Block]:
        for block in recording.blocks():
            finals = None if block.final_obs is None else resized(block.final_obs)
            yield replace(block, obs=resized(block.obs), final_obs=finals)

    new_space = spaces.Dict(parts) if isinstance(space, spaces.Dict) else parts[SINGLE_KEY]
    return replace(recording, obs_space=new_space, blocks=blocks)
