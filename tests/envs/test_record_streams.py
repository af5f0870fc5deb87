"""Several recorders write into one buffer; each has a stream of its own, whatever the others do."""

from __future__ import annotations

import gc
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv
from helpers.agents import make_agent
from helpers.envs import CountingEnv, assert_rows_belong_together
from helpers.recorded import buffer_for_counting
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv

from worldflux import WorldFluxAgent
from worldflux.agents.callbacks import AgentCheckpointCallback
from worldflux.envs import RecordEpisodes, VecRecordEpisodes, VectorRecordEpisodes
from worldflux.errors import BufferError, ConfigurationError
from worldflux.replay.checkpoint import ReplaySegments
from worldflux.training import ReplayBuffer

ACTION = np.array([5.0], np.float32)
LENGTHS = ((4, 7), (3,), (6, 1, 2))
ENDS = ("terminate", "truncate", "both")


def counting(env_id: int) -> CountingEnv:
    return CountingEnv(lengths=LENGTHS[env_id % 3], ends=ENDS, env_id=env_id)


def recorders(buffer: ReplayBuffer, count: int) -> list[RecordEpisodes]:
    return [RecordEpisodes(counting(env_id), buffer) for env_id in range(count)]


def step(env: Any, rng: np.random.Generator) -> bool:
    """Makes a step with a random action, and a reset if the episode ended; returns whether it did."""
    _, _, terminated, truncated, _ = env.step(rng.uniform(0, 10, 1).astype(np.float32))
    if terminated or truncated:
        env.reset()
    return bool(terminated or truncated)


def is_seen(buffer: ReplayBuffer, seq_len: int) -> bool:
    """Whether all observations are known, the last ones of episodes included."""
    return buffer.sample(100, seq_len).obs_mask is None


def assert_complete(buffer: ReplayBuffer, seq_len: int = 4) -> None:
    """Checks that every window has rows of one environment that belong together, and that no observation is missing."""
    batch = buffer.sample(300, seq_len)
    assert batch.obs_mask is None
    obs, actions, rewards, is_first = (
        part.numpy() for part in (batch.obs, batch.actions, batch.rewards, batch.is_first)
    )
    compared = 0
    for t in range(seq_len - 1):  # windows of a stream that several used one after another show several environments
        pair = slice(t, t + 2)
        same = ~is_first[:, t + 1]
        compared += assert_rows_belong_together(
            obs[same, pair], actions[same, pair], rewards[same, pair], is_first[same, pair]
        )
    assert compared > 100
    assert np.all(obs[is_first, 2] == 0)


def episodes_in(buffer: ReplayBuffer, path: Path) -> dict[int, list[tuple[int, int]]]:
    """The episodes of each environment and their lengths, in the order in which they are stored."""
    buffer.save(path / "episodes.npz")
    found: dict[int, list[tuple[int, int]]] = {}
    with np.load(path / "episodes.npz") as data:
        first = np.cumsum(data["episode_lengths"]) - data["episode_lengths"]
        for start, length in zip(first, data["episode_lengths"], strict=True):
            env_id, episode = data["obs"][start, :2].astype(int).tolist()
            rows = data["obs"][start : start + length]
            assert (rows[:, 0] == env_id).all() and (rows[:, 1] == episode).all()
            assert rows[:, 2].tolist() == list(range(length))
            found.setdefault(env_id, []).append((episode, int(length)))
    return found


# --- together


@pytest.mark.parametrize("n_envs", [1, 2, 3])
def test_environments_that_are_stepped_in_turn_record_what_each_does(n_envs: int, tmp_path: Path) -> None:
    buffer, rng = buffer_for_counting(n_envs=n_envs), np.random.default_rng(0)
    envs = recorders(buffer, 3)
    for env in envs:
        env.reset()
    ended = np.zeros(3, int)
    for _ in range(60):
        for env_id, env in enumerate(envs):
            ended[env_id] += step(env, rng)

    assert (len(buffer), buffer.num_episodes, buffer.num_streams) == (180, ended.sum(), 3)
    assert buffer.n_envs == n_envs
    assert_complete(buffer)
    for env_id, episodes in episodes_in(buffer, tmp_path).items():
        lengths, count = LENGTHS[env_id], int(ended[env_id])
        assert [episode for episode, _ in episodes] == list(range(len(episodes)))
        assert [n for _, n in episodes[:count]] == [lengths[i % len(lengths)] for i in range(count)]
        assert sum(n for _, n in episodes) == 60


