"""Animations of a report: what an agent does, small enough to be embedded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from worldflux.cli.report.page import Picture
from worldflux.diagnostics.plots.frames import animation, bgr, import_cv2
from worldflux.errors import ConfigurationError, MissingDependencyError

MOST_BYTES = 2_500_000
"""Largest size of all films of episodes together."""
_SIDE, _FRAMES, _FPS = 320, 300, 25
"""Largest side in pixels, number of frames and frames per second of an animation."""
_STILLS = 6
"""Number of frames in the still picture."""
_ATTEMPTS = ((1.0, 1, 80), (1.0, 1, 50), (0.75, 1, 40), (0.5, 2, 40), (0.4, 4, 30))
"""Scale, stride and WebP quality, from the best to the smallest."""


class Film:
    """Collects the frames of episodes. Long episodes are thinned out as they go on, so that they fit into memory.

    Args:
        fps: Frames per second of the environment.
    """

    def __init__(self, fps: float) -> None:
        self._fps = fps
        self._stride = max(round(fps / _FPS), 1)
        self._count = 0
        self._frames: list[np.ndarray] = []

    def add(self, frame: np.ndarray) -> None:
        """Adds a frame. `uint8 [H, W, 3]`"""
        if self._count % self._stride == 0:
            self._frames.append(scaled(frame, _SIDE))
        self._count += 1
        if len(self._frames) > 2 * _FRAMES:
            self._stride *= 2
            del self._frames[1::2]

    def picture(self, most_bytes: int, alt: str, **texts: Any) -> Picture:
        """The film as an animated picture with stills.

        Args:
            most_bytes: Largest size of the animation.
            alt: What it shows.
            **texts: Other fields of `Picture`.
        """
        frames, stride = self._frames, self._stride
        if len(frames) > _FRAMES:
            frames, stride = frames[::2], 2 * stride
        return animated(frames, stride / self._fps, most_bytes, alt, **texts)


def animated(frames: Sequence[np.ndarray], seconds: float, most_bytes: int, alt: str, **texts: Any) -> Picture:
    """An endless animation that every browser shows like an image, with stills.

    Args:
        frames: RGB frames of equal size. `uint8 [H, W, 3]` each
        seconds: Duration of each frame.
        most_bytes: Largest size. Frames are made smaller or left out to stay below it.
        alt: What it shows.
        **texts: Other fields of `Picture`.

    Raises:
        MissingDependencyError: If OpenCV is missing, or too old for animations.
        ConfigurationError: If the animation stays too large, or OpenCV cannot write it.
    """
    cv2 = import_cv2()
    if not hasattr(cv2, "imencodeanimation"):
        raise MissingDependencyError("Animations need OpenCV 4.11: pip install -U opencv-python.")
    side = max(frames[0].shape[:2])
    for scale, stride, quality in _ATTEMPTS:
        parts = [bgr(scaled(frame, round(scale * side))) for frame in frames[::stride]]
        made = animation(parts, seconds * stride)
        written, data = cv2.imencodeanimation(".webp", made, [cv2.IMWRITE_WEBP_QUALITY, quality])
        if not written:
            raise ConfigurationError("OpenCV cannot write WebP animations here.")
        if len(data) <= most_bytes:
            return Picture(bytes(data), "image/webp", alt, still=_stills(frames), **texts)
    raise ConfigurationError(f"The animation of {len(frames)} frames is larger than {most_bytes:,} bytes.")


def _stills(frames: Sequence[np.ndarray]) -> bytes:
    """Some frames side by side, as a PNG."""
    numbers = np.unique(np.linspace(0, len(frames) - 1, _STILLS).round().astype(int))
    rows = [[scaled(frames[number], 160) for number in part] for part in np.array_split(numbers, 2) if len(part)]
    rows[-1] += [np.full_like(rows[0][0], 255)] * (len(rows[0]) - len(rows[-1]))
    sheet = np.concatenate([np.concatenate(row, 1) for row in rows])
    return bytes(import_cv2().imencode(".png", bgr(sheet))[1])


def scaled(frame: np.ndarray, side: int) -> np.ndarray:
    """The frame, reduced so that its longer side has at most this many pixels."""
    height, width = frame.shape[:2]
    factor = side / max(height, width)
    if factor >= 1:
        return frame.copy()
    cv2 = import_cv2()
    size = (max(round(width * factor), 1), max(round(height * factor), 1))
    return np.asarray(cv2.resize(frame, size, interpolation=cv2.INTER_AREA))
