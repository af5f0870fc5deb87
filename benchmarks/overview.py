"""Draws the animation of the README: the film of an agent, its learning curve, and what its model imagines.

    worldflux train ... --run RUN
    worldflux eval RUN --video film.mp4
    worldflux imagine RUN --output imagination
    python benchmarks/overview.py RUN film.mp4 imagination/imagination.mp4 docs/pictures/overview.gif

The curve grows with the frames; the film and the imagination are shown from their beginnings.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import tyro
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from worldflux.cli.runs import EVALUATIONS_FILE, read_evaluations

HEIGHT, DPI = 280, 100


def frames_of(path: Path, count: int) -> list[np.ndarray]:
    """The frames of a video, stretched or thinned to `count` frames of the height of the animation."""
    film, frames = cv2.VideoCapture(str(path)), []
    while (read := film.read())[0]:
        frame = cv2.cvtColor(read[1], cv2.COLOR_BGR2RGB)
        width = round(frame.shape[1] * HEIGHT / frame.shape[0])
        frames.append(cv2.resize(frame, (width, HEIGHT), interpolation=cv2.INTER_AREA))
    if not frames:
        raise SystemExit(f"{path} has no frames.")
    return [frames[round(i)] for i in np.linspace(0, len(frames) - 1, count)]


def curve(steps: np.ndarray, scores: np.ndarray, shown: float) -> np.ndarray:
    """The learning curve, of which a share is drawn."""
    figure = Figure(figsize=(HEIGHT * 1.25 / DPI, HEIGHT / DPI), dpi=DPI, layout="constrained")
    canvas, axes = FigureCanvasAgg(figure), figure.subplots()
    until = steps[0] + shown * (steps[-1] - steps[0])
    inside = steps <= until
    x, y = np.append(steps[inside], until), np.append(scores[inside], np.interp(until, steps, scores))
    axes.plot(steps, scores, color="lightgray")
    axes.plot(x, y, color="tab:blue", linewidth=2)
    axes.plot(x[-1], y[-1], "o", color="tab:orange")
    axes.set(xlim=(0, steps[-1] * 1.04), xlabel="environment steps", title="return of evaluations")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def main(run: Path, film: Path, imagination: Path, output: Path, /, *, frames: int = 80, fps: int = 10) -> None:
    """Writes the animation.

    Args:
        run: Directory of the run.
        film: Video of an episode.
        imagination: Video of `worldflux imagine`.
        output: GIF to write.
        frames: Number of frames.
        fps: Frames per second.
    """
    rows = read_evaluations(run / EVALUATIONS_FILE)
    steps, scores = np.array([row.step for row in rows]), np.array([row.score for row in rows])
    played, imagined = frames_of(film, frames), frames_of(imagination, frames)
    gap = np.full((HEIGHT, 8, 3), 255, np.uint8)
    shares = np.clip(np.linspace(0.0, 1.25, frames), 0.0, 1.0)
    pictures = [
        Image.fromarray(np.hstack([played[i], gap, curve(steps, scores, shares[i])[:HEIGHT], gap, imagined[i]]))
        for i in range(frames)
    ]
    palette = pictures[frames // 2].quantize(96)
    pictures = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
    pictures[0].save(output, save_all=True, append_images=pictures[1:], duration=1000 // fps, loop=0, optimize=True)
    print(f"{output}: {output.stat().st_size / 1e6:.2f} MB, {pictures[0].size[0]}x{pictures[0].size[1]}")


if __name__ == "__main__":
    tyro.cli(main)
