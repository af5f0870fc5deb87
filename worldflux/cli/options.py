"""Options that several commands share, and how their values become settings and JSON."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import tyro

from worldflux.errors import CheckpointError, ConfigurationError, nearest

SettingsT = TypeVar("SettingsT")

_SAID = ""
"""For options without a default of their own: their texts say what happens without them."""

Number = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint=_SAID)]
"""A whole number, or nothing."""
Real = Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint=_SAID)]
"""A number, or nothing."""
DeviceName = Annotated[str | None, tyro.conf.arg(metavar="DEVICE", help_behavior_hint=_SAID)]
"""A device, or nothing."""
Directory = Annotated[Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint=_SAID)]
"""A directory, or nothing."""
File = Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint=_SAID)]
"""A file, or nothing."""
ModelName = Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL", help_behavior_hint=_SAID)]
"""The model to train; left out where a run goes on."""
OptionalEnvName = Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="ENV", help_behavior_hint=_SAID)]
"""An environment that may be left out."""
Fields = Annotated[
    tuple[str, ...], tyro.conf.arg(metavar="FIELD=VALUE", help_behavior_hint=_SAID), tyro.conf.UseAppendAction
]
"""`--set hidden_dim=64 --set entropy_scale=3e-3`."""


@dataclass(frozen=True)
class EnvOptions:
    """How an environment that is named is made; a class of your own takes none of these."""

    pixels: bool = False
    """Observe pictures of the environment instead of its numbers."""
    size: Number = None
    """Side of the observed pictures: 64, or the Atari protocol's own."""
    action_repeat: Number = None
    """How often each action is applied: 2 for DeepMind Control, 4 for Atari, else 1."""

    def given(self) -> dict[str, Any]:
        """Those that differ from the defaults, for `make_env`."""
        return {item.name: value for item in fields(EnvOptions) if (value := getattr(self, item.name)) != item.default}


def model_fields(given: Iterable[str]) -> dict[str, Any]:
    """What `--set` says: values are read as JSON where they are, else as text.

    Raises:
        ConfigurationError: If one is not of the form `field=value`, or a field comes twice.
    """
    found: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise ConfigurationError(f"--set {text} is not understood, expected FIELD=VALUE, such as hidden_dim=64.")
        if name.strip() in found:
            raise ConfigurationError(f"--set {name.strip()} was given twice.")
        try:
            found[name.strip()] = json.loads(value)
        except ValueError:
            found[name.strip()] = {"True": True, "False": False, "None": None}.get(value, value)
    return found


def changed(settings: Any) -> dict[str, Any]:
    """The fields of a dataclass that differ from its defaults."""
    return {item.name: value for item in fields(settings) if (value := getattr(settings, item.name)) != item.default}


def as_arguments(settings: Any) -> str:
    """The options that give these settings, as they are typed in a shell."""
    words: list[str] = []
    for name, value in changed(settings).items():
        option = "--" + name.replace("_", "-")
        if name == "set":
            words += [word for text in value for word in ("--set", text)]
        else:
            words += [option] if value is True else [option, str(value)]
    return shlex.join(words)


def from_json(cls: type[SettingsT], data: Any, source: object) -> SettingsT:
    """A dataclass of settings from what `dataclasses.asdict` gave; what is absent takes its default.

    Args:
        cls: With fields of JSON's types.
        data: Content of the file.
        source: The file, for messages.

    Raises:
        CheckpointError: If a field is unknown or has another type.
    """
    if not isinstance(data, Mapping):
        raise CheckpointError(f"{source} is damaged: its settings are {data!r}, expected names with values.")
    hints = get_type_hints(cls)
    taken = {}
    for name, value in data.items():
        if name not in hints:
            raise CheckpointError(f"{source} has an unknown setting '{name}'{nearest(str(name), hints)}")
        value = tuple(value) if isinstance(value, list) else value
        if not _fits(value, hints[name]):
            raise CheckpointError(f"{source} is damaged: {name} is {value!r}.")
        taken[name] = value
    return cls(**taken)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type, or of one of several."""
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(isinstance(entry, str) for entry in value)
    options = get_args(hint) or (hint,)
    if get_origin(hint) is Literal:
        return value in options
    if isinstance(value, bool | None):
        return type(value) in options
    return isinstance(value, (*options, int) if float in options else options)
