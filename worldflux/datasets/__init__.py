"""Data sets that others recorded, as replay buffers to train from, and checks of what is in them.

Names are imported when they are first used, so that `import worldflux.datasets` stays light.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from worldflux.lazy import lazy_exports

if TYPE_CHECKING:
    from worldflux.datasets.checks.findings import Finding
    from worldflux.datasets.detection import detect
    from worldflux.datasets.linting import Report, lint
    from worldflux.datasets.loading import FORMATS, load

__all__ = ["FORMATS", "Finding", "Report", "detect", "lint", "load"]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "worldflux.datasets.detection": ["detect"],
        "worldflux.datasets.checks.findings": ["Finding"],
        "worldflux.datasets.linting": ["Report", "lint"],
        "worldflux.datasets.loading": ["FORMATS", "load"],
    },
)
