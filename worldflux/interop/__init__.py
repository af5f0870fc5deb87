"""Reading what other projects wrote: the papers' own checkpoints."""

from worldflux.interop.dreamerv3 import load_official_dreamerv3

__all__ = ["load_official_dreamerv3"]
