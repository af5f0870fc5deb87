"""The same seeded episodes are stored alike through every path into the buffer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv, VectorEnv
from helpers.envs import DiceEnv
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv

from worldflux.envs.recording.wrappers import RecordEpisodes, VecRecordEpisodes, VectorRecordEpisodes
from worldflux.envs.spaces import ObservationCodec
from worldflux.envs.vector import GymnasiumVecEnv
from worldflux.replay.buffer import ReplayBuffer

N_ENVS, EPISODES, SEED = 3, 100, 100
MODES = ("NextStep", "SameStep", "Disabled")
Episode = dict[str, Any]


def actions_for(obs: Any) -> np.ndarray[Any, Any]:
    """Actions that depend on observations only, so that resets of other environments do not change them."""
    vector = obs["vector"] if isinstance(obs, dict) else obs
    return (vector[..., 0] * 1e6).astype(np.int64) % 3


def fresh_buffer(kind: str, n_envs: int = N_ENVS, capacity: int = 4000) -> ReplayBuffer:
    return ReplayBuffer(capacity, ObservationCodec(DiceEnv(kind).observation_space).obs_shape, 3, n_envs=n_envs, seed=0)


def true_episodes(kind: str, env_id: int) -> list[Episode]:
    """The episodes of an environment, written down step by step."""
    env = DiceEnv(kind)
    obs, _ = env.reset(seed=SEED + env_id)
    codec = ObservationCodec(env.observation_space)
    episodes: list[Episode] = []
    for _ in range(EPISODES):
        seen, actions, rewards, over = [obs], [], [], False
        terminated = truncated = False
        while not over:
            actions.append(int(actions_for(obs)))
            obs, reward, terminated, truncated, _ = env.step(actions[-1])
            seen.append(obs)
            rewards.append(reward)
            over = terminated or truncated
        encoded = [codec.encode_any(each)[0] for each in seen]
        parts = encoded if kind == "dict" else [{"obs": each} for each in encoded]
        episode = {f"obs/{key}": np.concatenate([part[key] for part in parts]) for key in parts[0]}
        episode |= {"actions": np.eye(3)[actions], "rewards": np.array(rewards, np.float32)}
        last = np.arange(len(rewards)) == len(rewards) - 1
        episode |= {"terminations": last & terminated, "truncations": last & (truncated and not terminated)}
        episodes.append(episode)
        obs, _ = env.reset()
    return episodes


def recorded_episodes(buffer: ReplayBuffer, path: Path) -> list[list[Episode]]:
    """The first complete episodes of each stream, as the buffer's file has them."""
    buffer.save(path)
    with np.load(path) as file:
        data = dict(file)
    ends = np.cumsum(data["episode_lengths"])
    obs = {key.removeprefix("obs/"): data[key] for key in data if key == "obs" or key.startswith("obs/")}
    streams: list[list[Episode]] = [[] for _ in range(buffer.n_envs)]
    for i, (end, length) in enumerate(zip(ends, data["episode_lengths"], strict=True)):
        stream = streams[data["episode_streams"][i]]
        if not data["episode_ends"][i] or len(stream) == EPISODES:
            continue
        assert data["episode_starts"][i] and data["final_obs_mask"][i]
        rows = slice(end - length, end)
        episode = {}
        for key, array in obs.items():
            final = data["final_obs" if key == "obs" else f"final_obs/{key}"][i]
            episode[f"obs/{key}"] = np.concatenate([array[rows], final[None]])
        for name in ("actions", "rewards", "truncations"):
            episode[name] = data[name][rows]
        stream.append({**episode, "terminations": data["dones"][rows]})
    return streams


def assert_same(recorded: list[Episode], expected: list[Episode]) -> None:
    assert len(recorded) == len(expected) == EPISODES
    for found, wanted in zip(recorded, expected, strict=True):
        assert found.keys() == wanted.keys()
        for name, array in wanted.items():
            np.testing.assert_array_equal(found[name], array, err_msg=name)


TRUE = {kind: [true_episodes(kind, env_id) for env_id in range(N_ENVS)] for kind in ("vector", "dict")}


def done_enough(episodes: Any) -> bool:
    return bool(np.min(episodes) >= EPISODES)


def drive_vector_env(env: VectorEnv[Any, Any, Any], mode: str) -> None:
    obs, _ = env.reset(seed=SEED)
    ended = np.zeros(N_ENVS, int)
    while not done_enough(ended):
        obs, _, terminations, truncations, _ = env.step(actions_for(obs))
        over = terminations | truncations
        ended += over
        if mode == "Disabled" and over.any():
            obs, _ = env.reset(options={"reset_mask": over})


