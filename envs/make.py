"""Making environments from their names."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import gymnasium as gym
from gymnasium.error import DependencyNotInstalled, Error, NameNotFound, NamespaceNotFound, VersionNotFound
from gymnasium.wrappers import AddRenderObservation
from stable_baselines3.common.env_util import make_vec_env as sb3_make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from worldflux.envs.processes import ProcessVecEnv
from worldflux.envs.spaces import ObservationCodec
from worldflux.envs.suites.atari import register_ale
from worldflux.envs.suites.registration import register_suites, suite_id, suite_names
from worldflux.envs.suites.rendering import has_display
from worldflux.envs.tasks import TaskVecEnv
from worldflux.envs.vector import GymnasiumVecEnv
from worldflux.envs.wrappers import ActionRepeat, ResizeImages, Size
from worldflux.errors import ConfigurationError, MissingDependencyError, WorldFluxError, a_type, nearest
from worldflux.validation import whole_number

_NAMES = "'CartPole-v1', 'dmc/walker-walk', 'atari/pong' or 'atari100k/pong'"
_OWN_SUITES = ("dmc/", "atari/", "atari100k/")


def make_env(name: str, **options: Any) -> gym.Env[Any, Any]:
    """Makes a single environment.

        >>> make_env("dmc/walker-walk", pixels=True, action_repeat=2)
        >>> make_env("atari100k/pong")
        >>> make_env("CartPole-v1", pixels=True, size=64)

    Args:
        name: `"dmc/<domain>-<task>"` for DeepMind Control, `"atari/<game>"` and `"atari100k/<game>"` for the two Atari
            protocols, or any id that Gymnasium knows, such as `"CartPole-v1"`.
        **options: For the two suites those of `DMCEnv` and `make_atari`. For other ids: `pixels=True` to observe what
            the environment renders instead of its own observations, `size` (a side, or height and width) to resize
            images, `action_repeat`, and what `gymnasium.make` takes (`render_mode`, `max_episode_steps`, which
            counts the steps before they are repeated, and the environment's own).

    Raises:
        ConfigurationError: If no environment has that name, or it cannot be made.
        MissingDependencyError: If a package that it needs is not installed.
    """
    if not isinstance(name, str):
        raise ConfigurationError(f"The environment's name is {name!r}, expected an id such as {_NAMES}.")
    register_suites()
    own = suite_id(name)
    if own is not None:
        return _made(own, name, options)
    if name.startswith(_OWN_SUITES):
        raise ConfigurationError(f"Unknown environment '{name}'{nearest(name, suite_names())}")
    if name.startswith("worldflux/"):
        return _made(name, name, options)
    if name.startswith("ALE/"):
        register_ale()
    return _adapted(name, **options)


def _adapted(
    name: str, *, pixels: bool = False, size: Size | None = None, action_repeat: int = 1, **options: Any
) -> gym.Env[Any, Any]:
    """Makes an environment of Gymnasium with the options that those of the suites have themselves."""
    action_repeat = whole_number("action_repeat", action_repeat, 1)
    if pixels and options.setdefault("render_mode", "rgb_array") != "rgb_array":
        raise ConfigurationError(
            f"pixels=True renders in the mode 'rgb_array', but render_mode is {options['render_mode']!r}. Leave it out."
        )
    env = _made(name, name, options)
    try:
        with _our_errors(name):
            if action_repeat > 1:
                env = ActionRepeat(env, action_repeat)
            if pixels:  # outside the repeat, so that only the frames that are seen are rendered
                env = AddRenderObservation(env, render_only=True)
            return env if size is None and not pixels else ResizeImages(env, 64 if size is None else size)
    except BaseException:
        env.close()
        raise


def _made(gym_id: str, name: str, options: dict[str, Any]) -> gym.Env[Any, Any]:
    """Calls `gymnasium.make` with our errors; `name` is what the user asked for."""
    if options.get("render_mode") == "rgb_array" and not has_display():
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # otherwise pygame prints an error, although it draws
    with _our_errors(name):
        return gym.make(gym_id, **options)


@contextmanager
def _our_errors(name: str) -> Iterator[None]:
    """Turns the errors of making an environment into errors that say what to do."""
    try:
        yield
    except WorldFluxError:
        raise
    except (NameNotFound, NamespaceNotFound, VersionNotFound) as error:
        raise ConfigurationError(
            f"Unknown environment '{name}'{nearest(name, [*gym.registry, *suite_names()])} "
            "gymnasium.pprint_registry() shows all; import the package that registers yours first."
        ) from error
    except (DependencyNotInstalled, ImportError) as error:
        raise MissingDependencyError(f"Environment '{name}' needs a package that is not installed: {error}") from error
    except TypeError as error:
        # Python says "takes no arguments" of a class without an `__init__`.
        if not any(words in str(error) for words in ("unexpected keyword argument", "takes no arguments")):
            raise
        raise ConfigurationError(f"Environment '{name}' does not take one of these options: {error}.") from error
    except Error as error:
        raise ConfigurationError(
            f"Environment '{name}' cannot be made: {error} Names look like {_NAMES}; "
            "gymnasium.pprint_registry() shows all ids."
        ) from error


def as_env(env: Any) -> gym.Env[Any, Any] | VecEnv:
    """Returns the environment that is meant: made from its name, or as it was given.

    Args:
        env: A name as in `make_env`, a Gymnasium environment, an SB3 `VecEnv` or a Gymnasium vector environment,
            which becomes a `VecEnv`; or several of these by the names of their tasks (`TaskVecEnv`). One that is made
            here renders `rgb_array` if it can, as in SB3.

    Raises:
        ConfigurationError: If it is none of these, or cannot be made.
        MissingDependencyError: If a package that it needs is not installed.
    """
    if isinstance(env, str):
        try:
            return make_env(env, render_mode="rgb_array")
        except ConfigurationError:  # its constructor may have no render_mode; any other problem occurs again
            return make_env(env)
    if isinstance(env, Mapping):
        return TaskVecEnv({name: as_env(one) for name, one in env.items()})
    if isinstance(env, gym.vector.VectorEnv):
        return GymnasiumVecEnv(env)
    if isinstance(env, gym.Env | VecEnv):
        return env
    given, advice = f"{env!r}", ""
    if isinstance(env, type):
        given, advice = f"the class {env.__name__}", f" Pass an instance: {env.__name__}()."
    elif isinstance(env, list | tuple):
        given = a_type(env)
        advice = " Several environments are passed as a VecEnv; make_vec_env of worldflux.envs makes one."
    raise ConfigurationError(f"env is {given}, expected a name, a Gymnasium environment or an SB3 VecEnv.{advice}")


def check_batches(env: gym.Env[Any, Any]) -> None:
    """Makes sure that observations can be put together into arrays, as SB3's `VecEnv`s do.

    Raises:
        ConfigurationError: If they cannot; the message lists what is supported.
    """
    space: Any = getattr(env, "observation_space", None)
    parts = space.spaces.values() if isinstance(space, gym.spaces.Dict) else [space]
    if isinstance(space, gym.spaces.Space) and any(part.shape is None for part in parts):
        ObservationCodec(space)


def make_vec_env(
    name: str | Callable[[], gym.Env[Any, Any]],
    n_envs: int = 1,
    *,
    seed: int | None = None,
    processes: bool = False,
    **options: Any,
) -> VecEnv:
    """Makes several copies of an environment that are stepped together.

    Each copy reports the return and the length of its episodes (SB3's `Monitor`).

    Args:
        name: As in `make_env`; or a function or class that makes one environment.
        n_envs: The number of copies.
        seed: The seed of the first copy; the others count up from it. None leaves them to chance.
        processes: Whether each copy has a process of its own, for environments that are slow to step or to render.
            Processes are started without `fork`, which hangs MuJoCo's rendering, so a script needs
            `if __name__ == "__main__":`.
        **options: The options of `make_env`, the same for all copies.

    Raises:
        ConfigurationError: If an argument cannot be used, or the environment cannot be made.
        WorkerError: If a process ended before it had made its environment.
    """
    n_envs, seed = whole_number("n_envs", n_envs, 1), None if seed is None else whole_number("seed", seed, 0)
    if not isinstance(name, str) and not callable(name):
        raise ConfigurationError(f"name is {name!r}, expected an environment's name, or a function that makes one.")
    if not isinstance(name, str) and options:
        raise ConfigurationError(
            f"The options {sorted(options)} apply to environments given by name, but a class or function was "
            "given. Leave them out, and set them in the class or function itself."
        )

    def make_one() -> gym.Env[Any, Any]:
        env = make_env(name, **options) if isinstance(name, str) else name()
        check_batches(env)
        return env

    return sb3_make_vec_env(make_one, n_envs=n_envs, seed=seed, vec_env_cls=ProcessVecEnv if processes else DummyVecEnv)
