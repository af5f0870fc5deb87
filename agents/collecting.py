"""Collecting: an agent acts in its environments, and every step goes into the replay buffer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecTransposeImage, unwrap_vec_normalize
from torch import Tensor

from worldflux.accel.transfers import to_device, to_host
from worldflux.agents.acting import Actor, Memory, PredictState
from worldflux.envs.recording.wrappers import VecEpisodeRecorder
from worldflux.envs.spaces import Array, Arrays
from worldflux.envs.step_counter import EnvWatch
from worldflux.envs.vector import GymnasiumVecEnv, innermost
from worldflux.envs.wrappers import LIMIT_NAMES, max_episode_steps, smallest_limit, stated_frames
from worldflux.errors import TrainingError
from worldflux.replay.buffer import ReplayBuffer


class VecStep(NamedTuple):
    """The actions `[n_envs, ...]` that a `VecEnv` was given, and what its `step` returned."""

    actions: Array
    new_obs: Any
    rewards: Array
    dones: Array
    infos: list[dict[str, Any]]


class Collector:
    """Steps environments with an actor's actions and stores the steps in a buffer.

    A collector lasts from a reset of the environments (`begin`) until the episodes in flight are given up (`close`), as
    they must be once somebody else `moved` the environments. In between it keeps the actor's memory of them.

    Attributes:
        actor: Chooses the actions of the next step.
        recorder: Writes the steps into the buffer.

    Args:
        env: The environments to act in.
        buffer: Receives the steps.
        actor: Chooses the actions.
        replay_context: Store the model's state beside each row.
        predict: Is asked for the actions in place of the actor, where an agent overrides `predict`.
    """

    def __init__(
        self,
        env: VecEnv,
        buffer: ReplayBuffer,
        actor: Actor,
        *,
        replay_context: bool,
        predict: Callable[..., tuple[Array, PredictState | None]] | None = None,
    ) -> None:
        self.env = env
        self.actor = actor
        self.replay_context = replay_context
        self.predict = predict
        self.recorder = VecEpisodeRecorder(buffer, env)
        self._watch = EnvWatch(env)
        self._normalizes = unwrap_vec_normalize(env) is not None
        self._memory: Memory | None = None  # after the last step

    def begin(self, obs: Any) -> None:
        """Begins episodes at `obs`, which the environments showed when they were just reset."""
        self.recorder.begin(obs)
        self._watch.mark()

    def close(self) -> None:
        """Closes the episodes in flight as truncated."""
        self.recorder.interrupt()

    @property
    def obs(self) -> Any:
        """Present observations in the library's form; None if others have their streams. `[n_envs, ...]`"""
        return self.recorder.obs if self.recorder.is_in_order else None

    @property
    def moved(self) -> bool:
        """Whether somebody else has reset or stepped the environments since the last step here."""
        return self._watch.moved

    def step(self, obs: Any, episode_starts: Array, *, at_random: bool, meanwhile: Callable[[], None]) -> VecStep:
        """Acts once in every environment and stores the step.

        Args:
            obs: What the last step or reset of `env` returned. `[n_envs, ...]`
            episode_starts: True where `obs` begins an episode. `[n_envs]`
            at_random: Sample the actions from the action space.
            meanwhile: Called between asking for the step and fetching it; other processes make it in that time.
        """
        with self.actor.turn:
            actions, extras = self._act(obs, episode_starts, at_random)
        env_actions = self.actor.action_codec.to_env(actions)
        self.env.step_async(env_actions)
        try:
            meanwhile()
        finally:  # other processes answer once to each step, whatever happened here
            new_obs, rewards, dones, infos = self.env.step_wait()
        self._watch.mark()
        self.recorder.add_vec_step(actions, new_obs, rewards, dones, infos, extras=extras)
        return VecStep(env_actions, new_obs, rewards, dones, infos)

    def _act(self, obs: Any, episode_starts: Array, at_random: bool) -> tuple[Array, dict[str, Array]]:
        """Chooses an action for every environment.

        Returns:
            Actions in the library's form `[n_envs, A]`, and what is stored beside them, `{name: [n_envs, ...]}`.
        """
        actor, n_envs = self.actor, self.env.num_envs
        before = self._memory if self._memory is not None else actor.start(n_envs)
        seen: Arrays | None = None
        if self.predict is None or at_random:
            seen = self._encoded(obs)
            memory = self._chosen(before, seen, episode_starts, at_random)
        else:
            chosen, state = self.predict(obs, before.arrays(), episode_starts, deterministic=False)
            if not np.isfinite(chosen).all():
                raise TrainingError(f"The agent's own predict chose an action that is not finite: {chosen}.")
            memory = replace(before.with_arrays(state), actions=self._as_tensor(chosen))
        if actor.action_codec.rounds:
            asked = to_host({"actions": memory.actions})["actions"]
            if seen is not None:  # before they are rounded
                actor.check_finite(asked, before, seen)
            memory = replace(memory, actions=self._as_tensor(actor.action_codec.to_env(asked)))
        extras = actor.model.extras_from_state(memory.state) if self.replay_context else {}
        arrays = to_host({**{f"extras/{name}": value for name, value in extras.items()}, "actions": memory.actions})
        if seen is not None:
            actor.check_finite(arrays["actions"], before, seen)
        self._memory = memory
        return arrays["actions"], {name: arrays[f"extras/{name}"] for name in extras}

    def _encoded(self, obs: Any) -> Arrays:
        """Observations as the policy sees them, in the library's form. `[n_envs, ...]`"""
        if self._normalizes:  # the recorder has them as they are stored
            return self.actor.obs_codec.encode_any(obs)[0]
        assert self.recorder.obs is not None
        return self.recorder.obs

    def _chosen(self, before: Memory, seen: Arrays, episode_starts: Array, at_random: bool) -> Memory:
        """The memory with a chosen action for each environment."""
        actor = self.actor
        memory = actor.observe(before, seen, episode_starts, deterministic=False)
        if at_random:
            sampled = np.stack([actor.action_codec.space.sample() for _ in range(self.env.num_envs)])
            return replace(memory, actions=self._as_tensor(sampled))
        return actor.act(memory, episode_starts, deterministic=False)

    def _as_tensor(self, env_actions: Array) -> Tensor:
        """Actions of the environments in the library's form. `[n_envs, A]`"""
        actions = self.actor.action_codec.from_env(env_actions)
        return to_device(torch.from_numpy(actions), self.actor.model.device)


