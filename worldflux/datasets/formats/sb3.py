"""Replay buffers of Stable-Baselines3, as objects: their files are pickles, which only their owner should load."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from gymnasium import spaces

from worldflux.datasets.recording import Arrays, Block, Recording, rows_at_once, spans
from worldflux.errors import ConfigurationError, a_type
from worldflux.validation import SINGLE_KEY


def open_source(source: Any) -> Recording:
    """Opens a `ReplayBuffer` or `DictReplayBuffer`, one environment after another.

    Actions in it are in [-1, 1], as SB3's algorithms store them.

    Args:
        source: The buffer, such as `model.replay_buffer`.
    """
    if not all(hasattr(source, name) for name in ("observations", "actions", "rewards", "dones", "pos", "full")):
        raise ConfigurationError(
            f"The source is {a_type(source)}, expected a replay buffer of SB3. Load the file of "
            "save_replay_buffer yourself if you trust it (it is a pickle), and pass model.replay_buffer."
        )
    size, n_envs = source.buffer_size if source.full else source.pos, int(source.n_envs)
    order = np.roll(np.arange(source.buffer_size), -source.pos) if source.full else np.arange(size)
    space = source.observation_space
    obs = source.observations if isinstance(source.observations, Mapping) else {SINGLE_KEY: source.observations}
    # With optimize_memory_usage, the observation after a step is the next row's, which a reset has replaced at an end.
    following = None
    if not getattr(source, "optimize_memory_usage", False):
        following = source.next_observations
        following = following if isinstance(following, Mapping) else {SINGLE_KEY: following}
    limits = getattr(source, "timeouts", None)
    timeouts = np.zeros_like(source.dones) if limits is None else limits
    dones = source.dones[order] != 0  # [size, n_envs]
    cut = dones & (timeouts[order] != 0)
    ended = dones.copy()
    ended[-1:] = True
    notes = []
    if not getattr(source, "handle_timeout_termination", True):
        notes.append(
            "it was made with handle_timeout_termination=False: time limits cannot be told from terminations, and all "
            "ends count as terminations."
        )
    step = rows_at_once([array[:, 0] for array in (*obs.values(), source.actions)])

    def blocks() -> Iterator[Block]:
        for env in range(n_envs):
            for part in spans(size, step):
                at = order[part]
                last = at[ended[part, env]]
                final = None if following is None else _rows(space, following, last, env)
                terminated = dones[part, env] & ~cut[part, env]
                yield Block(
                    _rows(space, obs, at, env),
                    source.actions[at, env],
                    source.rewards[at, env],
                    terminated,
                    ended[part, env] & ~terminated,
                    final,
                )

    is_box = hasattr(source.action_space, "low")
    return Recording(
        f"the {type(source).__name__}",
        space,
        tuple(source.actions.shape[2:]),
        source.actions.dtype,
        size * n_envs,
        int(np.count_nonzero(ended)),
        blocks,
        action_space=None if is_box else source.action_space,
        notes=notes,
    )


def _rows(space: spaces.Space[Any], arrays: Mapping[str, np.ndarray], at: np.ndarray, env: int) -> Arrays:
    """Rows of one environment, in the shape of their space: SB3 stores single numbers in arrays of one."""
    shapes = {key: (space[key] if isinstance(space, spaces.Dict) else space).shape or () for key in arrays}
    return {key: array[at, env].reshape(len(at), *shapes[key]) for key, array in arrays.items()}
