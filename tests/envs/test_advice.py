"""The advice in error messages about spaces leads to an agent that can be built."""

import re
from typing import Any

import gymnasium
import numpy
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.spaces import Box
from helpers.envs import Samples
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize

import worldflux.envs
from worldflux import WorldFluxAgent
from worldflux.envs import check_env, collect
from worldflux.envs.checking.report import EnvironmentCheckError
from worldflux.errors import ConfigurationError


class Mission(spaces.Space[str]):
    """A custom space of sentences, as in MiniGrid, which nothing can flatten."""

    def __init__(self) -> None:
        super().__init__(shape=None, dtype=str)

    def sample(self, mask: Any = None, probability: Any = None) -> str:
        return "use the key to open the door"

    def contains(self, x: Any) -> bool:
        return isinstance(x, str)


CELLS = Box(0, 255, (7, 7, 3), np.uint8)
PICTURE = Box(0, 255, (64, 64, 3), np.uint8)
NUMBERS = Box(-1, 1, (3,), np.float32)
MINIGRID = spaces.Dict(image=CELLS, direction=spaces.Discrete(4), mission=Mission())
GRAPH = spaces.Graph(node_space=NUMBERS, edge_space=None)


def followed(message: str, which: str, **names: Any) -> Any:
    """The result of the call in a message that has `which` in its name."""
    begin = re.search(rf"(gymnasium\.wrappers|worldflux\.envs)\.{which}\(", message)
    assert begin is not None, f"no {which} in: {message}"
    depth, end = 0, begin.end() - 1
    for end in range(begin.end() - 1, len(message)):
        depth += {"(": 1, ")": -1}.get(message[end], 0)
        if not depth:
            break
    known = {"gymnasium": gymnasium, "worldflux": worldflux, "numpy": numpy, "Box": Box, "Dict": spaces.Dict}
    return eval(message[begin.start() : end + 1], known | names)


FLATTEN, FILTER, TRANSFORM, RESIZE = "FlattenObservation", "FilterObservation", "TransformObservation", "ResizeImages"
OURS = {"function": lambda obs: np.zeros(3, np.float32), "space": NUMBERS}

