"""Reading what other projects wrote: the papers' own checkpoints."""

from worldflux.interop.dreamerv3 import load_official_dreamerv3
from worldflux.interop.tdmpc2 import load_official_tdmpc2

__all__ = ["load_official_dreamerv3", "load_official_tdmpc2"]
