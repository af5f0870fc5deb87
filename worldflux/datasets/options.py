"""Checks of what users pass to `load`, before anything is read: a wrong option is never taken for damaged data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from worldflux.datasets.detection import detect
from worldflux.datasets.recording import ALIGNMENTS
from worldflux.errors import ConfigurationError, a_type, nearest
from worldflux.validation import check_choice, check_flag, whole_number

NAMES = {
    "obs": ("obs", "observations", "observation"),
    "actions": ("actions", "action"),
    "rewards": ("rewards", "reward"),
    "terminations": ("terminations", "terminated", "terminals", "terminal", "is_terminal", "dones", "done"),
    "truncations": ("truncations", "truncated", "timeouts", "timeout"),
    "next_obs": ("next_obs", "next_observations", "next_observation"),
    "is_first": ("is_first",),
    "is_last": ("is_last",),
    "episode": ("episode", "episode_index", "episode_id", "episode_ids", "trajectory_indices"),
}
"""What an array can be, and the names under which it is found if the user names none."""
_SEVERAL = ("obs", "next_obs")
"""Those of which there may be several, by key."""


def check_source(source: Any, format: str) -> None:
    """Raises a `ConfigurationError` for an object that the format does not read, such as a dict instead of a path."""
    if isinstance(source, str | Path):
        return
    fitting = detect(source)
    if fitting != format:
        raise ConfigurationError(
            f"The source is {a_type(source)}, which is read with format='{fitting}' and not with format='{format}'. "
            f"Leave format out, or pass what '{format}' reads."
        )


def check_options(format: str, given: Mapping[str, Any], known: Sequence[str]) -> None:
    """Checks the options of a format.

    Args:
        format: The format.
        given: The options.
        known: The names of its options.

    Raises:
        ConfigurationError: If it has no such option, or one has a value that none can have.
    """
    for name, value in given.items():
        if name not in known:
            has = f"It has {', '.join(known)}." if known else "It has none."
            raise ConfigurationError(f"Unknown option '{name}' of the format '{format}'{nearest(name, known)} {has}")
        if value is not None and name in _CHECKS:
            _CHECKS[name](name, value)


def _check_name(name: str, value: Any, expected: str = "a name") -> None:
    if not isinstance(value, str) or not value:
        raise ConfigurationError(f"{name} is {value!r}, expected {expected}.")


def _check_names(name: str, value: Mapping[Any, Any]) -> None:
    for key, one in value.items():
        _check_name(f"A key of {name}", key)
        _check_name(f"{name}[{key!r}]", one)


def _check_obs(name: str, value: Any) -> None:
    if isinstance(value, Mapping):
        _check_names(name, value)
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for number, one in enumerate(value):
            _check_name(f"{name}[{number}]", one)
    else:
        _check_name(name, value, "a name, a list of names, or a dict {'new name': 'name'}")


def _check_keys(name: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise ConfigurationError(
            f"{name} is {value!r}, expected a dict with the names of arrays: {{'obs': 'state', 'actions': 'torque'}}."
        )
    for role, one in value.items():
        if role not in NAMES:
            raise ConfigurationError(f"Unknown key '{role}'{nearest(role, NAMES)} {name} has {', '.join(NAMES)}.")
        this = f"{name}[{role!r}]"
        if one is None and role in ("obs", "actions"):
            raise ConfigurationError(f"{this} is None, expected a name: there is nothing to learn without {role}.")
        if isinstance(one, Mapping) and role in _SEVERAL:
            if not one:
                raise ConfigurationError(f"{this} is an empty dict, expected the name of at least one array.")
            _check_names(this, one)
        elif one is not None:
            several = ", or a dict of names by key" if role in _SEVERAL else ", or None if there is no such array"
            _check_name(this, one, f"the name of an array{several}")


def _check_action_bounds(name: str, value: Any) -> None:
    check_choice(name, value, ("stats",))


_CHECKS: Mapping[str, Callable[[str, Any], object]] = {
    "action": _check_name,
    "action_bounds": _check_action_bounds,
    "align": lambda name, value: check_choice(name, value, ALIGNMENTS),
    "download": check_flag,
    "ends": lambda name, value: check_choice(name, value, ("termination", "truncation")),
    "final_row": check_flag,
    "keep_padding": check_flag,
    "keys": _check_keys,
    "n_envs": lambda name, value: whole_number(name, value, 1),
    "obs": _check_obs,
    "reward": _check_name,
    "sharded": check_flag,
    "task": whole_number,
    "time_limit": lambda name, value: whole_number(name, value, 1),
}
"""Check of each option of any format. None stands for what happens without the option."""
