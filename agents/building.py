"""The model of an agent, made for the spaces of an environment, and its planner."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from stable_baselines3.common.vec_env import VecEnv

from worldflux.agents.collecting import check_tasks, max_vec_episode_steps
from worldflux.agents.settings import AgentSettings
from worldflux.config import PlannerConfig, WorldModelConfig
from worldflux.envs.spaces import ActionCodec, ObservationCodec
from worldflux.envs.tasks import TaskVecEnv
from worldflux.envs.vector import innermost
from worldflux.errors import ConfigurationError, ShapeMismatchError, a_type
from worldflux.factory import create_world_model, find_preset
from worldflux.models.base import WorldModel
from worldflux.models.objective import Objective
from worldflux.models.planning import Planner

logger = logging.getLogger("worldflux")


def build_model(
    source: str | Path | WorldModel,
    chosen: Mapping[str, Any],
    obs_codec: ObservationCodec,
    action_codec: ActionCodec,
    *,
    env: VecEnv | None,
    device: torch.device,
) -> WorldModel:
    """A model for the spaces of an environment.

    Args:
        source: A preset, a directory written by `save_pretrained`, or a model.
        chosen: Fields of the configuration to override.
        obs_codec: Codec of the environment's observations.
        action_codec: Codec of the environment's actions.
        env: Environment that the model shall act in; a preset takes the length of episodes from it.
        device: Device of the model.

    Raises:
        ConfigurationError: If the source is unknown, or a field does not fit.
        ShapeMismatchError: If a model that exists was built for other spaces.
    """
    own = _space_fields(obs_codec, action_codec)
    if isinstance(source, WorldModel):
        if chosen:
            raise ConfigurationError(
                f"model_kwargs has {sorted(chosen)}, but the model is built already. "
                "Pass a preset, or build the model with these fields."
            )
        model = source.to(device)
    elif isinstance(source, str | Path):
        preset = find_preset(source) if isinstance(source, str) else None
        if preset is not None:
            # A saved model has its spaces already; they are compared below.
            _, family = preset
            max_steps = None if env is None else max_vec_episode_steps(env)
            tasks = _task_fields(env, family.config_class)
            chosen = {**own, **family.config_class.episode_fields(max_steps), **tasks, **chosen}
        model = create_world_model(source, device=device, **chosen)
    else:
        advice = " Build it: create_world_model(config)." if isinstance(source, WorldModelConfig) else ""
        raise ConfigurationError(
            f"model is {a_type(source)}, expected a preset, a saved directory or a WorldModel.{advice}"
        )
    _check_spaces(model, own)
    check_tasks(model, env)
    return model


def _task_fields(env: VecEnv | None, config_class: type[WorldModelConfig]) -> dict[str, Any]:
    """Fields of a preset that follow from the tasks of environments."""
    base = None if env is None else innermost(env)
    if not isinstance(base, TaskVecEnv):
        return {}
    named = {item.name: item.default for item in fields(config_class)}
    if "num_tasks" not in named:
        if len(base.names) == 1:
            return {}
        raise ConfigurationError(
            f"The environments are of the tasks {', '.join(base.names)}, and {named['model_type']} learns one. Choose "
            "TD-MPC2, 'tdmpc2:5m' for example, or an agent for each task."
        )
    if len(base.names) == 1:
        return {"task_names": base.names}
    steps = [max_vec_episode_steps(member) or named["episode_length"] for member in base.members]
    return {
        "num_tasks": len(base.names),
        "task_names": base.names,
        "task_action_dims": base.action_dims,
        "task_episode_lengths": tuple(steps),
    }


def build_planner(model: WorldModel, planner: str | None, overrides: Mapping[str, Any] | None) -> Planner | None:
    """The planner in the model; None where its policy acts.

    Raises:
        ConfigurationError: If the settings do not fit the planner, or the planner does not fit the model.
    """
    if planner is None:
        if overrides:
            logger.warning("planner_kwargs change nothing: this agent acts with its policy. planner='mppi' plans.")
        return None
    chosen = dict(overrides or {})
    if planner == "cem":
        if chosen.get("temperature") is not None:
            raise ConfigurationError(
                f"planner_kwargs has temperature={chosen['temperature']!r}, but planner='cem' gives all elites the "
                "same weight. Leave it out, or take planner='mppi'."
            )
        chosen["temperature"] = None
    return Planner(model, PlannerConfig.from_model(model.config, **chosen))


def set_objective(planner: Planner | None, objective: Objective | None) -> None:
    """Sets what a planner maximises; None stands for the model's reward.

    Raises:
        ConfigurationError: If there is an objective but no planner, or it is no function.
    """
    if planner is not None:
        planner.objective = objective
    elif objective is not None:
        raise ConfigurationError(
            "The agent has an objective but no planner: its policy acts, which was trained for the environment's "
            "reward. Choose a planner: WorldFluxAgent(..., planner='mppi', objective=...), or the same in load."
        )


def shown_model(model: WorldModel) -> str:
    """Names a model with the number of its trained parameters, such as "tdmpc2:5m with 5.0 million parameters"."""
    count = sum(weights.numel() for weights in model.parameters() if weights.requires_grad)
    family, name = model.config.model_type, f"{model.config.model_type}:{model.config.model_name}"
    shown = f"{count:,}" if count < 1_000_000 else f"{count / 1e6:.{1 if count < 100_000_000 else 0}f} million"
    return f"{name if find_preset(name) else family} with {shown} parameters"


_BOTH = ("learning_rate", "train_ratio", "seq_len")
"""Settings of an agent whose defaults are fields of the model's configuration."""


def checked_model_kwargs(given: Any, settings: AgentSettings) -> dict[str, Any]:
    """`model_kwargs` as a dictionary; the configuration itself checks the fields.

    Raises:
        ConfigurationError: If it is no dictionary, or another setting of the agent overrides one of its fields.
    """
    if given is None:
        return {}
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise ConfigurationError(
            f"model_kwargs is {given!r}, expected a dictionary with fields of the model's configuration, "
            "such as {'hidden_dim': 128}."
        )
    if "device" in given:
        raise ConfigurationError(f"model_kwargs has device={given['device']!r}. Pass device to WorldFluxAgent itself.")
    for name in _BOTH:
        if getattr(settings, name) is not None and name in given:
            raise ConfigurationError(
                f"{name} is a setting of the agent and a field of model_kwargs, where it would change nothing. "
                "Pass one of them."
            )
    twice = sorted(set(given) & set(settings.planner_kwargs or {}))
    if twice:
        raise ConfigurationError(
            f"{', '.join(twice)} is in planner_kwargs, which go first, and in model_kwargs. Pass one of them."
        )
    return dict(given)


def _space_fields(obs_codec: ObservationCodec, action_codec: ActionCodec) -> dict[str, Any]:
    """The fields of a model's configuration that follow from the spaces."""
    return {
        "obs_shape": obs_codec.obs_shape,
        "obs_classes": obs_codec.obs_classes,
        "action_type": action_codec.action_type,
        "action_dim": action_codec.action_dim,
        "action_classes": action_codec.action_classes,
    }


def _check_spaces(model: WorldModel, own: Mapping[str, Any]) -> None:
    for name, expected in own.items():
        if getattr(model.config, name) != expected:
            raise ShapeMismatchError(
                f"The model has {name}={getattr(model.config, name)!r}, expected {expected!r} for this environment. "
                f"Build it with create_world_model(..., {name}={expected!r}), or pass the preset's name."
            )
