"""Images at some steps, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from worldflux.diagnostics.open_loop import OpenLoop
from worldflux.diagnostics.plots.frames import ROWS, tiles, visible
from worldflux.diagnostics.plots.style import ending, new_figure, set_title

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_strip(found: OpenLoop, key: str, windows: Sequence[int], title: str = "") -> Figure:
    """Some rows of each window as images: true, predicted and error, one below the other. See `frames.tiles`."""
    horizon = found.steps.shape[1]
    ahead = sorted({step for step in (1, 2, 3, 5, 8, 12, 20, 30) if step < horizon} | {horizon})
    chosen = sorted({1 - found.context, 0}) + ahead
    rows = [step + found.context - 1 for step in chosen]
    seen = visible(found)
    figure = new_figure(max(1.05 * len(rows) + 1.0, 5.0), 3.35 * len(windows) + 1.0)
    grid = figure.subplots(len(windows), 1, squeeze=False)[:, 0]
    for number, (axes, window) in enumerate(zip(grid, windows, strict=True), 1):
        parts = tiles(found, key, window)[:, rows]
        parts[:, ~seen[window, rows]] = 190
        height, width = parts.shape[2:4]
        gap = max(width // 16, 1)
        split = sum(step < 1 for step in chosen)
        left = np.arange(len(rows)) * (width + gap) + (np.arange(len(rows)) >= split) * 3 * gap
        sheet = np.full((3 * (height + gap) - gap, left[-1] + width, 3), 255, np.uint8)
        for row, pictures in enumerate(parts):
            for x, picture in zip(left, pictures, strict=True):
                sheet[row * (height + gap) :][:height, x : x + width] = picture
        axes.imshow(sheet, interpolation="nearest" if height < 128 else "antialiased")
        axes.axvline(left[split] - 2 * gap, color="black", linewidth=1)
        axes.set_yticks(np.arange(3) * (height + gap) + height / 2, ROWS, fontsize=9)
        axes.set_xticks(left + width / 2, [f"{step:+d}" if step else "0" for step in chosen], fontsize=9)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_title(f"window {number}{ending(found, window)}", fontsize=9)
    grid[-1].set_xlabel(
        "steps ahead; the model sees the rows left of the line, and only the actions right of it", fontsize=9
    )
    set_title(figure, title, f"{key}: black is no error, white the largest possible; grey: the episode is over")
    return figure
