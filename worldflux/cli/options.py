"""Options that several commands share, and their conversion to settings and JSON."""

from __future__ import annotations

import json
import math
import shlex
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from worldflux.errors import CheckpointError, ConfigurationError, nearest

SettingsT = TypeVar("SettingsT")

_NO_HINT = ""
"""Instead of tyro's hint about the default, for options whose text says what happens without them."""


def _whole_number(words: Sequence[str]) -> int:
    """Parses an integer, which may be written as 100000, 100_000 or 1e5."""
    text = words[0]
    try:
        return int(text)
    except ValueError:
        pass
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not number.is_integer():
        raise ValueError(f"{text!r} is not a whole number, such as 100000, 100_000 or 1e5")
    return int(number)


_WHOLE_NUMBER: PrimitiveConstructorSpec[Any] = PrimitiveConstructorSpec(
    nargs=1,
    metavar="INT",
    instance_from_str=_whole_number,
    is_instance=lambda value: value is None or isinstance(value, int),
    str_from_instance=lambda value: [str(value)],
)

Count = Annotated[int, _WHOLE_NUMBER]
Number = Annotated[int | None, _WHOLE_NUMBER, tyro.conf.arg(help_behavior_hint=_NO_HINT)]
Numbers = Annotated[tuple[Count, ...], tyro.conf.arg(metavar="INT ...", help_behavior_hint=_NO_HINT)]
Real = Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint=_NO_HINT)]
Flag = Annotated[bool, tyro.conf.arg(help_behavior_hint=_NO_HINT)]
DeviceName = Annotated[str, tyro.conf.arg(metavar="DEVICE")]
OptionalDeviceName = Annotated[str | None, tyro.conf.arg(metavar="DEVICE", help_behavior_hint=_NO_HINT)]
Directory = Annotated[Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint=_NO_HINT)]
File = Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint=_NO_HINT)]
ModelName = Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[MODEL]", help_behavior_hint=_NO_HINT)]
"""The model to train; left out to resume a run."""
OptionalEnvName = Annotated[
    str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[ENV]", help_behavior_hint=_NO_HINT)
]
AgentPath = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="AGENT", help_behavior_hint=_NO_HINT)]
Json = Annotated[bool, tyro.conf.arg(name="json", help_behavior_hint=_NO_HINT)]
Fields = Annotated[
    tuple[str, ...], tyro.conf.arg(metavar="FIELD=VALUE", help_behavior_hint=_NO_HINT), tyro.conf.UseAppendAction
]
"""Fields of the model's configuration: `--set hidden_dim=64 --set entropy_scale=3e-3`."""


def option(name: str) -> str:
    """The option of the command line for a field of the settings: `--eval-interval`."""
    return "--" + name.replace("_", "-")


def counted(number: float, thing: str) -> str:
    """A number with its noun, in the plural unless it is one: `3 episodes`."""
    return f"{number:.12g} {thing}{'' if number == 1 else 's'}"


@dataclass(frozen=True)
class EnvOptions:
    """How an environment that is given by its id is made. Your own classes take none of these options."""

    pixels: Flag = False
    """Observe rendered images of the environment instead of its state."""
    size: Number = None
    """Side of the observed images in pixels. Default: 64, or what the Atari protocol defines."""
    action_repeat: Number = None
    """Number of times each action is repeated. Default: 2 for DeepMind Control, 4 for Atari, otherwise 1."""

    def given(self) -> dict[str, Any]:
        """The options that differ from the defaults, for `make_env`."""
        return {item.name: value for item in fields(EnvOptions) if (value := getattr(self, item.name)) != item.default}


def check_writable(changeable: str, output: Path, directory: Path) -> None:
    """Raises a `ConfigurationError` if nothing can be written to a directory; permissions alone do not tell.

    Args:
        changeable: Option that the user can change.
        output: The file or directory that will be written.
        directory: Where to write.
    """
    try:
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise ConfigurationError(
            f"{output} cannot be written: {error.strerror}. Choose another {changeable}."
        ) from error


def model_fields(given: Iterable[str]) -> dict[str, Any]:
    """The fields given with `--set`. Values are parsed as JSON if possible, otherwise taken as text.

    Raises:
        ConfigurationError: If one does not have the form `field=value`, or a field is given twice.
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
    """The options for these settings, quoted for a shell."""
    words: list[str] = []
    for name, value in changed(settings).items():
        if name == "set":
            words += [word for text in value for word in ("--set", text)]
        else:
            words += [option(name)] if value is True else [option(name), str(value)]
    return shlex.join(words)


def from_json(cls: type[SettingsT], data: Any, source: object) -> SettingsT:
    """Builds a dataclass of settings from the result of `dataclasses.asdict`. Missing fields take their defaults.

    Args:
        cls: Class of the settings, whose fields have types of JSON.
        data: Content of the file.
        source: Name of the file in error messages.

    Raises:
        CheckpointError: If a field is unknown or has another type.
    """
    if not isinstance(data, Mapping):
        raise CheckpointError(f"{source} is damaged: its settings are {data!r}, expected a mapping of names to values.")
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
    """Whether a value has one of the types of an annotation."""
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(isinstance(entry, str) for entry in value)
    options = get_args(hint) or (hint,)
    if get_origin(hint) is Literal:
        return value in options
    if isinstance(value, bool | None):
        return type(value) in options
    return isinstance(value, (*options, int) if float in options else options)
