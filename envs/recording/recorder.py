"""Recorders, the only place where steps of environments become rows of the replay buffer.

`ReplayBuffer` shows how observations, actions and rewards are aligned. A step is stored as soon as it was made, before
its episode ends.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, VecNormalize

from worldflux.envs.given import check_what_is_given
from worldflux.envs.recording.step_cache import StepCache
from worldflux.envs.spaces import ActionCodec, Array, Arrays, ObservationCodec
from worldflux.envs.taps import Tap, tapped
from worldflux.envs.tasks import TaskVecEnv
from worldflux.envs.vector import ENDED, RESET_STEP, GymnasiumVecEnv, innermost, settle
from worldflux.errors import BufferError, ConfigurationError, ShapeMismatchError
from worldflux.replay.buffer import ReplayBuffer
from worldflux.replay.ring import TERMINATED, TRUNCATED

_TERMINATED, _TRUNCATED = int(TERMINATED), int(TRUNCATED)

_GIVEN_FINAL = "worldflux.given_final"
"""The key in the info of an episode's last step for its last observation before `VecNormalize`."""

Ends = Sequence[tuple[int, int]]
"""The environments whose episodes a step ended, from the first to the last, with TERMINATED or TRUNCATED."""


class EpisodeRecorder:
    """Writes the steps of environments that are stepped together into a buffer.

    Attributes:
        buffer: The buffer that receives the steps.
        obs_codec: The codec of the observations.
        action_codec: The codec of the actions.

    Args:
        buffer: The buffer in which each environment gets a stream of its own.
        observation_space: The observation space of a single environment.
        action_space: The action space of a single environment.
        n_envs: The number of environments.

    Raises:
        ConfigurationError: If a space is not supported.
        ShapeMismatchError: If the buffer was made for other shapes.
        BufferError: If it was made for another kind of actions.
    """

    def __init__(
        self, buffer: ReplayBuffer, observation_space: spaces.Space[Any], action_space: spaces.Space[Any], n_envs: int
    ) -> None:
        self.buffer = buffer
        self.n_envs = n_envs
        self.obs_codec = ObservationCodec(observation_space)
        self.action_codec = ActionCodec(action_space)
        if buffer.obs_shape != self.obs_codec.obs_shape or buffer.action_dim != self.action_codec.action_dim:
            raise ShapeMismatchError(
                f"The buffer holds observations {buffer.obs_shape} and {buffer.action_dim} action numbers, expected "
                f"{self.obs_codec.obs_shape} and {self.action_codec.action_dim} for this environment. "
                "ObservationCodec and ActionCodec of worldflux.envs give these numbers for any space."
            )
        buffer.declare_actions(self.action_codec.action_type, self.action_codec.action_classes)
        self._began = False
        self._cache = StepCache(buffer, self.obs_codec, n_envs)
        # An environment that nobody closes must not keep its streams for ever.
        weakref.finalize(self, self._cache.abandon).atexit = False

    @property
    def is_in_order(self) -> bool:
        """Whether environment i writes to stream i of the buffer, as with `ReplayBuffer.add`."""
        return self._began and self._cache.is_in_order

    @property
    def obs(self) -> Arrays | None:
        """The observations that the next actions are taken at, in the library's form `[n_envs, ...]`.

        None before a reset.
        """
        with self.buffer.lock:
            return self._cache.obs if self._began else None

    def begin(self, obs: Any) -> None:
        """Notes that all environments were reset to `obs` `[n_envs, ...]`; episodes in flight end as truncated."""
        if self._began:
            self.interrupt()
        first, _ = self.obs_codec.encode_any(obs)
        count = len(next(iter(first.values())) if isinstance(first, dict) else first)
        if count != self.n_envs:
            raise ShapeMismatchError(f"reset() gave {count} observations, expected {self.n_envs}.")
        with self.buffer.lock:
            self._cache.attach()
            self._cache.set_obs(first)
        self._began = True

    def interrupt(self) -> None:
        """Ends the episodes in flight as truncated, with the observations after their last steps.

        Call it after a reset, a step or storing a step has failed, because the environments are in an unknown state.
        """
        with self.buffer.lock:
            if self._began:
                self._cache.end_episodes()
            self.finish()

    def __enter__(self) -> None:
        """Enters a block that resets or steps the environments."""

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Ends the episodes in flight if the block has failed."""
        if kind is not None:
            self.interrupt()

    def finish(self) -> None:
        """Notes that every episode has ended and that a reset is due."""
        self._began = False
        self._cache.rest()

    def close(self) -> None:
        """Ends the episodes in flight and releases the streams."""
        self.interrupt()
        self._cache.detach()

    def checked_actions(self, actions: Any) -> Array:
        """Returns a copy of the actions that are about to be executed, in the library's form, for `add`.

        Raises:
            BufferError: If no episode has begun.
            ShapeMismatchError: If they are not actions of the space.
        """
        if not self._began:
            raise BufferError("step() was called before an episode began. Call env.reset() first.")
        return self.action_codec.from_env(actions)

    def add(
        self,
        actions: Array,
        rewards: Any,
        next_obs: Any,
        ends: Ends = (),
        finals: Sequence[Any] | None = None,
        skipped: Sequence[int] = (),
        extras: Mapping[str, Any] | None = None,
    ) -> None:
        """Stores a step of every environment.

        Args:
            actions: The executed actions in the library's form. `[n_envs, A]`
            rewards: The rewards as the environments gave them. `[n_envs]`
            next_obs: The observations that the next actions are taken at, as the environments gave them.
                `[n_envs, ...]`
            ends: The episodes that the step ended.
            finals: For each of `ends` the observation after this step, before the reset, as the environment gave it.
                None if `next_obs` holds them.
            skipped: The environments that made no step.
            extras: Values of the model to store with the rows. `{name: [n_envs, ...]}`
        """
        encoded = None if finals is None else [self.obs_codec.encode_any(final)[0] for final in finals]
        with self.buffer.lock:  # another thread may learn from the rows, and would have them handed over in between
            if not extras and self._cache.put(actions, rewards, next_obs):
                if ends or skipped:
                    self._cache.mark(ends, encoded, skipped)
            else:
                self._add_at_once(actions, rewards, next_obs, ends, encoded, skipped, extras)

    def _add_at_once(
        self,
        actions: Array,
        rewards: Any,
        next_obs: Any,
        ends: Ends,
        finals: Sequence[Arrays] | None,
        skipped: Sequence[int],
        extras: Mapping[str, Any] | None,
    ) -> None:
        """Stores a step through `ReplayBuffer.add`, which takes extras and says what cannot be stored."""
        following, _ = self.obs_codec.encode_any(next_obs)
        envs = [env for env, _ in ends]
        flags = np.zeros(self.n_envs, np.uint8)
        flags[envs] = [flag for _, flag in ends]
        active = np.ones(self.n_envs, np.bool_)
        active[list(skipped)] = False
        add = self.buffer.add if self.is_in_order else partial(self.buffer.add, streams=self._cache.streams)
        add(
            self.obs,
            actions,
            rewards,
            flags == TERMINATED,
            flags == TRUNCATED,
            final_obs=following if finals is None else _at_rows(finals, envs, following),
            extras=extras,
            active=active if skipped else None,
        )
        self._cache.set_obs(following)


def end_of(terminated: Any) -> int:
    """TERMINATED or TRUNCATED, for a step that ended an episode.

    Where a time limit meets the true end, the end counts, as in SB3.
    """
    return _TERMINATED if terminated else _TRUNCATED


class VecEpisodeRecorder(EpisodeRecorder):
    """Reads the steps of an SB3 `VecEnv`, which resets its environments itself.

    Under `VecNormalize`, rewards and observations are stored as they were before normalisation: its running statistics
    move on, and what is stored must not depend on the time at which it was stored.

    Attributes:
        steps: The number of steps that were stored, over all environments.

    Args:
        buffer: A buffer with `n_envs=venv.num_envs`.
        venv: The outermost wrapper of what is stepped.

    Raises:
        ConfigurationError: If a space is not supported, the numbers of environments differ, wrappers outside
            `VecNormalize` change the shape of observations, or there is more than one `VecNormalize`.
        ShapeMismatchError: If the buffer was made for other shapes.
    """

    def __init__(self, buffer: ReplayBuffer, venv: VecEnv) -> None:
        super().__init__(buffer, venv.observation_space, venv.action_space, venv.num_envs)
        if buffer.n_envs != venv.num_envs:
            raise ConfigurationError(f"The buffer is for {buffer.n_envs} environments, expected {venv.num_envs}.")
        check_what_is_given(venv)
        self.steps = 0
        self._base = base = innermost(venv)
        self._reports_late = isinstance(base, GymnasiumVecEnv) and base.autoreset_mode is AutoresetMode.NEXT_STEP
        self._normalize = _normalization(venv)
        if self._normalize is not None:
            tapped(self._normalize.venv, "step_wait", _GivenFinals)
        if self._normalize is not None and self._normalize.norm_obs:
            inner = ObservationCodec(self._normalize.observation_space).obs_shape
            if inner != self.obs_codec.obs_shape:
                raise ConfigurationError(
                    f"VecNormalize sees observations {inner} and the policy {self.obs_codec.obs_shape}, expected the "
                    "same. Make VecNormalize the outermost wrapper, or pass norm_obs=False."
                )

    def begin(self, obs: Any) -> None:
        """Notes that all environments were reset to `obs` `[n_envs, ...]`; episodes in flight end as truncated."""
        super().begin(self._unnormalized(obs))

    def checked_actions(self, actions: Any) -> Array:
        """As that of the base class; what environments of a `TaskVecEnv` do not take of an action is zero."""
        checked = super().checked_actions(actions)
        return checked * self._base.action_masks if isinstance(self._base, TaskVecEnv) else checked

    def interrupt(self) -> None:
        """Ends the episodes in flight, and discards answers of processes that nobody has fetched."""
        super().interrupt()
        settle(self._base)

    def add_vec_step(
        self,
        actions: Array,
        new_obs: Any,
        rewards: Array,
        dones: Array,
        infos: Sequence[Mapping[str, Any]],
        *,
        extras: Mapping[str, Any] | None = None,
        skipped: Sequence[int] = (),
    ) -> list[int]:
        """Stores what `VecEnv.step` returned.

        Args:
            actions: The executed actions in the library's form. `[n_envs, A]`
            new_obs: The observations after the step; where an episode ended, the first one of the next.
                `[n_envs, ...]`
            rewards: The rewards. `[n_envs]`
            dones: Whether the step ended an episode. `[n_envs]`
            infos: Where an episode ended: `terminal_observation`, and `TimeLimit.truncated` for a cut from outside.
                Those of `GymnasiumVecEnv` say more.
            extras: What the model wants stored beside the rows. `{name: [n_envs, ...]}`
            skipped: The environments whose steps are not wanted.

        Returns:
            The environments whose episodes ended with a step that was stored.
        """
        if self._normalize is not None:
            rewards, new_obs = self._normalize.get_original_reward(), self._unnormalized(new_obs)
        ends: list[tuple[int, int]] = []
        finals: list[Any] | None = None
        if self._reports_late:
            skipped = sorted({*skipped, *(env for env, info in enumerate(infos) if RESET_STEP in info)})
            for env, info in enumerate(infos):
                if ENDED in info and env not in skipped:
                    ends.append((env, end_of(info[ENDED] == "terminated")))
        elif np.count_nonzero(dones):
            finals = []
            for env in np.flatnonzero(dones).tolist():
                if env not in skipped:
                    ends.append((env, end_of(not infos[env].get("TimeLimit.truncated", False))))
                    finals.append(self._final(env, infos[env]))
        self.add(actions, rewards, new_obs, ends, finals, skipped, extras)
        self.steps += self.n_envs - len(skipped)
        return [env for env, _ in ends]

    def _unnormalized(self, obs: Any) -> Any:
        return self._normalize.get_original_obs() if self._normalize is not None and self._normalize.norm_obs else obs

    def _final(self, env: int, info: Mapping[str, Any]) -> Any:
        """The observation before the reset, as it was before normalisation."""
        obs = info.get("terminal_observation")
        if obs is None:
            raise BufferError(
                f"Environment {env} ended an episode without a 'terminal_observation' in its info. "
                "Every VecEnv of SB3 puts the last observation there before it resets."
            )
        if self._normalize is None or not self._normalize.norm_obs:
            return obs
        if _GIVEN_FINAL not in info:
            raise BufferError(
                f"The last observation of environment {env} is known only as VecNormalize has clipped it, because a "
                "wrapper outside replaced the info. Let it keep all entries, or put VecNormalize outside of it."
            )
        return info[_GIVEN_FINAL]


class _GivenFinals(Tap):
    """Keeps the last observations of episodes below `VecNormalize`, which clips them and forgets the original ones."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self.method(*args, **kwargs)
        _, _, dones, infos = result
        if np.count_nonzero(dones):
            for info in infos:
                if "terminal_observation" in info:
                    info[_GIVEN_FINAL] = info["terminal_observation"]
        return result


def _normalization(venv: VecEnv) -> VecNormalize | None:
    """The `VecNormalize` in a stack of wrappers, if there is one.

    Raises:
        ConfigurationError: If there are several.
    """
    found: list[VecNormalize] = []
    while isinstance(venv, VecEnvWrapper):
        if isinstance(venv, VecNormalize):
            found.append(venv)
        venv = venv.venv
    if len(found) > 1:
        raise ConfigurationError(
            f"There are {len(found)} VecNormalize around these environments, expected one: what was before the inner "
            "one cannot be known. A single VecNormalize(venv, norm_obs=True, norm_reward=True) does both."
        )
    return found[0] if found else None


def _at_rows(finals: Sequence[Any], envs: Sequence[int], like: Arrays) -> Arrays:
    """Arrays as `like` with `finals` `[1, ...]` in the rows of their environments, and zeros elsewhere."""
    if isinstance(like, dict):
        spread: dict[str, Any] = {}
        for key, array in like.items():
            spread[key] = _at_rows([final[key] for final in finals], envs, array)
        return spread
    rows = np.zeros_like(like)
    for env, final in zip(envs, finals, strict=True):
        rows[env] = final[0]
    return rows
