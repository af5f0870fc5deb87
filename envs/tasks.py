"""Environments of several tasks as one `VecEnv`, in which each environment names its task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, unwrap_vec_normalize
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn

from worldflux.envs.spaces import ActionCodec, Array, ObservationCodec
from worldflux.envs.vector import GymnasiumVecEnv, JoinedVecEnv, innermost
from worldflux.errors import ConfigurationError, ShapeMismatchError
from worldflux.validation import TASK_KEY, is_vector


class TaskVecEnv(JoinedVecEnv):
    """The environments of several tasks as one `VecEnv`, in the order in which they are given.

        WorldFluxAgent("tdmpc2:5m", {"walker-walk": "dmc/walker-walk", "cartpole-swingup": "dmc/cartpole-swingup"})

    makes one. Infos hold the name of the task under `task`, those of resets (`reset_infos`) as well.

    Observations that are vectors are padded with zeros to the width of the longest. Others, such as images, are the
    same in all tasks. Actions lie in [-1, 1] and are as wide as the widest; each environment takes the first ones, in
    its own units.

    Attributes:
        members: The `VecEnv` of each task.
        names: Name of each task.
        tasks: Name of the task of each environment. `[num_envs]`
        action_dims: Number of action dimensions of each task.

    Args:
        envs: An environment or a `VecEnv` for each name of a task.

    Raises:
        ConfigurationError: If a space is not supported, or observations cannot be padded to one width.
    """

    def __init__(self, envs: Mapping[str, gym.Env[Any, Any] | VecEnv]) -> None:
        if not envs or not all(isinstance(name, str) and name for name in envs):
            raise ConfigurationError(f"The tasks are {list(envs)}, expected a name for each environment, at least one.")
        self.names = tuple(envs)
        self.members = [env if isinstance(env, VecEnv) else _single(env) for env in envs.values()]
        named = list(zip(self.names, self.members, strict=True))
        self.tasks = [name for name, member in named for _ in range(member.num_envs)]
        self._places = [(number, env) for number, member in enumerate(self.members) for env in range(member.num_envs)]
        ends = np.cumsum([member.num_envs for member in self.members]).tolist()
        self._rows = [slice(end - member.num_envs, end) for end, member in zip(ends, self.members, strict=True)]
        for name, member in named:
            base = innermost(member)
            if isinstance(base, GymnasiumVecEnv) and base.autoreset_mode is AutoresetMode.NEXT_STEP:
                raise ConfigurationError(
                    f"The vector environment of the task '{name}' resets on the next step, expected a reset in the "
                    "same step next to those of other tasks. Make it with autoreset_mode='SameStep'."
                )
            if unwrap_vec_normalize(member) is not None:
                raise ConfigurationError(
                    f"The environments of the task '{name}' are in a VecNormalize, whose observations and rewards the "
                    "replay buffer would keep. Wrap the environments of all tasks together: "
                    "VecNormalize(TaskVecEnv({...}))."
                )
        self._obs = [ObservationCodec(member.observation_space) for member in self.members]
        self._actions = [ActionCodec(member.action_space) for member in self.members]
        for name, actions in zip(self.names, self._actions, strict=True):
            if actions.action_type != "continuous" or actions.rounds:
                raise ConfigurationError(
                    f"The task '{name}' has the action space {actions.space}, expected a Box of floats: the actions of "
                    "several tasks are padded to one width. Learn tasks with other actions one by one."
                )
        self.action_dims = tuple(codec.action_dim for codec in self._actions)
        self._pads = all(is_vector(codec.obs_shape) for codec in self._obs)
        if not self._pads:
            for name, codec in zip(self.names, self._obs, strict=True):
                if codec.space != self._obs[0].space:
                    raise ConfigurationError(
                        f"The task '{name}' has observations {codec.space}, and '{self.names[0]}' has "
                        f"{self._obs[0].space}. Only vectors are padded: images and dictionaries have to be the same "
                        "in all tasks. worldflux.envs.ResizeImages gives images one size."
                    )
        self._width = max(map(_length, self._obs)) if self._pads else 0
        super().__init__(len(self.tasks), self._observation_space(), _actions_of(max(self.action_dims)))

    def fit(self, observation_space: spaces.Space[Any], action_space: spaces.Space[Any]) -> None:
        """Pads observations and actions to the width of these spaces, which are those of a model that exists.

        Raises:
            ShapeMismatchError: If they are narrower than those of the tasks.
        """
        if not isinstance(action_space, spaces.Box) or action_space.shape[0] < max(self.action_dims):
            raise ShapeMismatchError(
                f"The tasks have up to {max(self.action_dims)} action dimensions, and the model was made for "
                f"{action_space}. Make a model with as many."
            )
        self.action_space = _actions_of(action_space.shape[0])
        shape: Any = observation_space.shape
        if self._pads and shape is not None and len(shape) == 1:
            if shape[0] < self._width:
                raise ShapeMismatchError(
                    f"The tasks have observations of up to {self._width} numbers, and the model was made for "
                    f"{shape[0]}. Make a model with as many."
                )
            self._width = shape[0]
            self.observation_space = self._observation_space()

    def parts(self) -> dict[str, TaskVecEnv]:
        """The environments of each task by themselves, in the same form, by the task's name."""
        parts = {name: TaskVecEnv({name: member}) for name, member in zip(self.names, self.members, strict=True)}
        for part in parts.values():
            part.fit(self.observation_space, self.action_space)
        return parts

    @property
    def action_masks(self) -> Array:
        """1 where an environment has an action dimension, else 0. `[num_envs, A]`"""
        used = np.repeat(self.action_dims, [member.num_envs for member in self.members])
        return (np.arange(self.action_space.shape[0]) < used[:, None]).astype(np.float32)  # type: ignore[index]

    def _observation_space(self) -> spaces.Space[Any]:
        if not self._pads:
            return self.members[0].observation_space
        return spaces.Box(-np.inf, np.inf, (self._width,), np.float32)

    # --- moving

    def reset(self) -> VecEnvObs:
        """Resets all environments, with the seeds and options that were set for it."""
        for rows, member in zip(self._rows, self.members, strict=True):
            member.set_options(self._options[rows])
        obs = [member.reset() for member in self.members]
        self._reset_seeds()
        self._reset_options()
        self._read_reset_infos()
        return self._joined(obs)

    def step_async(self, actions: Array) -> None:
        """Starts a step of all environments with actions in [-1, 1]. `[num_envs, A]`"""
        for rows, member, codec in zip(self._rows, self.members, self._actions, strict=True):
            member.step_async(codec.to_env(np.asarray(actions)[rows, : codec.action_dim]))

    def step_wait(self) -> VecEnvStepReturn:
        """Waits for the step."""
        obs, rewards, dones, infos = zip(*[member.step_wait() for member in self.members], strict=True)
        self._read_reset_infos()
        named = []
        for name, codec, of_member in zip(self.names, self._obs, infos, strict=True):
            for info in of_member:
                if self._pads and "terminal_observation" in info:
                    info["terminal_observation"] = self._padded(codec, info["terminal_observation"])[0]
                named.append({**info, TASK_KEY: name})
        return self._joined(obs), np.concatenate(rewards), np.concatenate(dones), named

    def _read_reset_infos(self) -> None:
        infos = [info for member in self.members for info in innermost(member).reset_infos]
        self.reset_infos = [{**info, TASK_KEY: name} for info, name in zip(infos, self.tasks, strict=True)]

    def _joined(self, obs: Sequence[Any]) -> Any:
        """The observations of all environments in one array, or one for each key. `[num_envs, ...]`"""
        if self._pads:
            return np.concatenate([self._padded(codec, part) for codec, part in zip(self._obs, obs, strict=True)])
        if isinstance(obs[0], dict):
            return {key: np.concatenate([part[key] for part in obs]) for key in obs[0]}
        return np.concatenate(obs)

    def _padded(self, codec: ObservationCodec, obs: Any) -> Array:
        vectors: Any = codec.encode_any(obs)[0]
        return np.pad(vectors, ((0, 0), (0, self._width - _length(codec))))

    def close(self) -> None:
        """Closes all environments."""
        for member in self.members:
            member.close()

    def seed(self, seed: int | None = None) -> Sequence[int | None]:
        """Seeds the environments for their next reset; those of each task count up from the last one."""
        seeds = super().seed(seed)
        for rows, member in zip(self._rows, self.members, strict=True):
            member.seed(seeds[rows.start])
        return seeds

    # --- the environments in it

    def has_attr(self, attr_name: str) -> bool:
        """Whether all environments have an attribute."""
        return all(member.has_attr(attr_name) for member in self.members)

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """An attribute of each environment."""
        found = self._asked(indices, lambda member, chosen: member.get_attr(attr_name, chosen))
        # SB3 expects the same mode everywhere.
        return [None] * len(found) if attr_name == "render_mode" and len(set(found)) > 1 else found

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Sets an attribute of environments."""
        self._asked(indices, lambda member, chosen: member.set_attr(attr_name, value, chosen) or [])

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **kwargs: Any
    ) -> list[Any]:
        """Calls a method of environments."""
        return self._asked(
            indices, lambda member, chosen: member.env_method(method_name, *method_args, indices=chosen, **kwargs)
        )

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper[Any, Any, Any, Any]], indices: Any = None) -> list[bool]:
        """Whether environments have a wrapper."""
        return self._asked(indices, lambda member, chosen: member.env_is_wrapped(wrapper_class, chosen))

    def get_images(self) -> Sequence[Array | None]:
        """The picture of each environment, if it was made for `rgb_array`."""
        return [image for member in self.members for image in member.get_images()]

    def _asked(self, indices: VecEnvIndices, ask: Callable[[VecEnv, list[int]], Sequence[Any]]) -> list[Any]:
        """What members answer for their environments with these indices, in the order of the indices."""
        found: list[Any] = []
        places = [self._places[index] for index in self._get_indices(indices)]
        for number, chosen in groupby(places, lambda place: place[0]):
            found += ask(self.members[number], [env for _, env in chosen])
        return found


def _single(env: gym.Env[Any, Any]) -> VecEnv:
    return DummyVecEnv([lambda: Monitor(env)])


def _length(codec: ObservationCodec) -> int:
    shape = codec.obs_shape
    return shape[0] if isinstance(shape, tuple) else 0


def _actions_of(width: int) -> spaces.Box:
    return spaces.Box(-1.0, 1.0, (width,), np.float32)