def test_make_vec_env_of_sb3_records_with_the_wrapper_class() -> None:
    buffer = ReplayBuffer(1000, (4,), 2)
    kwargs = {"buffer": buffer}
    venv = make_vec_env("CartPole-v1", n_envs=3, seed=0, wrapper_class=RecordEpisodes, wrapper_kwargs=kwargs)
    venv.reset()
    dones = sum(int(venv.step(np.array([i % 2, 0, 1]))[2].sum()) for i in range(50))

    assert len(buffer) == 150 and buffer.num_episodes == dones > 10
    venv.close()
    assert buffer.num_episodes == dones + 3
    assert is_seen(buffer, 5)


@pytest.mark.parametrize("order", ["steps of all, then ends", "by chance"])
def test_resets_in_the_middle_cut_only_their_own_episodes(order: str) -> None:
    buffer, rng = buffer_for_counting(), np.random.default_rng(1)
    envs = recorders(buffer, 4)
    for env in envs:
        env.reset()
    for number in range(300):
        env = envs[number % 4 if order != "by chance" else rng.integers(4)]
        if rng.random() < 0.1:
            env.reset()
        else:
            step(env, rng)

    assert buffer.num_streams == 4
    assert_complete(buffer)


def test_a_buffer_that_wraps_around_keeps_the_newest_of_each() -> None:
    buffer, rng = buffer_for_counting(60), np.random.default_rng(0)
    envs = recorders(buffer, 3)
    for env in envs:
        env.reset()
    for _ in range(200):
        for env in envs:
            step(env, rng)
        assert len(buffer) <= 60

    assert len(buffer) == 60
    assert_complete(buffer, 3)
    seen = buffer.sample(500, 1).obs[:, 0].numpy()
    for env in envs:
        episode = env.unwrapped.episode  # type: ignore[attr-defined]
        assert seen[seen[:, 0] == env.unwrapped.env_id, 1].min() > episode - 15  # type: ignore[attr-defined]


# --- by turns


def test_one_environment_after_another_shares_a_stream() -> None:
    buffer = buffer_for_counting()
    one, other = recorders(buffer, 2)
    for _ in range(3):
        for env in (one, other):
            env.reset()
            while True:
                _, _, terminated, truncated, _ = env.step(ACTION)
                if terminated or truncated:
                    break

    assert (buffer.num_episodes, buffer.num_streams) == (6, 1)
    assert_complete(buffer)


@pytest.mark.parametrize("how", ["closed", "forgotten", "ended"])
def test_a_stream_that_is_free_serves_another_environment(how: str) -> None:
    buffer = buffer_for_counting()
    made = 0
    for env_id in range(5):
        env = RecordEpisodes(counting(0 if how == "ended" else env_id), buffer)
        env.reset()
        for _ in range(4 if how == "ended" else 2):
            env.step(ACTION)
            made += how == "ended" or LENGTHS[env_id % 3][0] > 1
        if how == "closed":
            env.close()
        del env
        gc.collect()
    RecordEpisodes(counting(0), buffer).reset()

    assert (len(buffer), buffer.num_streams, buffer.num_episodes) == (made, 1, 5)
    assert is_seen(buffer, 3)


def test_a_recorder_leaves_the_episode_alone_that_somebody_else_has_in_flight() -> None:
    buffer, zeros = buffer_for_counting(n_envs=2), np.zeros(2)
    buffer.add(np.zeros((2, 4)), np.zeros((2, 1)), zeros, zeros, zeros, active=[True, False])
    (env,) = recorders(buffer, 1)
    env.reset()
    env.step(ACTION)

    assert buffer.sample(50, 1).truncations.sum() == 0  # which the step of stream 0 would be
    assert buffer.stored()[0].in_flight.tolist() == [True, True]


def test_a_closed_environment_may_be_reset_again() -> None:
    buffer = buffer_for_counting()
    env, other = recorders(buffer, 2)
    env.reset()
    env.step(ACTION)
    env.close()
    other.reset()
    other.step(ACTION)
    env.reset()
    env.step(ACTION)
    other.step(ACTION)

    assert (len(buffer), buffer.num_streams) == (4, 2)
    assert is_seen(buffer, 2)


