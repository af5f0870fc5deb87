"""What users try out of habit: methods of SB3's policies, arguments of its algorithms, callbacks of a `Trainer`."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from stable_baselines3.common.callbacks import CallbackList
from stable_baselines3.common.policies import BaseModel
from torch import Tensor

from worldflux.agents.settings import SETTINGS
from worldflux.errors import ConfigurationError, nearest
from worldflux.replay.batch import Observation
from worldflux.training.callbacks import Callback, CheckpointCallback

if TYPE_CHECKING:
    from worldflux.agents.agent import WorldFluxAgent

_EXPLORES = "exploration is part of the algorithms, so there is nothing to pass"
_RATIO = "pass train_ratio, the replayed time steps per environment step"
_PPO = "it belongs to on-policy algorithms; worldflux replays windows of seq_len steps"
COUNTERPARTS = {
    "policy": "pass a preset as model, such as 'dreamerv3:tiny'; the networks follow from the spaces",
    "policy_kwargs": "pass model_kwargs, fields of the model's configuration, such as {'units': 256}",
    "gamma": "pass model_kwargs={'discount_horizon': 1 / (1 - gamma)} for DreamerV3, or "
    "{'discount_min': gamma, 'discount_max': gamma} for TD-MPC2",
    "gae_lambda": "pass model_kwargs={'lambda_': ...} for DreamerV3",
    "ent_coef": "pass model_kwargs={'entropy_scale': ...} for DreamerV3, or {'entropy_coef': ...} for TD-MPC2",
    "target_entropy": "pass model_kwargs={'entropy_scale': ...} for DreamerV3, or {'entropy_coef': ...} for TD-MPC2",
    "vf_coef": "pass model_kwargs={'loss_scales': {'critic': ...}} for DreamerV3, or {'value_coef': ...} for TD-MPC2",
    "tau": "pass model_kwargs={'slow_critic_rate': tau} for DreamerV3, or {'tau': tau} for TD-MPC2",
    "target_update_interval": "pass model_kwargs={'slow_critic_rate': ...} for DreamerV3, or {'tau': ...} for TD-MPC2",
    "max_grad_norm": "pass model_kwargs={'grad_clip': ...}",
    "train_freq": _RATIO,
    "gradient_steps": _RATIO,
    "n_steps": _PPO,
    "n_epochs": _RATIO,
    "clip_range": _PPO,
    "clip_range_vf": _PPO,
    "normalize_advantage": _PPO,
    "target_kl": _PPO,
    "rollout_buffer_class": _PPO,
    "rollout_buffer_kwargs": _PPO,
    "action_noise": _EXPLORES,
    "use_sde": _EXPLORES,
    "sde_sample_freq": _EXPLORES,
    "use_sde_at_warmup": _EXPLORES,
    "exploration_fraction": _EXPLORES,
    "exploration_initial_eps": _EXPLORES,
    "exploration_final_eps": _EXPLORES,
    "target_policy_noise": _EXPLORES,
    "target_noise_clip": _EXPLORES,
    "policy_delay": "both algorithms train the policy in every gradient step",
    "replay_buffer_class": "there is one ReplayBuffer of sequences; set agent.replay_buffer to use another one",
    "replay_buffer_kwargs": "pass buffer_size and buffer_storage",
    "optimize_memory_usage": "each observation is stored once, so there is nothing to pass",
    "monitor_wrapper": "environments are always wrapped in a Monitor; pass a VecEnv to do without it",
}
"""Arguments of SB3's algorithms that `WorldFluxAgent` does not have, with what to do instead."""


def refuse_unknown(names: Iterable[str]) -> None:
    """Raises a `ConfigurationError` for the first name, with what to do instead where it is one of SB3's arguments."""
    for name in names:
        if name in COUNTERPARTS:
            raise ConfigurationError(f"{name} is an argument of stable-baselines3's algorithms: {COUNTERPARTS[name]}.")
        known = (*SETTINGS, "device", "model_kwargs")
        raise ConfigurationError(f"Unknown setting '{name}'{nearest(name, known)}")


def refuse_callbacks_of_trainers(given: object) -> None:
    """Raises a `ConfigurationError` if a callback that was given to `learn` is one of a `Trainer`."""
    for callback in given.callbacks if isinstance(given, CallbackList) else given if isinstance(given, list) else ():
        refuse_callbacks_of_trainers(callback)
    if isinstance(given, Callback):
        takes = "AgentCheckpointCallback" if isinstance(given, CheckpointCallback) else "callbacks of stable-baselines3"
        raise ConfigurationError(f"{type(given).__name__} is for train(); an agent takes {takes}.")


def refuse_policy(model: Any) -> None:
    """Raises a `ConfigurationError` if a policy of SB3 is given in place of a model."""
    is_name = isinstance(model, str) and model.endswith("Policy")
    if is_name or (isinstance(model, type) and issubclass(model, BaseModel)):
        shown = repr(model) if is_name else model.__name__
        raise ConfigurationError(
            f"model is {shown}, a policy of stable-baselines3. Pass a preset, which names the algorithm and size; the "
            "networks follow from the spaces: WorldFluxAgent('dreamerv3:tiny', env). list_models() shows all presets."
        )


class PolicyMethods:
    """The methods of SB3's policies that the model of an agent gets, so that `agent.policy.predict(obs)` works.

    They do not keep the agent alive. Copies and pickles of the model belong to no agent.
    """

    def __init__(self, agent: WorldFluxAgent | None) -> None:
        self._agent = (lambda: None) if agent is None else weakref.ref(agent)

    def __reduce__(self) -> Any:
        return (PolicyMethods, (None,))

    @property
    def agent(self) -> WorldFluxAgent:
        """The agent.

        Raises:
            ConfigurationError: If it is gone, or the model is a copy.
        """
        agent = self._agent()
        if agent is None:
            raise ConfigurationError(
                "This model belongs to no agent that could act. Make one: WorldFluxAgent(model, env)."
            )
        return agent

    def predict(
        self,
        observation: Any,
        state: Any = None,
        episode_start: Any = None,
        deterministic: bool = False,
        **task: Any,
    ) -> Any:
        """As `WorldFluxAgent.predict`."""
        return self.agent.predict(observation, state, episode_start, deterministic, **task)

    def obs_to_tensor(self, observation: Any) -> tuple[Observation, bool]:
        """Observations as the model takes them, `[n, ...]`, and whether several were given."""
        obs, batched = self.agent.obs_codec.encode_any(observation)
        place = self.agent.device
        if isinstance(obs, dict):
            return {key: torch.as_tensor(array, device=place) for key, array in obs.items()}, batched
        found: Tensor = torch.as_tensor(obs, device=place)
        return found, batched

    def attach(self) -> None:
        """Gives the methods to the agent's model, unless its class has one of the name."""
        model: Any = self.agent.model
        for method in (self.predict, self.obs_to_tensor):
            if not hasattr(type(model), method.__name__):
                setattr(model, method.__name__, method)
