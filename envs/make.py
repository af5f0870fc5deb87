"""Environments from their names."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
from gymnasium.error import DependencyNotInstalled, Error, NameNotFound, NamespaceNotFound, VersionNotFound
from stable_baselines3.common.env_util import make_vec_env as sb3_make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from worldflux.errors import ConfigurationError, MissingDependencyError, nearest


def make_env(name: str, **options: Any) -> gym.Env[Any, Any]:
    """Makes a single environment.

    Args:
        name: Any id that Gymnasium knows, such as `"CartPole-v1"`.
        **options: Passed on to `gymnasium.make`, for example `render_mode="rgb_array"` or `max_episode_steps=200`.

    Raises:
        ConfigurationError: If no environment has that name, or it cannot be made.
        MissingDependencyError: If a package that it needs is not installed.
    """
    if not isinstance(name, str):
        raise ConfigurationError(f"The environment's name is {name!r}, expected an id such as 'CartPole-v1'.")
    try:
        return gym.make(name, **options)
    except (NameNotFound, NamespaceNotFound, VersionNotFound) as error:
        raise ConfigurationError(
            f"Unknown environment '{name}'{nearest(name, gym.registry)} "
            "gymnasium.pprint_registry() shows all; import the package that registers yours first."
        ) from error
    except (DependencyNotInstalled, ImportError) as error:
        raise MissingDependencyError(f"Environment '{name}' needs a package that is not installed: {error}") from error
    except Error as error:
        raise ConfigurationError(
            f"Environment '{name}' cannot be made: {error} Ids look like 'CartPole-v1'; "
            "gymnasium.pprint_registry() shows all."
        ) from error


def as_env(env: Any) -> gym.Env[Any, Any] | VecEnv:
    """The environment that is meant: made from its id, or as it was given.

    Args:
        env: An id, a Gymnasium environment or an SB3 `VecEnv`. One that is made here can be filmed if it knows how,
            as SB3 has it.

    Raises:
        ConfigurationError: If it is none of these, or cannot be made.
        MissingDependencyError: If a package that it needs is not installed.
    """
    if isinstance(env, str):
        try:
            return make_env(env, render_mode="rgb_array")
        except TypeError:  # its constructor has no render_mode
            return make_env(env)
    if isinstance(env, gym.Env | VecEnv):
        return env
    given, advice = f"{env!r}", ""
    if isinstance(env, type):
        given, advice = f"the class {env.__name__}", f" Pass an instance: {env.__name__}()."
    elif isinstance(env, list | tuple | gym.vector.VectorEnv):
        given = f"a {type(env).__name__}"
        advice = " Several environments are passed as a VecEnv; make_vec_env of worldflux.envs makes one."
    raise ConfigurationError(f"env is {given}, expected an id, a Gymnasium environment or an SB3 VecEnv.{advice}")


def make_vec_env(name: str, n_envs: int = 1, *, seed: int | None = None, **options: Any) -> VecEnv:
    """Makes several copies of an environment that are stepped together.

    Each copy reports the return and the length of its episodes (SB3's `Monitor`).

    Args:
        name: As in `make_env`.
        n_envs: Copies.
        seed: The first copy's; the others count up from it. None leaves them to chance.
        **options: As in `make_env`, the same for all.
    """
    if n_envs < 1:
        raise ConfigurationError(f"n_envs is {n_envs}, expected at least 1.")
    return sb3_make_vec_env(lambda: make_env(name, **options), n_envs=n_envs, seed=seed, vec_env_cls=DummyVecEnv)
