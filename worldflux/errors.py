"""The errors that worldflux raises for mistakes of its users.

Every class derives from `WorldFluxError` and from the matching built-in error, so that `except ValueError` works, too.
"""

from __future__ import annotations

from collections.abc import Iterable


class WorldFluxError(Exception):
    """Base class of all errors that worldflux raises deliberately."""


class ConfigurationError(WorldFluxError, ValueError):
    """Raised when a name, a field or a combination of settings cannot be used."""


class ShapeMismatchError(WorldFluxError, ValueError):
    """Raised when an array does not have the expected shape or dtype."""


class BufferError(WorldFluxError, ValueError):
    """Raised when a replay buffer cannot store, sample or load the requested data."""


class CheckpointError(WorldFluxError, RuntimeError):
    """Raised when saved weights or a saved training state cannot be read or do not fit."""


class TrainingError(WorldFluxError, RuntimeError):
    """Raised when training or acting cannot continue, for example at the first loss or action that is not finite."""


class MissingDependencyError(WorldFluxError, ImportError):
    """Raised when an optional package is required but not installed; the message names the extra to install."""


def nearest(name: str, options: Iterable[str]) -> str:
    """Returns the end of an "Unknown ..." sentence: `"; did you mean 'x'?"`, or `"."` if no option is similar.

    Args:
        name: Name that the user wrote.
        options: All valid names.

    Returns:
        Text to append directly to the quoted name, punctuation included.
    """
    import difflib  # here, because every process imports this module

    lowered = {option.lower(): option for option in options}
    matches = difflib.get_close_matches(str(name).lower(), list(lowered), n=1, cutoff=0.5)
    if not matches:  # abbreviations, such as lr for learning_rate
        matches = [option for option in lowered if "".join(word[:1] for word in option.split("_")) == str(name).lower()]
    return f"; did you mean '{lowered[matches[0]]}'?" if matches else "."
