"""Numbers that users give and files hold, checked."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from worldflux.errors import ConfigurationError
from worldflux.training.config import whole_number


def count(name: str, value: Any, least: int, *, below: int = 2**63) -> int:
    """`value` as an int, if it is a whole number from `least` and below a power of two, at most what fits 64 bits."""
    number = whole_number(name, value, least)
    if number >= below:
        limit = f"{below:.0e}".replace("e+", "e")
        raise ConfigurationError(f"{name} is above {limit}, expected a whole number below 2**{below.bit_length() - 1}.")
    return number


def finite_number(name: str, value: Any) -> float:
    """`value` as a finite float, if it is a number of Python, NumPy or torch, and no bool."""
    try:
        number = float(value) if hasattr(value, "__float__") else math.nan
    except (OverflowError, TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool | np.bool_) or not math.isfinite(number):
        raise ConfigurationError(f"{name} is {value!r}, expected a finite number.")
    return number
