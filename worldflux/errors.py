"""The errors that worldflux raises for mistakes of its users.

Every class derives from `WorldFluxError` and from the matching built-in error, so that `except ValueError` works, too.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


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


class WorkerError(WorldFluxError, ConnectionError):
    """Raised when the process of an environment has ended; the message gives the cause if it is known."""


class StoppedError(WorldFluxError, RuntimeError):
    """Raised in an evaluation by a callback of an agent that was asked to stop by Ctrl-C or SIGTERM."""


class HubError(WorldFluxError, ConnectionError):
    """Raised when the Hugging Face Hub cannot be reached, has no such repository, or refuses a request."""


class MissingDependencyError(WorldFluxError, ImportError):
    """Raised when an optional package is required but not installed; the message names the extra to install."""


def installed_from() -> dict[str, Any]:
    """Returns what pip recorded about where it installed worldflux from (PEP 610); empty for a package index."""
    import json
    from importlib import metadata

    try:
        origin = json.loads(metadata.distribution("worldflux").read_text("direct_url.json") or "{}")
    except (metadata.PackageNotFoundError, ValueError):
        return {}
    return origin if isinstance(origin, dict) else {}


def install_hint(extra: str) -> str:
    """Returns the command that installs an extra of worldflux from where worldflux itself was installed.

    That is a checkout (`pip install "/home/ann/worldflux[dmc]"`), a repository or file that pip was given the address
    of, or, where pip recorded no address, the package index. All messages get the command from here.

    Args:
        extra: Name of the extra, or several names separated by commas.
    """
    from urllib.parse import urlparse  # here, because every process imports this module
    from urllib.request import url2pathname

    origin = installed_from()
    url = str(origin.get("url", ""))
    if "dir_info" in origin and url.startswith("file:"):
        return f'pip install "{url2pathname(urlparse(url).path)}[{extra}]"'
    if "vcs_info" in origin:
        commit = origin["vcs_info"].get("requested_revision") or origin["vcs_info"].get("commit_id")
        url = f"{origin['vcs_info'].get('vcs', 'git')}+{url}{f'@{commit}' if commit else ''}"
    return f'pip install "worldflux[{extra}]{f" @ {url}" if url else ""}"'


def a_type(value: object) -> str:
    """Returns the type of a value as messages name it: "a dict", "an int", or "None"."""
    name = type(value).__name__
    return "None" if value is None else f"{'an' if name == 'ndarray' or name[0].lower() in 'aeio' else 'a'} {name}"


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
