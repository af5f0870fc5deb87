"""Values of an environment that its space does not describe are refused before anything casts them."""

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from helpers.envs import Gives
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecMonitor, VecNormalize

from worldflux import WorldFluxAgent
from worldflux.envs import (
    ActionCodec,
    GymnasiumVecEnv,
    ObservationCodec,
    RecordEpisodes,
    VectorRecordEpisodes,
    collect,
)
from worldflux.envs.given import GivenValues
from worldflux.errors import ShapeMismatchError
from worldflux.training import ReplayBuffer

LENGTH = 6


PICTURE = spaces.Box(0, 255, (64, 64, 3), np.uint8)
NUMBERS = spaces.Box(-99, 99, (3,), np.float32)
FAR_NUMBERS = spaces.Box(-np.inf, np.inf, (3,), np.float64)


def box(dtype: Any, low: float = 0, high: float = 100) -> spaces.Box:
    return spaces.Box(low, high, (3,), dtype)


# Each is right in reset() and, but for the shapes that never change, wrong from a later step on.
WRONG: dict[str, tuple[spaces.Space[Any], Callable[[int], Any], str]] = {
    "a picture of floats from 0 to 1": (
        PICTURE,
        lambda t: np.full((64, 64, 3), 0.1 * t),
        "has dtype float64, expected uint8.* the model scales them",
    ),
    "a grey picture for colours": (
        PICTURE,
        lambda t: np.full((64, 64, 1), t, np.uint8),
        r"has shape \(64, 64, 1\), expected \(64, 64, 3\)",
    ),
    "a picture of int64": (
        PICTURE,
        lambda t: np.full((64, 64, 3), t).astype(np.int64 if t else np.uint8),
        "has dtype int64, expected uint8",
    ),
    "300 in uint8": (box(np.uint8), lambda t: np.full(3, 60 * t), r"holds 300 at index \[0\], expected what uint8"),
    "a negative number in uint8": (box(np.uint8), lambda t: np.array([0, 0, -t]), r"holds -1 at index \[2\]"),
    "a fraction in int32": (box(np.int32), lambda t: np.full(3, 0.7 * t), "holds 0.7 at index .* what int32 can hold"),
    "NaN in int32": (box(np.int32), lambda t: np.full(3, np.nan if t else 0.0), "holds nan at index"),
    "40,000 in int16": (box(np.int16), lambda t: np.full(3, 10_000 * t), "holds 40000 at index .* what int16"),
    "80,000 in float16": (
        spaces.Box(-np.inf, np.inf, (3,), np.float16),
        lambda t: np.full(3, 20_000.0 * t),
        "holds 80000.0 at index .* what float16",
    ),
    "two in booleans": (box(np.bool_, 0, 1), lambda t: np.full(3, t), "holds 2 at index .* what bool can hold"),
    "one number for three": (NUMBERS, lambda t: np.full(1, t, np.float32), r"has shape \(1,\), expected \(3,\)"),
    "a single number for three": (NUMBERS, lambda t: float(t), r"has shape \(\), expected \(3,\)"),
    "a row too many": (NUMBERS, lambda t: np.full((1, 3), t, np.float32), r"has shape \(1, 3\), expected \(3,\)"),
    "rows of other lengths": (NUMBERS, lambda t: [[1.0], [2.0, 3.0], [4.0]], "is no array|has shape"),
    "text": (NUMBERS, lambda t: np.array(["1"] * 3) if t else np.zeros(3), "has dtype <U1, expected float32"),
    "nothing": (NUMBERS, lambda t: None if t else np.zeros(3), r"has shape \(\), expected \(3,\)"),
    "beyond float32": (
        FAR_NUMBERS,
        lambda t: np.full(3, 1e38 * t * t),
        r"holds \d.*e\+3[89], expected at most 3.4e\+38",
    ),
    "beyond float32, space float32": (
        spaces.Box(-np.inf, np.inf, (3,), np.float32),
        lambda t: np.full(3, -1e38 * t * t),
        r"holds -4e\+38",
    ),
    "a fraction for a Discrete": (spaces.Discrete(9), lambda t: 0.5 * t if t else 0, "has dtype float64"),
    "258 for a Discrete of uint8": (
        spaces.Discrete(9, dtype=np.uint8),
        lambda t: np.int64(256 * t),
        "holds 256, expected what uint8",
    ),
    "an array for a Discrete": (spaces.Discrete(9), lambda t: np.array([t]), r"has shape \(1,\), expected \(\)"),
    "fractions for a MultiDiscrete": (
        spaces.MultiDiscrete([9, 9]),
        lambda t: np.array([t, 0.5]) if t else np.zeros(2, int),
        "has dtype float64",
    ),
    "one for two of a MultiDiscrete": (
        spaces.MultiDiscrete([9, 9]),
        lambda t: np.array([t]),
        r"has shape \(1,\), expected \(2,\)",
    ),
    "256 in a MultiBinary": (spaces.MultiBinary(3), lambda t: np.full(3, t and 255 + t), "holds 256 at index"),
    "an extra key": (
        spaces.Dict(a=NUMBERS),
        lambda t: {"a": np.zeros(3), **({"b": 1} if t else {})},
        r"keys \['a', 'b'\], expected a dictionary with keys \['a'\]",
    ),
    "a key that is missing": (
        spaces.Dict(a=NUMBERS, b=NUMBERS),
        lambda t: {"a": np.zeros(3)},
        r"keys \['a'\].* with keys \['a', 'b'\]",
    ),
    "no dictionary": (spaces.Dict(a=NUMBERS), lambda t: None if t else {"a": np.zeros(3)}, "observation is None"),
    "a part of a dictionary": (
        spaces.Dict(a=NUMBERS, b=PICTURE),
        lambda t: {"a": np.zeros(3), "b": np.full((64, 64, 3), t / 10)},
        "observation 'b' has dtype float64, expected uint8",
    ),
}

