"""Environments given on the command line."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from worldflux.cli.options import EnvOptions, tasks_in
from worldflux.errors import ConfigurationError, WorldFluxError, nearest

if TYPE_CHECKING:
    import gymnasium as gym
    from stable_baselines3.common.vec_env import VecEnv

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
    if tasks := tasks_in(text):
        return shlex.join(f"{name}={lasting_name(place)}" for name, place in tasks.items())
    found = _WHERE.fullmatch(text)
    if found is None or not found["module"].endswith(".py"):
        return text
    return f"{Path(found['module']).resolve()}:{found['name']}"


def make_environment(name: str, options: EnvOptions, render_mode: str | None = None) -> gym.Env[Any, Any]:
    """Makes one environment.

    Args:
        name: ENV of the command line.
        options: Its options.
        render_mode: "rgb_array" for an environment that is filmed, "human" for one that is shown in a window.

    Raises:
        ConfigurationError: If it cannot be made, filmed or shown.
    """
    from worldflux.envs.make import check_batches, make_env

    make, arguments = _constructor(name, options)
    with _constructor_errors(name, options):
        if render_mode is None:
            env = make_env(make, **arguments) if isinstance(make, str) else make(**arguments)
        elif isinstance(make, str):
            env = _rendering_id(make, arguments, render_mode)
        else:
            env = _rendering(make, arguments, render_mode)
    check_batches(env)
    if render_mode is not None and env.render_mode != render_mode:
        env.close()
        purpose = "filmed" if render_mode == "rgb_array" else "shown"
        raise ConfigurationError(
            f"{name} cannot be {purpose}: its render_mode is {env.render_mode!r}, expected {render_mode!r}. "
            "A class of your own has to take render_mode in its constructor and store it."
        )
    return env


def make_environments(
    name: str,
    options: EnvOptions,
    n_envs: int,
    *,
    seed: int | None,
    processes: bool = False,
    render: bool = False,
) -> VecEnv:
    """Makes several environments that are stepped together.

    Args:
        name: ENV of the command line; of several tasks, all environments become one `TaskVecEnv`.
        options: Its options.
        n_envs: Number of environments, of each task.
        seed: Seed of the first one.
        processes: Run each of them in its own process.
        render: Show the first one in a window.

    Raises:
        ConfigurationError: If they cannot be made, or shown.
    """
    from worldflux.envs.make import make_vec_env
    from worldflux.envs.tasks import TaskVecEnv

    if tasks := tasks_in(name):
        of_tasks = {}
        for number, (task, place) in enumerate(tasks.items()):
            given = None if seed is None else seed + number * n_envs
            of_tasks[task] = make_environments(
                place, options, n_envs, seed=given, processes=processes, render=render and not number
            )
        return TaskVecEnv(of_tasks)
    make, arguments = _constructor(name, options)
    if not render:
        with _constructor_errors(name, options):
            if isinstance(make, str):
                return make_vec_env(make, n_envs, seed=seed, processes=processes, **arguments)
            return make_vec_env(partial(make, **arguments), n_envs, seed=seed, processes=processes)
    if processes:
        raise ConfigurationError("--render shows an environment of this process. Leave out --processes.")
    shown = iter([True])

    def make_next() -> gym.Env[Any, Any]:
        if not next(shown, False):
            return make_environment(name, options)
        return _without_mode(make_environment(name, options, "human"))

    envs = make_vec_env(make_next, n_envs, seed=seed)
    open_window(envs, name)
    return envs


def open_window(env: gym.Env[Any, Any] | VecEnv, name: str) -> None:
    """Resets an environment that is shown, so that its window opens, or fails before anything else begins.

    Raises:
        ConfigurationError: If it cannot be shown.
    """
    try:
        env.reset()
    except Exception as error:
        env.close()
        raise ConfigurationError(f"{name} cannot be shown in a window: {error}. Leave out --render.") from error


def _constructor(name: str, options: EnvOptions) -> tuple[str | Callable[..., gym.Env[Any, Any]], dict[str, Any]]:
    """The id, class or function that makes an environment, and its arguments."""
    found, of_ids = find_environment(name), options.of_ids()
    if not isinstance(found, str) and of_ids:
        given = EnvOptions(**of_ids).shown()
        raise ConfigurationError(
            f"{given}: {name} is your own code, and these options go with an id. "
            "Arguments of its constructor are given with --env-kwargs KEY=VALUE."
        )
    arguments = {**of_ids, **options.arguments(of_id=isinstance(found, str))}
    if not isinstance(found, str):
        _check_complete(name, found, arguments)
    return found, arguments


def _check_complete(name: str, make: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Raises a `ConfigurationError` that names the arguments which a constructor needs and was not given."""
    required = [
        parameter.name
        for parameter in inspect.signature(make).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and parameter.name not in arguments
    ]
    if required:
        needed = " ".join(f"--env-kwargs {each}=VALUE" for each in required)
        raise ConfigurationError(f"{name} needs arguments that are missing. Give them with {needed}.")


def _without_mode(env: gym.Env[Any, Any]) -> gym.Env[Any, Any]:
    """The environment without its render mode, which SB3 expects to be the same in all environments."""
    from gymnasium import Wrapper

    class WithoutMode(Wrapper[Any, Any, Any, Any]):
        render_mode = None

    return WithoutMode(env)


def _rendering_id(name: str, arguments: dict[str, Any], render_mode: str) -> gym.Env[Any, Any]:
    """An environment that is given by its id and renders."""
    from worldflux.envs.make import make_env

    if not (render_mode == "human" and arguments.get("pixels")):
        return make_env(name, render_mode=render_mode, **arguments)
    from gymnasium.wrappers import HumanRendering

    # Observing images needs the mode rgb_array.
    return HumanRendering(make_env(name, render_mode="rgb_array", **arguments))


def _rendering(
    make: Callable[..., gym.Env[Any, Any]], arguments: dict[str, Any], render_mode: str
) -> gym.Env[Any, Any]:
    """An environment of the user's own that renders, if its constructor takes `render_mode`."""
    if "render_mode" not in inspect.signature(make).parameters:
        return make(**arguments)
    modes = (getattr(make, "metadata", None) or {}).get("render_modes", ())
    if render_mode == "human" and "human" not in modes and "rgb_array" in modes:
        from gymnasium.wrappers import HumanRendering

        return HumanRendering(make(render_mode="rgb_array", **arguments))
    return make(render_mode=render_mode, **arguments)


@contextmanager
def _constructor_errors(name: str, options: EnvOptions) -> Iterator[None]:
    """Tells in one line what a constructor says about the arguments that the user gave."""
    try:
        yield
    except WorldFluxError:
        raise
    except Exception as error:
        if not options.env_kwargs:  # a mistake in the environment's own code, which a traceback locates
            raise
        given = " ".join(f"--env-kwargs {text}" for text in options.env_kwargs)
        raise ConfigurationError(f"{name} cannot be made with {given}: {type(error).__name__}: {error}") from error
