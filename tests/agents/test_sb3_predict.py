"""`predict`, the policy and `evaluate_policy` work as with SB3's own algorithms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from helpers.sb3_families import BOX, DISCRETE_ACTIONS, LENGTH, NUMBERS, OBSERVATIONS, AnySpaces, both, copies, make
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

from worldflux.agents import WorldFluxAgent
from worldflux.errors import ShapeMismatchError

AGENTS: dict[tuple[str, str], WorldFluxAgent] = {}


def untrained(family: str, observed: str = "box") -> WorldFluxAgent:
    """Shared by tests that change nothing in it."""
    if (family, observed) not in AGENTS:
        AGENTS[family, observed] = make(family, AnySpaces(OBSERVATIONS[observed]))
    return AGENTS[family, observed]


def rows(space: spaces.Space[Any], count: int) -> Any:
    """Observations of several environments, as a `VecEnv` would put them together."""
    space.seed(0)
    sampled = [space.sample() for _ in range(count)]
    if isinstance(space, spaces.Dict):
        return {key: np.stack([row[key] for row in sampled]) for key in space.spaces}
    return np.stack(sampled)


def row(batch: Any, index: int) -> Any:
    return {key: array[index] for key, array in batch.items()} if isinstance(batch, dict) else batch[index]


# --- actions


def of_sb3(algorithm: type[BaseAlgorithm], space: spaces.Space[Any]) -> BaseAlgorithm:
    options: dict[str, Any] = dict(buffer_size=10) if algorithm is SAC else dict(n_steps=2, batch_size=2)
    return algorithm("MlpPolicy", AnySpaces(NUMBERS, space), device="cpu", **options)


BOXES = {
    "box": BOX,
    "box of two axes": spaces.Box(-2, 5, (2, 3), np.float32),
    "one number": spaces.Box(0, 1, (1,), np.float32),
}


@both
@pytest.mark.parametrize("acted", BOXES)
def test_continuous_actions_look_like_those_of_sac(family: str, acted: str) -> None:
    space = BOXES[acted]
    ours, theirs = make(family, AnySpaces(NUMBERS, space)), of_sb3(SAC, space)

    for obs in (rows(NUMBERS, 1)[0], rows(NUMBERS, 1), rows(NUMBERS, 3)):
        action, expected = ours.predict(obs)[0], theirs.predict(obs)[0]
        assert type(action) is type(expected) is np.ndarray
        assert (action.shape, action.dtype) == (expected.shape, expected.dtype)
        assert np.all(action >= space.low) and np.all(action <= space.high)


@pytest.mark.parametrize("acted", DISCRETE_ACTIONS)
def test_other_actions_look_like_those_of_ppo(acted: str) -> None:
    space = DISCRETE_ACTIONS[acted]
    ours, theirs = make("dreamerv3", AnySpaces(NUMBERS, space)), of_sb3(PPO, space)

    for obs in (rows(NUMBERS, 1)[0], rows(NUMBERS, 1), rows(NUMBERS, 3)):
        action, expected = ours.predict(obs)[0], theirs.predict(obs)[0]
        # Of one Discrete action PPO gives an array without axes, which no environment can look up in a dictionary.
        assert isinstance(action, np.integer if action.ndim == 0 else np.ndarray)
        assert action.shape == expected.shape
        # PPO gives the bits of MultiBinary as floats; here they are what the space says.
        assert action.dtype == (space.dtype if acted == "multibinary" else expected.dtype)
        assert all(space.contains(one) for one in (action if action.ndim > len(space.shape) else action[None]))


TOY_TEXT: dict[str, Callable[[], gym.Env[Any, Any]]] = {
    "FrozenLake-v1": lambda: gym.make("FrozenLake-v1"),
    "CliffWalking-v1": lambda: gym.make("CliffWalking-v1"),
    "Taxi": lambda: gym.make("Taxi-v4" if "Taxi-v4" in gym.registry else "Taxi-v3"),
    "Blackjack-v1": lambda: gym.wrappers.FlattenObservation(gym.make("Blackjack-v1")),
    "actions from 5 on": lambda: AnySpaces(NUMBERS, spaces.Discrete(3, start=5, dtype=np.int32)),
}


@pytest.mark.parametrize("name", TOY_TEXT)
def test_the_loop_of_the_readme_plays_where_actions_are_looked_up(name: str) -> None:
    env = TOY_TEXT[name]()
    agent = make("dreamerv3", env)
    obs, state, table = env.reset(seed=0)[0], None, {int(action): action for action in choices_of(env.action_space)}
    for _ in range(20):
        action, state = agent.predict(obs, state, deterministic=False)
        assert isinstance(action, np.integer) and action.dtype == env.action_space.dtype and action in table
        obs, _, terminated, truncated, _ = env.step(action)
        if terminated or truncated:
            obs, state = env.reset()[0], None


def choices_of(space: Any) -> range:
    return range(int(space.start), int(space.start + space.n))


# --- observations


@both
@pytest.mark.parametrize("observed", OBSERVATIONS)
def test_one_observation_is_predicted_from_as_a_row_of_several(family: str, observed: str) -> None:
    agent = untrained(family, observed)
    batch = rows(OBSERVATIONS[observed], 3)

    actions, state = agent.predict(batch, deterministic=True)
    alone = [agent.predict(row(batch, i), deterministic=True)[0] for i in range(3)]

    assert actions.shape == (3, *BOX.shape) and all(action.shape == BOX.shape for action in alone)
    np.testing.assert_allclose(np.stack(alone), actions, atol=1e-5)
    again, _ = agent.predict(batch, state, np.array([True, False, True]), deterministic=True)
    np.testing.assert_allclose(again[[0, 2]], actions[[0, 2]], atol=1e-5)


@both
def test_what_numpy_makes_an_array_of_is_an_observation(family: str) -> None:
    agent = untrained(family)
    obs = rows(NUMBERS, 2)
    expected = agent.predict(obs, deterministic=True)[0]

    for given in (obs.tolist(), obs.astype(np.float64), obs.astype(np.float16).astype(np.float32), list(obs)):
        np.testing.assert_allclose(agent.predict(given, deterministic=True)[0], expected, atol=0.02)
    np.testing.assert_array_equal(agent.predict(torch.from_numpy(obs), deterministic=True)[0], expected)
    whole = agent.predict(np.ones((2, 3), np.int64), deterministic=True)[0]
    np.testing.assert_array_equal(whole, agent.predict(np.ones((2, 3), np.float32), deterministic=True)[0])


@both
def test_discrete_observations_are_numbers_of_any_kind(family: str) -> None:
    agent = untrained(family, "discrete")
    expected = agent.predict(np.array(2), deterministic=True)[0]

    for given in (2, np.int64(2), np.array(2, np.int32), np.uint8(2)):
        np.testing.assert_array_equal(agent.predict(given, deterministic=True)[0], expected)


@both
def test_images_come_in_either_order_of_their_axes(family: str) -> None:
    agent = untrained(family, "image")
    batch = rows(OBSERVATIONS["image"], 2)

    given = agent.predict(batch, deterministic=True)[0]
    turned = agent.predict(batch.transpose(0, 3, 1, 2), deterministic=True)[0]

    np.testing.assert_array_equal(given, turned)


WRONG: list[tuple[str, Any, str]] = [
    ("box", np.zeros(4), r"observation has shape \(4,\), expected \(3,\) for one environment or \(n_envs, 3\)"),
    ("box", np.zeros((2, 2, 3)), r"observation has shape \(2, 2, 3\), expected \(3,\)"),
    ("box", np.zeros(()), r"observation has shape \(\), expected \(3,\)"),
    ("box", [[1.0, 2.0, 3.0], [1.0]], "observation is no array"),
    ("box", "three", "observation has dtype"),
    ("box", None, "observation has dtype object"),
    ("box", (np.zeros(3, np.float32), {}), r"a tuple of two, .* obs, info = env\.reset\(\)"),
    ("box", {"numbers": np.zeros(3)}, r"a dictionary with keys \['numbers'\], expected an array"),
    ("discrete", 3, "values between 3 and 3, expected"),
    ("discrete", 0.5, "dtype float64, expected whole numbers"),
    ("multidiscrete", [[0, 2]], "values between 0 and 2, expected"),
    ("multibinary", [0, 1], r"observation has shape \(2,\), expected \(3,\)"),
    ("image", np.zeros((48, 48, 3), np.float32), "dtype float32, expected uint8"),
    ("image", np.zeros((48, 40, 3), np.uint8), r"shape \(48, 40, 3\)"),
    ("dict", np.zeros(3), r"an ndarray, expected a dictionary with keys \['choice', 'image', 'numbers'\]"),
    ("dict", {"image": np.zeros((48, 48, 3), np.uint8)}, r"keys \['image'\], expected a dictionary with keys"),
    ("dict", ({}, {}), r"a tuple of two, .* obs, info = env\.reset\(\)"),
]


@both
@pytest.mark.parametrize(("observed", "given", "message"), WRONG)
def test_what_is_no_observation_says_what_one_is(family: str, observed: str, given: Any, message: str) -> None:
    with pytest.raises(ShapeMismatchError, match=message) as caught:
        untrained(family, observed).predict(given)
    assert isinstance(caught.value, ValueError)  # which SB3 raises


@both
def test_the_parts_of_a_dictionary_must_agree_on_their_rows(family: str) -> None:
    batch = rows(OBSERVATIONS["dict"], 2)
    batch["numbers"] = batch["numbers"][0]

    with pytest.raises(ShapeMismatchError, match="disagree on the number of environments"):
        untrained(family, "dict").predict(batch)


# --- the policy


@both
def test_the_policy_is_a_module_of_torch(family: str) -> None:
    agent = untrained(family)

    assert isinstance(agent.policy, torch.nn.Module) and agent.policy.device == agent.device == torch.device("cpu")
    assert sum(p.numel() for p in agent.policy.parameters()) > 0
    agent.policy.set_training_mode(True)
    assert agent.policy.training
    agent.policy.set_training_mode(False)
    assert not agent.policy.training and not any(part.training for part in agent.policy.modules())


@both
def test_deterministic_actions_repeat_and_others_do_not(family: str) -> None:
    agent = untrained(family)
    obs = rows(NUMBERS, 1)[0]

    certain = {tuple(agent.predict(obs, deterministic=True)[0].tolist()) for _ in range(4)}
    drawn = {tuple(agent.predict(obs, deterministic=False)[0].tolist()) for _ in range(4)}

    assert (len(certain), len(drawn)) == (1, 4)


@both
def test_predicting_changes_nothing(family: str) -> None:
    agent = make(family).learn(12)
    before = {name: value.clone() for name, value in agent.policy.state_dict().items()}
    obs = rows(NUMBERS, 2)
    kept = obs.copy()

    _, state = agent.predict(obs)
    remembered = [array.copy() for array in state]
    agent.predict(obs, state)

    np.testing.assert_array_equal(obs, kept)
    for array, expected in zip(state, remembered, strict=True):
        np.testing.assert_array_equal(array, expected)
    assert all(torch.equal(value, before[name]) for name, value in agent.policy.state_dict().items())
    assert agent.num_timesteps == agent.replay_buffer.num_transitions == 12


# --- evaluate_policy


@both
@pytest.mark.parametrize("n_envs", [1, 3])
def test_evaluation_gives_what_it_gives_for_sb3(family: str, n_envs: int) -> None:
    agent, heard = untrained(family), []

    returns, lengths = evaluate_policy(
        agent,
        copies(n_envs),
        n_eval_episodes=4,
        return_episode_rewards=True,
        callback=lambda found, _: heard.append(found["reward"]),
    )

    assert (list(returns), lengths) == ([LENGTH] * 4, [LENGTH] * 4)
    assert len(heard) == 4 * LENGTH
    assert evaluate_policy(agent, Monitor(AnySpaces()), n_eval_episodes=2, deterministic=False) == (LENGTH, 0.0)


@both
def test_an_evaluation_may_ask_for_a_return(family: str) -> None:
    with pytest.raises(AssertionError, match=r"Mean reward below threshold: 5\.00 < 6\.00"):
        evaluate_policy(untrained(family), copies(1), n_eval_episodes=1, reward_threshold=LENGTH + 1)


@both
def test_the_environment_below_need_not_be_monitored(family: str) -> None:
    with pytest.warns(UserWarning, match="not wrapped with a ``Monitor``"):
        mean, _ = evaluate_policy(untrained(family), DummyVecEnv([AnySpaces]), n_eval_episodes=1)
    assert mean == LENGTH
