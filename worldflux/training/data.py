"""A buffer of random data to try things with, and the protocols of providers under their documented names."""

from __future__ import annotations

import numpy as np

from worldflux.replay.backends import StoragePlace
from worldflux.replay.buffer import ReplayBuffer
from worldflux.replay.provider import BatchProvider, BatchRequestProvider
from worldflux.validation import ObsShape, whole_number

__all__ = ["BatchProvider", "BatchRequestProvider", "ReplayBuffer", "create_random_buffer"]


def create_random_buffer(
    capacity: int = 10_000,
    obs_shape: ObsShape = (3, 64, 64),
    action_dim: int = 6,
    num_episodes: int = 100,
    episode_length: int = 100,
    seed: int | None = None,
    *,
    storage: StoragePlace = None,
) -> ReplayBuffer:
    """A buffer of noise, for tests and for trying out a model's plumbing.

    Args:
        capacity: Number of transitions to keep; beyond it the oldest episodes are dropped.
        obs_shape: Shape of one observation. Images are random bytes, vectors standard normal numbers.
        action_dim: Width of the action vectors, which are uniform in [-1, 1].
        num_episodes: Number of episodes, each ended by a termination.
        episode_length: Number of transitions of each episode.
        seed: Seed of the data and of the buffer's sampler; None draws one.
        storage: Storage of the rows, as for `ReplayBuffer`.

    Raises:
        ConfigurationError: If a number is not whole or less than 1.
        BufferError: If there is not enough memory.
    """
    for name, value in (("num_episodes", num_episodes), ("episode_length", episode_length)):
        whole_number(name, value, 1)
    buffer = ReplayBuffer(capacity, obs_shape, action_dim, seed=seed, storage=storage)
    buffer.check_budget(min(buffer.capacity, num_episodes * episode_length))
    rng = np.random.default_rng(seed)

    def random_obs(shape: tuple[int, ...]) -> np.ndarray:
        full = (episode_length + 1, *shape)
        if len(shape) == 3:
            return rng.integers(256, size=full, dtype=np.uint8)
        return rng.standard_normal(full, np.float32)

    shapes = buffer.obs_shape
    for _ in range(num_episodes):
        buffer.add_episode(
            {key: random_obs(shape) for key, shape in shapes.items()}
            if isinstance(shapes, dict)
            else random_obs(shapes),
            rng.uniform(-1, 1, (episode_length, action_dim)),
            rng.standard_normal(episode_length),
            np.arange(episode_length) == episode_length - 1,
        )
    return buffer
