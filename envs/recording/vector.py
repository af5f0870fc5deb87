"""A recorder of Gymnasium's vector environments, which reset their environments at three different times."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv

from worldflux.envs.given import check_what_is_given
from worldflux.envs.recording.recorder import EpisodeRecorder, end_of
from worldflux.envs.spaces import Array
from worldflux.envs.vector import autoreset_mode, final_obs_in
from worldflux.errors import BufferError, ConfigurationError, ShapeMismatchError
from worldflux.replay.buffer import ReplayBuffer


class VectorEpisodeRecorder(EpisodeRecorder):
    """Reads the steps of a Gymnasium vector environment, in any autoreset mode.

    An environment whose episode ended is reset in the same step, on the next step, or by its user. The next step of one
    that resets on it belongs to no episode; its action is ignored, and nothing of it is stored but the observation.

    Args:
        buffer: The buffer that receives the steps, with `n_envs=envs.num_envs`.
        envs: The outermost wrapper of what is stepped.

    Raises:
        ConfigurationError: If a space is not supported, the numbers of environments differ, or the vector
            environment does not say how it resets.
        ShapeMismatchError: If the buffer was made for other shapes.
    """

    def __init__(self, buffer: ReplayBuffer, envs: VectorEnv[Any, Any, Any]) -> None:
        super().__init__(buffer, envs.single_observation_space, envs.single_action_space, envs.num_envs)
        if buffer.n_envs != envs.num_envs:
            raise ConfigurationError(f"The buffer is for {buffer.n_envs} environments, expected {envs.num_envs}.")
        check_what_is_given(envs)
        self._mode = autoreset_mode(envs)
        self._any_action = envs.single_action_space.sample()
        self._over: Array = np.zeros(self.n_envs, np.bool_)  # the episodes that have ended and whose reset is due
        self._is_any_over = False

    def begin(self, obs: Any) -> None:
        """Notes that all environments were reset to `obs` `[n_envs, ...]`; episodes in flight end as truncated."""
        super().begin(obs)
        self._set_over(np.zeros(self.n_envs, np.bool_))

    def check_begun(self) -> None:
        """Makes sure that only some environments may be reset.

        Raises:
            BufferError: If no episode has begun in the others.
        """
        if not self._began:
            raise BufferError("No episode has begun: call reset() without a reset_mask first.")

    def begin_some(self, obs: Any, envs: Array) -> None:
        """Notes that some environments (`[n_envs]` bool) were reset, whose first observations are in `obs`."""
        first, _ = self.obs_codec.encode_any(obs)
        for env in np.flatnonzero(envs & ~self._over).tolist():
            self._cache.end_episodes(env)
        self._set_over(self._over & ~envs)
        self._cache.set_obs(first, envs)

    def checked_actions(self, actions: Any) -> Array:
        """A copy of the actions that are about to be executed; those that are ignored may be anything.

        Raises:
            BufferError: If no episode has begun in some environment.
            ShapeMismatchError: If these are no actions of the space.
        """
        if self._is_any_over and self._began and self._mode is AutoresetMode.DISABLED:
            raise BufferError(
                f"The episodes of environments {np.flatnonzero(self._over).tolist()} have ended. Reset them with "
                "options={'reset_mask': terminations | truncations}."
            )
        try:
            return super().checked_actions(actions)
        except ShapeMismatchError:
            if not self._is_any_over:
                raise
            given = np.array(actions)
            given[self._over] = self._any_action
            return super().checked_actions(given)

    def add_vector_step(
        self,
        actions: Array,
        next_obs: Any,
        rewards: Any,
        terminations: Array,
        truncations: Array,
        infos: Mapping[str, Any],
    ) -> None:
        """Stores what `VectorEnv.step` returned.

        Args:
            actions: The actions as `checked_actions` returned them.
            next_obs: The observations after the step. `[n_envs, ...]`
            rewards: The rewards. `[n_envs]`
            terminations: Whether the step ended an episode for good. `[n_envs]` bool
            truncations: Whether the step was cut from outside. `[n_envs]` bool
            infos: The infos, with `final_obs` where an environment was reset in the same step.
        """
        over = np.logical_or(terminations, truncations)
        is_any_over = bool(np.count_nonzero(over))
        skipped = self._over.nonzero()[0].tolist() if self._is_any_over else []
        ends = []
        if is_any_over:
            ends = [(env, end_of(terminations[env])) for env in over.nonzero()[0].tolist() if env not in skipped]
        finals = None
        if ends and self._mode is AutoresetMode.SAME_STEP:
            finals = [final_obs_in(infos, env) for env, _ in ends]
        self.add(actions, np.asarray(rewards), next_obs, ends, finals, skipped)
        if self._mode is not AutoresetMode.SAME_STEP:
            self._over, self._is_any_over = over, is_any_over

    def _set_over(self, over: Array) -> None:
        self._over, self._is_any_over = over, bool(over.any())
