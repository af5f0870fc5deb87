"""The latest steps of environments that move together, on their way into a replay buffer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium import spaces

from worldflux.accel.overriding import overridden, steps_back
from worldflux.envs.spaces import Array, Arrays, ObservationCodec
from worldflux.errors import BufferError, ShapeMismatchError
from worldflux.replay.buffer import ReplayBuffer
from worldflux.replay.ring import STEP
from worldflux.validation import SINGLE_KEY

MOST_STEPS = 256
MOST_BYTES = 4 * 2**20

_STEP = int(STEP)
_ADD = ReplayBuffer.add


class StepCache:
    """Keeps steps until there are many, or until somebody reads the buffer; for readers this makes no difference.

    Finding the rows of a step in a buffer takes about as long as some environments need for the step, but hardly longer
    for many steps. So a step is only checked here, and copied into the next row of arrays (environments may reuse
    theirs).

    Attributes:
        streams: The streams of the buffer that nobody else writes to, one for each environment.
        is_resting: Whether no episode is in flight, so that somebody else may have these streams.
        is_abandoned: Whether nobody will make another step.

    Args:
        buffer: The buffer that receives the steps. If it stores observations in other dtypes than the codec's, or
            overrides `add`, no step is taken.
        obs_codec: The codec of the observations.
        envs: The number of environments.
    """

    def __init__(self, buffer: ReplayBuffer, obs_codec: ObservationCodec, envs: int) -> None:
        self._buffer, self._obs_codec = buffer, obs_codec
        self.streams, self.is_resting, self.is_abandoned = np.arange(0), True, False
        action_dim = buffer.action_dim
        shapes = obs_codec.obs_shape if isinstance(obs_codec.obs_shape, dict) else {SINGLE_KEY: obs_codec.obs_shape}
        dtypes = obs_codec.obs_dtype if isinstance(obs_codec.obs_dtype, dict) else {SINGLE_KEY: obs_codec.obs_dtype}
        sizes = {key: int(np.prod(shape)) for key, shape in shapes.items()}
        self._floats = {key: shapes[key] for key in sizes if dtypes[key] == np.float32}
        width = sum(sizes[key] for key in self._floats) + action_dim + 1
        step_bytes = envs * (4 * width + sum(size for key, size in sizes.items() if key not in self._floats))
        self._most = max(1, min(MOST_STEPS, MOST_BYTES // step_bytes, buffer.most_steps))

        # Row k + 1 belongs to step k: its action, its reward, and the observation that followed. Row 0 has the
        # observation before the first. All floats lie together, so that one look finds a NaN among them.
        rows = self._most + 1
        self._block = np.zeros((rows, envs, width), np.float32)
        self._zeros = np.zeros(envs * width, np.float32)
        self._obs: dict[str, Array] = {key: np.zeros((rows, envs, *shapes[key]), dtypes[key]) for key in shapes}
        self._flags = np.full((rows, envs), STEP)
        self._finals: list[Arrays] = []
        self._count = 0
        self._own_add = steps_back("Storing several steps at a time", buffer, overridden(buffer, _ADD))
        self._rewards_shape = (envs,) if buffer.obs_dtype == obs_codec.obs_dtype and not self._own_add else None
        self._vectors: Array | None = None  # of observations that are plain vectors
        vector = shapes.get(SINGLE_KEY, ())
        self._vector_shapes = [(envs, *vector), vector] if envs == 1 else [(envs, *vector)]
        self._look_into_block()

    def _look_into_block(self) -> None:
        """Makes the arrays that are views of parts of the block."""
        begin, lead = 0, self._block.shape[:2]
        self._lines = self._block.reshape(len(self._block), -1)
        for key, shape in self._floats.items():
            end = begin + int(np.prod(shape))
            self._obs[key] = self._block[..., begin:end].reshape(*lead, *shape)
            begin = end
        self._actions, self._rewards = self._block[..., begin:-1], self._block[..., -1]
        space = self._obs_codec.space
        if isinstance(space, spaces.Box) and len(space.shape) == 1:
            self._vectors = self._obs[SINGLE_KEY]

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Makes the views anew: in a copy, each would be an array of its own."""
        self.__dict__.update(state)
        self._look_into_block()

    def attach(self) -> None:
        """Makes sure that there is a stream for each environment, before episodes begin.

        Raises:
            BufferError: If the buffer is too small for that, or overrides `add` and others use it now.
        """
        if not self._buffer.is_attached(self):
            self.streams = self._buffer.attach(self, self._flags.shape[1])
            self.limit(self._buffer.most_steps)
        if self._own_add and not self.is_in_order:
            self.detach()
            raise BufferError(
                f"{type(self._buffer).__name__} has an add of its own, which takes the steps of {self._buffer.n_envs} "
                "environments together. Let one recorder of so many environments write into it at a time."
            )
        self.is_resting = False

    @property
    def is_in_order(self) -> bool:
        """Whether the environments have the streams of the same numbers, as with `ReplayBuffer.add`."""
        return len(self.streams) == self._buffer.n_envs and bool((self.streams == np.arange(len(self.streams))).all())

    def rest(self) -> None:
        """Notes that all episodes have ended, and none has begun."""
        self.is_resting = True

    def detach(self) -> None:
        """Gives the streams back."""
        if self._buffer.is_attached(self):
            self._buffer.detach(self)
        self.rest()

    def abandon(self) -> None:
        """Notes that nobody will make another step; episodes in flight end when somebody else needs a stream."""
        self.is_abandoned = True

    def limit(self, steps: int) -> None:
        """Sets how many steps may be held back from now on."""
        self._most = max(1, min(self._most, steps))

    def end_episodes(self, env: int | None = None) -> None:
        """Ends the episodes in flight as truncated, with the observations after their last steps.

        Args:
            env: The environment whose episode ends; None for all of them.
        """
        envs = np.arange(len(self.streams)) if env is None else np.array([env])
        if self._buffer.is_attached(self):
            self._buffer.end_in(self.streams[envs], self.obs, len(self.streams), envs)

    @property
    def obs(self) -> Arrays:
        """A copy of the observations after the latest step, or of those that were set since. `[n_envs, ...]`"""
        now = {key: array[self._count].copy() for key, array in self._obs.items()}
        return now if isinstance(self._obs_codec.obs_shape, dict) else now[SINGLE_KEY]

    def set_obs(self, obs: Arrays, envs: Any = ...) -> None:
        """Sets the observations `[n_envs, ...]` of the environments that `envs` picks, after a reset."""
        for key, array in _by_key(obs).items():
            self._obs[key][self._count][envs] = array[envs]

    def put(self, actions: Array, rewards: Array, next_obs: Any) -> bool:
        """Takes a step, unless a number in it is not finite or the rewards are no array of the usual form.

        Args:
            actions: The actions in the library's form. `[n_envs, A]`
            rewards: The rewards. `[n_envs]`
            next_obs: The observations that followed, as the environments gave them. `[n_envs, ...]`

        Returns:
            Whether it was taken.

        Raises:
            ShapeMismatchError: If `next_obs` are no observations of the space; nothing is kept then.
        """
        if type(rewards) is not np.ndarray or rewards.shape != self._rewards_shape:
            return False
        if self._count == self._most:
            self.hand_over()
        row = self._count + 1
        if self._vectors is not None and type(next_obs) is np.ndarray and next_obs.shape in self._vector_shapes:
            self._vectors[row] = next_obs  # the commonest form, at a fraction of the time
        else:
            for key, array in _by_key(self._obs_codec.encode_any(next_obs)[0]).items():
                if len(array) != len(self.streams):
                    raise ShapeMismatchError(
                        f"There are {len(array)} observations, expected one of each environment ({len(self.streams)})."
                    )
                self._obs[key][row] = array
        self._actions[row] = actions
        self._rewards[row] = rewards
        # Zero times a NaN or an infinite number is NaN, and nothing can overflow.
        if self._lines[row].dot(self._zeros) != 0.0:
            return False
        self._count = row
        return True

    def mark(self, ends: Sequence[tuple[int, int]], finals: Sequence[Arrays] | None, skipped: Sequence[int]) -> None:
        """Adds to the latest step what else is known of it, before the next is put.

        Args:
            ends: The environments whose episodes it ended, from the first to the last, with TERMINATED or TRUNCATED.
            finals: For each of them the observation before the reset, in the library's form `[1, ...]`; None if
                `next_obs` holds it.
            skipped: The environments that made no step.
        """
        flags = self._flags[self._count]
        for env, flag in ends:
            flags[env] = _STEP | flag
        for env in skipped:
            flags[env] = 0
        if finals is not None:
            self._finals += finals
        elif ends:
            envs = [env for env, _ in ends]
            self._finals.append({key: array[self._count].take(envs, axis=0) for key, array in self._obs.items()})

    def hand_over(self) -> None:
        """Passes the steps on to the buffer."""
        count = self._count
        if not count:
            return
        finals = [_by_key(final) for final in self._finals]
        self._buffer.add_checked(
            {key: array[:count] for key, array in self._obs.items()},
            self._actions[1 : count + 1],
            self._rewards[1 : count + 1],
            self._flags[1 : count + 1],
            {key: np.concatenate([final[key] for final in finals]) for key in self._obs if finals},
            self.streams,
        )
        for array in self._obs.values():
            array[0] = array[count]
        self._flags[:] = STEP
        self._finals.clear()
        self._count = 0


def _by_key(obs: Arrays) -> dict[str, Array]:
    return obs if isinstance(obs, dict) else {SINGLE_KEY: obs}