def test_a_step_of_a_closed_environment_asks_for_a_reset() -> None:
    env, _ = recorders(buffer_for_counting(), 2)
    env.reset()
    env.close()
    with pytest.raises(BufferError, match=r"Call env.reset\(\) first"):
        env.step(ACTION)


def test_a_buffer_too_small_for_all_says_so() -> None:
    one, other, third = recorders(buffer_for_counting(2), 3)
    one.reset()
    other.reset()
    with pytest.raises(BufferError, match=r"capacity is 2, and 3 environments record into it.*Make it larger"):
        third.reset()
    one.step(ACTION)
    other.step(ACTION)


# --- with others


VECTORS: dict[str, Callable[[ReplayBuffer], Any]] = {
    "VecEnv": lambda buffer: VecRecordEpisodes(DummyVecEnv([lambda: counting(7), lambda: counting(8)]), buffer),
    "VectorEnv": lambda buffer: VectorRecordEpisodes(SyncVectorEnv([lambda: counting(7), lambda: counting(8)]), buffer),
}


@pytest.mark.parametrize("kind", VECTORS)
@pytest.mark.parametrize("first", ["vector", "single"])
def test_single_and_vector_environments_record_side_by_side(kind: str, first: str) -> None:
    buffer, rng = buffer_for_counting(n_envs=2), np.random.default_rng(0)
    vector, single = VECTORS[kind](buffer), RecordEpisodes(counting(0), buffer)
    for env in (vector, single) if first == "vector" else (single, vector):
        env.reset()
    for _ in range(40):
        vector.step(rng.uniform(0, 10, (2, 1)).astype(np.float32))
        step(single, rng)

    assert buffer.num_streams == 3
    assert_complete(buffer)
    vector.close()
    single.close()
    assert_complete(buffer)


def test_whole_episodes_are_added_between_the_steps_of_recorders() -> None:
    buffer, rng = buffer_for_counting(), np.random.default_rng(0)
    envs = recorders(buffer, 2)
    for env in envs:
        env.reset()
    for number in range(20):
        for env in envs:
            step(env, rng)
        t = np.arange(4)
        obs = np.stack([np.full(4, 9), np.full(4, number), t, np.where(t > 0, 5.0, 0.0)], axis=1)
        buffer.add_episode(obs, np.zeros((3, 1)), 100.0 * number + t[:3] + 1)

    assert len(buffer) == 40 + 60 and buffer.num_streams == 3
    assert_complete(buffer)


@pytest.mark.parametrize("context", [True, False])
def test_an_agent_and_others_record_into_its_buffer(context: bool) -> None:
    venv = DummyVecEnv([lambda: counting(0), lambda: counting(1)])
    agent = make_agent(venv, buffer_size=2000, replay_context=context)
    assert agent.replay_buffer is not None
    buffer, rng = agent.replay_buffer, np.random.default_rng(0)
    demonstration = RecordEpisodes(counting(2), buffer)
    demonstration.reset()
    for _ in range(10):
        step(demonstration, rng)  # an episode is in flight when the agent begins

    def show(*_: Any) -> None:
        step(demonstration, rng)

    agent.learn(60, callback=show)  # type: ignore[arg-type]
    demonstration.close()

    assert len(buffer) == 10 + 30 + 60 and buffer.n_envs == 2 and buffer.num_streams == 3
    assert_complete(buffer, 2)
    assert agent.learn(20).num_timesteps == 20


# --- files


def test_streams_are_saved_and_loaded(tmp_path: Path) -> None:
    buffer, rng = buffer_for_counting(), np.random.default_rng(0)
    envs = recorders(buffer, 3)
    for env in envs:
        env.reset()
    for _ in range(20):
        for env in envs:
            step(env, rng)
    buffer.save(tmp_path / "data.npz")

    loaded, shared = (
        ReplayBuffer.load(tmp_path / "data.npz", seed=0),
        ReplayBuffer.load(tmp_path / "data.npz", n_envs=1),
    )
    assert loaded.digest() == buffer.digest()
    assert (len(shared), shared.num_streams) == (60, 1)
    for env in envs:  # the original goes on, and the copy serves others
        step(env, rng)
    assert_complete(buffer)
    new = RecordEpisodes(counting(5), loaded)
    new.reset()
    for _ in range(10):
        step(new, rng)
    assert len(loaded) == 70 and loaded.num_streams == 3