FITS: dict[str, tuple[spaces.Space[Any], Callable[[int], Any]]] = {
    "float64 in float32": (NUMBERS, lambda t: np.full(3, float(t))),
    "float16 in float32": (NUMBERS, lambda t: np.full(3, t, np.float16)),
    "integers in float32": (NUMBERS, lambda t: np.full(3, t)),
    "a list": (NUMBERS, lambda t: [t, 2.0 * t, 0]),
    "whole floats in int32": (box(np.int32), lambda t: np.full(3, float(t))),
    "int64 in uint8": (box(np.uint8), lambda t: np.full(3, 40 * t)),
    "a picture with its channels first": (
        spaces.Box(0, 255, (3, 64, 64), np.uint8),
        lambda t: np.full((3, 64, 64), t, np.uint8),
    ),
    "int for a Discrete": (spaces.Discrete(9, start=-2), lambda t: t - 2),
    "bool for a Discrete": (spaces.Discrete(2), lambda t: t % 2 == 0),
    "an array without axes for a Discrete": (spaces.Discrete(9), lambda t: np.array(t)),
    "bools for a MultiBinary": (spaces.MultiBinary(2), lambda t: np.array([True, False])),
    "a list for a MultiDiscrete": (spaces.MultiDiscrete([9, 9]), lambda t: [t, 0]),
    "a dictionary in another order": (
        spaces.Dict(a=NUMBERS, b=NUMBERS),
        lambda t: {"b": np.zeros(3), "a": np.ones(3)},
    ),
    "large numbers that are told apart": (FAR_NUMBERS, lambda t: np.array([1e6 * t, 2e30 * t, 0.0])),
    "large numbers that stand still": (FAR_NUMBERS, lambda t: np.array([1.7e9, 1.7e9 + 1e-6 * t, t])),
}


def vec_env(env: Gives) -> DummyVecEnv:
    return DummyVecEnv([lambda: env])


def recorded(env: Any, wrapper: Any, envs: int = 1) -> Any:
    obs, actions = ObservationCodec(env_space(env)), ActionCodec(spaces.Discrete(2))
    buffer = ReplayBuffer(200, obs.obs_shape, actions.action_dim, obs_dtype=obs.obs_dtype, n_envs=envs)
    return wrapper(env, buffer)


def env_space(env: Any) -> spaces.Space[Any]:
    return getattr(env, "single_observation_space", None) or env.observation_space


def step_through(env: Any, action: Any) -> None:
    env.reset()
    for _ in range(LENGTH):
        env.step(action)


def by_agent(env: Any) -> None:
    WorldFluxAgent("dreamerv3:tiny", env, buffer_size=3000, learning_starts=1000).learn(LENGTH + 1)


