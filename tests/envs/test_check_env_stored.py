"""check_env looks at what replay, files and logs make of an environment."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from helpers.envs import Gives

from worldflux.envs.checking import check_env
from worldflux.envs.checking import report as check
from worldflux.envs.checking import stored as check_stored
from worldflux.envs.checking.report import EnvironmentCheckError
from worldflux.envs.recording.recorder import VecEpisodeRecorder


def box(dtype: Any = np.float64, high: Any = np.inf) -> spaces.Box:
    return spaces.Box(0, high, (2,), dtype)


def picture(shape: tuple[int, ...], dtype: Any = np.float32, high: float = 1) -> spaces.Box:
    return spaces.Box(0, high, shape, dtype)


PIXELS = picture((64, 64, 3), np.uint8, 255)

FOUND: dict[str, tuple[Callable[[], Gives], str, str]] = {
    "a picture of floats in uint8": (
        lambda: Gives(PIXELS, lambda t: np.full((64, 64, 3), t / 10)),
        check.RESET,
        "has dtype float64, expected uint8",
    ),
    "a grey picture": (
        lambda: Gives(PIXELS, lambda t: np.full((64, 64, 1), t, np.uint8)),
        check.RESET,
        r"has shape \(64, 64, 1\), expected \(64, 64, 3\)",
    ),
    "an extra key": (
        lambda: Gives(spaces.Dict(a=box()), lambda t: {"a": np.full(2, float(t)), **({"b": 1} if t else {})}),
        check.OBSERVATIONS,
        r"keys \['a', 'b'\], expected a dictionary with the keys \['a'\]",
    ),
    "fractions for a Discrete": (lambda: Gives(spaces.Discrete(99), lambda t: t / 2), check.OBSERVATIONS, "is 0.5,"),
    "seconds since 1970": (
        lambda: Gives(box(), lambda t: np.array([t, 1.7e9 + t])),
        check.STORED,
        r"observation is 17000000\d\d at index 1 and changes in steps that are lost.* steps of 128 ",
    ),
    "nanoseconds in a key": (
        lambda: Gives(
            spaces.Dict(clock=spaces.Box(0, 2**62, (1,), np.int64)),
            lambda t: {"clock": np.array([17 * 10**17 + t * 10**6])},
        ),
        check.STORED,
        "observation 'clock' is 1.7e.* changes in steps that are lost",
    ),
    "1e39": (lambda: Gives(box(), lambda t: np.array([t, 1e39 * t])), check.STORED, r"holds 1e\+39, expected at most"),
    "a large reward": (
        lambda: Gives(box(), lambda t: np.array([t, 0.0]), lambda t: 1.7e9 + t),
        check.STORED,
        "reward is 17000000.* changes in steps that are lost",
    ),
    "a reward of 1e39": (
        lambda: Gives(box(), lambda t: np.array([t, 0.0]), lambda t: 1e39),
        check.STORED,
        r"reward holds 1e\+39",
    ),
    "a grey picture of floats": (
        lambda: Gives(picture((84, 84)), lambda t: np.zeros((84, 84), np.float32)),
        check.SPACES,
        "vector of 7,056 float32 numbers",
    ),
    "five frames of floats": (
        lambda: Gives(picture((5, 84, 84)), lambda t: np.zeros((5, 84, 84), np.float32)),
        check.SPACES,
        "vector of 35,280 float32 numbers",
    ),
}


@pytest.mark.parametrize("case", FOUND)
def test_what_would_be_stored_wrongly_fails(case: str) -> None:
    make, name, message = FOUND[case]

    with pytest.raises(EnvironmentCheckError, match=message) as caught:
        check_env(make, steps=30)

    assert name in {item.name for item in caught.value.report.checks if not item.passed}


SOUND: dict[str, Callable[[], Gives]] = {
    "numbers": lambda: Gives(box(np.float32), lambda t: np.array([t, -(t**2) % 7], np.float32)),
    "large numbers": lambda: Gives(box(), lambda t: np.array([1e6 * t, 1e30])),
    "a picture": lambda: Gives(PIXELS, lambda t: np.full((64, 64, 3), t, np.uint8)),
    "a choice": lambda: Gives(spaces.Discrete(99, start=-3, dtype=np.int32), lambda t: np.int32(t - 3)),
    "a dictionary": lambda: Gives(
        spaces.Dict(kind=spaces.MultiBinary([2]), numbers=box(np.float32), pixels=PIXELS),
        lambda t: {
            "kind": np.int8([t % 2, 1]),
            "numbers": np.full(2, t, np.float32),
            "pixels": np.full((64, 64, 3), t, np.uint8),
        },
    ),
}


@pytest.mark.parametrize("case", SOUND)
def test_what_is_stored_as_it_was_passes(case: str) -> None:
    passed = [item.name for item in check_env(SOUND[case], steps=30).checks]

    assert check.STORED in passed and check.SAVED in passed


@pytest.mark.parametrize("case", ["numbers", "a dictionary"])
def test_last_observations_that_a_recorder_clips_are_seen(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def clipped(recorder: VecEpisodeRecorder, env: int, info: Any) -> Any:
        return recorder._normalize.unnormalize_obs(info["terminal_observation"])

    monkeypatch.setattr(VecEpisodeRecorder, "_final", clipped)

    with pytest.raises(EnvironmentCheckError, match=r"that was 6\.0 at index .* is stored as"):
        check_env(SOUND[case], steps=30)


def test_a_space_that_does_not_survive_saving_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(space: Any) -> dict[str, Any]:
        return {"type": "Discrete", "n": int(space.n), "start": int(space.start), "dtype": "int64"}

    monkeypatch.setattr(check_stored, "space_to_json", forgetful)

    with pytest.raises(EnvironmentCheckError, match=r"of int32 is .* of int64 in an agent's file"):
        check_env(SOUND["a choice"], steps=30)


ADVICE: dict[str, tuple[dict[str, Any], str | None]] = {
    "infinity": ({"max_episode_steps": np.inf}, "max_episode_steps is inf, which is no number of steps"),
    "-1": ({"max_episode_steps": -1}, "max_episode_steps is -1, which is no number of steps"),
    "a method": ({"max_episode_steps": lambda: 9}, "max_episode_steps is a function, which is no number of steps"),
    "too small": ({"max_episode_steps": 5}, "An episode had 6 steps, and the smallest time limit .* is 5"),
    "right": ({"max_episode_steps": 6}, None),
    "larger": ({"max_episode_steps": 900}, None),
    "none": ({}, None),
}


@pytest.mark.parametrize("case", ADVICE)
def test_time_limits_that_cannot_be_right_are_advice(case: str) -> None:
    attributes, message = ADVICE[case]
    env = Gives(box(np.float32), lambda t: np.array([t, 0], np.float32), **attributes)

    found = [text for text in check_env(env, steps=30).advice if "time limit that" in text or "is no number" in text]

    assert len(found) == (message is not None)
    assert message is None or re.search(message, found[0])


def test_long_keys_that_begin_alike_are_advice() -> None:
    keys = ["observation.images.left_wrist", "observation.images.left_front", "other"]
    space = spaces.Dict({key: box(np.float32) for key in keys})

    advice = check_env(
        lambda: Gives(space, lambda t: {key: np.full(2, t, np.float32) for key in keys}), steps=20
    ).advice

    assert any(
        "'observation.images.left_front' and 'observation.images.left_wrist' begin with" in text for text in advice
    )
    assert sum("begin with the same" in text for text in advice) == 1


@pytest.mark.parametrize(("same", "told"), [(19, 0), (20, 1)])
def test_keys_are_alike_from_20_equal_characters_on(same: int, told: int) -> None:
    keys = ["k" * same + end for end in "ab"]
    space = spaces.Dict({key: box(np.float32) for key in keys})

    advice = check_env(Gives(space, lambda t: {key: np.full(2, t, np.float32) for key in keys}), steps=20).advice

    assert sum("begin with the same 20 characters" in text for text in advice) == told
