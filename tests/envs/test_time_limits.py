"""The smallest time limit of an environment counts; values that are no number of steps are ignored."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv
from gymnasium.wrappers import TimeLimit
from helpers.envs import CountingEnv
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecMonitor

from worldflux import WorldFluxAgent
from worldflux.agents.collecting import max_vec_episode_steps
from worldflux.envs import ActionRepeat, GymnasiumVecEnv
from worldflux.envs.wrappers import frames_per_step, max_episode_steps, whole_steps
from worldflux.errors import WorkerError


def stating(limit: Any, name: str = "max_episode_steps") -> CountingEnv:
    env = CountingEnv()
    setattr(env, name, limit)
    return env


def specified(limit: Any) -> CountingEnv:
    env = CountingEnv()
    env.spec = gym.envs.registration.EnvSpec("Specified-v0", max_episode_steps=limit)
    return env


LIMITED: dict[str, tuple[Any, int | None]] = {
    "an own limit": (lambda: stating(20), 20),
    "an own limit that is larger": (lambda: TimeLimit(stating(10_000), 50), 50),
    "an own limit that is smaller": (lambda: TimeLimit(stating(20), 50), 20),
    "two wrappers": (lambda: TimeLimit(TimeLimit(CountingEnv(), 30), 400), 30),
    "two wrappers, the other way round": (lambda: TimeLimit(TimeLimit(CountingEnv(), 400), 30), 30),
    "a wrapper between two": (lambda: TimeLimit(gym.wrappers.OrderEnforcing(TimeLimit(CountingEnv(), 30)), 400), 30),
    "a specification": (lambda: specified(70), 70),
    "a wrapper around a specification": (lambda: TimeLimit(specified(70), 90), 70),
    "a specification and an own limit": (lambda: TimeLimit(specified(np.inf), 90), 90),
    "a registered limit": (lambda: TimeLimit(gym.make("CartPole-v1"), 900), 500),
    "a registered limit that was changed": (lambda: gym.make("CartPole-v1", max_episode_steps=700), 700),
    "a registered limit that was left out": (lambda: gym.make("CartPole-v1", max_episode_steps=-1), None),
    "repeated actions around a limit": (lambda: ActionRepeat(TimeLimit(CountingEnv(), 30), 4), 8),
    "a limit around repeated actions": (lambda: TimeLimit(ActionRepeat(TimeLimit(CountingEnv(), 30), 4), 5), 5),
    "a number that stands for none": (lambda: stating(1_000_000), None),
    "a useless one within a useful one": (lambda: TimeLimit(stating(-1, "_max_episode_steps"), 60), 60),
}


@pytest.mark.parametrize("case", LIMITED)
def test_the_smallest_of_all_time_limits_counts(case: str) -> None:
    make, limit = LIMITED[case]

    assert max_episode_steps(make()) == limit
    assert max_vec_episode_steps(DummyVecEnv([make])) == limit
    assert max_vec_episode_steps(VecMonitor(GymnasiumVecEnv(SyncVectorEnv([make])))) == limit


@pytest.mark.parametrize("number", [20, 20.0, np.int64(20), np.float32(20), np.array(20), np.uint8(20)])
def test_whole_numbers_of_any_type_are_limits(number: Any) -> None:
    assert max_episode_steps(stating(number)) == 20 and type(max_episode_steps(stating(number))) is int


NO_NUMBERS = [None, 0, -1, 0.5, 20.5, True, np.True_, np.inf, -np.inf, np.nan, np.float64("nan"), np.float32("inf")]


@pytest.mark.parametrize("value", [*NO_NUMBERS, "20", (20,), [20], np.array([20]), {}, int, lambda: 20, object()])
def test_whatever_else_has_the_name_of_a_limit_is_none(value: Any) -> None:
    assert whole_steps(value) is None
    assert max_episode_steps(stating(value)) is None
    assert max_episode_steps(TimeLimit(stating(value), 50)) == 50
    assert frames_per_step(stating(value, "action_repeat")) == 1


def in_process_of_sb3(make: Any) -> Any:
    return SubprocVecEnv([make], start_method="fork")


def in_process_of_gymnasium(make: Any) -> Any:
    return GymnasiumVecEnv(AsyncVectorEnv([make], context="fork"))


@pytest.mark.parametrize("in_process", [in_process_of_sb3, in_process_of_gymnasium])
def test_the_limits_of_other_processes_are_asked_for(in_process: Any) -> None:
    gym.register("WorldFluxTests/NotPicklable-v0", lambda: CountingEnv(), max_episode_steps=40)
    makers: list[Any] = [lambda: gym.make("WorldFluxTests/NotPicklable-v0"), lambda: TimeLimit(stating(30), 90)]
    for make, limit in zip(makers, (40, 30), strict=True):
        venv = in_process(make)
        try:
            assert max_vec_episode_steps(venv) == limit
        finally:
            venv.close()
    del gym.registry["WorldFluxTests/NotPicklable-v0"]


@pytest.mark.filterwarnings("ignore:.*ERROR")  # Gymnasium's own
@pytest.mark.parametrize("in_process", [in_process_of_sb3, in_process_of_gymnasium])
def test_what_a_process_cannot_send_is_named(in_process: Any) -> None:
    venv = in_process(lambda: stating(lambda: 20))
    try:
        with pytest.raises(WorkerError, match="an attribute 'max_episode_steps' that cannot be sent"):
            max_vec_episode_steps(venv)
    finally:
        for process in getattr(venv, "processes", ()):
            process.join()


def test_an_agent_starts_with_the_random_steps_that_the_smallest_limit_asks_for() -> None:
    starts = [
        WorldFluxAgent("tdmpc2:tiny", env).learning_starts
        for env in (TimeLimit(CountingEnv(), 50), TimeLimit(stating(10_000), 50), stating(np.inf), stating(-1))
    ]

    assert starts == [1000, 1000, 2500, 2500]
