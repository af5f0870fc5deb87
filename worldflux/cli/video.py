"""Writing videos with OpenCV, as `.mp4` or `.gif`."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from worldflux.diagnostics.plots.frames import animation, bgr, import_cv2
from worldflux.errors import ConfigurationError, MissingDependencyError
from worldflux.files import checked_path, path_beside, writing

_GIF_FPS = 25
"""Largest frame rate of a GIF; browsers slow down faster ones."""
_GIF_DITHER = 3
"""Level of OpenCV's dithering at which the colors of rendered frames stay within a few units of 255."""


def check_target(path: Path) -> None:
    """Checks that a video can be written to a path.

    Raises:
        ConfigurationError: If the name does not end in .mp4 or .gif, or its directory does not exist.
        MissingDependencyError: If OpenCV is missing, or too old for GIFs.
    """
    if path.suffix.lower() not in (".mp4", ".gif"):
        raise ConfigurationError(f"{path} ends in '{path.suffix}', expected .mp4 or .gif.")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ConfigurationError(f"{path} cannot be written: it is a directory, or '{path.parent}' is not.")
    if path.suffix.lower() == ".gif" and not hasattr(import_cv2(), "imwriteanimation"):
        raise MissingDependencyError("GIFs need OpenCV 4.11: pip install -U opencv-python. Or choose an .mp4.")


class VideoFile:
    """A video that is written frame by frame to a temporary file, which is moved to its path when it is complete.

    After an error, or without any frames, nothing is left behind. A GIF is kept in memory until it is complete. Above
    25 frames per second it contains only every second, third, ... frame.

    Args:
        path: Path of the video; ends in `.mp4` or `.gif`.
        fps: Frames per second.
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
        """Appends a frame.

        Args:
            picture: RGB frame, of the same size as all others. `uint8 [H, W, 3]`

        Raises:
            ConfigurationError: If its size differs from the first frame's, or it cannot be written.
        """
        self._shape = self._shape or picture.shape
        if picture.shape != self._shape:
            raise ConfigurationError(f"A frame has shape {picture.shape}, and the ones before {self._shape}.")
        self._count += 1
        if self.path.suffix.lower() == ".gif":
            if (self._count - 1) % self._stride == 0:
                self._pictures.append(bgr(picture))
            return
        if self._writer is None:
            cv2 = import_cv2()
            height, width = _even(picture).shape[:2]
            # Every build of OpenCV can write MPEG-4; H.264 needs a library that it may not include.
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
                    made = animation(self._pictures, self._stride / self.fps)
                    cv2 = import_cv2()
                    # By default, OpenCV dithers with a fixed palette, which distorts the colors around edges.
                    options = [cv2.IMWRITE_GIF_DITHER, _GIF_DITHER]
                    if not cv2.imwriteanimation(str(self._beside), made, options):
                        raise ConfigurationError("OpenCV cannot write this GIF. Choose an .mp4.")
                with writing(self.path, ConfigurationError):
                    os.replace(self._beside, self.path)
        finally:
            self._ending.close()


def _even(picture: np.ndarray) -> np.ndarray:
    """The frame with an even height and width. The codec would cut off an odd row or column."""
    height, width = picture.shape[:2]
    return np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
