"""Collecting: an agent acts in its environments, and every step goes into the replay buffer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_normalize
from torch import Tensor

from worldflux.agents.acting import Acting, Actor, Memory, recalled, remembered
from worldflux.envs.record import VecEpisodeRecorder
from worldflux.envs.spaces import Array, Arrays
from worldflux.envs.watch import EnvWatch
from worldflux.errors import TrainingError
from worldflux.training.replay import ReplayBuffer
from worldflux.training.transfers import to_device, to_host


class VecStep(NamedTuple):
    """The actions `[n_envs, ...]` that a `VecEnv` was given, and what its `step` returned."""

    actions: Array
    new_obs: Any
    rewards: Array
    dones: Array
    infos: list[dict[str, Any]]


class Collector:
    """Steps environments with an actor's actions and stores what came of it.

    One lasts from a reset of the environments (`begin`) until the episodes in flight are given up (`close`), as they
    must be once somebody else `moved` the environments. In between it remembers what the model made of them.

    Attributes:
        recorder: Writes the steps into the buffer.

    Args:
        env: To act in.
        buffer: Receives the steps.
        actor: Chooses the actions.
        replay_context: Store the model's state beside each row.
        predict: Asked for the actions in place of the actor; the `predict` that somebody gave the agent.
    """

    def __init__(
        self,
        env: VecEnv,
        buffer: ReplayBuffer,
        actor: Actor,
        *,
        replay_context: bool,
        predict: Callable[..., tuple[Array, Memory | None]] | None = None,
    ) -> None:
        self.env = env
        self.actor = actor
        self.replay_context = replay_context
        self.predict = predict
        self.recorder = VecEpisodeRecorder(buffer, env)
        self._watch = EnvWatch(env)
        self._normalizes = unwrap_vec_normalize(env) is not None
        self._acting: Acting | None = None  # of the last step

    def begin(self, obs: Any) -> None:
        """The environments were just reset, to `obs`."""
        self.recorder.begin(obs)
        self._watch.mark()

    def close(self) -> None:
        """Closes the episodes in flight as truncated."""
        self.recorder.interrupt()

    @property
    def obs(self) -> Any:
        """What the environments show now, in the library's form; None if others have their streams. `[n_envs, ...]`"""
        return self.recorder.obs if self.recorder.is_in_order else None

    @property
    def moved(self) -> bool:
        """Whether somebody else has reset or stepped the environments since the last step here."""
        return self._watch.moved

    def step(self, obs: Any, episode_starts: Array, *, at_random: bool, meanwhile: Callable[[], None]) -> VecStep:
        """Acts once in every environment and stores what came of it.

        Args:
            obs: What the last step or reset of `env` returned. `[n_envs, ...]`
            episode_starts: True where `obs` begins an episode. `[n_envs]`
            at_random: Take actions from all over the action space.
            meanwhile: Called between asking for the step and fetching it; other processes make it in that time.
        """
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
        """Chooses an action for every environment; with the state it was chosen in, for the replay.

        Returns:
            Actions in the library's form `[n_envs, A]`, and `{name: [n_envs, ...]}`.
        """
        actor, n_envs = self.actor, self.env.num_envs
        before = self._acting if self._acting is not None else actor.start(n_envs)
        seen: Arrays | None = None
        if self.predict is None or at_random:
            seen = self._encoded(obs)
            acting = self._chosen(before, seen, episode_starts, at_random)
        else:
            chosen, memory = self.predict(obs, remembered(before), episode_starts, deterministic=False)
            if not np.isfinite(chosen).all():
                raise TrainingError(f"The agent's own predict chose an action that is not finite: {chosen}.")
            acting = recalled(memory, before)
            acting = replace(acting, actions=self._as_tensor(chosen))
        if actor.action_codec.rounds:
            asked = to_host({"actions": acting.actions})["actions"]
            if seen is not None:  # before whole numbers are made of it
                actor.check_finite(asked, before, seen)
            acting = replace(acting, actions=self._as_tensor(actor.action_codec.to_env(asked)))
        extras = actor.model.extras_from_state(acting.state) if self.replay_context else {}
        arrays = to_host({**{f"extras/{name}": value for name, value in extras.items()}, "actions": acting.actions})
        if seen is not None:
            actor.check_finite(arrays["actions"], before, seen)
        self._acting = acting
        return arrays["actions"], {name: arrays[f"extras/{name}"] for name in extras}

    def _encoded(self, obs: Any) -> Arrays:
        """Observations as the policy sees them, in the library's form. `[n_envs, ...]`"""
        if self._normalizes:  # the recorder has them as they are stored
            return self.actor.obs_codec.encode_any(obs)[0]
        assert self.recorder.obs is not None
        return self.recorder.obs

    def _chosen(self, before: Acting, seen: Arrays, episode_starts: Array, at_random: bool) -> Acting:
        """What the actor makes of observations."""
        actor = self.actor
        acting = actor.observe(before, seen, episode_starts, deterministic=False)
        if at_random:
            sampled = np.stack([actor.action_codec.space.sample() for _ in range(self.env.num_envs)])
            return replace(acting, actions=self._as_tensor(sampled))
        return actor.act(acting, episode_starts, deterministic=False)

    def _as_tensor(self, env_actions: Array) -> Tensor:
        """Actions of the environments in the library's form. `[n_envs, A]`"""
        codec = self.actor.action_codec
        actions = codec.executed(codec.compact(env_actions))
        return to_device(torch.from_numpy(actions), self.actor.model.device)
