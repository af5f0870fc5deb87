"""Environments that step together are recorded in every autoreset mode, also if one of them fails or is reset alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import SyncVectorEnv
from helpers.envs import CountingEnv
from helpers.recorded import ENDINGS, assert_belongs_together, buffer_for_counting, everything
from stable_baselines3.common.vec_env import DummyVecEnv

from worldflux.envs import VecRecordEpisodes, VectorRecordEpisodes
from worldflux.envs.vector import GymnasiumVecEnv
from worldflux.errors import BufferError, ShapeMismatchError
from worldflux.replay.buffer import ReplayBuffer


def recorded_together(name: str, buffer: ReplayBuffer, **options: Any) -> Any:
    """Two counting environments, the second with options, behind one of the recording wrappers."""
    makers = [lambda: CountingEnv(**ENDINGS), lambda: CountingEnv(**ENDINGS, **options)]
    if name == "VecEnv":
        return VecRecordEpisodes(DummyVecEnv(makers), buffer)
    if name == "face":
        return VecRecordEpisodes(GymnasiumVecEnv(SyncVectorEnv(makers)), buffer)
    return VectorRecordEpisodes(SyncVectorEnv(makers, autoreset_mode=name), buffer)


PATHS = ("VecEnv", "face", "NextStep", "SameStep", "Disabled")


@pytest.mark.parametrize("name", PATHS)
def test_where_one_of_several_raises_nothing_of_that_step_is_stored(name: str) -> None:
    buffer = buffer_for_counting(n_envs=2)
    env = recorded_together(name, buffer, raise_at=2)
    env.reset()
    actions = np.full((2, 1), 2.5, np.float32)
    for _ in range(2):
        env.step(actions)
    with pytest.raises(KeyboardInterrupt):
        env.step(actions)

    assert (buffer.num_transitions, buffer.num_episodes) == (4, 2)
    batch = buffer.sample(50, 3)
    assert batch.obs[:, :, 2].tolist() == [[0, 1, 2]] * 50 and batch.truncations[:, 1].all()
    with pytest.raises(BufferError, match=r"Call env.reset\(\) first"):
        env.step(actions)
    env.reset()
    env.step(actions)
    batch = buffer.sample(50, 4)
    assert batch.is_first[batch.row_ids[:, 0] < 2].tolist()[:9] == [[True, False, False, True]] * 9
    assert_belongs_together(batch)


@pytest.mark.parametrize("name", PATHS)
def test_a_reset_that_raises_ends_the_episodes_and_another_begins_new_ones(name: str) -> None:
    buffer = buffer_for_counting(n_envs=2)
    env = recorded_together(name, buffer)
    first = env.envs[0] if name == "VecEnv" else (env.vector_env if name == "face" else env.env).envs[0]
    env.reset()
    env.step(np.ones((2, 1), np.float32))
    reset, first.reset = first.reset, "not callable"
    with pytest.raises(TypeError):
        env.reset()
    assert buffer.num_episodes == 2
    with pytest.raises(BufferError, match=r"Call env.reset\(\) first"):
        env.step(np.ones((2, 1), np.float32))
    first.reset = reset
    env.reset()
    env.step(np.ones((2, 1), np.float32))
    batch = buffer.sample(50, 3)
    assert (
        buffer.num_transitions == 4
        and batch.is_first[batch.row_ids[:, 0] < 2].tolist()[:9] == [[True, False, True]] * 9
    )


@pytest.mark.parametrize("name", PATHS)
def test_whoever_looks_in_the_middle_changes_nothing(name: str) -> None:
    batches = []
    for look_every in (1, 7, 10_000):
        buffer = buffer_for_counting(n_envs=2, capacity=700)
        env = recorded_together(name, buffer)
        env.reset()
        seen = 0
        for step in range(600):
            _, _, terminations, truncations, *_ = env.step(np.full((2, 1), step % 9 + 1.0, np.float32))
            if name == "Disabled" and (terminations | truncations).any():
                env.reset(options={"reset_mask": terminations | truncations})
            if step % look_every == 0:
                assert len(buffer) >= seen
                seen = len(buffer)
        buffer.seed(0)
        batches.append(buffer.sample(200, 6))
        assert len(buffer) == 700
    for batch in batches[1:]:
        for part in ("row_ids", "obs", "actions", "rewards", "terminations", "truncations", "is_first"):
            np.testing.assert_array_equal(getattr(batch, part), getattr(batches[0], part))
    compared = assert_belongs_together(batches[0])
    assert compared > 500


def test_a_vector_environment_that_resets_nothing_itself_must_be_reset_where_episodes_ended() -> None:
    buffer = buffer_for_counting(n_envs=2)
    env = recorded_together("Disabled", buffer)
    with pytest.raises(BufferError, match="No episode has begun: call reset"):
        env.reset(options={"reset_mask": np.array([True, False])})
    env.reset()
    for _ in range(3):
        env.step(np.ones((2, 1), np.float32))
    with pytest.raises(BufferError, match=r"environments \[0, 1\] have ended. Reset them with options="):
        env.step(np.ones((2, 1), np.float32))
    env.reset(options={"reset_mask": np.array([True, False])})
    with pytest.raises(BufferError, match=r"environments \[1\] have ended"):
        env.step(np.ones((2, 1), np.float32))
    env.reset(options={"reset_mask": np.array([False, True])})
    env.step(np.ones((2, 1), np.float32))
    assert (buffer.num_transitions, buffer.num_episodes) == (8, 4)  # their second episodes have one step


@pytest.mark.parametrize("mode", ["NextStep", "SameStep", "Disabled"])
def test_a_reset_of_some_environments_cuts_only_their_episodes(mode: str) -> None:
    buffer = buffer_for_counting(n_envs=2)
    makers = [lambda: CountingEnv(lengths=(9,)), lambda: CountingEnv(lengths=(2, 9))]
    env = VectorRecordEpisodes(SyncVectorEnv(makers, autoreset_mode=mode, copy=False), buffer)
    env.reset()
    actions = np.full((2, 1), 2.5, np.float32)
    for _ in range(2):
        env.step(actions)
    # The first is in flight, the second's episode has just ended.
    mask = {"NextStep": [True, False], "SameStep": [True, False], "Disabled": [True, True]}[mode]
    env.reset(options={"reset_mask": np.array(mask)})
    assert buffer.num_episodes == 2
    for _ in range(3):
        env.step(actions)
    batch = buffer.sample(100, 5)
    assert_belongs_together(batch)
    assert batch.truncations.sum() > 10 and batch.terminations.sum() > 10
    # Where it resets on the next step, one of the second's three steps was that.
    assert buffer.num_transitions == {"NextStep": 9, "SameStep": 10, "Disabled": 10}[mode]
    final = (batch.obs[..., 1] == 0) & (batch.obs[..., 2] == 2)
    assert final.any() and batch.obs_mask is None and not batch.rewards[final].any()


def test_actions_that_are_ignored_may_be_anything() -> None:
    makers = [lambda: CountingEnv(lengths=(1,), action_space=spaces.Discrete(2)), lambda: CountingEnv(lengths=(9,))]
    makers[1] = lambda: CountingEnv(lengths=(9,), action_space=spaces.Discrete(2))
    buffer = ReplayBuffer(100, (4,), 2, n_envs=2, seed=0)
    env = VectorRecordEpisodes(SyncVectorEnv(makers), buffer)
    env.reset()
    env.step(np.array([1, 1]))
    env.step(np.array([-5, 1]))  # the first only resets
    with pytest.raises(ShapeMismatchError, match="values between -5 and 1"):
        env.step(np.array([-5, 1]))
    env.step(np.array([0, 1]))
    assert (buffer.num_transitions, buffer.num_episodes) == (5, 2)


def test_the_atari_vector_environment_is_recorded() -> None:
    ale_vector = pytest.importorskip("ale_py.vector_env")
    for mode in ("NextStep", "SameStep"):
        envs = ale_vector.AtariVectorEnv(
            "breakout", 2, max_num_frames_per_episode=60, autoreset_mode=mode, img_height=20, img_width=20, stack_num=2
        )
        buffer = ReplayBuffer(200, (2, 20, 20), 4, n_envs=2, seed=0)
        env = VectorRecordEpisodes(envs, buffer)
        try:
            obs, _ = env.reset(seed=1)
            seen, ended = [obs], []
            for step in range(40):
                obs, _, terminations, truncations, _ = env.step(np.array([step % 4, 1]))
                seen.append(obs)
                ended.append(terminations | truncations)
            recorded = buffer.num_episodes  # those in flight end when the environments are closed
        finally:
            env.close()
        ends = np.array(ended)[:, 0]
        first = int(ends.argmax())
        assert ends.sum() >= 2 and recorded == np.sum(ended)
        assert buffer.num_transitions == 80 - (np.sum(np.array(ended)[:-1]) if mode == "NextStep" else 0)
        window = everything(buffer, rows=first + 2)
        if window.row_ids[0, 0] == 0:
            np.testing.assert_array_equal(window.obs[0, : first + 1], [obs[0] for obs in seen[: first + 1]])
            assert window.truncations[0].nonzero().flatten().tolist() == [first]