def in_process(env: Gives) -> None:
    venv = SubprocVecEnv([lambda: env, lambda: env], start_method="fork")
    try:
        collect(venv, steps=2 * LENGTH)
    except ShapeMismatchError:
        venv.reset_infos = []
        with warnings.catch_warnings():  # the answers of both processes were fetched
            warnings.simplefilter("error")
            assert venv.get_attr("t")[0] == venv.get_attr("t")[1]
        raise
    finally:
        venv.close()


DRIVERS: dict[str, Callable[[Gives], Any]] = {
    "one environment": lambda env: collect(env, steps=LENGTH),
    "one environment, whole episodes": lambda env: collect(env, episodes=2),
    "processes": in_process,
    "a stack": lambda env: collect(VecMonitor(vec_env(env)), steps=LENGTH),
    "SyncVectorEnv": lambda env: collect(
        SyncVectorEnv([lambda: env], autoreset_mode=AutoresetMode.SAME_STEP), steps=LENGTH
    ),
    "GymnasiumVecEnv of SyncVectorEnv": lambda env: collect(
        GymnasiumVecEnv(SyncVectorEnv([lambda: env])), steps=LENGTH
    ),
    "RecordEpisodes": lambda env: step_through(recorded(env, RecordEpisodes), 1),
    "VectorRecordEpisodes": lambda env: step_through(
        recorded(SyncVectorEnv([lambda: env]), VectorRecordEpisodes), np.array([1])
    ),
}


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("case", WRONG)
def test_what_the_space_does_not_describe_is_refused(case: str, driver: str) -> None:
    space, obs, message = WRONG[case]
    # Gymnasium itself refuses to cast integers to smaller ones, be they right or wrong.
    refused = (ShapeMismatchError, TypeError) if "Vector" in driver or "Sync" in driver else ShapeMismatchError

    with pytest.raises(refused, match=f"{message}|Cannot cast"):
        DRIVERS[driver](Gives(space, obs))


@pytest.mark.parametrize("case", ["a picture of floats from 0 to 1", "300 in uint8", "an extra key", "beyond float32"])
def test_an_agent_refuses_it_too(case: str) -> None:
    space, obs, message = WRONG[case]

    with pytest.raises(ShapeMismatchError, match=message):
        by_agent(Gives(space, obs))
    with pytest.raises(ShapeMismatchError, match=message):
        by_agent(Gives(space, lambda t: obs(5)))  # in reset
    with pytest.raises(ShapeMismatchError, match=message):
        by_agent(Gives(space, lambda t: obs(5 if t == LENGTH else 0)))  # in the last observation
    with pytest.raises(ShapeMismatchError, match=message):
        by_agent(vec_env(Gives(space, obs)))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("driver", ["one environment", "one environment, whole episodes", "a stack", "RecordEpisodes"])
@pytest.mark.parametrize("case", FITS)
def test_what_loses_nothing_is_taken(case: str, driver: str) -> None:
    DRIVERS[driver](Gives(*FITS[case]))


def test_an_agent_goes_on_when_the_environment_was_mended() -> None:
    env = Gives(NUMBERS, lambda t: np.zeros(2))
    agent = WorldFluxAgent("dreamerv3:tiny", env, buffer_size=3000, learning_starts=1000)
    with pytest.raises(ShapeMismatchError, match=r"shape \(2,\), expected \(3,\)"):
        agent.learn(5)

    env.obs = lambda t: np.full(3, t)

    assert agent.learn(10).replay_buffer.num_transitions == 10


def test_an_environment_that_is_listened_to_can_be_copied() -> None:
    env = Gives(NUMBERS, np.zeros_like)
    env.obs = NUMBERS.low.__add__
    collect(env, steps=3)

    for twin in (copy.deepcopy(env), pickle.loads(pickle.dumps(env.step.given))):
        assert twin is not None
    venv = vec_env(env)
    collect(venv, steps=3)
    twin = copy.deepcopy(venv)
    twin.envs[0].obs = lambda t: np.zeros(2)
    with pytest.raises(ShapeMismatchError):
        twin.reset()
    venv.reset()


