"""Comparisons of what an environment gave with what replay, files and logs make of it."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize

from worldflux.envs.checking.values import kind, parts
from worldflux.envs.given import GivenValues
from worldflux.envs.recording.wrappers import VecRecordEpisodes
from worldflux.envs.spaces import ActionCodec, ObservationCodec, is_image
from worldflux.envs.spaces_json import space_from_json, space_to_json
from worldflux.envs.wrappers import LIMIT_NAMES, max_episode_steps, whole_steps
from worldflux.errors import WorldFluxError
from worldflux.replay.buffer import ReplayBuffer

_TABLE_NAME = 20
"""The number of characters of a key that fit into SB3's tables beside the name of a loss."""


class _Witness(gym.Wrapper[Any, Any, Any, Any]):
    """Keeps copies of all observations that an environment gives."""

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        self.seen: list[Any] = []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        obs, info = self.env.reset(seed=seed, options=options)
        self.seen.append(copy.deepcopy(obs))
        return obs, info

    def step(self, action: Any) -> Any:
        result = self.env.step(action)
        self.seen.append(copy.deepcopy(result[0]))
        return result


def lost_in_float32(space: spaces.Space[Any], given: Iterable[tuple[Any, Any]]) -> str | None:
    """What float32 cannot hold of observations and rewards; None if it holds all of them.

    Args:
        space: The space of the observations.
        given: Observations of the space, each with its reward, or None after a reset.
    """
    found: list[str] = []
    values = GivenValues(space, found.append)
    try:
        for obs, reward in given:
            values.check_obs(obs)
            if reward is not None:
                values.check_reward(reward)
    except WorldFluxError as error:
        found.append(str(error))
    return found[0] if found else None


def stored_otherwise(env: gym.Env[Any, Any], actions: Sequence[Any], seed: int) -> str | None:
    """How a replay buffer differs from what the environment gave, recorded as an agent does; None if it does not.

    Numbers are normalised on the way, and clipped, as many users do; that must not be seen in the buffer.
    """
    witness = _Witness(env)
    obs_codec, action_codec = ObservationCodec(env.observation_space), ActionCodec(env.action_space)
    room = 2 * len(actions) + 2  # every step may end an episode, whose last observation takes a row
    buffer = ReplayBuffer(room, obs_codec.obs_shape, action_codec.action_dim, obs_dtype=obs_codec.obs_dtype)
    recorded = VecRecordEpisodes(_normalized(DummyVecEnv([lambda: witness])), buffer)
    try:
        recorded.seed(seed)
        recorded.reset()
        for action in actions:
            recorded.step(np.asarray(action)[None])
    except WorldFluxError as error:
        return str(error)
    rows, _ = buffer.stored()
    at = rows.at(0, np.arange(rows.end[0]))
    for row, obs in zip(at, witness.seen, strict=False):  # the last one is in flight
        encoded, _ = obs_codec.encode_any(obs)
        for key, part in (encoded if isinstance(encoded, dict) else {next(iter(rows.obs)): encoded}).items():
            stored = rows.obs[key][row]
            if not np.array_equal(stored, part[0]):
                index = tuple(np.argwhere(stored != part[0])[0])
                return (
                    f"An {key if key == 'obs' else f'observation {key!r}'} that was {part[0][index]} at index "
                    f"{[int(each) for each in index]} is stored as {stored[index]}. Change the dtype of its space."
                )
    return None


def _normalized(venv: VecEnv) -> VecEnv:
    """With `VecNormalize` around numbers, where there are any."""
    space = venv.observation_space
    boxes = {name: part for name, part in parts(space) if isinstance(part, spaces.Box) and not is_image(part)}
    if not isinstance(space, spaces.Dict):
        return VecNormalize(venv, clip_obs=1.0) if boxes else venv
    keys = [key for key, part in space.spaces.items() if any(part is box for box in boxes.values())]
    return VecNormalize(venv, clip_obs=1.0, norm_obs_keys=keys) if keys else venv


def saved_otherwise(*given: spaces.Space[Any]) -> str | None:
    """Which space is another one after it was saved and loaded, as an agent's file does; None if all are the same."""
    for space in given:
        loaded = space_from_json(json.loads(json.dumps(space_to_json(space))))
        if loaded != space:
            return f"The space {space} of {space.dtype} is {loaded} of {loaded.dtype} in an agent's file."
    return None


def names_alike(space: spaces.Space[Any]) -> str | None:
    """Which keys of a dictionary are hard to tell apart in tables; None if there are none."""
    keys = sorted(map(str, space.spaces)) if isinstance(space, spaces.Dict) else []
    for one, other in pairwise(keys):
        if one[:_TABLE_NAME] == other[:_TABLE_NAME]:
            return (
                f"The keys '{one}' and '{other}' begin with the same {_TABLE_NAME} characters. An agent makes the "
                "tables of its log wide enough for them; other tables of SB3's logger cut names after 36."
            )
    return None


def limit_unlike(env: gym.Env[Any, Any], longest: int) -> Iterable[str]:
    """What is odd about the time limit that an environment states, whose longest episode had so many steps."""
    for name in LIMIT_NAMES:
        value = env.get_wrapper_attr(name) if env.has_wrapper_attr(name) else None
        if value is not None and whole_steps(value) is None:
            shown = repr(value) if isinstance(value, int | float | str | tuple) else kind(value)
            yield f"{name} is {shown}, which is no number of steps, and is ignored."
    limit = max_episode_steps(env)
    if limit is not None and longest > limit:
        yield (
            f"An episode had {longest} steps, and the smallest time limit that the environment states is {limit}. "
            "Settings that follow from the length of episodes rely on it: correct it, or use "
            "gymnasium.wrappers.TimeLimit."
        )
