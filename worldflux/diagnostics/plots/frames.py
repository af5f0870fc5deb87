"""Videos of open-loop predictions: the true images, the predicted ones, and the difference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from worldflux.diagnostics.open_loop import OpenLoop
from worldflux.errors import MissingDependencyError
from worldflux.replay.batch import by_key

FPS = 10
ROWS = ("true", "predicted", "error")
_SIDE = (128, 256)
"""Range of the longer side in pixels. Smaller images are enlarged by a whole number, larger ones reduced."""
_MARGIN, _HEADER, _GAP, _FOOTER = 84, 30, 6, 22
"""Pixels for the names of the rows, for the header, between images, and for the bar below."""
_BACKGROUND, _FAINT, _TEXT = (24, 24, 24), (70, 70, 70), (255, 255, 255)
_SEEN, _IMAGINED = (130, 130, 130), (255, 170, 60)
"""Colours of the bar, and of the frame around predictions."""


def image_keys(found: OpenLoop) -> list[str]:
    """Keys of the observation that are images and that the model decodes."""
    recorded = by_key(found.real.obs)
    return [key for key in found.obs if recorded[key].dtype == torch.uint8]


def visible(found: OpenLoop) -> np.ndarray:
    """Whether a row is in the episode that the context ends in, and its observation was recorded. `[B, T]` bool"""
    real, context = found.real, found.context
    assert real.is_first is not None
    # A row of the context belongs to it if no later one starts an episode.
    later = real.is_first[:, 1:context].flip(1).cumsum(1).flip(1) == 0
    before = torch.cat([later, torch.ones_like(found.arrived[:, :1])], 1)
    if real.obs_mask is not None:
        before = before & real.obs_mask[:, :context]
    return torch.cat([before, found.arrived], 1).cpu().numpy()


def longest_windows(found: OpenLoop, count: int) -> list[int]:
    """The windows with the most visible rows, without duplicates; the first of those that have equally many."""
    chosen: dict[int, int] = {}
    rows = None if found.real.row_ids is None else found.real.row_ids[:, 0].tolist()
    for window in np.argsort(-visible(found).sum(1), kind="stable").tolist():
        chosen.setdefault(window if rows is None else rows[window], window)
    return list(chosen.values())[:count]


def tiles(found: OpenLoop, key: str, window: int) -> np.ndarray:
    """True and predicted images of a window and their difference; black if nothing was recorded or predicted.

    The difference is black where the prediction is right, and white where a channel is wrong by its whole range. Only
    the newest of stacked frames and the first of several futures are shown. `[3, T, H, W, 3]` uint8
    """
    recorded = by_key(found.real.obs)[key][window].cpu().numpy()
    predicted = found.obs[key][0, window].clamp(0, 1).mul(255).round().byte().cpu().numpy()
    true, expected = _rgb(recorded), _rgb(predicted)
    off = np.abs(true.astype(np.int16) - expected).max(-1, keepdims=True).astype(np.uint8)
    both = np.stack([true, expected, np.broadcast_to(off, true.shape)])
    both[:, ~visible(found)[window]] = 0
    return both


def _rgb(images: np.ndarray) -> np.ndarray:
    """RGB images from channel-first ones; the last of several stacked frames. `[T, C, H, W]` to `[T, H, W, 3]`"""
    channels = images.shape[1]
    newest = images[:, -3:] if channels % 3 == 0 else images[:, -1:].repeat(3, 1)
    return np.ascontiguousarray(newest.transpose(0, 2, 3, 1))


def film(found: OpenLoop, key: str, windows: Sequence[int]) -> np.ndarray:
    """One frame for each row of the windows, first those of the context, then the predicted ones.

    The true image, the predicted one and the error (see `tiles`) stand one below the other, the windows side by side.
    Predictions have an orange frame, and a bar below shows the progress.

    Args:
        found: Open-loop predictions.
        key: Key of an image in the observations.
        windows: Numbers of the windows that are shown.

    Returns:
        RGB frames; height and width are even, as video codecs require. `[T, height, width, 3]` uint8
    """
    cv2 = import_cv2()
    shown = [tiles(found, key, window) for window in windows]
    seen = visible(found)[list(windows)]
    _, length, height, width, _ = shown[0].shape
    tall, wide = _scaled(height, width)
    canvas = np.empty(
        (
            _even(_HEADER + len(ROWS) * (tall + _GAP) + _FOOTER),
            _even(_MARGIN + max(len(shown) * (wide + _GAP), 150) + _GAP),
            3,
        ),
        np.uint8,
    )
    canvas[:] = _BACKGROUND
    for number, name in enumerate(ROWS):
        _write(canvas, name, 6, _HEADER + number * (tall + _GAP) + tall // 2 + 4)
    frames = np.repeat(canvas[None], length, 0)
    for t, frame in enumerate(frames):
        ahead = t - found.context + 1
        text = f"context {t + 1}/{found.context}: seen" if ahead < 1 else f"open loop: {ahead} ahead"
        _write(frame, text, _MARGIN, 20)
        for column, parts in enumerate(shown):
            left = _MARGIN + column * (wide + _GAP)
            for number in range(len(ROWS)):
                top = _HEADER + number * (tall + _GAP)
                place = frame[top : top + tall, left : left + wide]
                if not seen[column, t]:
                    place[:] = _FAINT
                    if number == 0:
                        _write(frame, "not in" if ahead < 1 else "episode", left + 8, top + tall // 2 - 4)
                        _write(frame, "episode" if ahead < 1 else "over", left + 8, top + tall // 2 + 14)
                    continue
                enlarging = tall >= height
                way = cv2.INTER_NEAREST if enlarging else cv2.INTER_AREA
                place[:] = cv2.resize(parts[number, t], (wide, tall), interpolation=way)
                if number == 1 and ahead > 0:
                    cv2.rectangle(frame, (left - 2, top - 2), (left + wide + 1, top + tall + 1), _IMAGINED, 2)
        _bar(frame, t, length, found.context)
    return frames


def _bar(frame: np.ndarray, t: int, length: int, context: int) -> None:
    """Draws the progress bar: the context in grey, the predicted rows in orange."""
    bottom, right = frame.shape[0] - 8, frame.shape[1] - _GAP
    edges = np.linspace(_MARGIN, right, length + 1).round().astype(int)
    frame[bottom - 6 : bottom, edges[0] : right] = _FAINT
    frame[bottom - 6 : bottom, edges[0] : edges[min(t + 1, context)]] = _SEEN
    if t >= context:
        frame[bottom - 6 : bottom, edges[context] : edges[t + 1]] = _IMAGINED
    frame[bottom - 10 : bottom + 4, edges[context] - 1 : edges[context] + 1] = _TEXT


def _scaled(height: int, width: int) -> tuple[int, int]:
    least, most = _SIDE
    side = max(height, width)
    factor = max(least // side, 1) if side <= most else most / side
    return max(round(height * factor), 1), max(round(width * factor), 1)


def _even(size: int) -> int:
    return size + size % 2


def _write(frame: np.ndarray, text: str, x: int, y: int) -> None:
    cv2 = import_cv2()
    cv2.putText(frame, text, (x, y), cv2.FONT_HERSHEY_SIMPLEX, 0.45, _TEXT, 1, cv2.LINE_AA)


def as_animated_png(frames: np.ndarray, fps: float = FPS) -> bytes | None:
    """A looping, lossless animation that browsers show like any other image; None if OpenCV is older than 4.11.

    OpenCV's GIFs have a fixed table of colours, in which errors could not be recognised.

    Args:
        frames: RGB frames. `[T, height, width, 3]` uint8
        fps: Frames per second.
    """
    cv2 = import_cv2()
    if not hasattr(cv2, "imencodeanimation"):
        return None
    made, data = cv2.imencodeanimation(".png", animation([bgr(frame) for frame in frames], 1 / fps))
    return bytes(data) if made else None


def animation(frames: Sequence[np.ndarray], seconds: float) -> Any:
    """An endless animation for OpenCV to write.

    Args:
        frames: BGR frames. `[height, width, 3]` uint8 each
        seconds: Duration of each frame.
    """
    made = import_cv2().Animation()
    made.frames = list(frames)
    made.durations = [round(1000 * seconds)] * len(frames)
    made.loop_count = 0
    return made


def bgr(frame: np.ndarray) -> np.ndarray:
    """A frame with its channels in the order of OpenCV."""
    return np.ascontiguousarray(frame[..., ::-1])


def import_cv2() -> Any:
    """The module `cv2`.

    Raises:
        MissingDependencyError: If it cannot be imported.
    """
    try:
        import cv2
    except ImportError as error:
        raise MissingDependencyError(
            f"Videos need opencv-python, which cannot be imported: {error}. pip install opencv-python; on slim Linux "
            'machines also "apt-get install libgl1 libglib2.0-0".'
        ) from error
    return cv2