# A space of observations, and the advice that is followed, one after the other.
OBSERVATIONS: dict[str, tuple[spaces.Space[Any], list[str]]] = {
    "MiniGrid": (MINIGRID, [FILTER, FLATTEN]),
    "MiniGrid's picture alone": (CELLS, [FLATTEN]),
    "MiniGrid's picture, made larger": (CELLS, [RESIZE]),
    "MiniGrid's cells of 20 flags": (Box(0, 255, (7, 7, 20), np.uint8), [FLATTEN]),
    "a mission alone": (Mission(), [TRANSFORM]),
    "a text": (spaces.Text(9), [FLATTEN]),
    "a text beside numbers": (spaces.Dict(text=spaces.Text(9), numbers=NUMBERS), [FLATTEN]),
    "a text beside a picture": (spaces.Dict(text=spaces.Text(9), picture=PICTURE), [FILTER]),
    "a sequence": (spaces.Sequence(NUMBERS), [TRANSFORM]),
    "a sequence beside numbers": (spaces.Dict(items=spaces.Sequence(NUMBERS), numbers=NUMBERS), [FILTER]),
    "a graph": (GRAPH, [TRANSFORM]),
    "a graph beside a picture": (spaces.Dict(graph=GRAPH, picture=PICTURE), [FILTER]),
    "a graph beside a text": (spaces.Dict(graph=GRAPH, text=spaces.Text(9)), [TRANSFORM]),
    "a tuple": (spaces.Tuple([NUMBERS, spaces.Discrete(3)]), [FLATTEN]),
    "a tuple with a sequence": (spaces.Tuple([NUMBERS, spaces.Sequence(NUMBERS)]), [TRANSFORM]),
    "a tuple with a picture": (spaces.Tuple([NUMBERS, PICTURE]), [TRANSFORM]),
    "one of two": (spaces.OneOf([NUMBERS, spaces.Discrete(3)]), [FLATTEN]),
    "dictionaries in a dictionary": (spaces.Dict(a=spaces.Dict(b=NUMBERS), c=spaces.Discrete(3)), [FLATTEN]),
    "a picture in a dictionary in a dictionary": (spaces.Dict(a=spaces.Dict(b=PICTURE), c=NUMBERS), [FILTER]),
    "an empty dictionary in a dictionary": (spaces.Dict(a=spaces.Dict(), c=NUMBERS), [FILTER]),
    "nothing but an empty dictionary": (spaces.Dict(a=spaces.Dict()), [TRANSFORM]),
    "a picture of odd sides": (Box(0, 255, (84, 84, 3), np.uint8), [RESIZE]),
    "a picture with channels first": (Box(0, 255, (3, 84, 84), np.uint8), [RESIZE]),
    "five frames": (Box(0, 255, (5, 84, 84), np.uint8), [RESIZE]),
    "four frames of colours": (Box(0, 255, (4, 84, 84, 3), np.uint8), [RESIZE]),
    "four frames of colours, channels first": (Box(0, 255, (4, 3, 84, 96), np.uint8), [RESIZE]),
    "ten channels": (Box(0, 255, (50, 60, 10), np.uint8), [RESIZE]),
    "a large picture": (Box(0, 255, (480, 640, 3), np.uint8), [RESIZE]),
    "pictures of two sizes": (spaces.Dict(a=PICTURE, b=Box(0, 255, (48, 48, 3), np.uint8)), [RESIZE]),
    "floats from 0 to 1": (Box(0, 1, (64, 64, 3), np.float32), [TRANSFORM]),
    "floats from 0 to 1, as a vector": (Box(0, 1, (64, 64, 3), np.float32), [FLATTEN]),
    "a grey picture of floats": (Box(0, 1, (84, 84), np.float32), [TRANSFORM, RESIZE]),
    "five frames of floats": (Box(0, 1, (5, 84, 84), np.float64), [TRANSFORM, RESIZE]),
    "floats from -1 to 1": (Box(-1, 1, (64, 64, 3), np.float32), [TRANSFORM]),
    "floats from 0 to 255": (Box(0, 255, (64, 64), np.float32), [TRANSFORM]),
    "floats without bounds": (Box(-np.inf, np.inf, (64, 64, 1), np.float32), [TRANSFORM]),
    "frames of frames": (Box(0, 1, (4, 64, 64, 3), np.float32), [TRANSFORM]),
    "integers": (Box(0, 10, (64, 64), np.int64), [TRANSFORM]),
    "signed bytes": (Box(-128, 127, (64, 64), np.int8), [TRANSFORM]),
    "16 bits": (Box(0, 65535, (64, 64), np.uint16), [TRANSFORM]),
    "flags": (Box(0, 1, (64, 64), np.bool_), [TRANSFORM]),
    "uint8 from 0 to 1": (Box(0, 1, (64, 64), np.uint8), [TRANSFORM]),
    "floats in a dictionary, as pixels": (
        spaces.Dict(a=Box(0, 255, (48, 48), np.float32), b=Box(-1, 1, (3, 64, 64), np.float32), numbers=NUMBERS),
        [TRANSFORM, TRANSFORM, RESIZE],
    ),
    "floats in a dictionary": (spaces.Dict(picture=Box(0, 1, (64, 64), np.float32), numbers=NUMBERS), [FLATTEN]),
}


@pytest.mark.parametrize("case", OBSERVATIONS)
def test_advice_about_observations_leads_to_an_agent(case: str) -> None:
    space, advised = OBSERVATIONS[case]
    env: Any = Samples(space)
    for which in advised:
        with pytest.raises(ConfigurationError) as refused:
            WorldFluxAgent("dreamerv3:tiny", env, buffer_size=3000)
        env = followed(str(refused.value), which, env=env, **OURS)

    agent = WorldFluxAgent("dreamerv3:tiny", env, buffer_size=3000, learning_starts=1000)

    assert agent.learn(6).replay_buffer.num_transitions == 6


