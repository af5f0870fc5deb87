"""`check_env` passes sound environments, and gives advice on what may be intended."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.wrappers import RescaleAction, TimeLimit, TransformAction
from helpers.envs import CountingEnv, Gives
from helpers.walk import BOUNDLESS, PIXELS, Maker, Result, Walk, camera, numbers, reset_itself

from worldflux.envs.checking import check_env, stored
from worldflux.envs.checking import report as check
from worldflux.envs.checking.report import EnvironmentCheckError
from worldflux.envs.recording.recorder import VecEpisodeRecorder


@pytest.mark.parametrize(
    "name",
    ["CartPole-v1", "Pendulum-v1", "FrozenLake-v1", "Taxi-v4", "atari100k/pong", "worldflux/dmc-cartpole-balance-v0"],
)
def test_known_environments_are_sound(name: str) -> None:
    pytest.importorskip("ale_py" if "atari" in name else "dm_control" if "dmc" in name else "gymnasium")
    report = check_env(name, steps=60)
    assert report.passed and report.name == name
    assert len(report.checks) == 15
    assert report.advice == ()


class Restarted(gym.Wrapper[Any, Any, Any, Any]):
    """Starts the episodes of `CountingEnv` anew with a seed."""

    def reset(self, **options: Any) -> Any:
        if options.get("seed") is not None and isinstance(self.unwrapped, CountingEnv):
            self.unwrapped.episode = -1
        return super().reset(**options)


def counting(action_space: spaces.Space[Any]) -> Maker:
    options: dict[str, Any] = {"lengths": (3, 7), "ends": ("terminate", "truncate"), "obs": "dict"}
    return lambda: Restarted(CountingEnv(action_space=action_space, **options))


class Reach(Walk):
    """An environment with goals, which SB3's checker asks for its rewards."""

    def __init__(self) -> None:
        goal = spaces.Box(-100, 100, (1,), np.float32)
        super().__init__(spaces.Dict(observation=goal, achieved_goal=goal, desired_goal=goal))

    def obs(self) -> Any:
        x = np.array([self.x], np.float32)
        return {"observation": x, "achieved_goal": x.copy(), "desired_goal": np.zeros(1, np.float32)}

    def every(self, result: Result) -> Any:
        obs = result[0]
        reward = self.compute_reward(obs["achieved_goal"][None], obs["desired_goal"][None], [{}])[0]
        return (obs, float(reward), *result[2:])

    def compute_reward(self, achieved: Any, desired: Any, info: Any) -> Any:
        return -np.linalg.norm(achieved - desired, axis=-1)


def noise(self: Walk) -> Any:
    return self.np_random.uniform(-1, 1, 2).astype(np.float32)


NUMBER = spaces.Box(-100, 100, (), np.float32)

SOUND: dict[str, Maker] = {
    "numbers": Walk,
    "channels last": camera((64, 48, 3)),
    "channels first": camera((3, 64, 48)),
    "rescaled actions": lambda: RescaleAction(Walk(), -1.0, 1.0),
    "bounded actions": lambda: TransformAction(
        Walk(action_space=BOUNDLESS), lambda action: action, spaces.Box(-2.0, 2.0, (1,))
    ),
    "Discrete": counting(spaces.Discrete(3, start=2)),
    "MultiDiscrete": counting(spaces.MultiDiscrete([3, 2])),
    "MultiBinary": counting(spaces.MultiBinary(2)),
    "a matrix of actions": counting(spaces.Box(-1, 1, (2, 2))),
    "actions of integers": counting(spaces.Box(0, 9, (1,), np.int64)),
    "episodes of one step, flags of NumPy": partial(
        Walk, every=lambda _, result: (result[0], np.float32(result[1]), np.bool_(False), np.bool_(True), {})
    ),
    "observations drawn anew": partial(Walk, obs=noise),
    "contexts of a bandit": partial(Walk, obs=noise, every=lambda _, result: (*result[:2], True, False, {})),
    "a single number": partial(Walk, NUMBER, obs=lambda self: np.array(self.x, np.float32)),
    "a single number in a dictionary": partial(
        Walk, spaces.Dict(x=NUMBER), obs=lambda self: {"x": np.array(self.x, np.float32)}
    ),
    "goals": Reach,
    "large numbers": lambda: Gives(numbers(), lambda t: np.array([1e6 * t, 1e30])),
    "an observation of int32": lambda: Gives(spaces.Discrete(99, start=-3, dtype=np.int32), lambda t: np.int32(t - 3)),
    "a dictionary": lambda: Gives(
        spaces.Dict(kind=spaces.MultiBinary([2]), numbers=numbers(np.float32), pixels=PIXELS),
        lambda t: {
            "kind": np.int8([t % 2, 1]),
            "numbers": np.full(2, t, np.float32),
            "pixels": np.full((64, 64, 3), t, np.uint8),
        },
    ),
}