def drive_vec_env(venv: VecEnv) -> None:
    venv.seed(SEED)
    obs: Any = venv.reset()
    ended = np.zeros(N_ENVS, int)
    while not done_enough(ended):
        obs, _, dones, _ = venv.step(actions_for(obs))
        ended += dones


def makers(kind: str) -> list[Callable[[], DiceEnv]]:
    return [lambda: DiceEnv(kind)] * N_ENVS


def vector_env(name: str, kind: str, mode: str) -> VectorEnv[Any, Any, Any]:
    # Arrays that the next step overwrites are the harder case.
    if name == "sync":
        return SyncVectorEnv(makers(kind), copy=False, autoreset_mode=mode)
    return AsyncVectorEnv(makers(kind), copy=False, context="fork", autoreset_mode=mode)


@pytest.mark.parametrize("kind", ["vector", "dict"])
def test_a_single_environment_is_recorded_as_it_was(kind: str, tmp_path: Path) -> None:
    for env_id in range(N_ENVS):
        buffer = fresh_buffer(kind, n_envs=1)
        env = RecordEpisodes(DiceEnv(kind), buffer)
        obs, _ = env.reset(seed=SEED + env_id)
        while buffer.num_episodes < EPISODES:
            obs, _, terminated, truncated, _ = env.step(actions_for(obs))
            if terminated or truncated:
                obs, _ = env.reset()
        assert_same(recorded_episodes(buffer, tmp_path / "buffer.npz")[0], TRUE[kind][env_id])


@pytest.mark.parametrize("kind", ["vector", "dict"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["sync", "async"])
def test_a_vector_environment_is_recorded_as_it_was(name: str, mode: str, kind: str, tmp_path: Path) -> None:
    buffer = fresh_buffer(kind)
    env = VectorRecordEpisodes(vector_env(name, kind, mode), buffer)
    try:
        drive_vector_env(env, mode)
    finally:
        env.close()
    for recorded, expected in zip(recorded_episodes(buffer, tmp_path / "buffer.npz"), TRUE[kind], strict=True):
        assert_same(recorded, expected)


@pytest.mark.parametrize("kind", ["vector", "dict"])
@pytest.mark.parametrize(
    "name", ["dummy", "subproc", *(f"{env} {mode}" for env in ("sync", "async") for mode in MODES)]
)
def test_a_vec_env_is_recorded_as_it_was(name: str, kind: str, tmp_path: Path) -> None:
    if name == "dummy":
        venv: VecEnv = DummyVecEnv(makers(kind))
    elif name == "subproc":
        venv = SubprocVecEnv(makers(kind), start_method="fork")  # type: ignore[arg-type]
    else:
        env, mode = name.split()
        venv = GymnasiumVecEnv(vector_env(env, kind, mode))
    buffer = fresh_buffer(kind)
    venv = VecRecordEpisodes(venv, buffer)
    try:
        drive_vec_env(venv)
    finally:
        venv.close()
    for recorded, expected in zip(recorded_episodes(buffer, tmp_path / "buffer.npz"), TRUE[kind], strict=True):
        assert_same(recorded, expected)


@pytest.mark.parametrize("mode", MODES)
def test_a_buffer_that_wraps_around_holds_the_newest_of_the_same_rows(mode: str) -> None:
    """Every window of a small buffer is one of a large one that saw the same."""
    small, large = fresh_buffer("vector", capacity=30), fresh_buffer("vector")
    for buffer in (small, large):
        drive_vector_env(VectorRecordEpisodes(SyncVectorEnv(makers("vector"), autoreset_mode=mode), buffer), mode)
    windows = small.sample(500, 8)
    assert small.num_transitions == 30 and len(np.unique(windows.row_ids[:, 0])) > 10
    known = {}
    for _ in range(40):
        batch = large.sample(500, 8)
        known |= {
            int(batch.row_ids[i, 0]): i_batch for i, i_batch in enumerate(zip(batch.obs, batch.rewards, strict=True))
        }
    for i, row in enumerate(windows.row_ids[:, 0].tolist()):
        if row in known:
            np.testing.assert_array_equal(windows.obs[i], known[row][0])
            np.testing.assert_array_equal(windows.rewards[i], known[row][1])
    assert sum(row in known for row in windows.row_ids[:, 0].tolist()) > 400
