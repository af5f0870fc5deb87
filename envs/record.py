"""Recording: whatever drives an environment, its episodes land in a replay buffer, complete and aligned.

How observations, actions and rewards belong together is drawn in `ReplayBuffer`; here, and nowhere else, are the steps
of environments turned into its rows. A step is in the buffer as soon as it was made, long before its episode ends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, SupportsFloat

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, unwrap_vec_normalize
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn

from worldflux.envs.spaces import ActionCodec, Array, Arrays, ObservationCodec
from worldflux.errors import BufferError, ConfigurationError, ShapeMismatchError
from worldflux.training.replay import ReplayBuffer


class EpisodeRecorder:
    """Writes the steps of environments that move together into a buffer.

    Attributes:
        buffer: Where the steps go.
        obs_codec: Translates observations.
        action_codec: Translates actions.
        obs: What the next actions will be taken at, in the library's form `[n_envs, ...]`; None before a reset.

    Args:
        buffer: With one stream for each environment.
        observation_space: Of a single environment.
        action_space: Of a single environment.

    Raises:
        ConfigurationError: If a space is not supported.
        ShapeMismatchError: If the buffer was made for other shapes.
    """

    def __init__(
        self, buffer: ReplayBuffer, observation_space: spaces.Space[Any], action_space: spaces.Space[Any]
    ) -> None:
        self.buffer = buffer
        self.obs_codec = ObservationCodec(observation_space)
        self.action_codec = ActionCodec(action_space)
        self.obs: Arrays | None = None
        if buffer.obs_shape != self.obs_codec.obs_shape or buffer.action_dim != self.action_codec.action_dim:
            raise ShapeMismatchError(
                f"The buffer holds observations {buffer.obs_shape} and {buffer.action_dim} action numbers, expected "
                f"{self.obs_codec.obs_shape} and {self.action_codec.action_dim} for this environment. "
                "ObservationCodec and ActionCodec of worldflux.envs tell these numbers for any space."
            )

    def begin(self, obs: Any) -> None:
        """All environments were reset to `obs` `[n_envs, ...]`; episodes in flight end there, truncated."""
        first, _ = self.obs_codec.encode_any(obs)
        self.interrupt()
        self.obs = first

    def interrupt(self) -> None:
        """Ends the episodes in flight as truncated, with the observations after their last steps."""
        self.buffer.end_episodes(final_obs=self.obs)
        self.obs = None

    def add(
        self,
        actions: Array,
        rewards: Any,
        terminations: Any,
        truncations: Any,
        next_obs: Any,
        *,
        final_obs: Arrays | None = None,
        extras: Mapping[str, Any] | None = None,
    ) -> None:
        """Stores a step of every environment.

        Args:
            actions: As executed, in the library's form `[n_envs, A]`.
            rewards: As the environments gave them. `[n_envs]`
            terminations: The step ended the episode for good. `[n_envs]`
            truncations: The step was cut from outside. `[n_envs]`
            next_obs: What the next actions will be taken at, as the environments gave it `[n_envs, ...]`.
            final_obs: Where episodes ended: the observations after this step, before the reset, in the library's form
                `[n_envs, ...]`; only the rows of those environments are read. None if `next_obs` holds them.
            extras: What the model wants stored beside the rows. `{name: [n_envs, ...]}`
        """
        following, _ = self.obs_codec.encode_any(next_obs)
        self.buffer.add(
            self.obs,
            actions,
            rewards,
            terminations,
            truncations,
            final_obs=following if final_obs is None else final_obs,
            extras=extras,
        )
        self.obs = following


class RecordEpisodes(gym.Wrapper[Any, Any, Any, Any]):
    """Records every episode of a Gymnasium environment, whatever policy drives it.

    Put it outside wrappers that change what the policy sees and does. Rewards are stored as the wrapped environment
    gives them. A reset in the middle of an episode ends it as truncated.

        >>> buffer = ReplayBuffer(capacity=10_000, obs_shape=(4,), action_dim=2)
        >>> env = RecordEpisodes(gymnasium.make("CartPole-v1"), buffer)

    Args:
        env: To record.
        buffer: With `n_envs=1`; it belongs to this environment alone while that is being stepped.

    Raises:
        ConfigurationError: If a space is not supported, or the buffer is for several environments.
        ShapeMismatchError: If the buffer was made for other shapes.
    """

    def __init__(self, env: gym.Env[Any, Any], buffer: ReplayBuffer) -> None:
        super().__init__(env)
        self._recorder = EpisodeRecorder(buffer, env.observation_space, env.action_space)
        self._ended = False
        if buffer.n_envs != 1:
            raise ConfigurationError(
                f"The buffer is for {buffer.n_envs} environments, expected 1. Record a VecEnv with VecRecordEpisodes."
            )

    @property
    def buffer(self) -> ReplayBuffer:
        """Where the episodes go."""
        return self._recorder.buffer

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Resets the environment; an episode in flight ends as truncated."""
        obs, info = self.env.reset(seed=seed, options=options)
        self._recorder.begin(obs)
        self._ended = False
        return obs, info

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        """Steps the environment and stores what came of it."""
        if self._recorder.obs is None or self._ended:
            raise BufferError("step() was called where no episode has begun. Call env.reset() first.")
        encoded = self._recorder.action_codec.from_env(np.asarray(action)[None])
        obs, reward, terminated, truncated, info = self.env.step(action)
        # Where a time limit meets the true end, the end counts, as SB3 has it.
        self._recorder.add(encoded, [float(reward)], [terminated], [truncated and not terminated], obs)
        self._ended = bool(terminated or truncated)
        return obs, reward, terminated, truncated, info