@pytest.mark.parametrize("case", SOUND)
def test_sound_environments_pass_every_check(case: str) -> None:
    report = check_env(SOUND[case], steps=60)

    assert report.passed
    assert {check.STORED, check.SAVED, check.SEEDS, check.GYMNASIUM, check.SB3} <= {item.name for item in report.checks}
    if case.startswith("channels"):
        assert report.checks[0].detail.startswith("observations (3, 64, 48)")


@pytest.mark.parametrize("case", ["numbers", "a dictionary"])
def test_last_observations_that_a_recorder_clips_are_seen(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def clipped(recorder: VecEpisodeRecorder, env: int, info: Any) -> Any:
        return recorder._normalize.unnormalize_obs(info["terminal_observation"])

    monkeypatch.setattr(VecEpisodeRecorder, "_final", clipped)

    with pytest.raises(EnvironmentCheckError, match=r"that was .* at index .* is stored as"):
        check_env(SOUND[case], steps=60)


def test_a_space_that_does_not_survive_saving_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(space: Any) -> dict[str, Any]:
        return {"type": "Discrete", "n": int(space.n), "start": int(space.start), "dtype": "int64"}

    monkeypatch.setattr(stored, "space_to_json", forgetful)

    with pytest.raises(EnvironmentCheckError, match=r"of int32 is .* of int64 in an agent's file"):
        check_env(SOUND["an observation of int32"], steps=30)


# --- advice


def start_alike(_: Walk) -> float:
    return 0.0


def end_after_9(self: Walk, result: Result) -> Result:
    return (*result[:2], self.t >= 9, False, {})


def never_end(_: Walk, result: Result) -> Result:
    return (*result[:2], False, False, {})


def limited(**attributes: Any) -> Maker:
    """An environment with episodes of six steps that states a time limit."""
    return lambda: Gives(numbers(np.float32), lambda t: np.array([t, 0], np.float32), **attributes)


def with_keys(*keys: str) -> Maker:
    space = spaces.Dict({key: numbers(np.float32) for key in keys})
    return lambda: Gives(space, lambda t: {key: np.full(2, t, np.float32) for key in keys})


ADVICE: dict[str, tuple[Maker, str, bool]] = {
    "float64": (
        partial(Walk, numbers(), obs=lambda self: np.abs([self.x, self.t])),
        "The observation is float64",
        True,
    ),
    "no end": (partial(Walk, every=never_end), "No episode ended within 60 steps", True),
    "a limit not reached": (lambda: TimeLimit(Walk(every=never_end), 1_000), "No episode ended", False),
    "one start": (partial(Walk, start=start_alike), "Seeds 0 and 1 bring the same", True),
    "one start, no reset": (partial(Walk, start=start_alike), "seems to reset", False),
    "resets to one start": (
        partial(Walk, start=start_alike, every=reset_itself),
        "seems to reset the environment",
        True,
    ),
    "a limit as a termination": (partial(Walk, every=end_after_9), "Every episode was terminated after 9 steps", True),
    "both at once": (
        partial(Walk, every=lambda self, result: (*result[:2], self.t >= 9, self.t >= 9, {})),
        "terminated and truncated at once",
        True,
    ),
    "nothing to say": (Walk, "", False),
    "an infinite limit": (limited(max_episode_steps=np.inf), "max_episode_steps is inf, which is no number", True),
    "a limit of -1": (limited(max_episode_steps=-1), "max_episode_steps is -1, which is no number of steps", True),
    "a method as the limit": (
        limited(max_episode_steps=lambda: 9),
        "max_episode_steps is a function, which is no number of steps",
        True,
    ),
    "a limit that is too small": (
        limited(max_episode_steps=5),
        "An episode had 6 steps, and the smallest time limit .* is 5",
        True,
    ),
    "the right limit": (limited(max_episode_steps=6), "time limit that|is no number", False),
    "a larger limit": (limited(max_episode_steps=900), "time limit that|is no number", False),
    "no limit": (limited(), "time limit that|is no number", False),
    "long keys": (
        with_keys("observation.images.left_wrist", "observation.images.left_front", "other"),
        "'observation.images.left_front' and 'observation.images.left_wrist' begin with the same 20 characters",
        True,
    ),
    "19 equal characters": (with_keys("k" * 19 + "a", "k" * 19 + "b"), "begin with the same", False),
    "20 equal characters": (with_keys("k" * 20 + "a", "k" * 20 + "b"), "begin with the same 20 characters", True),
}


@pytest.mark.parametrize("case", ADVICE)
def test_what_may_be_meant_is_advice_where_it_applies(case: str) -> None:
    make, message, applies = ADVICE[case]

    advice = check_env(make, steps=60).advice

    assert len([text for text in advice if re.search(message, text)]) == applies
    assert advice == () or case != "nothing to say"
