"""Charts of a report as embedded pictures."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from worldflux.cli.report.page import Picture
from worldflux.diagnostics.plots.style import lay_out, new_figure
from worldflux.models.health import HealthMetric, Threshold

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LARGEST_SVG = 150_000
"""Bytes above which a chart is embedded as a PNG, which then is smaller."""
_WIDE_RANGE = 50
"""Ratio of the largest to the median value above which an axis is logarithmic, if all values are positive."""

Lines = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""Steps and values of each run, by its name. `[N]` each"""


def picture(figure: Figure, alt: str, **texts: Any) -> Picture:
    """A figure as a picture: an SVG, or a PNG if that would be large.

    Args:
        figure: Figure to embed.
        alt: What it shows.
        **texts: Other fields of `Picture`.
    """
    import matplotlib

    lay_out(figure)
    drawn = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "worldflux"}):  # the same identifiers every time
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    if len(drawn.getvalue()) <= _LARGEST_SVG:
        return Picture(drawn.getvalue(), "image/svg+xml", alt, **texts)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=120)
    return Picture(drawn.getvalue(), "image/png", alt, **texts)


def metric_chart(
    name: str, lines: Lines, title: str, meaning: str, unit: str, threshold: Threshold | None = None
) -> Picture:
    """A chart of a logged metric over the steps.

    Args:
        name: Name of the metric in the log.
        lines: Its values in each run.
        title: Title of the chart.
        meaning: What the metric is.
        unit: Unit of the steps.
        threshold: Limit of a health metric, which is drawn, too.
    """
    figure = new_figure(3.9, 2.3)  # first, because its error names the extra with matplotlib
    from matplotlib.ticker import EngFormatter

    figure.set_layout_engine(None)  # measuring all texts would take longer than drawing
    axes = figure.add_axes((0.15, 0.2, 0.82, 0.74))
    for number, (label, (steps, values)) in enumerate(lines.items()):
        marker: dict[str, Any] = {"marker": "o", "markersize": 4} if len(steps) == 1 else {}
        axes.plot(steps, values, color=f"C{number}", linewidth=1.4, label=label, **marker)
    if threshold is not None:
        axes.axhline(threshold.value, color="#a6330a", linewidth=1.2, linestyle="--", label="limit")
    elif _is_wide([values for _, values in lines.values()]):
        axes.set_yscale("log")
    if axes.get_yscale() == "linear":
        axes.ticklabel_format(axis="y", scilimits=(-3, 5), useMathText=True)
        axes.yaxis.get_offset_text().set_fontsize(8)
    if len(lines) > 1:
        axes.legend(fontsize=7, frameon=False)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlim(left=0)
    axes.set_xlabel(unit, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    found = {label: float(values[-1]) for label, (_, values) in lines.items()}
    ends = ", ".join(f"{f'{label}: ' if len(found) > 1 else ''}{value:.3g}" for label, value in found.items())
    alt = f"Line chart of {name} over {unit}; last value {ends}."
    if threshold is None:
        return picture(figure, alt, title=title, caption=f"{meaning} ({name})")
    bad = [HealthMetric(name, value, threshold) for value in found.values()]
    bad = [metric for metric in bad if metric.is_bad]
    state = f"The last value is {'bad' if bad else 'good'}; values {threshold.bad} {threshold.value:g} are bad."
    advice = f" {threshold.advice}" if bad else ""
    return picture(figure, alt, title=title, caption=f"{meaning} ({name}). {state}{advice}", bad=bool(bad))


def _is_wide(values: Sequence[np.ndarray]) -> bool:
    """Whether small values would vanish beside large ones on a linear axis."""
    known = np.concatenate(values)
    known = known[np.isfinite(known)]
    return len(known) > 1 and bool(known.min() > 0) and float(known.max()) > _WIDE_RANGE * float(np.median(known))
