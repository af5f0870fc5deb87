"""Pictures of open-loop predictions: the course of what was predicted, errors over the horizon, calibration.

    found = open_loop(model, buffer.sample(256, 50), context=5)
    for name, figure in figures(found, found.errors()).items():
        figure.savefig(f"{name}.png")

What is true is black, what the model expects is orange and dashed, and what it is compared with is grey.
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
    """All pictures of some predictions that stand still.

    - `"imagination"`: entries of vectors, if the model pictures any, and the reward, in the windows that show most;
    - `"imagination-strip"`: some rows of these windows, true, predicted and error, for each image that it pictures;
    - `"errors"`, `"rewards"`, `"continues"`: how far the model is off, and whether it is right on average.

    Args:
        found: Predictions.
        errors: Of these.
        shown: Windows in the first two.
        title: Said above all of them, such as whose predictions of what these are.

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
    """The name of an image's picture: with its key only where there are several."""
    return name if len(keys) == 1 else f"{name}-{key}".replace("/", "-")
