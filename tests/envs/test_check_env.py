"""check_env: sound environments pass, and each way to break the contract is found and named."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.wrappers import RescaleAction, TransformAction
from helpers.envs import CountingEnv

from worldflux import WorldFluxAgent
from worldflux.envs.checking import check_env
from worldflux.envs.checking import report as check
from worldflux.envs.checking.report import EnvironmentCheckError
from worldflux.errors import ConfigurationError

Result = tuple[Any, Any, Any, Any, Any]


class Walk(gym.Env[Any, Any]):
    """Noise with a number that grows by the action; an episode ends where it is large, or after 30 steps."""

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012

    def __init__(self) -> None:
        self.observation_space = spaces.Box(-100.0, 100.0, (2,), np.float32)
        self.action_space: spaces.Space[Any] = spaces.Box(-2.0, 2.0, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.t, self.x = 0, float(self.np_random.normal())
        return self.obs(), {}

    def step(self, action: Any) -> Result:
        self.t, self.x = self.t + 1, self.x + float(np.sum(action))
        return self.obs(), self.x, bool(abs(self.x) > 8.0), bool(self.t >= 30), {}

    def obs(self) -> Any:
        return np.array([self.x, self.t], np.float32)


class Broken(Walk):
    """Changes what the fifth step of an episode gives."""

    def change(self, result: Result) -> Result:
        raise NotImplementedError

    def step(self, action: Any) -> Result:
        result = super().step(action)
        return self.change(result) if self.t == 5 else result


class ObservesFloat64(Broken):
    def change(self, result: Result) -> Result:
        return (result[0].astype(np.float64), *result[1:])


class ObservesAnotherShape(Broken):
    def change(self, result: Result) -> Result:
        return (result[0][None], *result[1:])


class ObservesAList(Broken):
    def change(self, result: Result) -> Result:
        return (result[0].tolist(), *result[1:])


class ObservesOutsideBounds(Broken):
    def change(self, result: Result) -> Result:
        return (result[0] + np.float32([0, 200]), *result[1:])


class ObservesNaN(Broken):
    def change(self, result: Result) -> Result:
        return (result[0] * np.float32(np.nan), *result[1:])


class ObservesInfinity(Broken):
    def __init__(self) -> None:
        super().__init__()
        self.observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)

    def change(self, result: Result) -> Result:
        return (result[0] + np.float32(np.inf), *result[1:])


class GivesFourValues(Broken):
    def change(self, result: Result) -> Any:
        return result[0], result[1], result[2], result[4]


class RaisesInStep(Broken):
    def change(self, result: Result) -> Result:
        raise RuntimeError("the simulator diverged")


class RewardsNaN(Broken):
    def change(self, result: Result) -> Result:
        return (result[0], float("nan"), *result[2:])


class RewardsAnArray(Broken):
    def change(self, result: Result) -> Result:
        return (result[0], np.array([1.0]), *result[2:])


class RewardsNothing(Broken):
    def change(self, result: Result) -> Result:
        return (result[0], None, *result[2:])


class TerminatesWithANumber(Broken):
    def change(self, result: Result) -> Result:
        return (*result[:2], 0, *result[3:])


class TerminatesWithAnArray(Broken):
    def change(self, result: Result) -> Result:
        return (*result[:2], np.array([True, False]), *result[3:])


class ResetsWithoutInfo(Walk):
    def reset(self, **options: Any) -> Any:
        return super().reset(**options)[0]


class ResetsWithoutSeed(Walk):
    def reset(self) -> Any:  # type: ignore[override]
        return super().reset()


class ResetsOutsideTheSpace(Walk):
    def reset(self, **options: Any) -> Any:
        obs, info = super().reset(**options)
        return obs.astype(np.float64), info


class IgnoresTheSeed(Walk):
    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.t, self.x = 0, float(np.random.normal())
        return self.obs(), {}


class DrawsFromNumPyInSteps(Walk):
    def step(self, action: Any) -> Result:
        obs, reward, *rest = super().step(action)
        return (obs, reward + np.random.normal(), *rest)


class RemembersEarlierEpisodes(Walk):
    total = 0

    def step(self, action: Any) -> Result:
        self.total += 1
        obs, _, *rest = super().step(action)
        return (obs, float(self.total), *rest)


class DiffersByInstance(Walk):
    made = 0

    def __init__(self) -> None:
        super().__init__()
        DiffersByInstance.made += 1
        self.number = DiffersByInstance.made

    def step(self, action: Any) -> Result:
        obs, _, *rest = super().step(action)
        return (obs, float(self.number), *rest)


class ReusesItsArray(Walk):
    def __init__(self) -> None:
        super().__init__()
        self.array = np.zeros(2, np.float32)

    def obs(self) -> Any:
        self.array[:] = self.x, self.t
        return self.array


class ReusesTwoArraysInADict(Walk):
    def __init__(self) -> None:
        super().__init__()
        self.observation_space = spaces.Dict({"a": spaces.Box(-100, 100, (1,)), "b": spaces.Box(-100, 100, (1,))})  # type: ignore[assignment]
        self.arrays = [np.zeros(1, np.float32), np.zeros(1, np.float32)]

    def obs(self) -> Any:
        self.arrays[self.t % 2][:] = self.t
        return {"a": self.arrays[self.t % 2], "b": np.zeros(1, np.float32)}


class ClipsTheActionInPlace(Walk):
    def step(self, action: Any) -> Result:
        np.clip(action, -1.0, 1.0, out=action)
        return super().step(action)


class ResetsItself(Walk):
    def step(self, action: Any) -> Result:
        obs, reward, terminated, truncated, info = super().step(action)
        if terminated or truncated:
            obs, _ = self.reset()
        return obs, reward, terminated, truncated, info


class ResetsItselfAndSaysSo(Walk):
    def step(self, action: Any) -> Result:
        obs, reward, terminated, truncated, info = super().step(action)
        if terminated or truncated:
            info = {"final_obs": obs}
            obs, _ = self.reset()
            self.np_random.normal()  # so that a reset in its place gives something else
        return obs, reward, terminated, truncated, info


class RejectsItsBounds(Walk):
    def step(self, action: Any) -> Result:
        if np.any(action >= 2.0):
            raise ValueError("too large")
        return super().step(action)


class RejectsOneOption(Walk):
    def __init__(self) -> None:
        super().__init__()
        self.action_space = spaces.Discrete(500)

    def step(self, action: Any) -> Result:
        if action == 499:
            raise KeyError(int(action))
        return super().step(np.array([action / 250.0 - 1.0]))


class HasUnboundedActions(Walk):
    def __init__(self) -> None:
        super().__init__()
        self.action_space = spaces.Box(-np.inf, np.inf, (1,), np.float32)


class ObservesATuple(Walk):
    def __init__(self) -> None:
        super().__init__()
        self.observation_space = spaces.Tuple([spaces.Discrete(2)])  # type: ignore[assignment]

    def obs(self) -> Any:
        return (np.int64(1),)


class Camera(Walk):
    shape: tuple[int, ...] = (64, 48, 3)
    dtype: Any = np.uint8

    def __init__(self) -> None:
        super().__init__()
        self.observation_space = spaces.Box(0, 255, self.shape, self.dtype)

    def obs(self) -> Any:
        return np.full(self.shape, self.t, self.dtype)


class ChannelsFirst(Camera):
    shape = (3, 64, 48)


class CameraOfOddSize(Camera):
    shape = (84, 84, 3)

    def __init__(self) -> None:
        super().__init__()
        self.action_space = spaces.Discrete(2)


class CameraOfFewRows(Camera):
    shape = (32, 84, 3)


class CameraOfFloats(Camera):
    dtype = np.float32


BROKEN: list[tuple[Callable[[], gym.Env[Any, Any]], str, str]] = [
    (ObservesFloat64, check.OBSERVATIONS, "step 4, the observation has dtype float64, expected float32"),
    (ObservesAnotherShape, check.OBSERVATIONS, r"step 4, the observation has shape \(1, 2\), expected \(2,\)"),
    (ObservesAList, check.OBSERVATIONS, "the observation is a list, expected a NumPy array"),
    (ObservesOutsideBounds, check.OBSERVATIONS, r"is 205.0 at index \[1\], expected -100.0 to 100.0"),
    (ObservesNaN, check.OBSERVATIONS, "contains NaN or infinite"),
    (ObservesInfinity, check.OBSERVATIONS, "contains NaN or infinite"),
    (
        GivesFourValues,
        check.OBSERVATIONS,
        r"step\(\) returned a tuple of 4, expected \(observation, reward, terminated",
    ),
    (RaisesInStep, check.OBSERVATIONS, "at step 4 raised RuntimeError: the simulator diverged"),
    (RewardsNaN, check.REWARDS, "The reward of step 4 is nan"),
    (RewardsAnArray, check.REWARDS, r"an array \(1,\) of float64"),
    (RewardsNothing, check.REWARDS, "The reward of step 4 is None"),
    (TerminatesWithANumber, check.FLAGS, "terminated of step 4 is 0"),
    (TerminatesWithAnArray, check.FLAGS, r"terminated of step 4 is .* \(an array \(2,\) of bool\)"),
    (ResetsWithoutInfo, check.RESET, r"reset\(\) returned an array \(2,\) of float32, expected \(observation, info\)"),
    (ResetsWithoutSeed, check.RESET, r"raised TypeError.*keywords seed and options"),
    (ResetsOutsideTheSpace, check.RESET, r"After reset\(\), the observation has dtype float64"),
    (IgnoresTheSeed, check.SEEDS, r"the observation of reset\(\) is another one. Call super"),
    (DrawsFromNumPyInSteps, check.SEEDS, "the reward of step 0 is another one"),
    (RemembersEarlierEpisodes, check.SEEDS, "the reward of step 0 is another one"),
    (DiffersByInstance, check.INSTANCES, "the reward of step 0 is another one"),
    (ReusesItsArray, check.KEPT, r"The observation of reset\(\) was changed by step 0. .*obs.copy"),
    (ReusesTwoArraysInADict, check.KEPT, r"The observation of reset\(\) was changed by step 1"),
    (ClipsTheActionInPlace, check.KEPT, r"changed the action that it was given at step"),
    (ResetsItself, check.LAST, r"is what reset\(\) gives in its place"),
    (ResetsItselfAndSaysSo, check.LAST, "has 'final_obs': the environment resets itself"),
    (RejectsItsBounds, check.ACTIONS, r"The action array\(\[2.\].* raised ValueError: too large"),
    (RejectsOneOption, check.ACTIONS, r"The action .*499.* raised KeyError"),
    (HasUnboundedActions, check.SPACES, "has no finite bounds"),
    (ObservesATuple, check.SPACES, "Tuple space, which is not supported"),
    (CameraOfFloats, check.SPACES, "looks like an image"),
    (CameraOfOddSize, check.MODELS, "is 84x84 .*multiples of 16 from 48 to 256.*ResizeImages"),
    (CameraOfFewRows, check.MODELS, "is 32x84 .*multiples of 16 from 48 to 256.*ResizeImages"),
]


@pytest.mark.parametrize(("broken", "name", "message"), BROKEN, ids=[row[0].__name__ for row in BROKEN])
def test_a_broken_environment_is_told_what_is_wrong(broken: type[Walk], name: str, message: str) -> None:
    with pytest.raises(EnvironmentCheckError, match=message) as caught:
        check_env(broken, steps=100)
    failed = {item.name for item in caught.value.report.checks if not item.passed}
    assert name in failed
    own = failed - {check.GYMNASIUM, check.SB3, name}
    # One cause may show in several checks; where it cannot, nothing else is blamed.
    allowed = {
        "ObservesNaN": {check.SEEDS, check.INSTANCES},  # NaN is not equal to itself
        "RewardsNaN": {check.SEEDS, check.INSTANCES},
        "ResetsOutsideTheSpace": set(),
        "IgnoresTheSeed": {check.INSTANCES, check.LAST},
        "DrawsFromNumPyInSteps": {check.INSTANCES},
        "CameraOfFloats": set(),
    }
    assert own <= allowed.get(broken.__name__, set())


@pytest.mark.parametrize("shape", [(84, 84, 3), (5, 84, 84), (84, 84, 9)])
def test_pictures_for_one_family_pass_and_what_the_other_one_says_is_advice(shape: tuple[int, ...]) -> None:
    class CameraForOne(Camera):
        pass

    CameraForOne.shape = shape
    report = check_env(CameraForOne, steps=20)

    assert next(item.detail for item in report.checks if item.name == check.MODELS) == "TD-MPC2 only"
    (advice,) = (text for text in report.advice if "84x84" in text)
    assert advice.startswith("DreamerV3 does not take these shapes: The image 'obs' is 84x84")
    WorldFluxAgent("tdmpc2:tiny", CameraForOne(), buffer_size=3000)
    with pytest.raises(ConfigurationError, match="84x84"):
        WorldFluxAgent("dreamerv3:tiny", CameraForOne(), buffer_size=3000)


def test_all_problems_are_reported_together() -> None:
    class Worse(RewardsNaN, TerminatesWithANumber, ClipsTheActionInPlace):
        def change(self, result: Result) -> Result:
            return RewardsNaN.change(self, TerminatesWithANumber.change(self, result))

    with pytest.raises(EnvironmentCheckError) as caught:
        check_env(Worse)
    text = str(caught.value)
    assert text.startswith("Worse failed ")
    for name in (check.REWARDS, check.FLAGS, check.KEPT):
        assert f"\n- {name}: " in text
    assert str(pickle.loads(pickle.dumps(caught.value))) == text


def test_the_other_checkers_are_asked_too() -> None:
    class SharesItsInfo(Walk):
        shared: dict[str, Any] = {"constant": {}}  # noqa: RUF012

        def reset(self, **options: Any) -> Any:
            return super().reset(**options)[0], self.shared

    with pytest.raises(EnvironmentCheckError, match=f"- {check.GYMNASIUM}: .*share an object"):
        check_env(SharesItsInfo)

    class Goal(Walk):
        def compute_reward(self) -> None:
            pass

    with pytest.raises(EnvironmentCheckError, match=f"- {check.SB3}: .*[Gg]oal"):
        check_env(Goal)


@pytest.mark.parametrize("name", ["CartPole-v1", "Pendulum-v1", "FrozenLake-v1", "Taxi-v4", "atari100k/pong"])
def test_known_environments_are_sound(name: str) -> None:
    if name.startswith("atari"):
        pytest.importorskip("ale_py")
    report = check_env(name, steps=100)
    assert report.passed
    assert report.name == name
    assert len(report.checks) == 15
    assert report.advice == ()


def test_a_task_of_dm_control_is_sound() -> None:
    pytest.importorskip("dm_control")
    report = check_env("worldflux/dmc-cartpole-balance-v0", steps=60)
    assert report.passed
    assert report.advice == ()


@pytest.mark.parametrize(
    "make",
    [
        Walk,
        Camera,
        ChannelsFirst,
        lambda: RescaleAction(Walk(), -1.0, 1.0),
        lambda: TransformAction(HasUnboundedActions(), lambda action: action, spaces.Box(-2.0, 2.0, (1,))),
        *(
            lambda space=space: CountingEnv(
                lengths=(3, 7), ends=("terminate", "truncate"), obs="dict", action_space=space
            )
            for space in (
                spaces.Discrete(3, start=2),
                spaces.MultiDiscrete([3, 2]),
                spaces.MultiBinary(2),
                spaces.Box(-1, 1, (2, 2)),
                spaces.Box(0, 9, (1,), np.int64),
            )
        ),
    ],
)
def test_sound_environments_of_every_space_pass(make: Callable[[], gym.Env[Any, Any]]) -> None:
    class Restarted(gym.Wrapper[Any, Any, Any, Any]):
        """CountingEnv counts its episodes; a seed begins at the first again."""

        def reset(self, **options: Any) -> Any:
            if options.get("seed") is not None and isinstance(self.unwrapped, CountingEnv):
                self.unwrapped.episode = -1
            return super().reset(**options)

    assert check_env(lambda: Restarted(make())).passed


def test_images_are_recognised_whichever_side_the_channels_are_on() -> None:
    for camera in (Camera, ChannelsFirst):
        report = check_env(camera, steps=40)
        assert report.checks[0].detail.startswith("observations (3, 64, 48)")


def test_an_environment_is_taken_as_an_object_and_stays_open() -> None:
    env = gym.make("CartPole-v1")
    report = check_env(env)
    assert check.INSTANCES in {item.name for item in report.checks}
    env.reset(seed=0)
    env.step(0)


def test_an_object_that_cannot_be_made_again_is_not_compared() -> None:
    report = check_env(Walk())
    assert report.passed
    assert check.INSTANCES not in {item.name for item in report.checks}
    assert any("Pass the class" in advice for advice in report.advice)


def advice(env: Callable[[], gym.Env[Any, Any]], **options: Any) -> str:
    report = check_env(env, **options)
    assert report.passed
    return "\n".join(report.advice)


def test_what_may_be_meant_is_advice() -> None:
    class Wide(Walk):
        def __init__(self) -> None:
            super().__init__()
            self.observation_space = spaces.Box(-100.0, 100.0, (2,), np.float64)

        def obs(self) -> Any:
            return super().obs().astype(np.float64)

    class Endless(Walk):
        def step(self, action: Any) -> Result:
            self.t += 1
            return self.obs(), 0.0, False, False, {}

    class AlwaysAlike(Walk):
        def reset(self, **options: Any) -> Any:
            super().reset(**options)
            self.x = 0.0
            return self.obs(), {}

    class ResetsItselfToTheSameStart(AlwaysAlike, ResetsItself):
        pass

    class LimitAsTermination(Walk):
        def step(self, action: Any) -> Result:
            obs, reward, _, _, info = super().step(action * 0)
            return obs, reward, self.t >= 9, False, info

    class BothAtOnce(LimitAsTermination):
        def step(self, action: Any) -> Result:
            obs, reward, over, _, info = super().step(action)
            return obs, reward, over, over, info

    assert "The observation is float64" in advice(Wide)
    assert "No episode ended within 100 steps" in advice(Endless, steps=100)
    assert "No episode ended" not in advice(lambda: gym.wrappers.TimeLimit(Endless(), 1_000), steps=100)
    assert "Seeds 0 and 1 bring the same" in advice(AlwaysAlike)
    assert "seems to reset the environment" in advice(ResetsItselfToTheSameStart)
    assert "seems to reset" not in advice(AlwaysAlike)
    assert "Every episode was terminated after 9 steps" in advice(LimitAsTermination)
    assert "terminated and truncated at once" in advice(BothAtOnce)
    assert advice(Walk) == ""


def test_episodes_of_one_step_and_flags_of_numpy_are_fine() -> None:
    class Bandit(Walk):
        def step(self, action: Any) -> Result:
            obs, reward, *_ = super().step(action)
            return obs, np.float32(reward), np.bool_(False), np.bool_(True), {}

    assert check_env(Bandit).passed


def test_observations_that_are_drawn_anew_in_each_step_are_fine() -> None:
    class Noise(Walk):
        def obs(self) -> Any:
            return self.np_random.uniform(-1, 1, 2).astype(np.float32)

    class Contexts(Noise):
        """A bandit: every episode has one step."""

        def step(self, action: Any) -> Result:
            obs, reward, *_ = super().step(action)
            return obs, reward, True, False, {}

    assert check_env(Noise).passed
    assert check_env(Contexts).passed


@pytest.mark.parametrize("in_dict", [False, True])
def test_an_observation_that_is_one_number_is_fine(in_dict: bool) -> None:
    class Scalar(Walk):
        def __init__(self) -> None:
            super().__init__()
            number = spaces.Box(-100, 100, (), np.float32)
            self.observation_space = spaces.Dict(x=number) if in_dict else number  # type: ignore[assignment]

        def obs(self) -> Any:
            x = np.array(self.x, np.float32)
            return {"x": x} if in_dict else x

    report = check_env(Scalar)
    assert check.SB3 in {item.name for item in report.checks}


def test_an_environment_with_goals_is_asked_for_its_rewards() -> None:
    class Reach(Walk):
        def __init__(self) -> None:
            super().__init__()
            goal = spaces.Box(-100, 100, (1,), np.float32)
            self.observation_space = spaces.Dict(observation=goal, achieved_goal=goal, desired_goal=goal)  # type: ignore[assignment]

        def obs(self) -> Any:
            x = np.array([self.x], np.float32)
            return {"observation": x, "achieved_goal": x.copy(), "desired_goal": np.zeros(1, np.float32)}

        def step(self, action: Any) -> Result:
            obs, _, *rest = super().step(action)
            reward = float(self.compute_reward(obs["achieved_goal"][None], obs["desired_goal"][None], [{}])[0])
            return (obs, reward, *rest)

        def compute_reward(self, achieved: Any, desired: Any, info: Any) -> Any:
            return -np.linalg.norm(achieved - desired, axis=-1)

    assert check_env(Reach).passed


def test_the_seed_is_checked() -> None:
    for seed in (-1, 1.5, None):
        with pytest.raises(ConfigurationError, match=r"seed is .* expected a whole number from 0"):
            check_env("CartPole-v1", seed=seed)  # type: ignore[arg-type]


def test_pictures_are_checked_on_request() -> None:
    class Painted(Walk):
        render_mode = "rgb_array"

        def render(self) -> Any:
            return np.zeros((40, 60, 3), np.uint8)

    class Blind(Painted):
        def render(self) -> Any:
            return None

    def rendering(**options: Any) -> list[str]:
        return [item.detail for item in check_env(Painted, **options).checks if item.name == check.RENDERING]

    assert rendering() == []
    assert rendering(render=True) == ["40x60"]
    assert "Pictures were not checked: the render_mode is None" in advice(Walk, render=True)
    with pytest.raises(EnvironmentCheckError, match=r"render\(\) gave None, expected a uint8 array"):
        check_env(Blind, render=True)


def test_a_report_reads_as_a_list() -> None:
    text = str(check_env("CartPole-v1", steps=20)).splitlines()
    assert text[0] == "CartPole-v1"
    assert text[1] == "  ok      spaces are supported: observations (4,), actions (2,) in the library"
    assert text[-1] == "  ok      Stable-Baselines3's checker"


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ("CartPole-v9", "CartPole-v"),
        (3, "env is 3, expected a name, an environment, or a class or function"),
        (lambda: 3, "made a int, expected a gymnasium.Env"),
        (lambda: gym.Env(), "as its observation_space, expected a space"),
        (lambda: 1 / 0, "cannot be made: ZeroDivisionError: division by zero"),
        (lambda: gym.make_vec("Pendulum-v1", 2), "SyncVectorEnv of 2 environments, expected a single one"),
    ],
)
def test_what_is_no_environment_is_a_configuration_error(env: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        check_env(env)


def test_a_vec_env_is_not_checked() -> None:
    from worldflux.envs import make_vec_env

    with pytest.raises(ConfigurationError, match="DummyVecEnv of 2 environments, expected a single one"):
        check_env(make_vec_env("CartPole-v1", 2))  # type: ignore[arg-type]


def test_the_number_of_steps_is_checked() -> None:
    with pytest.raises(ConfigurationError, match="steps is 0, expected a whole number from 1"):
        check_env("CartPole-v1", steps=0)
