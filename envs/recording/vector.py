"""Recorders of Gymnasium's vector environments, which reset their environments at three different times."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv

from worldflux.envs.given import check_what_is_given
from worldflux.envs.recording.recorder import EpisodeRecorder
from worldflux.envs.recording.step_cache import NextStepStepCache
from worldflux.envs.spaces import Array
from worldflux.envs.vector import autoreset_mode, final_obs_in
from worldflux.errors import BufferError, ConfigurationError, ShapeMismatchError
from worldflux.replay.buffer import ReplayBuffer
from worldflux.replay.ring import TERMINATED, TRUNCATED

_TERMINATED, _TRUNCATED = int(TERMINATED), int(TRUNCATED)


class VectorEpisodeRecorder(EpisodeRecorder):
    """Reads the steps of a Gymnasium vector environment whose ended episodes begin anew at once or by a reset.

    Args:
        buffer: With `n_envs=envs.num_envs`.
        envs: Outermost wrapper of what is stepped.

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
        self._resets_at_once = autoreset_mode(envs) is AutoresetMode.SAME_STEP
        self._over = np.zeros(self._shape, np.bool_)  # whose reset is due
        self._is_reset_due = False

    def begin(self, obs: Any) -> None:
        """The environments were reset to `obs` `[n_envs, ...]`; episodes in flight end there, truncated."""
        super().begin(obs)
        self._set_over(np.zeros(self._shape, np.bool_))

    def check_begun(self) -> None:
        """Before some environments are reset.

        Raises:
            BufferError: If no episode has begun in the others.
        """
        if not self._began:
            raise BufferError("No episode has begun: call reset() without a reset_mask first.")

    def begin_some(self, obs: Any, envs: Array) -> None:
        """Some environments (`[n_envs]` bool) were reset, and `obs` `[n_envs, ...]` has their first observations."""
        first, _ = self.obs_codec.encode_any(obs)
        over = self._get_over()
        for env in np.flatnonzero(envs & ~over).tolist():
            self._held.end_episodes(env)
        self._set_over(over & ~envs)
        self._held.set_obs(first, envs)

    def checked_actions(self, actions: Any) -> Array:
        """As for all recorders.

        Raises:
            BufferError: If no episode has begun in some environment.
        """
        if self._is_reset_due and self._began:
            raise BufferError(
                f"The episodes of environments {np.flatnonzero(self._over).tolist()} have ended. Reset them with "
                "options={'reset_mask': terminations | truncations}."
            )
        return super().checked_actions(actions)

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
            actions: As `checked_actions` returned them.
            next_obs: `[n_envs, ...]`
            rewards: `[n_envs]`
            terminations: `[n_envs]` bool
            truncations: `[n_envs]` bool
            infos: With `final_obs` where an environment was reset in the same step.
        """
        ends: list[tuple[int, int]] = []
        finals: list[Any] | None = None
        if np.count_nonzero(terminations) or np.count_nonzero(truncations):
            over = np.logical_or(terminations, truncations)
            ends = _ends(over, terminations)
            if self._resets_at_once:
                finals = [final_obs_in(infos, env) for env, _ in ends]
            else:
                self._set_over(over)
        self.add(actions, np.asarray(rewards), next_obs, ends, finals, is_compact=True)

    def _get_over(self) -> Array:
        return self._over

    def _set_over(self, over: Array) -> None:
        self._over, self._is_reset_due = over, bool(over.any())


class NextStepVectorEpisodeRecorder(VectorEpisodeRecorder):
    """Reads the steps of a Gymnasium vector environment that resets on the step after an episode's end.

    That step is none of an episode; its action is ignored, and nothing of it is stored but the observation.

    Args:
        buffer: As for `VectorEpisodeRecorder`.
        envs: Likewise.
    """

    _held_type = NextStepStepCache

    def __init__(self, buffer: ReplayBuffer, envs: VectorEnv[Any, Any, Any]) -> None:
        super().__init__(buffer, envs)
        self._any_action = envs.single_action_space.sample()

    def checked_actions(self, actions: Any) -> Array:
        """As for all recorders; actions that the environments ignore may be anything."""
        try:
            return EpisodeRecorder.checked_actions(self, actions)
        except ShapeMismatchError:
            given = np.array(actions)
            given[self._get_over()] = self._any_action
            return EpisodeRecorder.checked_actions(self, given)

    def add_vector_step(
        self,
        actions: Array,
        next_obs: Any,
        rewards: Any,
        terminations: Array,
        truncations: Array,
        infos: Mapping[str, Any],
    ) -> None:
        """Stores what `VectorEnv.step` returned; see `VectorEpisodeRecorder.add_vector_step`."""
        if self._held.put(actions, rewards, next_obs, True):
            self._held.flag(terminations, truncations)
            return
        over = np.logical_or(terminations, truncations)
        skipped = np.flatnonzero(self._get_over()).tolist()
        ends = _ends(over, terminations)
        self._add_at_once(actions, np.asarray(rewards), next_obs, ends, None, skipped, None, True)
        self._set_over(over)

    def _get_over(self) -> Array:
        return self._held.over

    def _set_over(self, over: Array) -> None:
        self._held.set_over(over)


def vector_recorder(buffer: ReplayBuffer, envs: VectorEnv[Any, Any, Any]) -> VectorEpisodeRecorder:
    """The recorder for a Gymnasium vector environment in its autoreset mode.

    Raises:
        ConfigurationError: If a space is not supported, the numbers of environments differ, or the vector
            environment does not say how it resets.
        ShapeMismatchError: If the buffer was made for other shapes.
    """
    if autoreset_mode(envs) is AutoresetMode.NEXT_STEP:
        return NextStepVectorEpisodeRecorder(buffer, envs)
    return VectorEpisodeRecorder(buffer, envs)


def _ends(over: Array, terminations: Array) -> list[tuple[int, int]]:
    # Where a time limit meets the true end, the end counts, as SB3 has it.
    return [(env, _TERMINATED if terminations[env] else _TRUNCATED) for env in np.flatnonzero(over).tolist()]