def steps_in_subprocesses(venv: VecEnv) -> bool:
    """Whether a step is made by other processes, so that this one can work between `step_async` and `step_wait`."""
    base = innermost(venv)
    if isinstance(base, GymnasiumVecEnv):
        return isinstance(base.vector_env.unwrapped, AsyncVectorEnv)
    return isinstance(base, SubprocVecEnv)


def stands_for(venv: VecEnv, env: object) -> bool:
    """Whether `venv` is what an agent makes of `env`: itself, or wrapped in what SB3 and worldflux put around it."""
    layer: Any = venv
    while layer is not env:
        if isinstance(layer, VecTransposeImage):
            layer = layer.venv
        elif isinstance(layer, GymnasiumVecEnv):
            layer = layer.vector_env
        elif isinstance(layer, DummyVecEnv) and layer.num_envs == 1:
            layer = layer.envs[0]
        elif isinstance(layer, Monitor):
            layer = layer.env
        else:
            return False
    return True


def max_vec_episode_steps(venv: VecEnv) -> int | None:
    """Steps after which each environment cuts its episodes; None where it does not say.

    Of environments in other processes only the outermost limit of each name is known.
    """
    base = innermost(venv)
    envs = base.vector_env.unwrapped if isinstance(base, GymnasiumVecEnv) else base
    if isinstance(envs, DummyVecEnv | SyncVectorEnv):
        return max_episode_steps(envs.envs[0])
    stated = [_of_the_first(venv, name) for name in LIMIT_NAMES]
    if not isinstance(base, SubprocVecEnv):  # whose processes die of a specification that cannot be pickled
        stated.append(getattr(_of_the_first(venv, "spec"), "max_episode_steps", None))
    return smallest_limit(stated)


def spec_of_the_first(venv: VecEnv) -> Any:
    """Gymnasium's specification of the first environment; None where it has none, or it cannot be asked for."""
    in_processes = isinstance(innermost(venv), SubprocVecEnv)  # which die of one that cannot be pickled
    return None if in_processes else _of_the_first(venv, "spec")


def frames_per_vec_step(venv: VecEnv) -> int:
    """Frames that a step of each environment takes, by the attribute `action_repeat`; 1 where there is none."""
    return stated_frames(_of_the_first(venv, "action_repeat"))


def _of_the_first(venv: VecEnv, name: str) -> Any:
    """An attribute of the first environment; None where there is no such attribute, or it cannot be asked for."""
    try:
        return venv.get_attr(name, indices=[0])[0] if venv.has_attr(name) else None
    except (AttributeError, TypeError, LookupError, NotImplementedError):
        # SB3's wrapper class is also put around objects that are no VecEnv and lack its methods.
        return None
