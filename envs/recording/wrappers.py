"""Wrappers that record the episodes of an environment in a replay buffer, whatever policy drives it.

There is one for each kind of environment: `RecordEpisodes` for Gymnasium's, `VecRecordEpisodes` for SB3's `VecEnv`,
`VectorRecordEpisodes` for Gymnasium's vector environments.
"""

from __future__ import annotations

from typing import Any, SupportsFloat

import gymnasium as gym
import numpy as np
from gymnasium.vector import VectorEnv, VectorWrapper
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn

from worldflux.envs.given import GivenValues
from worldflux.envs.recording.recorder import EpisodeRecorder, VecEpisodeRecorder, end_of
from worldflux.envs.recording.vector import VectorEpisodeRecorder
from worldflux.envs.spaces import Array
from worldflux.errors import ConfigurationError
from worldflux.replay.buffer import ReplayBuffer

__all__ = ["RecordEpisodes", "VecEpisodeRecorder", "VecRecordEpisodes", "VectorRecordEpisodes"]


class RecordEpisodes(gym.Wrapper[Any, Any, Any, Any]):
    """Records every episode of a Gymnasium environment, whatever policy drives it.

    Put it outside wrappers that change what the policy sees and does. Rewards are stored as the wrapped environment
    gives them, actions beyond the bounds of the action space as the nearest ones inside. A reset in the middle of an
    episode ends it as truncated; so does a step that raises, after which the environment must be reset.

        >>> buffer = ReplayBuffer(capacity=10_000, obs_shape=(4,), action_dim=2)
        >>> env = RecordEpisodes(gymnasium.make("CartPole-v1"), buffer)

    Args:
        env: The environment to record.
        buffer: The buffer that receives the steps. Any number of environments may record into it by turns, each with a
            stream of its own from its reset to the end of its episode, or until it is closed. Those that step in other
            processes cannot.

    Raises:
        ConfigurationError: If this is another kind of environment, a space is not supported, or the buffer is that of
            another process.
        ShapeMismatchError: If the buffer was made for other shapes.
    """

    def __init__(self, env: gym.Env[Any, Any], buffer: ReplayBuffer) -> None:
        _check_kind(env, gym.Env)
        buffer.check_process()
        super().__init__(env)
        self._recorder = EpisodeRecorder(buffer, env.observation_space, env.action_space, 1)
        self._given = GivenValues(env.observation_space)

    @property
    def buffer(self) -> ReplayBuffer:
        """The buffer that receives the episodes."""
        return self._recorder.buffer

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Resets the environment; an episode in flight ends as truncated."""
        with self._recorder:
            obs, info = self.env.reset(seed=seed, options=options)
            self._given.check_obs(obs)
            self._recorder.begin(obs)
        return obs, info

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        """Steps the environment and stores the step."""
        checked = self._recorder.checked_actions(np.asarray(action)[None])
        with self._recorder:
            obs, reward, terminated, truncated, info = self.env.step(action)
            self._given.check_obs(obs)
            self._given.check_reward(reward)
            over = terminated or truncated
            ends = [(0, end_of(terminated))] if over else []
            self._recorder.add(checked, np.array(reward, np.float64).reshape(1), obs, ends)
        if over:
            self._recorder.finish()
        return obs, reward, terminated, truncated, info

    def close(self) -> None:
        """Closes the environment; an episode in flight ends as truncated."""
        self._recorder.close()
        super().close()


class VecRecordEpisodes(VecEnvWrapper):
    """Records every episode of an SB3 `VecEnv`, whatever policy drives it.

    Args:
        venv: The environments to record.
        buffer: A buffer with `n_envs=venv.num_envs`. Others may record into it as well, with streams of their own.

    Raises:
        ConfigurationError: If this is another kind of environment, a space is not supported, the numbers of
            environments differ, or the buffer is that of another process.
        ShapeMismatchError: If the buffer was made for other shapes.
    """

    def __init__(self, venv: VecEnv, buffer: ReplayBuffer) -> None:
        _check_kind(venv, VecEnv)
        buffer.check_process()
        super().__init__(venv)
        self._recorder = VecEpisodeRecorder(buffer, venv)
        self._actions: Array | None = None

    @property
    def buffer(self) -> ReplayBuffer:
        """The buffer that receives the episodes."""
        return self._recorder.buffer

    def reset(self) -> VecEnvObs:
        """Resets all environments; episodes in flight end as truncated."""
        with self._recorder:
            obs = self.venv.reset()
            self._recorder.begin(obs)
        return obs

    def step_async(self, actions: Array) -> None:
        """Starts a step of all environments."""
        self._actions = self._recorder.checked_actions(actions)
        with self._recorder:
            self.venv.step_async(actions)

    def step_wait(self) -> VecEnvStepReturn:
        """Waits for the step and stores it."""
        assert self._actions is not None
        with self._recorder:
            new_obs, rewards, dones, infos = self.venv.step_wait()
            self._recorder.add_vec_step(self._actions, new_obs, rewards, dones, infos)
        return new_obs, rewards, dones, infos

    def close(self) -> None:
        """Closes the environments; episodes in flight end as truncated."""
        self._recorder.close()
        super().close()


class VectorRecordEpisodes(VectorWrapper[Any, Any, Any, Any, Any]):
    """Records every episode of a Gymnasium vector environment, in every autoreset mode.

    A step in which an environment only resets itself (`AutoresetMode.NEXT_STEP`) belongs to no episode and is not
    stored. Resets through `options={"reset_mask": ...}` are understood.

    Args:
        env: The vector environment to record.
        buffer: A buffer with `n_envs=env.num_envs`. Others may record into it as well, with streams of their own.

    Raises:
        ConfigurationError: If this is another kind of environment, a space is not supported, the numbers of
            environments differ, or the vector environment does not say how it resets.
        ShapeMismatchError: If the buffer was made for other shapes.
    """

    def __init__(self, env: VectorEnv[Any, Any, Any], buffer: ReplayBuffer) -> None:
        _check_kind(env, VectorEnv)
        buffer.check_process()
        super().__init__(env)
        self._recorder = VectorEpisodeRecorder(buffer, env)

    @property
    def buffer(self) -> ReplayBuffer:
        """The buffer that receives the episodes."""
        return self._recorder.buffer

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Resets all environments, or those of a `reset_mask`; their episodes in flight end as truncated."""
        # Gymnasium removes the mask from the dictionary.
        mask = None if options is None else options.get("reset_mask")
        if mask is not None:
            self._recorder.check_begun()
        with self._recorder:
            obs, infos = self.env.reset(seed=seed, options=options)
            if mask is None:
                self._recorder.begin(obs)
            else:
                self._recorder.begin_some(obs, np.asarray(mask, dtype=bool))
        return obs, infos

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Steps all environments and stores the step."""
        checked = self._recorder.checked_actions(actions)
        with self._recorder:
            obs, rewards, terminations, truncations, infos = self.env.step(actions)
            self._recorder.add_vector_step(checked, obs, rewards, terminations, truncations, infos)
        return obs, rewards, terminations, truncations, infos

    def close(self, **kwargs: Any) -> None:
        """Closes the environments; episodes in flight end as truncated."""
        self._recorder.close()
        super().close(**kwargs)


_WRAPPERS = {
    gym.Env: ("a Gymnasium environment", "RecordEpisodes"),
    VecEnv: ("a VecEnv of SB3", "VecRecordEpisodes"),
    VectorEnv: ("a Gymnasium vector environment", "VectorRecordEpisodes"),
}


def _check_kind(env: Any, expected: type) -> None:
    """Raises an error that names the right wrapper for another kind of environment."""
    if isinstance(env, expected):
        return
    wanted, wrapper = _WRAPPERS[expected]
    for kind, (name, other) in _WRAPPERS.items():
        if isinstance(env, kind):
            raise ConfigurationError(f"{wrapper} got {name}, {env}, expected {wanted}. Record it with {other}.")
    raise ConfigurationError(f"{wrapper} got {env!r}, expected {wanted}.")
