"""What happens in an environment is what the recording wrappers store."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv
from helpers.envs import CountingEnv
from helpers.recorded import ENDINGS, assert_belongs_together, buffer_for_counting, everything
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize

from worldflux.envs import RecordEpisodes, VecRecordEpisodes, VectorRecordEpisodes, collect
from worldflux.envs.vector import GymnasiumVecEnv
from worldflux.errors import BufferError, ConfigurationError, ShapeMismatchError
from worldflux.replay.buffer import ReplayBuffer


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
    assert batch.obs_mask is None
    assert_belongs_together(batch)
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
    assert not batch.terminations.any() and batch.obs_mask is None
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

    # What was stored until then is an episode that was cut.
    assert (buffer.num_transitions, buffer.num_episodes) == (2, 1)
    batch = everything(buffer, rows=3)
    assert batch.obs[0, :, 2].tolist() == [0, 1, 2] and batch.truncations[0].tolist() == [False, True, False]
    with pytest.raises(BufferError, match=r"Call env.reset\(\) first"):
        env.step(np.array([1.0], np.float32))
    env.reset()
    env.step(np.array([1.0], np.float32))
    assert everything(buffer, rows=4).is_first[0].tolist() == [True, False, False, True]


class OutOfRangeEnv(CountingEnv):
    """Returns NaN or an infinite number in its third step."""

    def __init__(self, what: str) -> None:
        super().__init__(lengths=(9,))
        self.what = what

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        obs, reward, *ends = super().step(action)
        if self.total == 3 and self.what == "obs":
            obs[3] = np.inf
        return obs, float("nan") if self.total == 3 and self.what == "reward" else reward, *ends


@pytest.mark.parametrize(
    ("what", "message"),
    [("obs", "observation contains NaN or infinite"), ("reward", r"rewards has nan at index \(0,\)")],
)
@pytest.mark.parametrize("name", ["single", "VecEnv", "vector"])
@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_number_that_is_none_is_refused_in_the_step_that_brings_it(name: str, what: str, message: str) -> None:
    buffer = buffer_for_counting()
    makers = [lambda: OutOfRangeEnv(what)]
    env: Any = {
        "single": lambda: RecordEpisodes(makers[0](), buffer),
        "VecEnv": lambda: VecRecordEpisodes(DummyVecEnv(makers), buffer),
        "vector": lambda: VectorRecordEpisodes(SyncVectorEnv(makers), buffer),
    }[name]()
    action = np.ones(1 if name == "single" else (1, 1), np.float32)
    env.reset()
    env.step(action)
    env.step(action)
    with pytest.raises((BufferError, ShapeMismatchError), match=message):
        env.step(action)
    assert (buffer.num_transitions, buffer.num_episodes) == (2, 1)
    with pytest.raises(BufferError, match=r"Call env.reset\(\) first"):
        env.step(action)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))])
def test_a_copy_of_a_recorder_holds_what_was_made_and_goes_on_by_itself(copied: Any) -> None:
    env = RecordEpisodes(OutOfRangeEnv("reward"), buffer_for_counting())
    env.reset()
    env.step(np.array([1.0], np.float32))

    twin = copied(env)
    twin.step(np.array([2.0], np.float32))

    assert (len(env.buffer), len(twin.buffer)) == (1, 2)
    assert everything(twin.buffer, rows=2).obs[0, :, 3].tolist() == [0, 1]
    with pytest.raises(BufferError, match="finite"):
        twin.step(np.array([3.0], np.float32))
    assert everything(twin.buffer, rows=3).rewards[0].tolist() == [1, 2, 0]


def test_a_reset_that_fails_leaves_another_recorders_episode_alone() -> None:
    buffer, action = buffer_for_counting(), np.array([1.0], np.float32)
    one = RecordEpisodes(CountingEnv(lengths=(9,)), buffer)
    other = RecordEpisodes(CountingEnv(), buffer)
    other.env.reset = lambda **_: 1 / 0  # type: ignore[method-assign,assignment]
    one.reset()
    one.step(action)

    with pytest.raises(ZeroDivisionError):
        other.reset()
    one.step(action)

    assert everything(buffer, rows=2).truncations[0].tolist() == [False, False]


class InterruptedPipe:
    """Raises KeyboardInterrupt once, instead of fetching an answer that `left` others come before."""

    def __init__(self, pipe: Any) -> None:
        self._pipe, self.left = pipe, -1

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipe, name)

    def recv(self) -> Any:
        self.left -= 1
        if self.left == -1:
            raise KeyboardInterrupt
        return self._pipe.recv()


@pytest.mark.parametrize("kind", ["SubprocVecEnv", "AsyncVectorEnv"])
def test_an_interrupt_between_the_answers_of_processes_leaves_them_usable(kind: str) -> None:
    makers = [lambda i=i: CountingEnv(env_id=i, **ENDINGS) for i in range(2)]  # type: ignore[misc]
    venv: Any
    if kind == "SubprocVecEnv":
        venv = SubprocVecEnv(makers, start_method="forkserver")
        pipe = InterruptedPipe(venv.remotes[1])
        venv.remotes = (venv.remotes[0], pipe)
    else:
        venv = GymnasiumVecEnv(AsyncVectorEnv(makers, context="forkserver"))
        pipe = InterruptedPipe(venv.vector_env.parent_pipes[1])
        venv.vector_env.parent_pipes[1] = pipe
    buffer, action = buffer_for_counting(n_envs=2), np.full((2, 1), 5.0, np.float32)
    env = VecRecordEpisodes(venv, buffer)
    try:
        env.reset()
        pipe.left = 2
        with pytest.raises(KeyboardInterrupt):
            for _ in range(9):
                env.step(action)
        made = len(buffer)
        env.reset()
        for _ in range(9):
            env.step(action)
    finally:
        env.close()

    assert made == 4 and len(buffer) > made + 8
    batch = buffer.sample(100, 2)
    assert_belongs_together(batch)


def test_an_action_that_is_none_is_refused_before_the_environment_moves() -> None:
    inner = CountingEnv(lengths=(9,), action_space=spaces.Discrete(3, start=1))
    buffer = ReplayBuffer(100, (4,), 3, seed=0)
    env = RecordEpisodes(inner, buffer)
    env.reset()
    for wrong in (0, 4, -1, 1.5):
        with pytest.raises(ShapeMismatchError, match=rf"values between {wrong} and {wrong}, expected \[1\] to \[3\]"):
            env.step(wrong)
    with pytest.raises(ShapeMismatchError, match=r"actions have shape \(1, 2\), expected"):
        env.step([1, 2])
    env.step(np.int64(3))
    assert inner.t == 1 and everything(buffer, rows=1).actions[0].tolist() == [[0, 0, 1]]


@pytest.mark.parametrize(
    ("space", "given", "expected"),
    [
        (spaces.MultiDiscrete([2, 3]), np.array([1, 2]), [0, 1, 0, 0, 1]),
        (spaces.MultiBinary(2), np.array([1, 0], np.int8), [0, 1, 1, 0]),
        (spaces.Box(np.array([0.0, 3.0]), np.array([4.0, 3.0]), dtype=np.float64), np.array([1.0, 3.0]), [-0.5, 0]),
    ],
)
def test_every_kind_of_action_is_stored_in_the_librarys_form(space: Any, given: Any, expected: list[float]) -> None:
    buffer = ReplayBuffer(100, (4,), len(expected), seed=0)
    env = RecordEpisodes(CountingEnv(lengths=(9,), action_space=space), buffer)
    env.reset()
    for _ in range(2):
        env.step(given)
    assert everything(buffer, rows=2).actions[0].tolist() == [expected] * 2


def test_what_is_recorded_is_a_copy() -> None:
    buffer = buffer_for_counting(n_envs=2)
    venv = VecRecordEpisodes(DummyVecEnv([lambda: CountingEnv(lengths=(2,))] * 2), buffer)
    actions = np.ones((2, 1), np.float32)
    given: Any = [venv.reset()]
    for value in range(1, 7):
        actions[:] = value
        venv.step_async(actions.copy() if value < 6 else actions)
        actions[:] = -1  # whoever overwrites arrays has no influence on what was recorded
        *arrays, infos = venv.step_wait() if value < 6 else (np.zeros(1), [])
        given += [*arrays, *(info["terminal_observation"] for info in infos if "terminal_observation" in info)]
        for array in given:
            array[...] = 77 if array.dtype != bool else True
    batch = buffer.sample(50, 5)
    assert buffer.num_transitions == 10 and batch.obs.max() < 77 and batch.rewards.max() < 300
    assert_belongs_together(batch)


def test_the_wrong_wrapper_names_the_right_one() -> None:
    single, vec, vector = CountingEnv(), DummyVecEnv([CountingEnv]), SyncVectorEnv([CountingEnv])
    buffer = buffer_for_counting()
    for wrapper, env, right in (
        (RecordEpisodes, vec, "VecRecordEpisodes"),
        (RecordEpisodes, vector, "VectorRecordEpisodes"),
        (VecRecordEpisodes, single, "RecordEpisodes"),
        (VecRecordEpisodes, vector, "VectorRecordEpisodes"),
        (VectorRecordEpisodes, single, "RecordEpisodes"),
        (VectorRecordEpisodes, vec, "VecRecordEpisodes"),
    ):
        with pytest.raises(ConfigurationError, match=f"{wrapper.__name__} got a.* Record it with {right}."):
            wrapper(env, buffer)  # type: ignore[operator]
    with pytest.raises(ConfigurationError, match="VectorRecordEpisodes got 'CartPole-v1', expected a Gymnasium vector"):
        VectorRecordEpisodes("CartPole-v1", buffer)  # type: ignore[arg-type]


def test_a_reset_of_all_environments_truncates_what_they_were_doing() -> None:
    buffer = buffer_for_counting(n_envs=2)
    venv = VecRecordEpisodes(DummyVecEnv([lambda: CountingEnv(lengths=(100,))] * 2), buffer)
    venv.reset()
    venv.step(np.ones((2, 1), np.float32))

    venv.reset()

    assert buffer.num_episodes == 2
    assert buffer.sample(8, 2).truncations[:, 0].all()


def test_under_normalisation_rewards_and_observations_are_stored_as_they_were() -> None:
    buffer = buffer_for_counting(n_envs=2)
    venv = VecNormalize(DummyVecEnv([lambda: CountingEnv(**ENDINGS)] * 2))
    venv = VecRecordEpisodes(venv, buffer)
    seen = [venv.reset()]
    for _ in range(20):
        seen.append(venv.step(np.full((2, 1), 2.5, np.float32))[0])

    batch = buffer.sample(64, 6)

    assert np.abs(np.concatenate(seen)).max() < 11  # the policy saw normalised numbers
    compared = assert_belongs_together(batch)
    assert compared > 100
    np.testing.assert_allclose(batch.actions[batch.rewards > 0], -0.5)


def test_a_buffer_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ShapeMismatchError, match=r"holds observations \(3,\) and 1 action numbers, expected \(4,\)"):
        RecordEpisodes(CountingEnv(), ReplayBuffer(100, (3,), 1))
    with pytest.raises(ConfigurationError, match="buffer is for 2 environments, expected 1"):
        VecRecordEpisodes(DummyVecEnv([CountingEnv]), buffer_for_counting(n_envs=2))
    with pytest.raises(ConfigurationError, match="buffer is for 2 environments, expected 1"):
        VectorRecordEpisodes(SyncVectorEnv([CountingEnv]), buffer_for_counting(n_envs=2))


class Paying(CountingEnv):
    """Returns the reward that it was made with."""

    def __init__(self, reward: Any) -> None:
        super().__init__()
        self.reward = reward

    def step(self, action: Any) -> Any:
        obs, _, *rest = super().step(action)
        return obs, self.reward, *rest


@pytest.mark.parametrize(
    "reward",
    [2, 2.0, True + 1, np.float32(2), np.int64(2), np.array(2.0), np.array([2.0], np.float32), np.array([[2]])],
)
def test_a_reward_is_any_number_or_an_array_of_one(reward: Any) -> None:
    buffer = ReplayBuffer(20, (4,), 1)
    env = RecordEpisodes(Paying(reward), buffer)
    env.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert env.step(np.array([5.0], np.float32))[1] is reward
    assert buffer.stored()[0].rewards[0] == 2.0


@pytest.mark.parametrize("reward", [None, [2.0], (2.0,), "2", np.array([2.0, 3.0]), np.array([]), {}, 2j])
def test_a_reward_that_is_no_number_is_called_so(reward: Any) -> None:
    env = RecordEpisodes(Paying(reward), ReplayBuffer(20, (4,), 1))
    env.reset()
    with pytest.raises(ShapeMismatchError, match=r"The reward is .*, expected one number\. Change what step returns"):
        env.step(np.array([5.0], np.float32))
    with pytest.raises(ShapeMismatchError, match=r"The reward is .*, expected one number"):
        collect(Paying(reward), steps=3)
