"""Options that several commands share, and their conversion to settings and JSON."""

from __future__ import annotations

import ast
import json
import math
import re
import shlex
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from worldflux.errors import CheckpointError, ConfigurationError, nearest

SettingsT = TypeVar("SettingsT")

NO_HINT = ""
"""Instead of tyro's hint about the default, for options whose text says what happens without them."""


def whole_number_from(text: str) -> int:
    """Parses an integer, which may be written as 100000, 100_000 or 1e5.

    Raises:
        ValueError: If it is none.
    """
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


def _seeds_from(words: list[str]) -> tuple[int, ...]:
    if not words:
        raise ValueError("expected at least one seed, such as --seeds 0 1 2")
    return tuple(map(whole_number_from, words))


_WHOLE_NUMBER: PrimitiveConstructorSpec[Any] = PrimitiveConstructorSpec(
    nargs=1,
    metavar="INT",
    instance_from_str=lambda words: whole_number_from(words[0]),
    is_instance=lambda value: value is None or isinstance(value, int),
    str_from_instance=lambda value: [str(value)],
)

Count = Annotated[int, _WHOLE_NUMBER]
Number = Annotated[int | None, _WHOLE_NUMBER, tyro.conf.arg(help_behavior_hint=NO_HINT)]
Seeds = Annotated[
    tuple[int, ...],
    PrimitiveConstructorSpec(
        nargs="*",
        metavar="INT ...",
        instance_from_str=_seeds_from,
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda value: [str(entry) for entry in value],
    ),
    tyro.conf.arg(help_behavior_hint=NO_HINT),
]
Real = Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint=NO_HINT)]
Flag = Annotated[bool, tyro.conf.arg(help_behavior_hint=NO_HINT)]
DeviceName = Annotated[str, tyro.conf.arg(metavar="DEVICE")]
OptionalDeviceName = Annotated[str | None, tyro.conf.arg(metavar="DEVICE", help_behavior_hint=NO_HINT)]
Directory = Annotated[Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint=NO_HINT)]
File = Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint=NO_HINT)]
ModelName = Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[MODEL]", help_behavior_hint=NO_HINT)]
"""The model to train; left out to resume a run."""
OptionalEnvName = Annotated[
    str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[ENV]", help_behavior_hint=NO_HINT)
]
EnvNames = Annotated[
    tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[ENV ...]", help_behavior_hint=NO_HINT)
]
DataNames = Annotated[
    tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[DATA ...]", help_behavior_hint=NO_HINT)
]
"""The argument of `joined_tasks`."""
TaskName = Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint=NO_HINT)]
"""A task of an agent that has several."""
AgentPath = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="AGENT", help_behavior_hint=NO_HINT)]
Json = Annotated[bool, tyro.conf.arg(name="json", help_behavior_hint=NO_HINT)]
Fields = Annotated[
    tuple[str, ...], tyro.conf.arg(metavar="FIELD=VALUE", help_behavior_hint=NO_HINT), tyro.conf.UseAppendAction
]
"""Fields of the model's configuration: `--set hidden_dim=64 --set entropy_scale=3e-3`."""


EnvArguments = Annotated[
    tuple[str, ...], tyro.conf.arg(metavar="KEY=VALUE", help_behavior_hint=NO_HINT), tyro.conf.UseAppendAction
]
"""Arguments of an environment's constructor: `--env-kwargs g=1.6 --env-kwargs 'goal=[1, 2]'`."""
Trackers = Annotated[
    tuple[Literal["wandb", "mlflow"], ...], tyro.conf.arg(help_behavior_hint=NO_HINT), tyro.conf.UseAppendAction
]
Name = Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint=NO_HINT)]
Precision = Literal["auto", "float32", "bfloat16", "float16"]
DataStorage = Literal["memory", "in_place"]
Compile = Literal["auto", "true", "false"]

REPEATABLE = ("set", "env_kwargs", "track")
"""Settings whose option may be repeated."""


_OF_TASK = re.compile(r"(?P<name>[^\s=/\\:'\"]+)=(?P<place>.+)", re.DOTALL)
"""`walker-walk=dmc/walker-walk`: the environment or the data of a task. Paths with `=` are written as `./a=b.npz`."""


_LONGEST_TITLE = 100
"""Characters of a directory's name; systems take 255 bytes."""


def joined_tasks(words: Sequence[str]) -> str | None:
    """ENV or DATA of the command line as one text; None if there is none.

    Several have the form `NAME=PLACE NAME=PLACE`, quoted as for a shell. Where no name is given, it is the last part of
    the place: `walker-walk` for `dmc/walker-walk`, `walk` for `data/walk.npz`.

    Raises:
        ConfigurationError: If two have the same name, or a name or a place is missing.
    """
    for word in words:
        if word.startswith("=") or word.endswith("="):
            raise ConfigurationError(f"'{word}' is not understood, expected NAME=PLACE: walker-walk=dmc/walker-walk.")
    if len(words) <= 1 and not tasks_in(" ".join(words)):
        return words[0] if words else None
    if len(words) == 1 and len(tasks_in(words[0])) > 1:  # which are quoted already
        return words[0]
    named = [word if _OF_TASK.fullmatch(word) else f"{task_name(word)}={word}" for word in words]
    text = shlex.join(named)
    tasks_in(text)
    return text


def task_name(place: str) -> str:
    """The name of a task whose environment or data are given without one."""
    last = re.split(r"[/\\:]", place.rstrip("/\\"))[-1].removesuffix(".npz")
    return re.sub(r"[\s='\"]+", "-", last)


