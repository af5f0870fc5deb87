"""Collecting: an agent acts in its environments, and every step goes into the replay buffer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecTransposeImage, unwrap_vec_normalize
from torch import Tensor

from worldflux.accel.transfers import to_device, to_host
from worldflux.agents.acting import Actor, Memory, PredictState
from worldflux.config import WorldModelConfig
from worldflux.envs.make import as_env
from worldflux.envs.processes import not_sent
from worldflux.envs.recording.wrappers import VecEpisodeRecorder
from worldflux.envs.spaces import Array, Arrays
from worldflux.envs.step_counter import EnvWatch
from worldflux.envs.tasks import TaskVecEnv
from worldflux.envs.vector import GymnasiumVecEnv, JoinedVecEnv, innermost, parts_of
from worldflux.envs.wrappers import LIMIT_NAMES, max_episode_steps, smallest_limit, stated_frames
from worldflux.errors import ConfigurationError, ShapeMismatchError, TrainingError
from worldflux.factory import find_preset
from worldflux.hub.client import model_path
from worldflux.models.base import WorldModel
from worldflux.nn.distributions import one_hots
from worldflux.replay.buffer import ReplayBuffer
from worldflux.validation import TASK_KEY


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
        self._tasks: Array | None = None  # numbers of the environments' tasks, where the model has several

    def begin(self, obs: Any) -> None:
        """Begins episodes at `obs`, which the environments showed when they were just reset."""
        self.recorder.begin(obs)
        self._watch.mark()
        if self.actor.has_tasks:
            self._tasks = np.array([self._task_of(env) for env in range(self.env.num_envs)])

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
        if self._tasks is not None and dones.any():
            for env in np.flatnonzero(dones).tolist():
                if "episode" in infos[env]:  # from which the log is made
                    infos[env]["episode"][TASK_KEY] = int(self._tasks[env])
                self._tasks[env] = self._task_of(env)
        return VecStep(env_actions, new_obs, rewards, dones, infos)

    def _act(self, obs: Any, episode_starts: Array, at_random: bool) -> tuple[Array, dict[str, Array]]:
        """Chooses an action for every environment.

        Returns:
            Actions in the library's form `[n_envs, A]`, and what is stored beside them, `{name: [n_envs, ...]}`.
        """
        actor, n_envs = self.actor, self.env.num_envs
        before = (self._memory if self._memory is not None else actor.start(n_envs)).with_tasks(self._tasks)
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
        extras = actor.model.extras_from_state(memory.state) if self.replay_context or actor.has_tasks else {}
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
            actions = self._as_tensor(sampled)
            if actor.has_tasks:
                mask: Tensor = actor.model.action_mask(memory.state)  # type: ignore[operator]
                if classes := actor.action_codec.action_classes:
                    # Any other class takes the place of one that the task does not have.
                    actions = one_hots((2.0 * actions + 1.0 + torch.rand_like(actions)) * mask, classes)
                actions = actions * mask
            return replace(memory, actions=actions)
        return actor.act(memory, episode_starts, deterministic=False)

    def _task_of(self, env: int) -> int:
        """The number of the task that an environment has named in the info of its last reset."""
        infos = getattr(innermost(self.env), "reset_infos", [{}] * self.env.num_envs)
        if TASK_KEY not in infos[env]:
            raise ConfigurationError(
                f"The model has several tasks, and environment {env} does not say which one it is. Pass the environment"
                " of each task by its name, WorldFluxAgent(model, {'walk': env, ...}), or let reset return the name or "
                "number of its task in the info: info['task']."
            )
        return int(self.actor.task_numbers(infos[env][TASK_KEY], 1)[0])

    def _as_tensor(self, env_actions: Array) -> Tensor:
        """Actions of the environments in the library's form. `[n_envs, A]`"""
        actions = self.actor.action_codec.from_env(env_actions)
        return to_device(torch.from_numpy(actions), self.actor.model.device)


