"""Under VecNormalize, the last observations of episodes are stored as the environments gave them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecCheckNan,
    VecEnv,
    VecEnvWrapper,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
)

from worldflux import WorldFluxAgent
from worldflux.envs import ActionCodec, GymnasiumVecEnv, ObservationCodec, VecRecordEpisodes, collect
from worldflux.errors import BufferError
from worldflux.training import ReplayBuffer

FAR = 5000.1
"""A value that appears only in the last observation of an episode, and that any normalisation clips."""

LENGTH = 4


class Far(gym.Env[Any, Any]):
    """Shows the step, and a number that is 0 until an episode ends; every second episode is truncated."""

    action_space = spaces.Box(-1, 1, (1,), np.float32)
    observation_space: spaces.Space[Any] = spaces.Box(-np.inf, np.inf, (2,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.t, self.episode = 0, getattr(self, "episode", 0) + 1
        return self.see(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.t += 1
        over, cut = self.t == LENGTH, self.episode % 2 == 0
        return self.see(), 1.0, over and not cut, over and cut, {}

    def see(self) -> Any:
        return np.array([self.t, FAR * (self.t == LENGTH)], np.float32)


class FarInDictionaries(Far):
    observation_space = spaces.Dict(
        numbers=Far.observation_space,
        other=Far.observation_space,
        image=spaces.Box(0, 255, (48, 64, 3), np.uint8),
        kind=spaces.Discrete(9),
    )

    def see(self) -> Any:
        image = np.arange(48 * 64 * 3).reshape(48, 64, 3)
        return {
            "numbers": super().see(),
            "other": 2 * super().see(),
            "image": (image * (self.t == LENGTH) % 251).astype(np.uint8),
            "kind": np.int64(self.t),
        }


def two(env: type[Far] = Far) -> DummyVecEnv:
    return DummyVecEnv([env, env])


def of_gymnasium(mode: AutoresetMode, kind: Any = SyncVectorEnv) -> GymnasiumVecEnv:
    return GymnasiumVecEnv(kind([Far, Far], autoreset_mode=mode))


STACKS: dict[str, Callable[[], VecEnv]] = {
    "no normalisation": two,
    "VecNormalize": lambda: VecNormalize(two()),
    "one environment": lambda: VecNormalize(DummyVecEnv([Far])),
    "clipped early": lambda: VecNormalize(two(), clip_obs=0.01),
    "observations only": lambda: VecNormalize(two(), norm_reward=False),
    "rewards only": lambda: VecNormalize(two(), norm_obs=False),
    "statistics that stand still": lambda: VecNormalize(two(), training=False),
    "VecMonitor outside": lambda: VecMonitor(VecNormalize(two())),
    "VecCheckNan and VecMonitor outside": lambda: VecCheckNan(VecMonitor(VecNormalize(two()))),
    "VecMonitor inside": lambda: VecNormalize(VecMonitor(two())),
    "VecFrameStack inside": lambda: VecNormalize(VecFrameStack(two(), 2)),
    "VecFrameStack outside, rewards only": lambda: VecFrameStack(VecNormalize(two(), norm_obs=False), 2),
    "processes": lambda: VecNormalize(SubprocVecEnv([Far, Far], start_method="fork")),
    "Gymnasium, same step": lambda: VecNormalize(of_gymnasium(AutoresetMode.SAME_STEP)),
    "Gymnasium, next step": lambda: VecNormalize(of_gymnasium(AutoresetMode.NEXT_STEP)),
    "Gymnasium, disabled": lambda: VecNormalize(of_gymnasium(AutoresetMode.DISABLED)),
    "Gymnasium, processes": lambda: VecNormalize(of_gymnasium(AutoresetMode.SAME_STEP, AsyncVectorEnv)),
    "some keys": lambda: VecNormalize(two(FarInDictionaries), norm_obs_keys=["numbers"]),
    "two keys": lambda: VecNormalize(two(FarInDictionaries), norm_obs_keys=["other", "numbers"], clip_obs=1),
}


def of_agent(venv: VecEnv) -> ReplayBuffer:
    agent = WorldFluxAgent("dreamerv3:tiny", venv, buffer_size=3000, learning_starts=1000, seed=0)
    return agent.learn(30).replay_buffer


def of_wrapper(venv: VecEnv) -> ReplayBuffer:
    obs, actions = ObservationCodec(venv.observation_space), ActionCodec(venv.action_space)
    buffer = ReplayBuffer(200, obs.obs_shape, actions.action_dim, obs_dtype=obs.obs_dtype, n_envs=venv.num_envs)
    recorded = VecRecordEpisodes(venv, buffer)
    recorded.reset()
    for _ in range(15):
        recorded.step(np.zeros((venv.num_envs, 1), np.float32))
    return buffer


DRIVERS: dict[str, Callable[[VecEnv], ReplayBuffer]] = {
    "agent": of_agent,
    "collect": lambda venv: collect(venv, steps=30, seed=0),
    "VecRecordEpisodes": of_wrapper,
}


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("stack", STACKS)
def test_last_observations_are_stored_as_they_were(stack: str, driver: str, tmp_path: Path) -> None:
    venv = STACKS[stack]()
    try:
        DRIVERS[driver](venv).save(tmp_path / "rows.npz")
    finally:
        venv.close()

    with np.load(tmp_path / "rows.npz") as rows:
        ended = rows["final_obs_mask"] & (rows["episode_lengths"] == LENGTH)
        finals = {name: rows[name][ended] for name in rows if name.startswith("final_obs") and name != "final_obs_mask"}
    assert ended.sum() >= 3
    last = np.float32([LENGTH, FAR])
    for name, found in finals.items():
        expected = last
        if name.endswith("other"):
            expected = 2 * last
        elif name.endswith("kind"):
            expected = np.eye(9)[LENGTH]
        elif name.endswith("image"):
            expected = np.moveaxis(np.arange(48 * 64 * 3).reshape(48, 64, 3) % 251, -1, 0)
        elif found.shape[1] == 4:
            expected = np.float32([LENGTH - 1, 0, *last])
        np.testing.assert_array_equal(found, np.broadcast_to(expected, found.shape), err_msg=name)


def test_an_unknown_last_observation_is_refused_and_never_guessed() -> None:
    class NewInfos(VecEnvWrapper):
        def reset(self) -> Any:
            return self.venv.reset()

        def step_wait(self) -> Any:
            obs, rewards, dones, infos = self.venv.step_wait()
            kept = ("terminal_observation", "TimeLimit.truncated")
            return obs, rewards, dones, [{key: info[key] for key in kept if key in info} for info in infos]

    with pytest.raises(BufferError, match="known only as VecNormalize has clipped it, because a wrapper outside"):
        collect(NewInfos(VecNormalize(two())), steps=20)
    assert collect(NewInfos(VecNormalize(two(), norm_obs=False)), steps=20).num_transitions == 20


def test_a_layer_is_listened_to_once_however_many_record() -> None:
    venv = VecNormalize(two())
    for _ in range(5):
        of_wrapper(venv)
        collect(venv, steps=8)

    depth, method = 0, venv.venv.step_wait
    while hasattr(method, "method"):
        depth, method = depth + 1, method.method
    assert depth == 1
