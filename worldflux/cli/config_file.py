"""`config.yaml`: the settings of a run, written by every run and read by `--config`.

It holds MODEL, the environment or data, and the options that differ from the defaults, by their names:

    model: dreamerv3:tiny
    env: CartPole-v1             # or {walker-walk: dmc/walker-walk, walker-run: dmc/walker-run}
    steps: 8000
    seed: 0
    set: {units: 64}
"""

from __future__ import annotations

import io
import json
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

from worldflux.cli.options import REPEATABLE, assignments, changed, option, tasks_in, whole_number_from
from worldflux.cli.runs import CONFIG_FILE
from worldflux.errors import ConfigurationError, a_type, nearest
from worldflux.files import write_atomically
from worldflux.reading import open_regular

YAML_FILE = "config.yaml"
FORMAT = 1
"""Version of `config.yaml`. A change that older versions cannot read increases it."""

_MOST_BYTES = 2**20
_WITH_EXPONENT = (
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)
"""1e5 and 3e-4, which are numbers in JSON and YAML 1.2, and text in YAML 1.1 and thus in PyYAML."""
_OPTION = "--config"

SettingsT = TypeVar("SettingsT")


@dataclass(frozen=True)
class RunSettings:
    """What a `config.yaml` says about a run; None and empty for what it leaves out."""

    FIXED: ClassVar[tuple[str, ...]] = ("format", "model", "seeds")
    """Names in the file besides the task and the options."""

    model: str | None
    """MODEL of the command line."""
    task: str | None
    """Environment or data file of the run."""
    seeds: tuple[int, ...]
    """Seeds of several runs."""
    options: Any
    """Options of the command."""


def path_in(args: Sequence[str]) -> Path | None:
    """The value of `--config` among arguments; None if it is not there or has no value, which the parser reports."""
    found = _values(_OPTION, args)
    return Path(found[-1]) if found else None


def write_settings(directory: Path, command: str, task_name: str, model: str, task: str, settings: Any) -> None:
    """Writes `config.yaml`. The file is replaced as a whole.

    Args:
        directory: Directory of the run.
        command: Name of the command.
        task_name: Name of the task in the file, `env` or `data`.
        model: MODEL of the run.
        task: Environment or data file of the run.
        settings: Options of the run.
    """
    import yaml

    class Dumper(yaml.SafeDumper):
        pass

    Dumper.add_implicit_resolver(*_WITH_EXPONENT)
    content: dict[str, Any] = {"format": FORMAT, "model": model, task_name: tasks_in(task) or task}
    for name, value in changed(settings).items():
        if name in REPEATABLE:
            value = assignments(name, value, "") if value and "=" in value[0] else list(value)
        content[name] = value
    text = f"# To start the same run again, in a new directory: worldflux {command} --config {YAML_FILE}\n"
    text += yaml.dump(content, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)
    write_atomically(directory / YAML_FILE, text.encode())


def read_settings(path: Path, task_name: str, defaults: SettingsT, args: Sequence[str]) -> RunSettings:
    """Reads a `config.yaml`.

    Args:
        path: Path that the user has given.
        task_name: Name of the task in the file, `env` or `data`.
        defaults: Options of the command for what the file leaves out.
        args: Arguments of the command line, of which `--seed` and `--seeds` win over both in the file.

    Raises:
        ConfigurationError: If the file cannot be read, or has an unknown name or a value of another type.
    """
    content = _load(path)
    hints = get_type_hints(type(defaults))
    names = (*RunSettings.FIXED, task_name, *hints)
    for name in content:
        if str(name).replace("-", "_") not in names:
            raise ConfigurationError(f"{path} has an unknown name '{str(name)[:50]}'{nearest(str(name), names)}")
    twice = next((name for name in content if "-" in str(name) and str(name).replace("-", "_") in content), None)
    if twice is not None:
        raise ConfigurationError(f"{path} has '{twice}' twice, once with underscores.")
    content = {str(name).replace("-", "_"): value for name, value in content.items()}
    if content.pop("format", FORMAT) != FORMAT:
        raise ConfigurationError(f"{path} was written by another version of worldflux. Use that version.")
    model, task = (_text(path, name, content.pop(name, None), tasks=name == task_name) for name in ("model", task_name))
    seeds = _seeds(path, content.pop("seeds", None))
    options = replace(defaults, **{name: _value(path, name, value, hints[name]) for name, value in content.items()})  # type: ignore[type-var]
    for name in REPEATABLE:
        given_names = {text.partition("=")[0] for text in _values(option(name), args)}
        kept = tuple(text for text in getattr(options, name, ()) if text.partition("=")[0] not in given_names)
        options = replace(options, **({name: kept} if name in hints else {}))  # type: ignore[type-var]
    given = {word.partition("=")[0] for word in args}
    if "--seeds" in given:
        options = replace(options, seed=getattr(defaults, "seed"))  # type: ignore[type-var]  # noqa: B009
    if "--seed" in given:
        seeds = ()
    return RunSettings(model, task, seeds, options)


