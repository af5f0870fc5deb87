"""`collect` makes a buffer from an environment and a policy."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import SyncVectorEnv
from helpers.envs import CountingEnv, DiceEnv, assert_rows_belong_together
from stable_baselines3 import A2C
from stable_baselines3.common.vec_env import DummyVecEnv

from worldflux.envs.collection import collect
from worldflux.errors import ConfigurationError, MissingDependencyError, ShapeMismatchError
from worldflux.replay.buffer import ReplayBuffer

MODES = ("NextStep", "SameStep", "Disabled")


def lengths_of(buffer: ReplayBuffer, path: Path) -> tuple[list[int], list[int], bool]:
    """The lengths and the streams of the episodes, and whether all of them are complete."""
    buffer.save(path)
    with np.load(path) as file:
        complete = bool(file["episode_starts"].all() and file["episode_ends"].all() and file["final_obs_mask"].all())
        return file["episode_lengths"].tolist(), file["episode_streams"].tolist(), complete


def counting(env_id: int, lengths: tuple[int, ...]) -> Any:
    return lambda: CountingEnv(lengths=lengths, ends=("terminate", "truncate"), env_id=env_id)


def many(kind: str, *makers: Any) -> Any:
    return DummyVecEnv(list(makers)) if kind == "VecEnv" else SyncVectorEnv(makers, autoreset_mode=kind)


def test_a_name_and_a_number_of_episodes_suffice(tmp_path: Path) -> None:
    buffer = collect("CartPole-v1", episodes=7, seed=0)
    lengths, _, complete = lengths_of(buffer, tmp_path / "buffer.npz")
    assert len(lengths) == buffer.num_episodes == 7 and complete and sum(lengths) == buffer.num_transitions
    again, other = collect("CartPole-v1", episodes=7, seed=0), collect("CartPole-v1", episodes=7, seed=1)
    assert lengths_of(again, tmp_path / "buffer.npz")[0] == lengths != lengths_of(other, tmp_path / "buffer.npz")[0]
    assert np.array_equal(again.sample(3, 9).obs, buffer.sample(3, 9).obs)


def test_an_episode_in_flight_at_the_last_step_is_cut_with_its_last_observation(tmp_path: Path) -> None:
    buffer = collect(CountingEnv(lengths=(5,)), steps=12)
    assert lengths_of(buffer, tmp_path / "buffer.npz") == ([5, 5, 2], [0, 0, 0], True)
    assert buffer.capacity == 12
    last = next(batch for batch in iter(lambda: buffer.sample(1, 3), None) if batch.obs[0, 0, 1] == 2)
    assert last.truncations[0].tolist() == [False, True, False] and last.obs[0, :, 2].tolist() == [0, 1, 2]


@pytest.mark.parametrize("kind", ["VecEnv", *MODES])
def test_environments_share_episodes_out_beforehand_so_that_short_ones_do_not_prevail(
    kind: str, tmp_path: Path
) -> None:
    env = many(kind, counting(0, (2,)), counting(1, (7,)), counting(2, (1,)))
    lengths, streams, complete = lengths_of(collect(env, episodes=8, seed=0), tmp_path / "buffer.npz")
    assert complete
    by_env = {stream: [n for n, s in zip(lengths, streams, strict=True) if s == stream] for stream in range(3)}
    assert by_env == {0: [2, 2], 1: [7, 7, 7], 2: [1, 1, 1]}
    few = collect(env, episodes=1)
    assert lengths_of(few, tmp_path / "buffer.npz") == ([1], [2], True)
    env.close()


@pytest.mark.parametrize("kind", ["VecEnv", *MODES])
def test_steps_are_reached_and_nothing_of_them_is_lost(kind: str, tmp_path: Path) -> None:
    env = many(kind, counting(0, (1,)), counting(1, (50,)))
    buffer = collect(env, steps=301)
    lengths, streams, complete = lengths_of(buffer, tmp_path / "buffer.npz")
    assert complete and 301 <= sum(lengths) == buffer.num_transitions <= 302
    if kind == "NextStep":  # the first environment resets on every other step
        assert abs(streams.count(0) - 100) <= 3
    batch = buffer.sample(200, 5)
    actions = batch.actions.numpy()
    assert_rows_belong_together(batch.obs.numpy(), actions, batch.rewards.numpy(), batch.is_first.numpy())
    assert len(np.unique(actions)) > 50


def test_a_buffer_without_a_capacity_keeps_everything(tmp_path: Path) -> None:
    buffer = collect(CountingEnv(lengths=(1,)), episodes=5000, policy=lambda obs: [2.0])
    assert (buffer.num_episodes, buffer.num_transitions) == (5000, 5000)
    assert lengths_of(buffer, tmp_path / "buffer.npz")[2]
    bounded = collect(CountingEnv(lengths=(4,)), episodes=30, capacity=21)
    assert (bounded.capacity, bounded.num_transitions) == (21, 21)
    # The oldest of the newest 21 steps is the last of its episode.
    assert lengths_of(bounded, tmp_path / "buffer.npz")[0] == [1, 4, 4, 4, 4, 4]


def test_a_function_acts_on_what_it_sees() -> None:
    single = collect(DiceEnv(), lambda obs: int(obs[1]) % 3, episodes=5, seed=0)
    several = collect(DummyVecEnv([DiceEnv] * 2), lambda obs: obs[:, 1].astype(int) % 3, episodes=6, seed=0)
    for buffer in (single, several):
        batch = buffer.sample(100, 3)
        step = batch.obs[..., 1].long() % 3
        taken = batch.actions.sum(-1) > 0
        assert (batch.actions.argmax(-1) == step)[taken].all() and taken.sum() > 100
    image = collect(DiceEnv("dict"), lambda obs: int(obs["image"].shape == (12, 10, 3)), episodes=2, seed=0)
    assert image.obs_shape == {"vector": (3,), "image": (3, 12, 10)}
    assert image.sample(20, 1).actions.sum(0)[0].tolist()[::2] == [0, 0]


class Remembering:
    """A policy that counts the steps since its episode began."""

    def __init__(self) -> None:
        self.asked: list[bool] = []

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> Any:
        self.asked.append(deterministic)
        count = np.zeros(len(observation)) if state is None else state
        count = np.where(episode_start, 0, count + 1)
        return count[:, None].astype(np.float32) % 10, count


@pytest.mark.parametrize("kind", ["VecEnv", *MODES])
def test_a_policy_with_a_memory_is_told_where_episodes_begin(kind: str) -> None:
    policy = Remembering()
    env = many(kind, counting(0, (4,)), counting(1, (6,)))
    batch = collect(env, policy, episodes=6, deterministic=True).sample(300, 2)
    follows = ~batch.is_first[:, 1]
    # `last action` of the next observation: what the memory had counted.
    assert (batch.obs[:, 1, 3] == batch.obs[:, 0, 2])[follows].all() and follows.sum() > 100
    assert all(policy.asked)


def test_an_algorithm_of_sb3_collects() -> None:
    env = gym.make("CartPole-v1")
    model = A2C("MlpPolicy", env, seed=0, device="cpu")
    assert collect(env, model, steps=50, seed=0).num_transitions == 50


def test_progress_is_shown_on_request(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    collect(CountingEnv(), episodes=3)
    assert capsys.readouterr().err == ""
    collect(CountingEnv(), episodes=3, progress=True)
    assert "3/3" in capsys.readouterr().err
    collect(CountingEnv(), steps=7, progress=True)
    assert "7/7" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(MissingDependencyError, match="needs tqdm"):
        collect(CountingEnv(), episodes=3, progress=True)


def test_what_cannot_be_collected_says_why() -> None:
    env = CountingEnv()
    with pytest.raises(ConfigurationError, match="steps is None and episodes is None, expected a number for one of"):
        collect(env)
    with pytest.raises(ConfigurationError, match="steps is 3 and episodes is 3"):
        collect(env, steps=3, episodes=3)
    with pytest.raises(ConfigurationError, match="episodes is 0, expected a whole number from 1"):
        collect(env, episodes=0)
    with pytest.raises(ConfigurationError, match="capacity is 'x'"):
        collect(env, episodes=1, capacity="x")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="seed is -1"):
        collect(env, episodes=1, seed=-1)
    with pytest.raises(ConfigurationError, match=r"policy is 'random', expected an object with predict\(\)"):
        collect(env, "random", episodes=1)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="Unknown environment 'CartPol-v1'"):
        collect("CartPol-v1", episodes=1)
    with pytest.raises(ConfigurationError, match="env is 5"):
        collect(5, episodes=1)  # type: ignore[arg-type]
    with pytest.raises(ShapeMismatchError, match=r"actions have shape \(1, 2\), expected"):
        collect(env, lambda obs: [1.0, 2.0], episodes=1)


def test_the_package_gives_the_function_whatever_was_imported_before() -> None:
    import worldflux.envs.collection
    from worldflux.envs import check_env, collect

    assert collect is worldflux.envs.collection.collect and callable(check_env)


@pytest.mark.parametrize("space", [spaces.Dict(a=spaces.Dict(b=spaces.Discrete(2))), spaces.Text(3)])
def test_observations_that_cannot_be_stored_say_what_is_supported(space: Any) -> None:
    env = CountingEnv()
    env.observation_space = space
    with pytest.raises(ConfigurationError, match=r"which is not supported\. Supported observations are Box"):
        collect(env, steps=1)
