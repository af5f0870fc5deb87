"""`check_env` finds and names each way to break the contract of an environment."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from helpers.envs import Gives
from helpers.walk import BOUNDLESS, PIXELS, Maker, Result, Walk, camera, numbers, reset_itself

from worldflux import WorldFluxAgent
from worldflux.envs import make_vec_env
from worldflux.envs.checking import check_env
from worldflux.envs.checking import report as check
from worldflux.envs.checking.report import CheckReport, EnvironmentCheckError
from worldflux.errors import ConfigurationError


def changed(**parts: Callable[[Any], Any]) -> Maker:
    """An environment whose fifth step returns something else for the named parts."""

    def fifth(self: Walk, result: Result) -> Result:
        named = dict(zip(("obs", "reward", "terminated", "truncated", "info"), result, strict=True))
        return tuple(parts[name](part) if name in parts else part for name, part in named.items())  # type: ignore[return-value]

    return partial(Walk, fifth=fifth)


def raise_error(error: Exception) -> Any:
    raise error


def clip_in_place(_: Walk, action: Any) -> None:
    np.clip(action, -1.0, 1.0, out=action)


def reset_itself_and_say_so(self: Walk, result: Result) -> Result:
    if not (result[2] or result[3]):
        return result
    obs, _ = self.reset()
    self.np_random.normal()  # so that a reset in its place gives something else
    return (obs, *result[1:4], {"final_obs": result[0]})


def reuse_array(self: Walk) -> Any:
    self.array[:] = self.x, self.t
    return self.array


def reuse_two_arrays(self: Walk) -> Any:
    part = self.array[self.t % 2 :][:1]
    part[:] = self.t
    return {"a": part, "b": np.zeros(1, np.float32)}


class ResetsWithoutSeed(Walk):
    def reset(self) -> Any:  # type: ignore[override]
        return super().reset()


class ResetsTo(Walk):
    """Returns from a reset what a function makes of the observation and the info."""

    def __init__(self, change: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.change = change

    def reset(self, **options: Any) -> Any:
        return self.change(*super().reset(**options))


class DiffersByInstance(Walk):
    made = 0

    def __init__(self) -> None:
        DiffersByInstance.made += 1
        number = float(DiffersByInstance.made)
        super().__init__(every=lambda self, result: (result[0], number, *result[2:]))


def floats(*shape: int) -> Maker:
    """Grey pictures of floats from 0 to 1."""
    return lambda: Gives(spaces.Box(0, 1, shape, np.float32), lambda t: np.zeros(shape, np.float32))


TWO_PARTS = spaces.Dict({"a": spaces.Box(-100, 100, (1,)), "b": spaces.Box(-100, 100, (1,))})

BROKEN: dict[str, tuple[Maker, str, str]] = {
    "observes float64": (
        changed(obs=lambda obs: obs.astype(np.float64)),
        check.OBSERVATIONS,
        "step 4, the observation has dtype float64, expected float32",
    ),
    "observes another shape": (
        changed(obs=lambda obs: obs[None]),
        check.OBSERVATIONS,
        r"step 4, the observation has shape \(1, 2\), expected \(2,\)",
    ),
    "observes a list": (
        changed(obs=lambda obs: obs.tolist()),
        check.OBSERVATIONS,
        "the observation is a list, expected a NumPy array",
    ),
    "observes outside the bounds": (
        changed(obs=lambda obs: obs + np.float32([0, 200])),
        check.OBSERVATIONS,
        r"is 205.0 at index \[1\], expected -100.0 to 100.0",
    ),
    "observes NaN": (
        changed(obs=lambda obs: obs * np.float32(np.nan)),
        check.OBSERVATIONS,
        "contains NaN or infinite",
    ),
    "observes infinity": (
        partial(
            Walk,
            spaces.Box(-np.inf, np.inf, (2,), np.float32),
            fifth=lambda _, result: (result[0] + np.float32(np.inf), *result[1:]),
        ),
        check.OBSERVATIONS,
        "contains NaN or infinite",
    ),
    "observes an extra key": (
        lambda: Gives(spaces.Dict(a=numbers()), lambda t: {"a": np.full(2, float(t)), **({"b": 1} if t else {})}),
        check.OBSERVATIONS,
        r"keys \['a', 'b'\], expected a dictionary with the keys \['a'\]",
    ),
    "observes fractions for a Discrete": (
        lambda: Gives(spaces.Discrete(99), lambda t: t / 2),
        check.OBSERVATIONS,
        "is 0.5,",
    ),
    "gives four values": (
        partial(Walk, fifth=lambda _, result: (*result[:3], result[4])),
        check.OBSERVATIONS,
        r"step\(\) returned a tuple of 4, expected \(observation, reward, terminated",
    ),
    "raises in a step": (
        changed(obs=lambda _: raise_error(RuntimeError("the simulator diverged"))),
        check.OBSERVATIONS,
        "at step 4 raised RuntimeError: the simulator diverged",
    ),
    "rewards NaN": (changed(reward=lambda _: float("nan")), check.REWARDS, "The reward of step 4 is nan"),
    "rewards an array": (changed(reward=lambda _: np.array([1.0])), check.REWARDS, r"an array \(1,\) of float64"),
    "rewards nothing": (changed(reward=lambda _: None), check.REWARDS, "The reward of step 4 is None"),
    "terminates with a number": (changed(terminated=lambda _: 0), check.FLAGS, "terminated of step 4 is 0"),
    "terminates with an array": (
        changed(terminated=lambda _: np.array([True, False])),
        check.FLAGS,
        r"terminated of step 4 is .* \(an array \(2,\) of bool\)",
    ),
    "resets without an info": (
        lambda: ResetsTo(lambda obs, _: obs),
        check.RESET,
        r"reset\(\) returned an array \(2,\) of float32, expected \(observation, info\)",
    ),
    "resets without a seed": (ResetsWithoutSeed, check.RESET, r"raised TypeError.*keywords seed and options"),
    "resets outside the space": (
        lambda: ResetsTo(lambda obs, info: (obs.astype(np.float64), info)),
        check.RESET,
        r"After reset\(\), the observation has dtype float64",
    ),
    "shows pictures of floats in uint8": (
        lambda: Gives(PIXELS, lambda t: np.full((64, 64, 3), t / 10)),
        check.RESET,
        "has dtype float64, expected uint8",
    ),
    "ignores the seed": (
        partial(Walk, start=lambda _: float(np.random.normal())),
        check.SEEDS,
        r"the observation of reset\(\) is another one. Call super",
    ),
    "draws from NumPy in steps": (
        partial(Walk, every=lambda _, result: (result[0], np.random.normal(), *result[2:])),
        check.SEEDS,
        "the reward of step 0 is another one",
    ),
    "remembers earlier episodes": (
        partial(Walk, every=lambda self, result: (result[0], float(self.total), *result[2:])),
        check.SEEDS,
        "the reward of step 0 is another one",
    ),
    "differs by instance": (DiffersByInstance, check.INSTANCES, "the reward of step 0 is another one"),
    "reuses its array": (
        partial(Walk, obs=reuse_array),
        check.KEPT,
        r"The observation of reset\(\) was changed by step 0. .*obs.copy",
    ),
    "reuses two arrays in a dictionary": (
        partial(Walk, TWO_PARTS, obs=reuse_two_arrays),
        check.KEPT,
        r"The observation of reset\(\) was changed by step 1",
    ),
    "clips the action in place": (
        partial(Walk, before=clip_in_place),
        check.KEPT,
        "changed the action that it was given at step",
    ),
    "resets itself": (partial(Walk, every=reset_itself), check.LAST, r"is what reset\(\) gives in its place"),
    "resets itself and says so": (
        partial(Walk, every=reset_itself_and_say_so),
        check.LAST,
        "has 'final_obs': the environment resets itself",
    ),
    "rejects its bounds": (
        partial(Walk, before=lambda _, action: raise_error(ValueError("too large")) if np.any(action >= 2.0) else None),
        check.ACTIONS,
        r"The action array\(\[2.\].* raised ValueError: too large",
    ),
    "rejects one option": (
        partial(
            Walk,
            action_space=spaces.Discrete(500),
            before=lambda _, action: raise_error(KeyError(499)) if action == 499 else None,
            obs=lambda _: np.zeros(2, np.float32),
        ),
        check.ACTIONS,
        "The action .*499.* raised KeyError",
    ),
    "has unbounded actions": (partial(Walk, action_space=BOUNDLESS), check.SPACES, "has no finite bounds"),
    "observes a tuple": (
        partial(Walk, spaces.Tuple([spaces.Discrete(2)]), obs=lambda _: (np.int64(1),)),
        check.SPACES,
        "Tuple space, which is not supported",
    ),
    "shows pictures of floats": (camera((64, 48, 3), np.float32), check.SPACES, "looks like an image"),
    "shows a grey picture of floats": (floats(84, 84), check.SPACES, "vector of 7,056 float32 numbers"),
    "shows five frames of floats": (floats(5, 84, 84), check.SPACES, "vector of 35,280 float32 numbers"),
    "shows pictures of few rows": (
        camera((32, 84, 3)),
        check.MODELS,
        "is 32x84 .*multiples of 16 from 48 to 256.*ResizeImages",
    ),
    "tells seconds since 1970": (
        lambda: Gives(numbers(), lambda t: np.array([t, 1.7e9 + t])),
        check.STORED,
        r"observation is 17000000\d\d at index 1 and changes in steps that are lost.* steps of 128 ",
    ),
    "tells nanoseconds in a key": (
        lambda: Gives(
            spaces.Dict(clock=spaces.Box(0, 2**62, (1,), np.int64)),
            lambda t: {"clock": np.array([17 * 10**17 + t * 10**6])},
        ),
        check.STORED,
        "observation 'clock' is 1.7e.* changes in steps that are lost",
    ),
    "observes 1e39": (
        lambda: Gives(numbers(), lambda t: np.array([t, 1e39 * t])),
        check.STORED,
        r"holds 1e\+39, expected at most",
    ),
    "earns large rewards": (
        lambda: Gives(numbers(), lambda t: np.array([t, 0.0]), lambda t: 1.7e9 + t),
        check.STORED,
        "reward is 17000000.* changes in steps that are lost",
    ),
    "earns 1e39": (
        lambda: Gives(numbers(), lambda t: np.array([t, 0.0]), lambda t: 1e39),
        check.STORED,
        r"reward holds 1e\+39",
    ),
}

ALSO: dict[str, set[str]] = {
    "observes NaN": {check.SEEDS, check.INSTANCES},  # NaN is not equal to itself
    "rewards NaN": {check.SEEDS, check.INSTANCES},
    "observes fractions for a Discrete": {check.RESET},
    "ignores the seed": {check.INSTANCES, check.LAST},
    "draws from NumPy in steps": {check.INSTANCES},
    "shows pictures of floats in uint8": {check.OBSERVATIONS},
}
"""The checks in which the same fault may show, too."""


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_environment_is_told_what_is_wrong_and_nothing_else(case: str) -> None:
    make, name, message = BROKEN[case]
    with pytest.raises(EnvironmentCheckError, match=message) as caught:
        check_env(make, steps=100)
    failed = {item.name for item in caught.value.report.checks if not item.passed}
    assert name in failed
    assert failed - {check.GYMNASIUM, check.SB3, name} <= ALSO.get(case, set())


@pytest.mark.parametrize(
    ("shape", "options"),
    [((84, 84, 3), {}), ((5, 84, 84), {}), ((84, 84, 9), {}), ((84, 84, 3), {"action_space": spaces.Discrete(2)})],
)
def test_pictures_for_one_family_pass_and_the_objection_of_the_other_is_advice(
    shape: tuple[int, ...], options: dict[str, Any]
) -> None:
    make = camera(shape, **options)
    report = check_env(make, steps=20)

    assert next(item.detail for item in report.checks if item.name == check.MODELS) == "TD-MPC2 only"
    (advice,) = (text for text in report.advice if "84x84" in text)
    assert advice.startswith("DreamerV3 does not take these shapes: The image 'obs' is 84x84")
    WorldFluxAgent("tdmpc2:tiny", make(), buffer_size=3000)
    with pytest.raises(ConfigurationError, match="84x84"):
        WorldFluxAgent("dreamerv3:tiny", make(), buffer_size=3000)


def test_all_problems_are_reported_together() -> None:
    def worse() -> Walk:
        return Walk(before=clip_in_place, fifth=lambda _, result: (result[0], float("nan"), 0, *result[3:]))

    with pytest.raises(EnvironmentCheckError) as caught:
        check_env(worse)
    text = str(caught.value)
    assert text.startswith("worse failed ")
    for name in (check.REWARDS, check.FLAGS, check.KEPT):
        assert f"\n- {name}: " in text
    assert str(pickle.loads(pickle.dumps(caught.value))) == text


def test_the_other_checkers_are_asked_too() -> None:
    shared: dict[str, Any] = {"constant": {}}
    with pytest.raises(EnvironmentCheckError, match=f"- {check.GYMNASIUM}: .*share an object"):
        check_env(lambda: ResetsTo(lambda obs, _: (obs, shared)))
    with pytest.raises(EnvironmentCheckError, match=f"- {check.SB3}: .*[Gg]oal"):
        check_env(lambda: Walk(compute_reward=lambda _: None))


# --- what is checked, and how


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


class Painted(Walk):
    render_mode = "rgb_array"

    def render(self) -> Any:
        return np.zeros((40, 60, 3), np.uint8)


class Blind(Painted):
    def render(self) -> Any:
        return None


def test_pictures_are_checked_on_request() -> None:
    def rendering(report: CheckReport) -> list[str]:
        return [item.detail for item in report.checks if item.name == check.RENDERING]

    assert rendering(check_env(Painted)) == []
    assert rendering(check_env(Painted, render=True)) == ["40x60"]
    assert "Pictures were not checked: the render_mode is None, not 'rgb_array'." in check_env(Walk, render=True).advice
    with pytest.raises(EnvironmentCheckError, match=r"render\(\) gave None, expected a uint8 array"):
        check_env(Blind, render=True)


def test_a_report_reads_as_a_list() -> None:
    text = str(check_env("CartPole-v1", steps=20)).splitlines()
    assert text[0] == "CartPole-v1"
    assert text[1] == "  ok      spaces are supported: observations (4,), actions (2,) in the library"
    assert text[-1] == "  ok      Stable-Baselines3's checker"


@pytest.mark.parametrize(
    ("env", "options", "message"),
    [
        ("CartPole-v9", {}, "CartPole-v"),
        (3, {}, "env is 3, expected a name, an environment, or a class or function"),
        (lambda: 3, {}, "made an int, expected a gymnasium.Env"),
        (lambda: gym.Env(), {}, "as its observation_space, expected a space"),
        (lambda: 1 / 0, {}, "cannot be made: ZeroDivisionError: division by zero"),
        (lambda: gym.make_vec("Pendulum-v1", 2), {}, "SyncVectorEnv of 2 environments, expected a single one"),
        ("CartPole-v1", {"steps": 0}, "steps is 0, expected a whole number from 1"),
        ("CartPole-v1", {"seed": -1}, "seed is -1, expected a whole number from 0"),
        ("CartPole-v1", {"seed": None}, "seed is None, expected a whole number from 0"),
    ],
)
def test_what_cannot_be_checked_is_a_configuration_error(env: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        check_env(env, **options)


def test_a_vec_env_is_not_checked() -> None:
    with pytest.raises(ConfigurationError, match="DummyVecEnv of 2 environments, expected a single one"):
        check_env(make_vec_env("CartPole-v1", 2))  # type: ignore[arg-type]