def _values(flag: str, args: Sequence[str]) -> list[str]:
    """All values of an option among arguments."""
    found = []
    for word, following in zip(args, [*args[1:], None], strict=False):
        if word == flag and following is not None:
            found.append(following)
        elif word.startswith(f"{flag}="):
            found.append(word.removeprefix(f"{flag}="))
    return found


def _load(path: Path) -> dict[Any, Any]:
    """The content of a YAML file, without aliases, of which a few lines can describe a structure of any size."""
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("aliases (*name) are not allowed")
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            twice = next((name for name, count in Counter(names).items() if count > 1), None)
            if twice is not None:
                raise yaml.YAMLError(f"'{twice[:50]}' is there twice")
            return super().construct_mapping(node, deep=deep)

    Loader.add_implicit_resolver(*_WITH_EXPONENT)
    try:
        with open_regular(path) as file:
            data = file.read(_MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            raise ConfigurationError(f"{path} cannot be read: it has more than {_MOST_BYTES // 2**20} MB.")
        content = yaml.load(io.StringIO(data.decode("utf-8")), Loader)
    except FileNotFoundError as error:
        raise ConfigurationError(
            f"There is no file '{path}'. {_OPTION} takes the {YAML_FILE} of a run, or one of your own."
        ) from error
    except OSError as error:
        hint = f" Did you mean {path / YAML_FILE}?" if path.is_dir() else ""
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}.{hint}") from error
    except RecursionError as error:
        raise ConfigurationError(f"{path} cannot be read: it is nested too deeply.") from error
    except (yaml.YAMLError, ValueError, TypeError) as error:
        if isinstance(error, ConfigurationError):
            raise
        raise ConfigurationError(f"{path} is not valid YAML: {error}.") from error
    if isinstance(content, dict) and {"run", "settings"} <= set(content):
        raise ConfigurationError(f"{path} is the {CONFIG_FILE} of a run. {_OPTION} takes the {YAML_FILE} beside it.")
    if not isinstance(content, dict):
        found = "is empty" if content is None else f"holds {a_type(content)}"
        raise ConfigurationError(f"{path} {found}, expected names and values, such as 'model: dreamerv3:tiny'.")
    return content


def _text(path: Path, name: str, value: Any, *, tasks: bool = False) -> str | None:
    """A text of the file, for a name that may stand for several tasks also from their names and texts."""
    if tasks and isinstance(value, dict) and value:
        value = shlex.join(f"{_text(path, name, key)}={_text(path, name, one)}" for key, one in value.items())
        if not tasks_in(value):
            raise ConfigurationError(f"{path}: {name} has a name of a task with a space or one of = / : \\ in it.")
    if value is not None and not isinstance(value, str):
        raise ConfigurationError(f"{path}: {name} is {_short(value)}, expected text.")
    return value


def _seeds(path: Path, value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise ConfigurationError(f"{path}: seeds is {_short(value)}, expected a list, such as [0, 1, 2].")
    return tuple(_value(path, "seeds", entry, int) for entry in value)


def _value(path: Path, name: str, value: Any, hint: Any) -> Any:
    """A value of the file with the type of its option."""
    if get_origin(hint) is tuple:
        return _repeated(path, name, value, get_args(hint)[0])
    options = get_args(hint) or (hint,)
    if get_origin(hint) is Literal:
        value = str(value).lower() if isinstance(value, bool) else value
        if value not in options:
            raise ConfigurationError(f"{path}: {name} is {_short(value)}, expected one of {', '.join(options)}.")
        return value
    if (value is None and type(None) in options) or (type(value) is bool and bool in options):
        return value
    found: Any = None
    if int in options:
        found = _number(value, whole=True)
    elif float in options:
        found = _number(value, whole=False)
    elif str in options and isinstance(value, str):
        found = value
    if found is None:
        kind = "a whole number" if int in options else "a number" if float in options else "text"
        kind = "true or false" if bool in options else kind
        raise ConfigurationError(f"{path}: {name} is {_short(value)}, expected {kind}.")
    return found


def _number(value: Any, *, whole: bool) -> int | float | None:
    """A number, which may be quoted; None if it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return whole_number_from(str(value)) if whole else float(value)
    except (ValueError, OverflowError):
        return None


def _repeated(path: Path, name: str, value: Any, entry: Any) -> tuple[str, ...]:
    """The value of an option that may be repeated."""
    if get_origin(entry) is Literal:
        entries = value if isinstance(value, list) else [value]
        return tuple(_value(path, name, one, entry) for one in entries)
    if isinstance(value, Mapping):
        return tuple(f"{_text(path, name, key)}={_as_text(path, name, one)}" for key, one in value.items())
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        return tuple(value)
    raise ConfigurationError(f"{path}: {name} is {_short(value)}, expected a mapping of names to values.")


def _as_text(path: Path, name: str, value: Any) -> str:
    """A value as it is written behind `--set NAME=`."""
    if isinstance(value, str) and assignments("", [f"value={value}"], "")["value"] == value:
        return value
    try:
        return json.dumps(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigurationError(f"{path}: {name} has {_short(value)}, expected numbers, text or lists.") from error


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