@pytest.mark.parametrize("case", [case for case in OBSERVATIONS if OBSERVATIONS[case][1][:1] == [TRANSFORM]])
def test_advice_about_pictures_makes_the_least_number_black_and_the_largest_white(case: str) -> None:
    space, _ = OBSERVATIONS[case]
    if not isinstance(space, Box):
        pytest.skip("no picture")
    with pytest.raises(ConfigurationError) as refused:
        WorldFluxAgent("dreamerv3:tiny", Samples(space))
    shown = followed(str(refused.value), TRANSFORM, env=Samples(space))
    bounds = (space.low, space.high) if space.is_bounded() else (np.zeros(space.shape), np.ones(space.shape))

    black, white = (shown.observation(bound.astype(space.dtype)) for bound in bounds)

    assert (black == 0).all() and (white == 255).all()


LOW, HIGH, SHAPE = -1.0, 1.0, (2,)


@pytest.mark.parametrize("space", [Box(-np.inf, np.inf, SHAPE), Box(-1, np.inf, SHAPE)])
def test_advice_about_actions_without_bounds_leads_to_an_agent(space: Box) -> None:
    env = Samples(NUMBERS, space)
    with pytest.raises(ConfigurationError, match="has no finite bounds") as refused:
        WorldFluxAgent("tdmpc2:tiny", env)
    bounded = followed(str(refused.value), "TransformAction", env=env, low=LOW, high=HIGH, shape=SHAPE)

    assert WorldFluxAgent("tdmpc2:tiny", bounded, buffer_size=3000).learn(6).replay_buffer.num_transitions == 6


@pytest.mark.parametrize("family", ["dreamerv3:tiny"])
@pytest.mark.parametrize(
    "space",
    [spaces.Discrete(3, start=-2), spaces.MultiDiscrete([2, 3], start=[5, -1]), spaces.MultiBinary([2, 2])],
)
def test_what_needs_no_advice_is_taken(space: spaces.Space[Any], family: str) -> None:
    agent = WorldFluxAgent(family, Samples(space, space), buffer_size=3000, learning_starts=1000)

    assert agent.learn(6).replay_buffer.num_transitions == 6


def single() -> DummyVecEnv:
    return DummyVecEnv([lambda: Samples(NUMBERS)])


def test_advice_about_normalisation_within_a_stack_leads_to_a_buffer() -> None:
    with pytest.raises(ConfigurationError, match="Make VecNormalize the outermost wrapper, or pass norm_obs=False"):
        collect(VecFrameStack(VecNormalize(single()), 2), steps=4)
    with pytest.raises(
        ConfigurationError, match=r"There are 2 VecNormalize .* A single VecNormalize\(venv, norm_obs=True"
    ):
        collect(VecNormalize(VecNormalize(single(), norm_obs=False), norm_reward=False), steps=4)

    for venv in (
        VecNormalize(VecFrameStack(single(), 2)),
        VecFrameStack(VecNormalize(single(), norm_obs=False), 2),
        VecNormalize(single(), norm_obs=True, norm_reward=True),
    ):
        assert collect(venv, steps=4).num_transitions == 4


@pytest.mark.filterwarnings("error")
def test_advice_about_lost_changes_ends_them() -> None:
    class Clock(Samples):
        began = 1.7e9

        def reset(self, **options: Any) -> Any:
            return np.array([self.began], np.float64), super().reset(**options)[1]

        def step(self, action: Any) -> Any:
            return (np.array([self.began + self.t], np.float64), *super().step(action)[1:])

    env = Clock(Box(0, np.inf, (1,), np.float64))
    with pytest.raises(UserWarning, match=r"Subtract what stays the same, .*TransformObservation"):
        collect(env, steps=40)
    shown = gymnasium.wrappers.TransformObservation(env, lambda obs: obs - Clock.began, env.observation_space)

    assert collect(shown, steps=40).num_transitions == 40


def test_advice_of_a_report_ends_what_it_is_about() -> None:
    class Endless(Samples):
        def step(self, action: Any) -> Any:
            return (*super().step(action)[:2], False, False, {})

    def advice(env: Any) -> str:
        with pytest.raises(EnvironmentCheckError) as caught:  # its samples are not seeded
            check_env(env, steps=20)
        return " ".join(caught.value.report.advice)

    assert "gymnasium.wrappers.TimeLimit" in advice(Endless(NUMBERS))
    assert "gymnasium.wrappers.TimeLimit" not in advice(gymnasium.wrappers.TimeLimit(Endless(NUMBERS), 9))