def tasks_in(text: str) -> dict[str, str]:
    """The environment or the data of each task, by its name; empty if a text of `joined_tasks` names no tasks.

    Raises:
        ConfigurationError: If two have the same name.
    """
    try:
        found = [_OF_TASK.fullmatch(word) for word in shlex.split(text)]
    except ValueError:  # an apostrophe in a path
        return {}
    named = [(match["name"], match["place"]) for match in found if match is not None]
    if len(named) < len(found):
        return {}
    tasks = dict(named)
    if len(tasks) < len(named):
        twice = next(name for name, _ in named if [other for other, _ in named].count(name) > 1)
        raise ConfigurationError(f"Two tasks have the name '{twice}'. Give each its own: {twice}-2={tasks[twice]}.")
    return tasks


def places_in(text: str) -> list[str]:
    """The environments or the data in a text of `joined_tasks`."""
    return list(tasks_in(text).values()) or [text]


def words_in(text: str) -> list[str]:
    """The arguments of the command line in a text of `joined_tasks`."""
    return [f"{name}={place}" for name, place in tasks_in(text).items()] or [text]


def title_of(text: str) -> str:
    """A short name for a text of `joined_tasks`: the names of the tasks, or their number."""
    names = "_".join(tasks_in(text))
    return text if not names else names if len(names) <= _LONGEST_TITLE else f"{len(tasks_in(text))}-tasks"


def option(name: str) -> str:
    """The option of the command line for a field of the settings: `--eval-interval`."""
    return "--" + name.replace("_", "-")


def counted(number: float, thing: str) -> str:
    """A number with its noun, in the plural unless it is one: `3 episodes`."""
    return f"{number:.12g} {thing}{'' if number == 1 else 's'}"


OF_IDS = ("pixels", "size", "action_repeat")
"""Options that go with environments given by their id."""


@dataclass(frozen=True)
class EnvOptions:
    """How an environment is made. Your own classes take only `env_kwargs`."""

    pixels: Flag = False
    """Observe rendered images of the environment instead of its state."""
    size: Number = None
    """Side of the observed images in pixels. Default: 64, or what the Atari protocol defines."""
    action_repeat: Number = None
    """Number of times each action is repeated. Default: 2 for DeepMind Control, 4 for Atari, otherwise 1."""
    env_kwargs: EnvArguments = ()
    """Pass an argument to the constructor of ENV, such as --env-kwargs g=1.6. May be repeated."""

    def of_ids(self) -> dict[str, Any]:
        """The options that apply to environments given by their id, as far as they differ from the defaults."""
        return {name: getattr(self, name) for name in OF_IDS if getattr(self, name) != getattr(EnvOptions, name)}

    def arguments(self, *, of_id: bool) -> dict[str, Any]:
        """The arguments given with `--env-kwargs`.

        Args:
            of_id: Whether the environment is given by its id, for which some arguments are options.

        Raises:
            ConfigurationError: If one is not understood, or is set by an option of its own.
        """
        found = assignments("--env-kwargs", self.env_kwargs, "KEY=VALUE, such as g=1.6")
        for name in OF_IDS:
            if of_id and name in found:
                raise ConfigurationError(f"--env-kwargs {name}: this argument has its own option, {option(name)}.")
        if "render_mode" in found:
            raise ConfigurationError(
                "--env-kwargs render_mode: --render shows the environment, and --video of worldflux eval films it."
            )
        return found

    def shown(self) -> str:
        """The options that differ from the defaults, for messages."""
        return " ".join([*map(option, self.of_ids()), *(["--env-kwargs"] if self.env_kwargs else [])])


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
    """The fields given with `--set`.

    Raises:
        ConfigurationError: If one does not have the form `field=value`, or a field is given twice.
    """
    return assignments("--set", given, "FIELD=VALUE, such as hidden_dim=64")


def assignments(option: str, given: Iterable[str], expected: str) -> dict[str, Any]:
    """Values by name. They are read as JSON or else as Python's literals if possible, otherwise taken as text.

    Args:
        option: Option of the command line, for error messages.
        given: Texts of the form `name=value`.
        expected: Description of the form, for error messages.

    Raises:
        ConfigurationError: If a text does not have this form, or a name is given twice.
    """
    found: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise ConfigurationError(f"{option} {text} is not understood, expected {expected}.")
        if name.strip() in found:
            raise ConfigurationError(f"{option} {name.strip()} was given twice.")
        found[name.strip()] = _value_of(value)
    return found


def _value_of(text: str) -> Any:
    """The value that a text stands for, in the types of JSON, or the text itself."""
    with suppress(ValueError):
        return json.loads(text)
    try:
        # Errors show values as Python writes them: True, ('walk', 'run'), .1
        return json.loads(json.dumps(ast.literal_eval(text)))
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return text


def fields_and_dtype(given: Iterable[str], dtype: Precision) -> dict[str, Any]:
    """The fields of the model's configuration that `--set` and `--dtype` give.

    Raises:
        ConfigurationError: If both give the dtype.
    """
    fields = model_fields(given)
    if dtype == "auto":
        return fields
    if "dtype" in fields:
        raise ConfigurationError(f"--set dtype and --dtype {dtype} are both given. Leave one of them out.")
    return {**fields, "dtype": dtype}


def compile_setting(given: Compile) -> bool | Literal["auto"]:
    """The setting `compile` of the library."""
    return "auto" if given == "auto" else given == "true"


def changed(settings: Any) -> dict[str, Any]:
    """The fields of a dataclass that differ from its defaults."""
    return {item.name: value for item in fields(settings) if (value := getattr(settings, item.name)) != item.default}


def as_arguments(settings: Any) -> str:
    """The options for these settings, quoted for a shell."""
    words: list[str] = []
    for name, value in changed(settings).items():
        if name in REPEATABLE:
            words += [word for text in value for word in (option(name), text)]
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
