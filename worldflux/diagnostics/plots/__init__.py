"""Plots of open-loop predictions: time series, errors over the horizon, calibration and images.

    found = open_loop(model, buffer.sample(256, 50), context=5)
    for name, figure in figures(found, found.errors()).items():
        figure.savefig(f"{name}.png")

Recorded data are black, predictions are orange and dashed, and the baseline is grey.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from worldflux.diagnostics.open_loop import OpenLoop, PredictionError
from worldflux.diagnostics.plots.calibration import draw_continues, draw_rewards
from worldflux.diagnostics.plots.frames import image_keys, longest_windows
from worldflux.diagnostics.plots.horizon import draw_errors
from worldflux.diagnostics.plots.strip import draw_strip
from worldflux.diagnostics.plots.time_series import draw_time_series, vector_entries

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def figures(
    found: OpenLoop, errors: Mapping[str, PredictionError], *, shown: int = 4, title: str = ""
) -> dict[str, Figure]:
    """All plots of open-loop predictions, except for the videos.

    - `"imagination"`: entries of vectors, if the model decodes any, and the reward, in the longest windows;
    - `"imagination-strip"`: some rows of these windows, true, predicted and error, for each image that is decoded;
    - `"errors"`, `"rewards"`, `"continues"`: prediction errors, and calibration of rewards and terminations.

    Args:
        found: Open-loop predictions.
        errors: Errors of these predictions.
        shown: Number of windows in the first two plots.
        title: Title of every plot, such as the agent and the data.

    Raises:
        MissingDependencyError: If matplotlib is not installed.
    """
    windows = longest_windows(found, shown)
    images = image_keys(found)
    made: dict[str, Figure] = {}
    made["imagination"] = draw_time_series(found, vector_entries(found), windows, title)
    for key in images:
        made[picture_name("imagination-strip", key, images)] = draw_strip(found, key, windows[:3], title)
    made["errors"] = draw_errors(found, errors, title)
    made["rewards"] = draw_rewards(found, title)
    made["continues"] = draw_continues(found, title)
    return made


def picture_name(name: str, key: str, keys: Sequence[str]) -> str:
    """The file name for an image of the observation, which contains its key if there are several."""
    return name if len(keys) == 1 else f"{name}-{key}".replace("/", "-")
