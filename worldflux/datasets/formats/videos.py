"""Columns of pictures: frames of videos, and compressed images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from worldflux.datasets.columns import imported
from worldflux.diagnostics.plots.frames import import_cv2
from worldflux.errors import BufferError
from worldflux.reading import open_regular

Place = tuple[Path, int]
"""A file, and the number of a frame in it."""


class VideoColumn:
    """The frames of videos, decoded in the order of the rows. `[N, H, W, 3]` uint8

    Args:
        place: The file and the number of the frame of a row.
        count: Number of rows.
    """

    def __init__(self, place: Callable[[int], Place], count: int) -> None:
        self._place, self._count = place, count
        self._av: Any = imported("av", "lerobot", "Reading videos")
        self._path: Path | None = None
        self._frames: Iterator[Any] = iter(())
        self._at = -1  # number of the frame that was decoded last
        self._last: Any = None
        self.dtype = np.dtype(np.uint8)
        self.shape = (count, *self._frame(0).shape)

    def __getitem__(self, part: slice) -> np.ndarray:
        begin, end, _ = part.indices(self._count)
        found = np.empty((end - begin, *self.shape[1:]), np.uint8)
        for row in range(begin, end):
            frame = self._frame(row)
            if frame.shape != self.shape[1:]:
                raise BufferError(f"{self._path} has frames of {frame.shape}, expected {self.shape[1:]} as before.")
            found[row - begin] = frame
        return found

    def _frame(self, row: int) -> np.ndarray:
        path, number = self._place(row)
        try:
            if path != self._path or number < self._at:
                open_regular(path).close()
                self._path, self._at = path, -1
                self._frames = self._decoded(path)
            while self._at < number:
                self._last = next(self._frames)
                self._at += 1
            return self._last.to_ndarray(format="rgb24")
        except StopIteration:
            raise BufferError(f"{path.name} has {self._at + 1} frames, and frame {number} was asked for.") from None
        except FileNotFoundError:
            raise BufferError(
                f"There is no video {path}. Download the videos, or leave the camera out: obs='observation.state'."
            ) from None
        except (OSError, ValueError) as error:  # errors of PyAV are one or the other
            raise BufferError(f"{path.name} cannot be decoded: {error}") from error

    def _decoded(self, path: Path) -> Iterator[Any]:
        with self._av.open(str(path)) as container:
            container.streams.video[0].thread_type = "AUTO"
            yield from container.decode(video=0)


class PictureColumn:
    """Images that are compressed one by one, such as PNG. `[N, H, W, C]` uint8

    Args:
        name: What the source is called in messages.
        take: Rows of the images, as arrays of pyarrow with their `bytes`.
        count: Number of rows.
    """

    def __init__(self, name: str, take: Callable[[slice], Iterable[Any]], count: int) -> None:
        self._name, self._take, self._count, self._cv2 = name, take, count, import_cv2()
        self.dtype = np.dtype(np.uint8)
        self.shape: tuple[int, ...] = (count, *next(self._decoded(slice(0, 1))).shape)

    def __getitem__(self, part: slice) -> np.ndarray:
        begin, end, _ = part.indices(self._count)
        found = np.empty((end - begin, *self.shape[1:]), np.uint8)
        for number, image in enumerate(self._decoded(slice(begin, end))):
            if image.shape != self.shape[1:]:
                raise BufferError(f"{self._name} has images of {image.shape}, expected {self.shape[1:]} as before.")
            found[number] = image
        return found

    def _decoded(self, part: slice) -> Iterator[np.ndarray]:
        for rows in self._take(part):
            for row in rows:
                data = (row.as_py() or {}).get("bytes")
                image = self._cv2.imdecode(np.frombuffer(data, np.uint8), self._cv2.IMREAD_COLOR) if data else None
                if image is None:
                    raise BufferError(f"{self._name} has a row without an image that can be decoded.")
                yield image[..., ::-1]  # OpenCV has blue first
