"""Data sets that others recorded, as replay buffers to train from.

Names are imported when they are first used, so that `import worldflux.datasets` stays light.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from worldflux.lazy import lazy_exports

if TYPE_CHECKING:
    from worldflux.datasets.detection import detect
    from worldflux.datasets.loading import FORMATS, load

__all__ = ["FORMATS", "detect", "load"]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "worldflux.datasets.detection": ["detect"],
        "worldflux.datasets.loading": ["FORMATS", "load"],
    },
)