class VecEpisodeRecorder(EpisodeRecorder):
    """Reads the steps of an SB3 `VecEnv`, which resets its environments itself.

    Under `VecNormalize`, rewards and observations are stored as they were before normalisation: its running statistics
    move on, and what is stored must not depend on when it was.

    Args:
        buffer: With `n_envs=venv.num_envs`.
        venv: Outermost wrapper of what is stepped.

    Raises:
        ConfigurationError: If a space is not supported, the numbers of environments differ, or wrappers outside
            `VecNormalize` change the shape of observations.
        ShapeMismatchError: If the buffer was made for other shapes.
    """

    def __init__(self, buffer: ReplayBuffer, venv: VecEnv) -> None:
        super().__init__(buffer, venv.observation_space, venv.action_space)
        if buffer.n_envs != venv.num_envs:
            raise ConfigurationError(f"The buffer is for {buffer.n_envs} environments, expected {venv.num_envs}.")
        self._normalize = unwrap_vec_normalize(venv)
        self._normalizes_obs = self._normalize is not None and self._normalize.norm_obs
        if self._normalize is not None and self._normalizes_obs:
            inner = ObservationCodec(self._normalize.observation_space).obs_shape
            if inner != self.obs_codec.obs_shape:
                raise ConfigurationError(
                    f"VecNormalize sees observations {inner} and the policy {self.obs_codec.obs_shape}, expected the "
                    "same. Make VecNormalize the outermost wrapper, or pass norm_obs=False."
                )

    def begin(self, obs: Any) -> None:
        """The environments were reset to `obs` `[n_envs, ...]`; episodes in flight end there, truncated."""
        super().begin(self._unnormalized(obs))

    def add_vec_step(
        self,
        actions: Array,
        new_obs: Any,
        rewards: Array,
        dones: Array,
        infos: Sequence[Mapping[str, Any]],
        *,
        extras: Mapping[str, Any] | None = None,
    ) -> None:
        """Stores what `VecEnv.step` returned.

        Args:
            actions: As executed, in the library's form `[n_envs, A]`.
            new_obs: `[n_envs, ...]`; where an episode ended, the first observation of the next one.
            rewards: `[n_envs]`
            dones: `[n_envs]`
            infos: Where an episode ended: `terminal_observation`, and `TimeLimit.truncated` for a cut from outside.
            extras: What the model wants stored beside the rows. `{name: [n_envs, ...]}`
        """
        if self._normalize is not None:
            rewards = self._normalize.get_original_reward()
        new_obs = self._unnormalized(new_obs)
        ended = np.asarray(dones, dtype=bool)
        if not ended.any():
            self.add(actions, rewards, ended, ended, new_obs, extras=extras)
            return
        cut = np.array([bool(info.get("TimeLimit.truncated", False)) for info in infos])
        final_obs = self._final_obs(np.flatnonzero(ended), infos)
        self.add(actions, rewards, ended & ~cut, ended & cut, new_obs, final_obs=final_obs, extras=extras)

    def _unnormalized(self, obs: Any) -> Any:
        return self._normalize.get_original_obs() if self._normalize is not None and self._normalizes_obs else obs

    def _final_obs(self, envs: Array, infos: Sequence[Mapping[str, Any]]) -> Arrays:
        """The observations before the reset, `[n_envs, ...]`; zeros where no episode ended."""
        assert self.obs is not None
        is_dict = isinstance(self.obs, dict)
        current = self.obs if isinstance(self.obs, dict) else {"": self.obs}
        finals = {key: np.zeros_like(array) for key, array in current.items()}
        for env in envs:
            obs = infos[env].get("terminal_observation")
            if obs is None:
                raise BufferError(
                    f"Environment {env} ended an episode without a 'terminal_observation' in its info. "
                    "Every VecEnv of SB3 puts the last observation there before it resets."
                )
            if self._normalize is not None and self._normalizes_obs:
                obs = self._normalize.unnormalize_obs(obs)
            encoded, _ = self.obs_codec.encode_any(obs)
            for key, array in (encoded if isinstance(encoded, dict) else {"": encoded}).items():
                finals[key][env] = array[0]
        return finals if is_dict else finals[""]


class VecRecordEpisodes(VecEnvWrapper):
    """Records every episode of an SB3 `VecEnv`, whatever policy drives it; the twin of `RecordEpisodes`.

    Args:
        venv: To record.
        buffer: With `n_envs=venv.num_envs`; it belongs to these environments alone while they are being stepped.

    Raises:
        ConfigurationError: If a space is not supported, or the numbers of environments differ.
        ShapeMismatchError: If the buffer was made for other shapes.
    """

    def __init__(self, venv: VecEnv, buffer: ReplayBuffer) -> None:
        super().__init__(venv)
        self._recorder = VecEpisodeRecorder(buffer, venv)
        self._actions: Array | None = None

    @property
    def buffer(self) -> ReplayBuffer:
        """Where the episodes go."""
        return self._recorder.buffer

    def reset(self) -> VecEnvObs:
        """Resets all environments; episodes in flight end as truncated."""
        obs = self.venv.reset()
        self._recorder.begin(obs)
        return obs

    def step_async(self, actions: Array) -> None:
        """Starts a step of all environments."""
        if self._recorder.obs is None:
            raise BufferError("step() was called where no episode has begun. Call env.reset() first.")
        self._actions = self._recorder.action_codec.from_env(actions)
        self.venv.step_async(actions)

    def step_wait(self) -> VecEnvStepReturn:
        """Waits for the step and stores what came of it."""
        new_obs, rewards, dones, infos = self.venv.step_wait()
        assert self._actions is not None
        self._recorder.add_vec_step(self._actions, new_obs, rewards, dones, infos)
        return new_obs, rewards, dones, infos
