"""Objects that are not a `VecEnv` inside SB3's wrapper class: pools, and multi-player games of SuperSuit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from helpers.sb3_families import both, make
from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, VecMonitor, VecNormalize

from worldflux import WorldFluxAgent
from worldflux.agents.callbacks import AgentCheckpointCallback
from worldflux.envs import VecRecordEpisodes, collect
from worldflux.training import ReplayBuffer

LENGTH = 7


class Pool:
    """Two environments with the interface of an engine in C++; shows `[environment, step, action]`."""

    __slots__ = ("actions", "t")

    num_envs, metadata, render_mode = 2, {}, None
    observation_space = gym.spaces.Box(-9, 9, (3,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def reset(self) -> Any:
        self.t = 0
        return self._obs(np.zeros(2))

    def step(self, actions: Any) -> Any:
        self.t += 1
        last = self._obs(actions)
        done = self.t == LENGTH
        obs = self.reset() if done else last
        return obs, np.full(2, float(self.t or LENGTH), np.float32), np.full(2, done), last

    def _obs(self, actions: Any) -> Any:
        return np.stack([np.arange(2), np.full(2, self.t), actions], axis=1).astype(np.float32)


class Adapter(VecEnvWrapper):
    """An adapter as in the examples of such pools."""

    def __init__(self, pool: Any) -> None:
        super().__init__(pool, pool.observation_space, pool.action_space)

    def reset(self) -> Any:
        return self.venv.reset()

    def step_async(self, actions: Any) -> None:
        self.actions = actions

    def step_wait(self) -> Any:
        obs, rewards, dones, last = self.venv.step(self.actions)  # type: ignore[attr-defined]
        infos = [{"terminal_observation": row} if done else {} for row, done in zip(last, dones, strict=True)]
        return obs, rewards, dones, infos


class Unprepared(Adapter):
    """An adapter as in SuperSuit: it does not call SB3's constructors, and attributes are not lists."""

    def __init__(self, pool: Any) -> None:
        self.venv = pool
        self.num_envs, self.render_mode, self.reset_infos = pool.num_envs, None, []
        self.observation_space, self.action_space = pool.observation_space, pool.action_space

    def has_attr(self, attr_name: str) -> bool:
        return hasattr(self.venv, attr_name)

    def get_attr(self, attr_name: str, indices: Any = None) -> Any:
        value = getattr(self.venv, attr_name)
        return [value] * self.num_envs if attr_name == "render_mode" else value

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        return [False] * self.num_envs

    def getattr_recursive(self, name: str) -> Any:
        raise AttributeError(name)

    def getattr_depth_check(self, name: str, already_found: bool) -> None:
        return None


POOLS: dict[str, Callable[[], VecEnv]] = {
    "adapter": lambda: Adapter(Pool()),
    "monitored adapter": lambda: VecMonitor(Adapter(Pool())),
    "normalized adapter": lambda: VecNormalize(Adapter(Pool())),
    "unprepared": lambda: Unprepared(Pool()),
    "monitored unprepared": lambda: VecMonitor(Unprepared(Pool())),
}

pytestmark = pytest.mark.filterwarnings("ignore:The `render_mode` attribute is not defined")


def assert_complete(buffer: ReplayBuffer, episodes: int) -> None:
    assert buffer.num_episodes >= episodes
    batch = buffer.sample(20, LENGTH + 1)
    assert batch.obs_mask is None
    obs, first = batch.obs.numpy(), batch.is_first.numpy()
    follows = ~first[:, 1:]
    np.testing.assert_allclose((obs[:, 1:, 1] - obs[:, :-1, 1])[follows], 1, atol=1e-4)
    np.testing.assert_allclose(obs[:, 1:, 2][follows], batch.actions.numpy()[:, :-1].argmax(-1)[follows], atol=1e-4)


@pytest.mark.parametrize("kind", POOLS)
def test_dreamerv3_learns_where_sb3s_algorithms_learn(kind: str, tmp_path: Path) -> None:
    PPO("MlpPolicy", POOLS[kind](), n_steps=8, batch_size=8, device="cpu").learn(16)

    agent = make("dreamerv3", POOLS[kind]()).learn(40, AgentCheckpointCallback(tmp_path / "run"))

    assert agent.num_timesteps == 40 and agent._n_updates > 0
    assert agent.replay_buffer is not None
    assert_complete(agent.replay_buffer, 2 * (20 // LENGTH))
    resumed = WorldFluxAgent.load(tmp_path / "run", POOLS[kind](), resume=True)
    assert resumed.learn(20, reset_num_timesteps=False).num_timesteps == 60


def test_a_pool_that_cannot_be_seeded_is_named_in_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"Pool cannot be seeded .*Seed the environments where they are made"):
        make("dreamerv3", Adapter(Pool()), seed=0)
    with pytest.warns(UserWarning, match="Pool cannot be seeded"):
        collect(Adapter(Pool()), steps=20, seed=0)


@pytest.mark.parametrize("kind", POOLS)
def test_a_pool_is_recorded(kind: str) -> None:
    buffer = ReplayBuffer(100, (3,), 2, n_envs=2)
    env = VecRecordEpisodes(POOLS[kind](), buffer)
    env.reset()
    for _ in range(2 * LENGTH):
        env.step(np.array([0, 1]))

    assert buffer.num_episodes == 4
    assert_complete(buffer, 4)
    assert_complete(collect(POOLS[kind](), episodes=4), 4)


def test_an_agent_is_evaluated_in_a_pool() -> None:
    agent = make("dreamerv3", POOLS["monitored unprepared"]())

    score, _ = evaluate_policy(agent, agent.get_env(), n_eval_episodes=2)

    assert score == sum(range(1, LENGTH)) + LENGTH


class PicturePool(Pool):
    """Shows pictures."""

    __slots__ = ()
    observation_space = gym.spaces.Box(0, 255, (48, 48, 3), np.uint8)

    def _obs(self, actions: Any) -> Any:
        return np.full((2, 48, 48, 3), self.t, np.uint8)


@both
def test_pictures_of_a_pool_are_learned_from(family: str) -> None:
    pool = PicturePool()
    if family == "tdmpc2":
        pool = type("Continuous", (PicturePool,), {"action_space": gym.spaces.Box(-1, 1, (1,))})()
    agent = make(family, Unprepared(pool)).learn(20)

    assert agent.replay_buffer is not None and agent.replay_buffer.obs_shape == (3, 48, 48)
    assert agent.replay_buffer.num_episodes == 2