def steps_in_subprocesses(venv: VecEnv) -> bool:
    """Whether a step is made by other processes, so that this one can work between `step_async` and `step_wait`."""
    bases = [innermost(part) for part in parts_of(venv)]
    return any(
        isinstance(base.vector_env.unwrapped, AsyncVectorEnv)
        if isinstance(base, GymnasiumVecEnv)
        else isinstance(base, SubprocVecEnv)
        for base in bases
    )


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
    """Steps after which each environment cuts its episodes, of several tasks the most; None where it does not say.

    Of environments in other processes only the outermost limit of each name is known.
    """
    base = innermost(venv)
    if isinstance(base, JoinedVecEnv):
        return max((steps for steps in map(max_vec_episode_steps, base.members) if steps is not None), default=None)
    envs = base.vector_env.unwrapped if isinstance(base, GymnasiumVecEnv) else base
    if isinstance(envs, DummyVecEnv | SyncVectorEnv):
        return max_episode_steps(envs.envs[0])
    stated = [_of_the_first(venv, name) for name in LIMIT_NAMES]
    return smallest_limit([*stated, getattr(spec_of_the_first(venv), "max_episode_steps", None)])


def spec_of_the_first(venv: VecEnv) -> Any:
    """Gymnasium's specification of the first environment; None where it has none, or it cannot be asked for."""
    if steps_in_subprocesses(venv):  # processes die of one that cannot be pickled
        return getattr(getattr(innermost(venv), "vector_env", None), "spec", None)
    return _of_the_first(venv, "spec")


def env_of(env: Any, model: Any = None, *, like: Any = None) -> Any:
    """`as_env` of what a user has passed, where tasks are padded to the width of a model that exists.

    Args:
        env: The environment.
        model: As for `WorldFluxAgent`.
        like: What has the `observation_space` and `action_space` of an agent that exists, in place of `model`.

    Raises:
        ConfigurationError: If it is no environment, or of tasks that the agent does not have.
        ShapeMismatchError: If a task is wider than the model.
    """
    made = as_env(env)
    if not isinstance(made, TaskVecEnv):
        return made
    if like is not None:
        made.fit(like.observation_space, like.action_space)
        if isinstance(exists := getattr(like, "model", None), WorldModel):
            check_tasks(exists, made)
    elif not (isinstance(model, str) and find_preset(model) is not None):
        config = model.config if isinstance(model, WorldModel) else WorldModelConfig.load(model_path("model", model))
        if isinstance(config.obs_shape, tuple):  # of dictionaries, nothing is padded
            actions = spaces.Box(-1.0, 1.0, (config.action_dim,))
            made.fit(spaces.Box(-np.inf, np.inf, config.obs_shape), actions)
    return made


def check_tasks(model: WorldModel, env: VecEnv | None) -> None:
    """Checks that a model has the tasks of environments that are given by their names.

    Raises:
        ConfigurationError: If it has not.
        ShapeMismatchError: If a task has more action dimensions than the model uses for it.
    """
    base = None if env is None else innermost(env)
    if not isinstance(base, TaskVecEnv):
        return
    config: Any = model.config
    if getattr(config, "task_names", ()) or getattr(config, "num_tasks", 1) > 1:
        for name, given in zip(base.names, base.action_dims, strict=True):
            used = config.used_action_dims[config.task_number(name)]
            if given > used:
                raise ShapeMismatchError(
                    f"The environments of the task '{name}' have {given} action dimensions, and the model uses {used} "
                    "for it (task_action_dims). Add it as another task: model.with_task(name, like=...)."
                )
    elif len(base.names) > 1:
        raise ConfigurationError(
            f"The environments are of the tasks {', '.join(base.names)}, and the model has one. Pass a preset of "
            "TD-MPC2, or a model with num_tasks and task_names."
        )


def policy_for(agent: Any, venv: VecEnv) -> Any:
    """The agent, in the tasks that environments have by their names, where its model has several."""
    base = innermost(venv)
    return agent.for_task(base.tasks) if isinstance(base, TaskVecEnv) and agent.actor.has_tasks else agent


def frames_per_vec_step(venv: VecEnv) -> int:
    """Frames that a step of each environment takes, by the attribute `action_repeat`; 1 where there is none."""
    return stated_frames(_of_the_first(venv, "action_repeat"))


def _of_the_first(venv: VecEnv, name: str) -> Any:
    """An attribute of the first environment; None where there is no such attribute, or it cannot be asked for."""
    try:
        if not venv.has_attr(name):  # which fails where a process has ended before
            return None
        try:
            return venv.get_attr(name, indices=[0])[0]
        except (EOFError, ConnectionError) as error:
            raise not_sent(name) from error
    except (AttributeError, TypeError, LookupError, NotImplementedError):
        # SB3's wrapper class is also put around objects that are no VecEnv and lack its methods.
        return None
