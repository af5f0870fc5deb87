"""Environments given on the command line."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from worldflux.errors import ConfigurationError, nearest

if TYPE_CHECKING:
    import gymnasium as gym

EnvName = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="ENV", help_behavior_hint="")]
"""The argument of `find_environment`."""

_WHERE = re.compile(r"(?P<module>[^:]+|[A-Za-z]:[^:]+):(?P<name>[A-Za-z_]\w*)")
"""`module:Class` or `path.py:Class`; Gymnasium's own `module:Id-v0` has a dash behind the colon."""


def find_environment(text: str) -> str | Callable[[], gym.Env[Any, Any]]:
    """Finds the environment that the user has given.

    Args:
        text: An id (`CartPole-v1`, `dmc/walker-walk`), or the location of a class or function (`package.module:MyEnv`,
            `folder/file.py:MyEnv`). The code of that module or file is executed.

    Returns:
        An id for `make_env`, or the class or function.

    Raises:
        ConfigurationError: If there is no such file, module or class, or it cannot be imported.
    """
    found = _WHERE.fullmatch(text)
    if found is None:
        file = text.removesuffix(":")
        if file.endswith(".py"):
            raise ConfigurationError(f"'{file}' is a file, expected a class in it as well: {file}:MyEnv.")
        return text
    where, name = found["module"], found["name"]
    module = _import_file(Path(where)) if where.endswith(".py") else _import_module(where)
    make = getattr(module, name, None)
    if not callable(make):
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ConfigurationError(f"{where} has no class or function '{name}'{nearest(name, public)}")
    return make


def _import_module(name: str) -> ModuleType:
    _add_to_path(Path.cwd())  # as `python -m` does, but not an installed command
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            raise ConfigurationError(
                f"There is no module '{name}' in the current directory or among the installed packages. "
                "Give a file with its ending: path/to/file.py:MyEnv."
            ) from error
        raise ConfigurationError(f"Module '{name}' cannot be imported: {error}.") from error
    except Exception as error:
        raise ConfigurationError(f"Module '{name}' cannot be imported: {type(error).__name__}: {error}") from error


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ConfigurationError(f"There is no file '{path}' (looked in {Path.cwd()}).")
    _add_to_path(path.resolve().parent)  # as for a script, which may import files beside it
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None, f"Python can load {path}, which ends in .py"
    module = importlib.util.module_from_spec(spec)
    # Pickling a class, and dataclasses, look up the module by its name.
    previous = sys.modules.get(path.stem)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        if previous is None:
            del sys.modules[path.stem]
        else:
            sys.modules[path.stem] = previous
        raise ConfigurationError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    return module


def _add_to_path(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def is_own_code(text: str) -> bool:
    """Whether making the environment imports a module or a file given by the user."""
    return ":" in text


def lasting_name(text: str) -> str:
    """The same environment, given so that it is found from every working directory."""
    found = _WHERE.fullmatch(text)
    if found is None or not found["module"].endswith(".py"):
        return text
    return f"{Path(found['module']).resolve()}:{found['name']}"
