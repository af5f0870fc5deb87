"""Checks, made once when training starts, that data and settings fit a model."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from worldflux.accel.overriding import overridden
from worldflux.config import WorldModelConfig
from worldflux.errors import BufferError, ConfigurationError, TrainingError
from worldflux.replay.actions import ROUNDING, check_one_hots
from worldflux.replay.batch import Batch
from worldflux.replay.provider import SAMPLES, MixedReplay, TaskReplay
from worldflux.replay.sampler import WindowSampler
from worldflux.replay.spec import check_tasks
from worldflux.training.config import TrainingConfig
from worldflux.training.gradient_step import OF_BATCH
from worldflux.validation import TASK_KEY

logger = logging.getLogger("worldflux.training")


def check_kind(model: nn.Module, data: Any) -> None:
    """Raises a `BufferError` if a buffer's actions are not of the model's kind, or the model's tasks are missing."""
    config = getattr(model, "config", None)
    if not isinstance(config, WorldModelConfig) or not isinstance(data, WindowSampler | TaskReplay):
        return
    data.check_actions(config.action_classes)
    tasks = getattr(config, "num_tasks", 1)
    if tasks > 1 and isinstance(data, WindowSampler):
        data.check_tasks(tasks, getattr(config, "task_action_dims", ()))


def provider_for(model: nn.Module, data: Any) -> Any:
    """Data as a provider of batches for a model: those that are given by the names of tasks become one.

    Raises:
        ConfigurationError: If the model has no such tasks.
        ShapeMismatchError: If observations or actions do not fit into those of the model.
        BufferError: If actions are not zero beyond the dimensions that the model uses for a task.
    """
    if not isinstance(data, Mapping):
        return data
    config = getattr(model, "config", None)
    tasks = getattr(config, "num_tasks", 1)
    if not isinstance(config, WorldModelConfig) or (tasks == 1 and len(data) != 1):
        given = tuple(data)
        raise ConfigurationError(
            f"The data are of the tasks {given}, and the model has one. Make a model of several: create_world_model("
            f"'tdmpc2:5m', num_tasks={len(given)}, task_names={given}, ...); DreamerV3 has one task."
        )
    names: tuple[str, ...] = getattr(config, "task_names", ())
    if tasks == 1 and not names:
        return next(iter(data.values()))
    numbers = {name: number for number, name in enumerate(names)}
    made = TaskReplay(data, numbers, config.obs_shape, config.action_dim)
    if used := getattr(config, "task_action_dims", ()):
        for name, source in made.data.items():
            source.check_used(f"the task {name!r}", used[numbers[name]])
    return made if tasks > 1 else next(iter(made.data.values()))


def overruled_fields(model: nn.Module) -> list[str]:
    """Names of the fields of a model's configuration that `TrainingConfig` overrules."""
    config, spec = getattr(model, "config", None), getattr(model, "optimizer_spec", None)
    if not isinstance(config, WorldModelConfig) or spec is None:
        return []
    names = ("learning_rate", "warmup_steps", "weight_decay", "grad_clip")
    return [name for name in names if hasattr(config, name) and getattr(spec, name) == getattr(config, name)]


def warn_of_overruled(model: nn.Module, training: TrainingConfig) -> None:
    """Warns of fields of a model's configuration that were changed but have no effect on this training."""
    for name in overruled_fields(model):
        own, ruling = getattr(model.config, name), getattr(training, name)
        if own not in (ruling, _usual(model.config, name)):  # type: ignore[arg-type]
            logger.warning(
                "the model's configuration has %s=%g, which is not used here: TrainingConfig.%s rules, and is %g",
                name,
                own,
                name,
                ruling,
            )


def _usual(config: WorldModelConfig, name: str) -> Any:
    """The value of a field in the preset that a configuration comes from, or else its default."""
    from_size = getattr(type(config), "from_size", None)
    try:
        return getattr(from_size(config.model_name), name) if from_size is not None else None
    except ConfigurationError:
        return next(item.default for item in fields(config) if item.name == name)


def check_first_batch(model: nn.Module, batch: Batch, step: int) -> None:
    """Checks the values of a batch, which waits for the device.

    Raises:
        TrainingError: If a number in it is not finite; it names the field.
        BufferError: If its actions or tasks are none that the world model takes.
    """
    check_batch(batch, step)
    config = getattr(model, "config", None)
    if not isinstance(config, WorldModelConfig):
        return
    tasks = getattr(config, "num_tasks", 1)
    if tasks > 1 and TASK_KEY in batch.extras:
        check_tasks(f"The batch's extras[{TASK_KEY!r}]", batch.extras[TASK_KEY].cpu().numpy(), tasks)
    actions = batch.actions.detach().float().flatten(0, -2).cpu().numpy()
    if config.action_classes:
        taken = actions[actions.any(-1)]  # after an episode's last step there is none
        check_one_hots("The batch's actions", taken, config.action_classes)
    elif actions.size and np.abs(actions).max() > 1 + ROUNDING:
        raise BufferError(
            f"The batch's actions have values from {actions.min():g} to {actions.max():g}, expected -1 to 1 for "
            "continuous actions. Rescale them: 2 * (actions - low) / (high - low) - 1."
        )


def inputs_to_watch(batch: Batch, buffer: Any, device: torch.device) -> dict[str, Tensor]:
    """For `FiniteWatch`: 0 for each tensor of a batch whose values are finite, NaN for the others.

    A buffer of this library stores no other values, so its batches give nothing to watch.
    """
    sources = [buffer]
    if isinstance(buffer, MixedReplay):
        sources = [buffer.recorded, buffer.collected]
    elif isinstance(buffer, TaskReplay):
        sources = list(buffer.data.values())
    if all(isinstance(source, WindowSampler) and not overridden(source, *SAMPLES) for source in sources):
        return {}
    floats = {name: x for name, x in batch.named_tensors().items() if x.is_floating_point()}
    return {f"{OF_BATCH}{name}": (x.detach().to(device) * 0).sum() for name, x in floats.items()}


def check_batch(batch: Batch, step: int) -> None:
    """Checks that all numbers in a batch are finite.

    Raises:
        TrainingError: If one is not; it names the field and the index.
    """
    for name, tensor in batch.named_tensors().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            where = tuple(torch.nonzero(~torch.isfinite(tensor))[0].tolist())
            raise TrainingError(
                f"The batch's {name} is not finite at gradient step {step}: it has {float(tensor[where])} at index "
                f"{where}. Look for where these data come from."
            )
