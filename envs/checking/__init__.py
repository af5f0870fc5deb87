"""`check_env` tests the contract that an environment must keep so that what is learned from it is right.

Gymnasium's and Stable-Baselines3's checkers, which it calls, look at spaces and at a few steps. It checks over whole
episodes what they leave out and replay depends on: arrays that change after they were handed over, last observations
that belong to the next episode, seeds that do not repeat, actions at the bounds.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import gymnasium as gym
from gymnasium import spaces

from worldflux.envs.checking.report import CheckReport, EnvironmentCheckError
from worldflux.envs.checking.rollout import EnvChecker
from worldflux.envs.checking.values import kind, one_line
from worldflux.envs.make import make_env
from worldflux.errors import ConfigurationError, WorldFluxError, a_type
from worldflux.validation import whole_number


def check_env(
    env: str | gym.Env[Any, Any] | Callable[[], gym.Env[Any, Any]],
    *,
    steps: int = 200,
    seed: int = 0,
    render: bool = False,
) -> CheckReport:
    """Checks an environment's contract over whole episodes of random actions.

        >>> print(check_env("CartPole-v1"))
        >>> check_env(MyEnv)

    Every problem is collected before the error is raised. An environment that was passed as an object is stepped and
    reset, not closed; to compare two instances, its `spec` must be able to make another one.

    Args:
        env: A name as in `make_env`, a class or function that makes an environment, or an environment.
        steps: The number of random actions; enough for an episode to end.
        seed: The seed of the environment and of the actions.
        render: Whether to check the picture of the render mode "rgb_array", too.

    Returns:
        The checks that passed, and advice on what does not break the contract.

    Raises:
        EnvironmentCheckError: If any check fails.
        ConfigurationError: If it is no single environment, or cannot be made.
        MissingDependencyError: If a package that it needs is not installed.
    """
    steps, seed = whole_number("steps", steps, 1), whole_number("seed", seed, 0)
    make, made, name = _maker(env, render)
    try:
        first = make() if made is None else made
    except WorldFluxError:
        raise
    except Exception as error:
        raise ConfigurationError(f"{name} cannot be made: {one_line(error)}.") from error
    _reject_no_environment(first, name)
    checker = EnvChecker(name, first, make, steps, seed)
    try:
        # Warnings of the environment's own wrappers would repeat, step by step, what the report says.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            checker.run(render)
    finally:
        if made is None:
            first.close()
    report = checker.report()
    if not report.passed:
        raise EnvironmentCheckError(report)
    return report


def _maker(env: Any, render: bool) -> tuple[Callable[[], gym.Env[Any, Any]], gym.Env[Any, Any] | None, str]:
    """A function that makes the environment, the environment itself if it was given, and its name."""
    if isinstance(env, str):
        options = {"render_mode": "rgb_array"} if render else {}
        return lambda: make_env(env, **options), None, env
    if isinstance(env, gym.Env):
        return lambda: _from_spec(env), env, str(env)
    _reject_vector(env)
    if not callable(env):
        raise ConfigurationError(
            f"env is {env!r}, expected a name, an environment, or a class or function that makes one."
        )
    return env, None, getattr(env, "__name__", repr(env))


def _from_spec(env: gym.Env[Any, Any]) -> gym.Env[Any, Any]:
    if env.spec is None:
        raise ValueError("it has no spec")
    return env.spec.make(render_mode=env.render_mode) if env.render_mode else env.spec.make()


def _reject_no_environment(env: Any, name: str) -> None:
    if not isinstance(env, gym.Env):
        _reject_vector(env)
        raise ConfigurationError(f"{name} made {kind(env)}, expected a gymnasium.Env.")
    for attribute in ("observation_space", "action_space"):
        space = getattr(env, attribute, None)
        if not isinstance(space, spaces.Space):
            raise ConfigurationError(
                f"{name} has {kind(space)} as its {attribute}, expected a space of gymnasium.spaces. "
                "Set it in the constructor."
            )


def _reject_vector(env: Any) -> None:
    if not isinstance(env, type) and hasattr(env, "num_envs"):
        raise ConfigurationError(
            f"env is {a_type(env)} of {env.num_envs} environments, expected a single one. "
            "Pass what one of them is made with."
        )
