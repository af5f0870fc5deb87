"""Columns of pictures: frames of videos, and compressed images. No picture is decoded before its size is known."""

from __future__ import annotations

import struct
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

_MOST_PIXELS = 2**25
"""Pixels of the largest picture that is decoded, 100 MB of memory, if the source does not say how large they are."""


def checked_pixels(name: str, height: int, width: int, stated: int | None) -> None:
    """Raises a `BufferError` for a picture that is not as large as its source says, or is too large for any source.

    Args:
        name: What has the picture, in messages.
        height: Its height.
        width: Its width.
        stated: Number of pixels that it should have; None if that is not known.
    """
    if stated is not None and height * width != stated:
        raise BufferError(
            f"{name} has a picture of {height} x {width} pixels, and the data set's description says {stated} pixels. "
            "One of them is wrong."
        )
    if height * width > _MOST_PIXELS:
        raise BufferError(
            f"{name} has a picture of {height} x {width} pixels, expected at most {_MOST_PIXELS:,} pixels. Resize the "
            "pictures before."
        )


def decoded_image(name: str, data: bytes, stated: int | None, flags: int) -> np.ndarray:
    """A PNG or JPEG image, red first. `[H, W, C]` or `[H, W]`

    Args:
        name: What has the image, in messages.
        data: The compressed image.
        stated: Number of pixels that it should have; None if that is not known.
        flags: As for `cv2.imdecode`.

    Raises:
        BufferError: If it cannot be decoded, or has another size.
    """
    size = _size_in_header(data)
    if size is not None:
        checked_pixels(name, *size, stated)
        image = import_cv2().imdecode(np.frombuffer(data, np.uint8), flags)
    if size is None or image is None:
        raise BufferError(f"{name} has a row without a PNG or JPEG image that can be decoded.")
    return np.asarray(image[..., ::-1] if image.ndim == 3 else image)  # OpenCV has blue first


def _size_in_header(data: bytes) -> tuple[int, int] | None:
    """Height and width in the header of a PNG or JPEG image; None if it has none."""
    try:
        if data[:8] == b"\x89PNG\r\n\x1a\n":
            width, height = struct.unpack(">II", data[16:24])
            return height, width
        at = 2 if data[:2] == b"\xff\xd8" else len(data)
        while at < len(data):
            if data[at] != 0xFF:
                return None
            marker = data[at + 1]
            if marker == 0xFF:  # a byte to fill
                at += 1
            elif marker == 0x01 or 0xD0 <= marker <= 0xD8:  # markers without content
                at += 2
            elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
                height, width = struct.unpack(">HH", data[at + 5 : at + 9])
                return height, width
            else:
                at += 2 + int(struct.unpack(">H", data[at + 2 : at + 4])[0])
    except (IndexError, struct.error):  # it is cut short
        pass
    return None


class VideoColumn:
    """The frames of videos, decoded in the order of the rows. `[N, H, W, 3]` uint8

    Args:
        place: The file and the number of the frame of a row.
        count: Number of rows.
        stated: Number of pixels that each frame should have; None if that is not known.
        notes: Gets a note about the first video that has frames of which there is no row.
    """

    def __init__(self, place: Callable[[int], Place], count: int, stated: int | None, notes: list[str]) -> None:
        self._place, self._count, self._stated, self._notes = place, count, stated, notes
        self._av: Any = imported("av", "lerobot", "Reading videos")
        self._path: Path | None = None
        self._frames: Iterator[Any] = iter(())
        self._at = -1  # number of the frame that was decoded last
        self._last: Any = None
        self._is_noted = False
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
            if not self._is_noted:
                self._compare(row)
        return found

    def _compare(self, row: int) -> None:
        """Notes if frames follow that of a row, and neither the next row nor any other has the next of them."""
        path, number = self._place(row)
        following, next_number = self._place(row + 1) if row + 1 < self._count else (None, 0)
        if following == path and next_number <= number + 1:
            return
        try:
            self._last, self._at = next(self._frames), self._at + 1
        except (StopIteration, OSError, ValueError):
            return
        self._is_noted = True
        self._notes.append(
            f"{path.name} goes on after frame {number}, for which there is the last row of an episode: its other "
            "frames are left out, and so may be those of further videos. If rows were removed from the middle of "
            "episodes, pictures and rows do not belong together: compare them."
        )

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
        except BufferError:
            raise
        except (OSError, ValueError) as error:  # errors of PyAV are one or the other
            raise BufferError(f"{path.name} cannot be decoded: {error}") from error

    def _decoded(self, path: Path) -> Iterator[Any]:
        with self._av.open(str(path)) as container:
            if not container.streams.video:
                raise BufferError(f"{path.name} has no pictures in it.")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            checked_pixels(path.name, stream.codec_context.height, stream.codec_context.width, self._stated)
            # A frame may be larger than the header says: the decoder allocates none beyond this.
            most = self._stated or stream.codec_context.height * stream.codec_context.width
            stream.codec_context.options = {"max_pixels": str(most)}
            yield from container.decode(video=0)


class PictureColumn:
    """Images that are compressed one by one, such as PNG. `[N, H, W, C]` uint8

    Args:
        name: What the source is called in messages.
        take: Rows of the images, as arrays of pyarrow with their `bytes`.
        count: Number of rows.
        stated: Number of pixels that each image should have; None if that is not known.
    """

    def __init__(self, name: str, take: Callable[[slice], Iterable[Any]], count: int, stated: int | None) -> None:
        self._name, self._take, self._count, self._stated = name, take, count, stated
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
        color = import_cv2().IMREAD_COLOR
        for rows in self._take(part):
            for row in rows:
                data = (row.as_py() or {}).get("bytes")
                yield decoded_image(self._name, data or b"", self._stated, color)