def test_a_checkpoint_of_a_buffer_with_streams_is_read_back(tmp_path: Path) -> None:
    buffer, rng = buffer_for_counting(300), np.random.default_rng(0)
    segments = ReplaySegments(buffer)
    envs = recorders(buffer, 3)
    for number in range(4):  # a stream joins before each checkpoint but the last
        for env in envs[number : number + 1]:
            env.reset()
        for _ in range(15):
            for env in envs[: number + 1]:
                step(env, rng)
        directory = tmp_path / str(number)
        directory.mkdir()
        segments.write(directory)
        segments.moved_to(directory)
        read = buffer_for_counting(300)
        log = ReplaySegments.read(directory, read)
        assert log.buffer is read and read.num_streams == buffer.num_streams == min(number + 1, 3)
        assert len(read) == len(buffer) and not read.stored()[0].in_flight.any()
        np.testing.assert_array_equal(read.stored()[0].begin, buffer.stored()[0].begin)
    again = buffer_for_counting(300)
    ReplaySegments.read(tmp_path / "0", again)
    assert again.num_streams == 1 and len(again) == 15


def test_a_run_goes_on_whose_buffer_others_recorded_into(tmp_path: Path) -> None:
    agent = make_agent(counting(0))
    assert agent.replay_buffer is not None
    demonstration, rng = RecordEpisodes(counting(1), agent.replay_buffer), np.random.default_rng(0)
    demonstration.reset()

    def show(*_: Any) -> None:
        step(demonstration, rng)

    agent.learn(40, [AgentCheckpointCallback(tmp_path / "run"), callback_of(show)])
    resumed = WorldFluxAgent.load(tmp_path / "run", counting(0), resume=True)

    assert resumed.replay_buffer is not None and resumed.replay_buffer.num_streams == 2
    assert len(resumed.replay_buffer) >= 79
    assert resumed.learn(20, reset_num_timesteps=False).num_timesteps == 60
    agent.save_replay_buffer(tmp_path / "buffer.npz")
    resumed.load_replay_buffer(tmp_path / "buffer.npz")
    assert len(resumed.replay_buffer) == len(agent.replay_buffer)


def callback_of(function: Callable[..., None]) -> Any:
    from stable_baselines3.common.callbacks import ConvertCallback

    return ConvertCallback(function)


# --- other processes


def in_a_worker(buffer: ReplayBuffer) -> Callable[[], gym.Env[Any, Any]]:
    return lambda: RecordEpisodes(counting(0), buffer)


def said_in_a_worker(make: Any, buffer: ReplayBuffer, queue: Any) -> None:
    try:
        make(buffer)
        queue.put("")
    except ConfigurationError as error:
        queue.put(str(error))


MAKERS = {
    "single": lambda buffer: RecordEpisodes(counting(0), buffer),
    "VecEnv": lambda buffer: VecRecordEpisodes(DummyVecEnv([lambda: counting(0)]), buffer),
    "VectorEnv": lambda buffer: VectorRecordEpisodes(SyncVectorEnv([lambda: counting(0)]), buffer),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_a_copy_in_a_worker_is_not_recorded_into(kind: str) -> None:
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    worker = context.Process(target=said_in_a_worker, args=(MAKERS[kind], buffer_for_counting(), queue))
    worker.start()
    said = queue.get(timeout=60)
    worker.join()
    assert "belongs to another process" in said and "VecRecordEpisodes(SubprocVecEnv(...), buffer)" in said


def learned_in_a_worker(agent: WorldFluxAgent, queue: Any) -> None:
    agent.learn(20)
    queue.put(len(agent.replay_buffer))  # type: ignore[arg-type]


def test_an_agent_may_learn_in_a_worker() -> None:
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    worker = context.Process(target=learned_in_a_worker, args=(make_agent(counting(0), train_ratio=0), queue))
    worker.start()
    assert queue.get(timeout=60) == 20
    worker.join()


def test_processes_of_sb3_say_what_to_do(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((EOFError, ConnectionError, BrokenPipeError, ConfigurationError)):
        SubprocVecEnv([in_a_worker(buffer_for_counting())], start_method="spawn").reset()
    assert "Record the vector environment from outside" in capfd.readouterr().err


def test_a_buffer_may_be_made_in_a_worker() -> None:
    venv = AsyncVectorEnv([lambda: RecordEpisodes(counting(0), buffer_for_counting())], context="fork")
    venv.reset()
    venv.step(np.full((1, 1), 5.0, np.float32))
    venv.close()