def test_who_knows_how_to_read_an_environment_is_let_do_so() -> None:
    class Scaling(DummyVecEnv):
        def _save_obs(self, env_idx: int, obs: Any) -> None:
            super()._save_obs(env_idx, np.rint(255 * obs))

    env = Gives(PICTURE, lambda t: np.full((64, 64, 3), t / 255))

    with pytest.raises(ShapeMismatchError):
        collect(vec_env(env), steps=3)
    env = Gives(PICTURE, lambda t: np.full((64, 64, 3), t / 255))
    assert collect(Scaling([lambda: env]), steps=3).num_transitions == 3


# --- changes that float32 loses


CLOCKS: dict[str, tuple[spaces.Space[Any], Callable[[int], Any], str]] = {
    "seconds since 1970": (
        FAR_NUMBERS,
        lambda t: np.array([1.0, t, 1.7e9 + t]),
        r"observation is 17000000\d\d at index 2",
    ),
    "seconds since 1970 in a float32 space": (
        spaces.Box(-np.inf, np.inf, (3,), np.float32),
        lambda t: np.array([1.0, t, 1.7e9 + t]),
        "tells apart steps of 128",
    ),
    "nanoseconds in int64": (
        spaces.Box(0, 2**62, (1,), np.int64),
        lambda t: np.array([1.7e18 + 1e6 * t], np.int64),
        "tells apart steps of 1.37",
    ),
    "whole numbers from 2**27 on": (
        spaces.Box(0, 2**40, (1,), np.int64),
        lambda t: np.array([2**27 + t]),
        "steps of 16 ",
    ),
    "a Julian day": (spaces.Box(0, np.inf, (), np.float64), lambda t: np.array(2460000.5 + t / 1440), "steps of 0.25 "),
    "one key": (
        spaces.Dict(a=NUMBERS, clock=FAR_NUMBERS),
        lambda t: {"a": np.zeros(3), "clock": np.full(3, 1.7e9 + 0.01 * t)},
        "observation 'clock' is 17000000.* gymnasium.wrappers.TransformObservation",
    ),
}


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("case", CLOCKS)
def test_changes_that_are_lost_are_told_once(case: str, driver: str) -> None:
    space, obs, message = CLOCKS[case]

    if driver == "one environment, whole episodes":
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            collect(Gives(space, lambda t: obs(0)), episodes=2)
        return
    with pytest.warns(UserWarning, match=message) as told:
        DRIVERS[driver](Gives(space, obs))

    assert len([each for each in told if "stored as" in str(each.message)]) == (2 if driver == "processes" else 1)


def test_lost_changes_are_told_under_normalisation_and_by_an_agent() -> None:
    space, obs, message = CLOCKS["seconds since 1970"]

    with pytest.warns(UserWarning, match=message):
        by_agent(VecNormalize(vec_env(Gives(space, obs))))


@pytest.mark.parametrize(
    "driver", ["one environment", "processes", "SyncVectorEnv", "RecordEpisodes", "VectorRecordEpisodes"]
)
def test_rewards_are_looked_at_too(driver: str) -> None:
    with pytest.raises(ShapeMismatchError, match=r"reward holds 4e\+38, expected at most 3.4e\+38.*TransformReward"):
        DRIVERS[driver](Gives(NUMBERS, lambda t: np.zeros(3), lambda t: 1e38 * t * t))
    with pytest.raises(ShapeMismatchError, match=r"reward holds -1\.79"):
        DRIVERS[driver](Gives(NUMBERS, lambda t: np.zeros(3), lambda t: -(10**400) if t > 1 else 0))
    with pytest.warns(UserWarning, match=r"reward is 1\.?70000\d* and changes in steps that are lost"):
        DRIVERS[driver](Gives(NUMBERS, lambda t: np.zeros(3), lambda t: 1.7e9 + t))


def test_large_numbers_are_looked_at_for_a_while_and_those_beyond_float32_always() -> None:
    told: list[str] = []
    given = GivenValues(FAR_NUMBERS, told.append)
    for t in range(1500):
        given.check_obs(np.array([1e6 * t, 1.7e9, 1e30 * (t + 1)]))
        given.check_reward(1e5 * t)
    for t in range(20):
        given.check_obs(np.array([0.0, 1.7e9 + t, 0.0]))

    assert told == []
    with pytest.raises(ShapeMismatchError, match=r"observation holds 1e\+39"):
        given.check_obs(np.array([0.0, 0.0, 1e39]))
    with pytest.raises(ShapeMismatchError, match=r"reward holds -1e\+39"):
        given.check_reward(-1e39)
