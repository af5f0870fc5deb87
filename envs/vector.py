"""Gymnasium's vector environments: how they reset, and an adapter that makes them an SB3 `VecEnv`."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.vector.async_vector_env import AsyncState
from gymnasium.wrappers.vector import DictInfoToList
from stable_baselines3.common.env_util import is_wrapped
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn

from worldflux.envs.processes import naming_the_ended, not_sent
from worldflux.envs.spaces import Array
from worldflux.errors import BufferError, ConfigurationError, a_type

ENDED = "worldflux.ended"
"""The key in the info of an episode's last step if the end is reported one step late: "terminated" or "truncated"."""
RESET_STEP = "worldflux.reset_step"
"""The key in the info of the step that reports the end: the environment was only reset."""

_PATIENCE = 10.0
"""The seconds in which an environment is expected to finish a step that was interrupted."""

_NOT_TO_BE_CALLED = ("reset", "step", "close")


def autoreset_mode(envs: VectorEnv[Any, Any, Any]) -> AutoresetMode:
    """The time at which a vector environment resets the environments whose episodes ended.

    Raises:
        ConfigurationError: If it does not say, or its steps cannot be followed.
    """
    base = envs.unwrapped
    given = envs.metadata.get("autoreset_mode")
    try:
        mode = AutoresetMode(given)
    except ValueError:
        raise ConfigurationError(
            f"{type(base).__name__} has metadata['autoreset_mode'] {given!r}, expected one of Gymnasium's "
            "AutoresetMode: without it, the meaning of a step after the end of an episode is unknown."
        ) from None
    layer: Any = envs
    while layer is not base:
        if isinstance(layer, DictInfoToList):
            raise ConfigurationError(
                "DictInfoToList turns infos into a form in which last observations cannot be found. Leave it out, or "
                "put it outside of the recorder."
            )
        layer = layer.env
    batch = getattr(base, "batch_size", envs.num_envs)
    if batch != envs.num_envs:
        raise ConfigurationError(
            f"{type(base).__name__} steps {batch} of its {envs.num_envs} environments at a time, expected all of them. "
            "Leave batch_size out."
        )
    if isinstance(base, AsyncVectorEnv) and not base.shared_memory and mode is AutoresetMode.NEXT_STEP:
        # Its workers forget to clear their mark (gymnasium 1.4, `_async_worker`), and the step after such a reset
        # resets again instead of stepping.
        raise ConfigurationError(
            "An AsyncVectorEnv with shared_memory=False that resets on the next step does so once more after reset() "
            "was called at an episode's end. Use shared_memory=True or autoreset_mode='SameStep'."
        )
    return mode


def innermost(venv: VecEnv) -> Any:
    """The object inside SB3's wrappers, which may be no `VecEnv`: a game with many players, a pool of environments."""
    while isinstance(venv, VecEnvWrapper):
        venv = venv.venv
    return venv


class JoinedVecEnv(VecEnv):
    """Base class of a `VecEnv` that steps the environments of several others.

    Attributes:
        members: The others.
    """

    members: list[VecEnv]

    def has_attr(self, attr_name: str) -> bool:
        """Whether all environments have an attribute. Processes would die of being asked for one that is missing."""
        return all(member.has_attr(attr_name) for member in self.members)


def parts_of(venv: VecEnv) -> list[VecEnv]:
    """The members of a `VecEnv` that joins several, otherwise the `VecEnv` itself."""
    base = innermost(venv)
    return base.members if isinstance(base, JoinedVecEnv) else [venv]


def base_of(envs: VecEnv | VectorEnv[Any, Any, Any]) -> Any:
    """The innermost object that steps environments: an SB3 `VecEnv`, a Gymnasium vector environment, or a pool."""
    base = envs if isinstance(envs, VectorEnv) else innermost(envs)
    if isinstance(base, GymnasiumVecEnv):
        base = base.vector_env
    return base.unwrapped if isinstance(base, VectorEnv) else base


def seed_envs(venv: VecEnv, seed: int) -> None:
    """Seeds environments for their next reset; warns if they cannot be seeded."""
    try:
        venv.seed(seed)
    except AttributeError as error:
        base = type(innermost(venv)).__name__
        warnings.warn(
            f"{base} cannot be seeded ({error}). Seed the environments where they are made.", UserWarning, stacklevel=3
        )


def row_of(obs: Any, env: int) -> Any:
    """The observation of one environment in a batch, which may consist of dictionaries and tuples."""
    if isinstance(obs, dict):
        return {key: row_of(part, env) for key, part in obs.items()}
    if isinstance(obs, tuple):
        return tuple(row_of(part, env) for part in obs)
    return obs[env]


