"""`EnvWatch` notices whoever moves an environment, through whatever handle."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv
from helpers.envs import CountingEnv
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecFrameStack, VecNormalize

from worldflux.envs.step_counter import EnvWatch
from worldflux.envs.vector import GymnasiumVecEnv

ACTION = np.ones(1, np.float32)
ACTIONS = np.ones((2, 1), np.float32)


def limited() -> gym.Env[Any, Any]:
    return gym.wrappers.TimeLimit(CountingEnv(lengths=(9,)), 5)


def in_process(kind: str) -> Any:
    """Two environments in this process."""
    return DummyVecEnv([limited] * 2) if kind == "DummyVecEnv" else GymnasiumVecEnv(SyncVectorEnv([limited] * 2))


def in_processes(kind: str) -> Any:
    """Two environments in processes of their own."""
    if kind == "SubprocVecEnv":
        return SubprocVecEnv([CountingEnv] * 2, start_method="fork")
    return GymnasiumVecEnv(AsyncVectorEnv([CountingEnv] * 2, context="fork"))


def assert_seen(watch: EnvWatch, *moves: Any) -> None:
    for move in moves:
        watch.mark()
        assert not watch.moved
        move()
        assert watch.moved


@pytest.mark.parametrize("kind", ["DummyVecEnv", "SyncVectorEnv"])
def test_every_handle_to_an_environment_is_watched(kind: str) -> None:
    base = in_process(kind)
    venv = VecNormalize(VecFrameStack(base, 2))
    owner = base if kind == "DummyVecEnv" else base.vector_env
    assert_seen(
        EnvWatch(venv),
        base.reset,
        owner.reset,
        owner.envs[1].reset,
        lambda: venv.step(ACTIONS),
        lambda: owner.step(ACTIONS),
        lambda: owner.envs[0].step(ACTION),
        lambda: owner.envs[1].unwrapped.step(ACTION),
        lambda: venv.env_method("reset", indices=[1]),
    )


@pytest.mark.parametrize("kind", ["SubprocVecEnv", "AsyncVectorEnv"])
def test_environments_in_other_processes_are_watched_where_they_are_reached(kind: str) -> None:
    venv = in_processes(kind)
    try:
        watch = EnvWatch(VecFrameStack(venv, 2))
        assert_seen(watch, venv.reset, lambda: venv.step(ACTIONS))
        watch.mark()
        venv.env_method("get_wrapper_attr", "t")  # a question moves nothing
        venv.get_attr("t")
        assert not watch.moved
        if kind == "SubprocVecEnv":
            step = {"method_name": "step", "action": ACTION}
            assert_seen(watch, lambda: venv.env_method("reset"), lambda: venv.env_method(**step))
        else:
            assert_seen(watch, lambda: venv.vector_env.step(ACTIONS))
    finally:
        venv.close()


def test_two_who_watch_do_not_count_each_others_marks() -> None:
    venv = DummyVecEnv([CountingEnv])
    first, second = EnvWatch(venv), EnvWatch(venv)
    venv.reset()
    first.mark()

    assert second.moved and not first.moved


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))])
def test_a_copy_of_a_watched_environment_moves_alone(copied: Any) -> None:
    env = CountingEnv(lengths=(9,))
    watch = EnvWatch(DummyVecEnv([lambda: env]))
    env.reset()
    twin = copied(env)
    watch.mark()

    twin.reset()
    twin.step(np.ones(1, np.float32))

    assert (env.episode, env.t) == (0, 0) and (twin.episode, twin.t) == (1, 1)
    assert not watch.moved
