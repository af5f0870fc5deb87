"""The errors that worldflux raises for what its users can get wrong.

Every class derives from `WorldFluxError` and from the built-in that fits, so that `except ValueError` keeps working.
"""

from __future__ import annotations

from collections.abc import Iterable


class WorldFluxError(Exception):
    """Base of every error that worldflux raises on purpose."""


class ConfigurationError(WorldFluxError, ValueError):
    """Raised when a name, a field or a combination of settings cannot be used."""


class ShapeMismatchError(WorldFluxError, ValueError):
    """Raised when an array has another shape or dtype than its place expects."""


class BufferError(WorldFluxError, ValueError):
    """Raised when a replay buffer cannot store, give or read what was asked for."""


class CheckpointError(WorldFluxError, RuntimeError):
    """Raised when saved weights or a saved training state cannot be read or do not fit."""


class TrainingError(WorldFluxError, RuntimeError):
    """Raised when training or acting cannot go on, for example at the first loss or action that is not finite."""


class MissingDependencyError(WorldFluxError, ImportError):
    """Raised when an optional package is needed and not installed; the message names the extra."""


def nearest(name: str, options: Iterable[str]) -> str:
    """End of an "Unknown ..." sentence: `"; did you mean 'x'?"`, or `"."` where nothing comes close.

    Args:
        name: What the user wrote.
        options: Every name that would have been right.

    Returns:
        Text to append directly to the quoted name; it brings its own punctuation.
    """
    import difflib  # here, because every process imports this module

    lowered = {option.lower(): option for option in options}
    matches = difflib.get_close_matches(str(name).lower(), list(lowered), n=1, cutoff=0.5)
    if not matches:  # abbreviations: lr of learning_rate
        matches = [option for option in lowered if "".join(word[:1] for word in option.split("_")) == str(name).lower()]
    return f"; did you mean '{lowered[matches[0]]}'?" if matches else "."