def final_obs_in(infos: Mapping[str, Any], env: int) -> Any:
    """The last observation of an environment that was reset in the step of these infos.

    Raises:
        BufferError: If the infos do not hold it.
    """
    finals = infos.get("final_obs")
    final = None if finals is None else row_of(finals, env)
    if final is None:
        raise BufferError(
            f"Environment {env} ended an episode without a 'final_obs' in the infos. Every vector environment that "
            "resets in the same step puts the last observations there."
        )
    return final


def split_infos(infos: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    """The infos of a vector environment as a dictionary for each environment, with the entries that it has."""
    split: list[dict[str, Any]] = [{} for _ in range(count)]
    for key, values in infos.items():
        if key == "final_obs" or (key.startswith("_") and key[1:] in infos):
            continue
        mask = infos.get(f"_{key}")
        if isinstance(values, Mapping):
            values = split_infos(values, count)
        # Some vector environments add entries that hold for all environments.
        shared = not isinstance(values, list | tuple | np.ndarray) or len(values) != count
        for env in range(count) if mask is None else np.flatnonzero(mask):
            split[env][key] = values if shared else values[env]
    return split


def settle(venv: VecEnv) -> None:
    """Discards the answers of other processes that nobody fetched because a step was interrupted.

    They would be taken for the answers to the next questions. How many are on their way cannot be seen, so each process
    is asked something whose answer looks like no other one. Where no step was interrupted, nothing is done.

    Args:
        venv: The innermost `VecEnv`.
    """
    if isinstance(venv, JoinedVecEnv):
        for member in venv.members:
            settle(innermost(member))
    elif isinstance(venv, SubprocVecEnv) and venv.waiting:
        _clear(venv.remotes, ("get_spaces", None), lambda answer: isinstance(answer[-1], spaces.Space))
        venv.waiting = False
    elif isinstance(venv, GymnasiumVecEnv) and isinstance(base := venv.vector_env.unwrapped, AsyncVectorEnv):
        if base._state is not AsyncState.DEFAULT and not venv.is_stepping:
            question: tuple[str, Any] = ("_call", ("has_wrapper_attr", ["reset"], {}))
            pipes = [pipe for pipe in base.parent_pipes if pipe is not None]  # None where a process has failed
            _clear(pipes, question, lambda answer: isinstance(answer[0], bool))
            base._state = AsyncState.DEFAULT


def _clear(pipes: Sequence[Any], question: tuple[str, Any], is_answer: Callable[[Any], bool]) -> None:
    try:
        for pipe in pipes:
            pipe.send(question)
        for pipe in pipes:
            while pipe.poll(_PATIENCE) and not is_answer(pipe.recv()):
                pass
    except (EOFError, OSError):
        pass  # that process has ended; the next call raises an error


class GymnasiumVecEnv(VecEnv):
    """A Gymnasium vector environment as an SB3 `VecEnv`, for SB3's algorithms and `WorldFluxAgent`.

    Where it resets on the next step, an episode's end is reported one step late, because SB3 wants the next episode's
    first observation with it: the last step gives `done=False`, the last observation and the last reward; the step
    after it, in which the environment ignores the action, gives `done=True`, the first observation, a reward of 0 and
    the last observation as `terminal_observation`. Marks in the infos (`ENDED`, `RESET_STEP`) let recorders store the
    episode as it was. Such an environment loses one step for each episode; `autoreset_mode="SameStep"` does not.

    At an episode's end the info holds `episode`, as SB3's `Monitor` has it, unless the environment puts its own there.

    Attributes:
        vector_env: The Gymnasium vector environment.

    Args:
        envs: The vector environment, in any autoreset mode. Nobody else may step it meanwhile.

    Raises:
        ConfigurationError: If it is something else, or does not say how it resets.
    """

    def __init__(self, envs: VectorEnv[Any, Any, Any]) -> None:
        if not isinstance(envs, VectorEnv):
            raise ConfigurationError(
                f"envs is {a_type(envs)}, expected a Gymnasium vector environment. A VecEnv of SB3 and a "
                "single Gymnasium environment are used as they are."
            )
        self.vector_env = envs
        self.autoreset_mode = autoreset_mode(envs)
        super().__init__(envs.num_envs, envs.single_observation_space, envs.single_action_space)
        base = envs.unwrapped
        self._copies = getattr(base, "copy", None) is True  # otherwise the next step may write into the same arrays
        self._is_async = envs is base and isinstance(base, AsyncVectorEnv)
        self._processes = dict(enumerate(base.processes)) if isinstance(base, AsyncVectorEnv) else {}
        self._actions: Any = None
        self._stepping = False
        self._late: dict[int, dict[str, Any]] = {}  # infos of ended episodes that the next step reports
        self._returns, self._lengths = np.zeros(self.num_envs), np.zeros(self.num_envs, np.int64)
        self._started = time.time()

    # --- moving

    @property
    def is_stepping(self) -> bool:
        """Whether a step was asked for and not fetched."""
        return self._stepping

    def reset(self) -> VecEnvObs:
        """Resets all environments, with the seeds and options that were set for it."""
        if self._stepping:
            self._finish_step()
        settle(self)
        if any(options != self._options[0] for options in self._options):
            raise ConfigurationError(
                "The options differ between environments, but a Gymnasium vector environment takes the same for all."
            )
        # Gymnasium counts up from the first environment's seed as SB3 does.
        with naming_the_ended(self._processes):
            obs, infos = self.vector_env.reset(seed=self._seeds[0], options=self._options[0] or None)
        self.reset_infos = split_infos(infos, self.num_envs)
        self._reset_seeds()
        self._reset_options()
        self._late.clear()
        self._returns[:] = self._lengths[:] = 0
        return self._own(obs)

    def step_async(self, actions: Array) -> None:
        """Starts a step of all environments."""
        if self._is_async:
            with naming_the_ended(self._processes):
                self.vector_env.step_async(actions)  # type: ignore[attr-defined]
        self._actions, self._stepping = actions, True

    def step_wait(self) -> VecEnvStepReturn:
        """Waits for the step."""
        obs, rewards, terminated, truncated, vector_infos = self._finish_step()
        rewards = np.array(rewards, dtype=np.float32)
        terminated, truncated = np.asarray(terminated), np.asarray(truncated)
        ended = terminated | truncated
        infos = split_infos(vector_infos, self.num_envs)
        self._returns += rewards
        self._lengths += 1
        late, self._late = self._late, {}
        if late:
            self._lengths[list(late)] -= 1  # a reset is no step
        dones = ended
        if late or ended.any():
            ends = {int(env): bool(truncated[env] and not terminated[env]) for env in np.flatnonzero(ended)}
            if self.autoreset_mode is AutoresetMode.SAME_STEP:
                self._report_resets(ends, vector_infos, infos)
            elif self.autoreset_mode is AutoresetMode.DISABLED:
                obs = self._reset_ended(ends, obs, infos)
            else:
                dones = np.zeros(self.num_envs, dtype=bool)
                dones[list(late)] = True
                self._report_late(ends, late, obs, infos)
        return self._own(obs), rewards, dones, infos

    def close(self) -> None:
        """Closes the vector environment."""
        self.vector_env.close()

    def _finish_step(self) -> tuple[Any, Array, Array, Array, dict[str, Any]]:
        self._stepping = False
        with naming_the_ended(self._processes):
            if self._is_async:
                return self.vector_env.step_wait()  # type: ignore[attr-defined]
            return self.vector_env.step(self._actions)

    def _report_resets(self, ends: dict[int, bool], vector_infos: dict[str, Any], infos: list[dict[str, Any]]) -> None:
        """Puts into the infos what SB3 expects from environments that were reset in this step."""
        for env, cut in ends.items():
            self.reset_infos[env] = info = infos[env]
            infos[env] = dict(info.pop("final_info", info))
            self._report_end(infos[env], env, cut, final_obs_in(vector_infos, env))

    def _reset_ended(self, ends: dict[int, bool], obs: Any, infos: list[dict[str, Any]]) -> Any:
        """Resets the environments whose episodes ended, and returns the observations after that."""
        mask = np.zeros(self.num_envs, dtype=bool)
        for env, cut in ends.items():
            mask[env] = True
            self._report_end(infos[env], env, cut, row_of(obs, env))
        obs, vector_infos = self.vector_env.reset(options={"reset_mask": mask})
        reset_infos = split_infos(vector_infos, self.num_envs)
        for env in ends:
            self.reset_infos[env] = reset_infos[env]
        return obs

    def _report_late(
        self, ends: dict[int, bool], late: dict[int, dict[str, Any]], obs: Any, infos: list[dict[str, Any]]
    ) -> None:
        """Reports the ends of the previous step, and keeps those of this one for the next."""
        for env, info in late.items():
            self.reset_infos[env], infos[env] = infos[env], info
        for env, cut in ends.items():
            self._late[env] = {**infos[env], RESET_STEP: True}
            self._report_end(self._late[env], env, cut, row_of(obs, env))
            # SB3 counts every "episode" that it sees.
            infos[env].pop("episode", None)
            infos[env][ENDED] = "truncated" if cut else "terminated"

    def _report_end(self, info: dict[str, Any], env: int, cut: bool, final_obs: Any) -> None:
        info["terminal_observation"] = deepcopy(final_obs)
        info["TimeLimit.truncated"] = cut
        seconds = round(time.time() - self._started, 6)
        own = {"r": round(float(self._returns[env]), 6), "l": int(self._lengths[env]), "t": seconds}
        info.setdefault("episode", own)
        self._returns[env] = self._lengths[env] = 0

    def _own(self, obs: Any) -> Any:
        return obs if self._copies else deepcopy(obs)

    # --- the environments in it

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """An attribute of each environment, or of the vector environment where single ones cannot be reached."""
        base, chosen = self.vector_env.unwrapped, list(self._get_indices(indices))
        if isinstance(base, SyncVectorEnv):
            return [base.envs[env].get_wrapper_attr(attr_name) for env in chosen]
        if isinstance(base, AsyncVectorEnv):
            # A worker that does not find an attribute ends.
            if not all(base.call("has_wrapper_attr", attr_name)):
                raise AttributeError(f"The environments have no attribute {attr_name!r}.")
            try:
                values = base.call("get_wrapper_attr", attr_name)
            except Exception as error:
                raise not_sent(attr_name) from error
            return [values[env] for env in chosen]
        for layer in self._layers():
            if hasattr(layer, attr_name):
                return [getattr(layer, attr_name)] * len(chosen)
        raise AttributeError(f"{base!r} has no attribute {attr_name!r}.")

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Sets an attribute of environments."""
        base, chosen = self.vector_env.unwrapped, list(self._get_indices(indices))
        if isinstance(base, SyncVectorEnv):
            for env in chosen:
                base.envs[env].set_wrapper_attr(attr_name, value)
        elif isinstance(base, AsyncVectorEnv):
            every = set(chosen) == set(range(self.num_envs))
            values = [value] * self.num_envs if every else self.get_attr(attr_name)
            for env in chosen:
                values[env] = value
            base.set_attr(attr_name, values)
        else:
            raise self._unreachable(f"set {attr_name!r}")

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **kwargs: Any
    ) -> list[Any]:
        """Calls a method of environments.

        Raises:
            ConfigurationError: If they cannot be reached; in processes, also if not all of them are called, or if the
                method is `reset`, `step` or `close`.
        """
        base, chosen = self.vector_env.unwrapped, list(self._get_indices(indices))
        if isinstance(base, SyncVectorEnv):
            return [base.envs[env].get_wrapper_attr(method_name)(*method_args, **kwargs) for env in chosen]
        if not isinstance(base, AsyncVectorEnv):
            raise self._unreachable(f"call {method_name!r}")
        if chosen != list(range(self.num_envs)) or method_name in _NOT_TO_BE_CALLED:
            raise ConfigurationError(
                f"AsyncVectorEnv cannot call {method_name!r} of environments {chosen}: it calls methods of all "
                f"{self.num_envs}, and none of {', '.join(_NOT_TO_BE_CALLED)}."
            )
        if not all(base.call("has_wrapper_attr", method_name)):
            raise AttributeError(f"The environments have no method {method_name!r}.")
        return list(base.call(method_name, *method_args, **kwargs))

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper[Any, Any, Any, Any]], indices: Any = None) -> list[bool]:
        """Whether environments have a wrapper. They count as having `Monitor`, because its reports are in the infos."""
        base, chosen = self.vector_env.unwrapped, list(self._get_indices(indices))
        if wrapper_class is Monitor:
            return [True] * len(chosen)
        if isinstance(base, SyncVectorEnv):
            return [is_wrapped(base.envs[env], wrapper_class) for env in chosen]
        return [False] * len(chosen)

    def get_images(self) -> Sequence[Array | None]:
        """The picture of each environment, if it was made for `rgb_array`."""
        if self.render_mode != "rgb_array":
            warnings.warn(f"The render mode is {self.render_mode}, but images need 'rgb_array'.", stacklevel=2)
            return [None] * self.num_envs
        images: Any = self.vector_env.render()
        return [None] * self.num_envs if images is None else list(images)

    def _layers(self) -> Iterator[Any]:
        layer: Any = self.vector_env
        while layer is not None:
            yield layer
            layer = getattr(layer, "env", None)

    def _unreachable(self, what: str) -> ConfigurationError:
        return ConfigurationError(
            f"{type(self.vector_env.unwrapped).__name__} offers no way to {what} in its single environments. "
            "SyncVectorEnv and AsyncVectorEnv do."
        )
