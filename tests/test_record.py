"""What drives an environment is what lands in the buffer."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from envs_for_tests import CountingEnv, assert_rows_belong_together
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecFrameStack, VecNormalize

from worldflux.envs import RecordEpisodes, VecRecordEpisodes, make_env, make_vec_env
from worldflux.envs.watch import EnvWatch
from worldflux.errors import BufferError, ConfigurationError, MissingDependencyError, ShapeMismatchError
from worldflux.training.batch import Batch
from worldflux.training.replay import ReplayBuffer

ENDINGS = dict(lengths=(3, 1, 4), ends=("terminate", "truncate", "both"))


def buffer_for_counting(n_envs: int = 1, capacity: int = 1000) -> ReplayBuffer:
    return ReplayBuffer(capacity, (4,), 1, n_envs=n_envs, seed=0)


def everything(buffer: ReplayBuffer, rows: int) -> Batch:
    """The first `rows` rows of the only stream, in order."""
    while True:
        batch = buffer.sample(1, rows)
        if batch.rows[0, 0] == 0:
            return batch


def drive(env: gym.Env[Any, Any], steps: int) -> None:
    env.action_space.seed(0)
    env.reset()
    for _ in range(steps):
        _, _, terminated, truncated, _ = env.step(env.action_space.sample())
        if terminated or truncated:
            env.reset()


def test_every_kind_of_ending_is_recorded_as_it_happened() -> None:
    buffer = buffer_for_counting()
    env = RecordEpisodes(CountingEnv(**ENDINGS), buffer)

    drive(env, 8)

    batch = everything(buffer, rows=11)
    # Episodes of 3, 1 and 4 steps, each followed by a row for its last observation.
    assert batch.obs[0, :, 1].tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 2, 2, 2]
    assert batch.obs[0, :, 2].tolist() == [0, 1, 2, 3, 0, 1, 0, 1, 2, 3, 4]
    assert batch.rewards[0].tolist() == [1, 2, 3, 0, 101, 0, 201, 202, 203, 204, 0]
    assert batch.terminations[0].nonzero().flatten().tolist() == [2, 9]
    assert batch.truncations[0].nonzero().flatten().tolist() == [4]
    assert batch.is_first[0].nonzero().flatten().tolist() == [0, 4, 6]
    assert bool(batch.obs_mask.all())
    assert_rows_belong_together(batch.obs.numpy(), batch.actions.numpy(), batch.rewards.numpy(), batch.is_first.numpy())
    assert (buffer.num_episodes, buffer.num_transitions) == (3, 8)


def test_steps_of_an_episode_in_flight_are_in_the_buffer() -> None:
    buffer = buffer_for_counting()
    env = RecordEpisodes(CountingEnv(lengths=(100,)), buffer)

    drive(env, 7)

    assert (buffer.num_episodes, buffer.num_transitions) == (0, 7)
    assert everything(buffer, rows=7).rewards[0].tolist() == [1, 2, 3, 4, 5, 6, 7]


def test_a_reset_in_the_middle_truncates_the_episode_and_keeps_its_last_observation() -> None:
    buffer = buffer_for_counting()
    env = RecordEpisodes(CountingEnv(lengths=(100,)), buffer)
    env.reset()
    for _ in range(2):
        env.step(np.array([4.0], np.float32))

    env.reset()
    env.step(np.array([4.0], np.float32))

    batch = everything(buffer, rows=4)
    assert batch.obs[0].tolist() == [[0, 0, 0, 0], [0, 0, 1, 4], [0, 0, 2, 4], [0, 1, 0, 0]]
    assert batch.truncations[0].tolist() == [False, True, False, False]
    assert not batch.terminations.any() and bool(batch.obs_mask.all())
    assert batch.is_first[0].tolist() == [True, False, False, True]


def test_two_resets_in_a_row_record_nothing() -> None:
    buffer = buffer_for_counting()
    env = RecordEpisodes(CountingEnv(), buffer)

    env.reset()
    env.reset()

    assert buffer.num_transitions == 0 and buffer.num_episodes == 0


def test_a_step_after_the_end_asks_for_a_reset() -> None:
    env = RecordEpisodes(CountingEnv(lengths=(1,)), buffer_for_counting())
    action = np.array([1.0], np.float32)

    with pytest.raises(BufferError, match=r"Call env.reset\(\) first"):
        env.step(action)
    env.reset()
    env.step(action)
    with pytest.raises(BufferError, match=r"Call env.reset\(\) first"):
        env.step(action)


def test_a_step_that_raises_leaves_nothing_behind() -> None:
    buffer = buffer_for_counting()
    env = RecordEpisodes(CountingEnv(raise_at=2), buffer)
    env.reset()
    env.step(np.array([1.0], np.float32))
    env.step(np.array([1.0], np.float32))

    with pytest.raises(KeyboardInterrupt):
        env.step(np.array([1.0], np.float32))

    assert buffer.num_transitions == 2


def test_several_environments_are_recorded_as_each_would_be_alone() -> None:
    settings = [dict(lengths=(3, 1, 4)), dict(lengths=(5,), ends=("truncate",)), dict(lengths=(2, 7))]
    together = buffer_for_counting(n_envs=3)
    venv = VecRecordEpisodes(
        DummyVecEnv([lambda i=i, kw=kw: CountingEnv(env_id=i, **kw) for i, kw in enumerate(settings)]), together
    )
    actions = np.random.default_rng(0).uniform(0, 10, (30, 3, 1)).astype(np.float32)
    venv.reset()
    for action in actions:
        venv.step(action)

    for i, kw in enumerate(settings):
        alone = buffer_for_counting()
        env = RecordEpisodes(CountingEnv(env_id=i, **kw), alone)
        env.reset()
        for action in actions[:, i]:
            if any(env.step(action)[2:4]):
                env.reset()
        rows = int(alone.num_transitions + alone.num_episodes)
        expected = everything(alone, rows)
        windows = together.sample(400, rows)
        found = (windows.rows[:, 0] == i).nonzero().flatten()  # the window that begins at row 0 of stream i
        for name in ("obs", "actions", "rewards", "terminations", "truncations", "is_first"):
            np.testing.assert_array_equal(getattr(windows, name)[found[0]], getattr(expected, name)[0], err_msg=name)


def test_a_reset_of_all_environments_truncates_what_they_were_doing() -> None:
    buffer = buffer_for_counting(n_envs=2)
    venv = VecRecordEpisodes(DummyVecEnv([lambda: CountingEnv(lengths=(100,))] * 2), buffer)
    venv.reset()
    venv.step(np.ones((2, 1), np.float32))

    venv.reset()

    assert buffer.num_episodes == 2
    assert buffer.sample(8, 2).truncations[:, 0].all()


def test_images_and_dictionaries_are_recorded_channel_first() -> None:
    env = CountingEnv(lengths=(4,), obs="dict", action_space=spaces.Discrete(3))
    shapes = {"image": (3, 48, 48), "vector": (4,), "kind": (3,)}
    buffer = ReplayBuffer(100, shapes, 3, seed=0)

    drive(RecordEpisodes(env, buffer), 4)

    batch = everything(buffer, rows=5)
    assert batch.obs["image"][0, :, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]
    assert batch.obs["vector"][0, :, 2].tolist() == [0, 1, 2, 3, 4]
    assert batch.obs["kind"][0].argmax(-1).tolist() == [0, 1, 2, 0, 1]
    assert batch.actions[0, :4].sum(-1).tolist() == [1, 1, 1, 1]


def test_under_normalisation_rewards_and_observations_are_stored_as_they_were() -> None:
    buffer = buffer_for_counting(n_envs=2)
    venv = VecNormalize(DummyVecEnv([lambda: CountingEnv(**ENDINGS)] * 2))
    venv = VecRecordEpisodes(venv, buffer)
    seen = [venv.reset()]
    for _ in range(20):
        seen.append(venv.step(np.full((2, 1), 2.5, np.float32))[0])

    batch = buffer.sample(64, 6)

    assert np.abs(np.concatenate(seen)).max() < 11  # the policy saw normalised numbers
    compared = assert_rows_belong_together(
        batch.obs.numpy(), batch.actions.numpy(), batch.rewards.numpy(), batch.is_first.numpy()
    )
    assert compared > 100
    np.testing.assert_allclose(batch.actions[batch.rewards > 0], -0.5)


def test_normalisation_below_a_wrapper_that_changes_shapes_is_refused() -> None:
    venv = VecFrameStack(VecNormalize(DummyVecEnv([CountingEnv])), 2)

    with pytest.raises(ConfigurationError, match="Make VecNormalize the outermost wrapper"):
        VecRecordEpisodes(venv, ReplayBuffer(100, (8,), 1))


def test_a_buffer_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ShapeMismatchError, match=r"holds observations \(3,\) and 1 action numbers, expected \(4,\)"):
        RecordEpisodes(CountingEnv(), ReplayBuffer(100, (3,), 1))
    with pytest.raises(ConfigurationError, match=r"buffer is for 2 environments, expected 1. Record a VecEnv with Vec"):
        RecordEpisodes(CountingEnv(), buffer_for_counting(n_envs=2))
    with pytest.raises(ConfigurationError, match="buffer is for 2 environments, expected 1"):
        VecRecordEpisodes(DummyVecEnv([CountingEnv]), buffer_for_counting(n_envs=2))


def test_environments_are_made_from_their_names() -> None:
    assert make_env("CartPole-v1").spec.id == "CartPole-v1"
    assert make_vec_env("Pendulum-v1", 3, seed=0, max_episode_steps=7).num_envs == 3
    with pytest.raises(ConfigurationError, match=r"Unknown environment 'CartPol-v1'; did you mean 'CartPole-v[01]'"):
        make_env("CartPol-v1")
    with pytest.raises(ConfigurationError, match="n_envs is 0, expected at least 1"):
        make_vec_env("Pendulum-v1", 0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Pendulum-v0", "'Pendulum-v0' cannot be made: .*use `Pendulum-v1` instead"),
        ("bad id!!", r"'bad id!!' cannot be made: Malformed .* gymnasium\.pprint_registry\(\) shows all"),
        ("", "'' cannot be made: Malformed environment ID"),
        (5, "name is 5, expected an id such as 'CartPole-v1'"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*out of date")
def test_names_that_cannot_be_made_say_what_to_do(name: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make_env(name)


@pytest.mark.filterwarnings("ignore:.*out of date")
def test_an_environment_whose_package_is_missing_says_so() -> None:
    with pytest.raises(MissingDependencyError, match="'Humanoid-v3' needs a package that is not installed"):
        make_env("Humanoid-v3")


# --- who moves an environment


def test_every_handle_to_an_environment_is_watched() -> None:
    venv = VecNormalize(DummyVecEnv([lambda: gym.wrappers.TimeLimit(CountingEnv(lengths=(9,)), 5)] * 2))
    watch = EnvWatch(venv)
    venv.reset()
    assert watch.moved
    action = np.ones(1, np.float32)
    for move in (
        venv.venv.reset,
        venv.venv.envs[1].reset,
        lambda: venv.step(np.stack([action] * 2)),
        lambda: venv.venv.envs[0].step(action),
        lambda: venv.venv.envs[1].unwrapped.step(action),
        lambda: venv.env_method("reset", indices=[1]),
    ):
        watch.mark()
        assert not watch.moved
        move()
        assert watch.moved


def test_environments_in_other_processes_are_watched_where_they_are_reached() -> None:
    venv = SubprocVecEnv([CountingEnv] * 2, start_method="fork")
    try:
        watch = EnvWatch(VecFrameStack(venv, 2))
        assert not watch.moved
        venv.reset()
        assert watch.moved
        watch.mark()
        venv.step(np.ones((2, 1), np.float32))
        assert watch.moved
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
