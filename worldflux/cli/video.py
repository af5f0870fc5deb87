"""Videos from pictures, through OpenCV: `.mp4` and `.gif`."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from worldflux.diagnostics.plots.frames import bgr, import_cv2
from worldflux.errors import ConfigurationError, MissingDependencyError
from worldflux.files import checked_path, path_beside, writing

_GIF_FPS = 25
"""Browsers play faster GIFs slowly."""


def check_target(path: Path) -> None:
    """Makes sure that a video can be written there.

    Raises:
        ConfigurationError: If the name has another ending, or there is no such directory.
        MissingDependencyError: If OpenCV is missing, or too old for the ending.
    """
    if path.suffix.lower() not in (".mp4", ".gif"):
        raise ConfigurationError(f"{path} ends in '{path.suffix}', expected .mp4 or .gif.")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ConfigurationError(f"{path} cannot be written: it is a directory, or '{path.parent}' is none.")
    if path.suffix.lower() == ".gif" and not hasattr(import_cv2(), "imwriteanimation"):
        raise MissingDependencyError("GIFs need OpenCV 4.11: pip install -U opencv-python. Or choose an .mp4.")


class VideoFile:
    """A video that is written picture by picture, beside its place, and moved there when it is complete.

    Nothing is left of it after an error, or if it has no pictures. A GIF is kept in memory until then; of more than 25
    pictures in a second, it takes every second, third, and so on.

    Args:
        path: Ends in `.mp4` or `.gif`.
        fps: Pictures in a second.
    """

    def __init__(self, path: Path, fps: float) -> None:
        check_target(path)
        self.path = checked_path("path", path)
        self.fps = fps
        self._stride = max(round(fps / _GIF_FPS), 1)
        self._count = 0
        self._shape: tuple[int, ...] = ()
        self._pictures: list[np.ndarray] = []
        self._writer: Any = None
        self._beside = Path()
        self._ending = ExitStack()

    def __enter__(self) -> VideoFile:
        self._beside = self._ending.enter_context(path_beside(self.path))
        return self

    def add(self, picture: np.ndarray) -> None:
        """Appends a picture.

        Args:
            picture: RGB, as large as the others. `uint8 [H, W, 3]`

        Raises:
            ConfigurationError: If it has another size than the ones before, or cannot be written.
        """
        self._shape = self._shape or picture.shape
        if picture.shape != self._shape:
            raise ConfigurationError(f"A picture has shape {picture.shape}, and the ones before {self._shape}.")
        self._count += 1
        if self.path.suffix.lower() == ".gif":
            if (self._count - 1) % self._stride == 0:
                self._pictures.append(bgr(picture))
            return
        if self._writer is None:
            cv2 = import_cv2()
            height, width = _even(picture).shape[:2]
            # MPEG-4 is what every build of OpenCV can write; H.264 needs a library that it may not ship.
            self._writer = cv2.VideoWriter(
                str(self._beside), cv2.VideoWriter_fourcc(*"mp4v"), float(self.fps), (width, height)
            )
            if not self._writer.isOpened():
                raise ConfigurationError(f"OpenCV cannot write {self.path}. Choose a .gif.")
        self._writer.write(bgr(_even(picture)))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._writer is not None:
                self._writer.release()
            if error is None and self._count:
                if self._pictures:
                    _write_gif(self._beside, self._pictures, self._stride / self.fps)
                with writing(self.path, ConfigurationError):
                    os.replace(self._beside, self.path)
        finally:
            self._ending.close()


def _write_gif(path: Path, pictures: list[np.ndarray], seconds: float) -> None:
    cv2 = import_cv2()
    animation = cv2.Animation()
    animation.frames = pictures
    animation.durations = [round(1000 * seconds)] * len(pictures)
    animation.loop_count = 0
    if not cv2.imwriteanimation(str(path), animation):
        raise ConfigurationError("OpenCV cannot write this GIF. Choose an .mp4.")


def _even(picture: np.ndarray) -> np.ndarray:
    """The picture with one more row or column where their number is odd, which the codec would cut off."""
    height, width = picture.shape[:2]
    return np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
