"""`worldflux train-offline`: trains a model on recorded steps, in a directory from which the run can be resumed."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from worldflux.cli import runs
from worldflux.cli.life_cycle import Work, start_or_resume
from worldflux.cli.options import (
    Compile,
    Count,
    DataNames,
    DataStorage,
    DeviceName,
    Directory,
    Fields,
    File,
    ModelName,
    Name,
    Number,
    Precision,
    Real,
    Seeds,
    Trackers,
    compile_setting,
    counted,
    fields_and_dtype,
    joined_tasks,
    option,
    tasks_in,
    title_of,
)
from worldflux.errors import BufferError, ConfigurationError
from worldflux.hub.addresses import is_address
from worldflux.hub.client import pinned_dataset

if TYPE_CHECKING:
    from stable_baselines3.common.logger import KVWriter

    from worldflux.config import WorldModelConfig
    from worldflux.models.base import WorldModel
    from worldflux.replay.buffer import ReplayBuffer
    from worldflux.training.config import TrainingConfig

_DECIDED_ELSEWHERE = {
    "device": "--device sets the device to train on",
    "obs_shape": "the data has its shape of observations",
    "action_dim": "the data has its width of actions",
    "train_ratio": "it is the ratio of an agent that learns in an environment",
    "seq_len": "--seq-len sets the length of the windows",
}
"""Fields of a model's configuration that --set cannot change, with what decides about them."""


@dataclass(frozen=True)
class OfflineSettings:
    """The options of `worldflux train-offline`. None stands for the default of `TrainingConfig`."""

    steps: Number = None
    """Gradient steps of the whole run. Default: 100000."""
    eval_share: float = 0.1
    """Share of the episodes that is held out for evaluations; 0 trains on all of them."""
    storage: DataStorage = "memory"
    """Place of the observations: in_place reads them from the files of DATA whenever they are sampled."""
    seed: Count = 42
    """Seed for all random number generators."""
    device: DeviceName = "auto"
    """Device to train on: cpu, cuda, cuda:1; auto uses the GPU if there is one."""
    learning_rate: Real = None
    """Learning rate of the optimizer. Default: 3e-4."""
    batch_size: Number = None
    """Number of windows in a batch. Default: 16."""
    seq_len: Number = None
    """Number of time steps in each window. Default: 50."""
    grad_clip: Real = None
    """Largest norm of the gradient; 0 disables clipping. Default: 100."""
    warmup_steps: Number = None
    """Gradient steps over which the learning rate rises from zero. Default: 0."""
    dtype: Precision = "auto"
    """Numbers in which the model multiplies matrices. auto: float32, or what the model was saved with."""
    compile: Compile = "auto"
    """Compile the model with torch.compile, which needs a C++ compiler on a CPU. auto: only on a GPU."""
    set: Fields = ()
    """Set a field of the model's configuration, such as --set action_type=discrete. May be repeated."""
    checkpoint_interval: Number = None
    """Gradient steps between checkpoints, also saved at the end, and on Ctrl-C and SIGTERM. Default: 10000."""
    eval_interval: Number = None
    """Gradient steps between evaluations. Default: 1000."""
    log_interval: Number = None
    """Gradient steps between the rows of the log. Default: 100."""
    track: Trackers = ()
    """Also log to Weights & Biases or MLflow. May be given for both."""
    track_project: Name = None
    """Project of W&B, experiment of MLflow. Default: WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME, otherwise worldflux."""

    def resolved(self) -> OfflineSettings:
        """The same settings with the number of steps.

        Raises:
            ConfigurationError: If a number is out of its range.
        """
        return replace(self, steps=self.training_config().total_steps)

    def training_config(self) -> TrainingConfig:
        """The settings under their names in the library."""
        from worldflux.training.config import TrainingConfig

        named = {
            "total_steps": self.steps,
            "batch_size": self.batch_size,
            "sequence_length": self.seq_len,
            "learning_rate": self.learning_rate,
            "grad_clip": self.grad_clip,
            "warmup_steps": self.warmup_steps,
            "log_interval": self.log_interval,
            "eval_interval": self.eval_interval,
            "save_interval": self.checkpoint_interval,
            "device": self.device,
            "seed": self.seed,
            "compile": compile_setting(self.compile),
        }
        given: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
        return TrainingConfig(**given)


_DEFAULTS = OfflineSettings()


def train_offline(
    model: ModelName = None,
    data: DataNames = (),
    *,
    run: Directory = None,
    seeds: Seeds = (),
    config: File = None,
    resume: Directory = None,
    settings: Annotated[OfflineSettings, tyro.conf.arg(name="")] = _DEFAULTS,
) -> int:
    """Train a world model on recorded steps, or resume a run that was stopped.

    Args:
        model: A preset (see worldflux models), or a directory written by save_pretrained. Left out with --resume.
        data: An .npz file of worldflux collect or of ReplayBuffer.save, a directory with many of them, or the
            address of a data set on the Hugging Face Hub. Several are the data of tasks that TD-MPC2 learns together;
            NAME=DATA names one.
        run: Directory of the new run. Default: runs/<data>/<model>/<number>. With --seeds, of all new runs.
        seeds: Several seeds, each for a run of its own, one after the other. Write MODEL and DATA before them.
        config: A YAML file with settings, such as the config.yaml of a run. Other options win over it.
        resume: Directory of a run to resume with its own settings. Only --steps and --device can be changed.
        settings: All other options.

    Returns:
        0, or 130 after Ctrl-C and 143 after SIGTERM.
    """
    return start_or_resume(
        OfflineTraining, model, joined_tasks(data), settings, run=run, seeds=seeds, config=config, resume=resume
    )


class OfflineTraining(Work):
    """Trains a model on the steps of a file, or of a directory of files."""

    command, argument, example = "train-offline", "DATA", "tdmpc2:tiny walker.npz"
    settings_type, result = OfflineSettings, runs.MODEL_DIRECTORY
    next_commands = ("imagine {run}", "eval {run} ENV")
    score_name = "last loss on the held-out steps"

    def __init__(
        self, model: str, task: str, settings: OfflineSettings, run: Path | None, resources: ExitStack
    ) -> None:
        from worldflux.accel import ranks
        from worldflux.replay.buffer import ReplayBuffer
        from worldflux.training.fitting import provider_for
        from worldflux.training.trainer import Trainer

        tasks = tasks_in(task)
        found = {name: _found(place) for name, place in (tasks or {"": task}).items()}
        if tasks:
            self.task, self.title = shlex.join(f"{name}={place}" for name, (place, _) in found.items()), title_of(task)
        else:
            self.task, _ = found[""]
            is_hub = is_address(self.task)
            self.title = self.task.rpartition("datasets/")[2].partition("@")[0] if is_hub else Path(self.task).stem
        buffers = {
            name: ReplayBuffer.load(data, storage=settings.storage, sharded=True) for name, (_, data) in found.items()
        }
        self.model = _build_model(model, buffers, settings)
        self._data = provider_for(self.model, buffers if tasks else buffers[""])
        self._steps = sum(ranks.every(self._data.num_transitions))
        self._trainer = Trainer(self.model, settings.training_config(), eval_data=settings.eval_share or None)
        if run is None:
            self._check_data(settings.eval_share)

    def _check_data(self, eval_share: float) -> None:
        """Raises what training would raise later, when the run already has a directory."""
        from worldflux.training.fitting import check_kind

        check_kind(self.model, self._data)
        config = self._trainer.config
        try:
            if eval_share:
                self._data.split(eval_share, seed=config.seed, seq_len=config.sequence_length)
        except BufferError as error:
            raise ConfigurationError(f"{error} Or train on all of it: --eval-share 0.") from error

    def describe(self) -> str:
        """Names the amount of data."""
        return f"{counted(self._steps, 'step')} of data"

    def train(self, directory: Path, outputs: Sequence[KVWriter]) -> str:
        """Trains, evaluates and saves checkpoints."""
        from worldflux.cli.run_callbacks import OfflineLog
        from worldflux.training.callbacks import CheckpointCallback, ProgressCallback

        trainer, log = self._trainer, OfflineLog(directory / runs.LOGS, outputs)
        trainer.add_callback(log)
        interval = trainer.config.save_interval
        trainer.add_callback(CheckpointCallback(directory / runs.CHECKPOINTS, interval, max_checkpoints=2))
        if sys.stderr.isatty():
            trainer.add_callback(ProgressCallback())
        trainer.train(self._data, resume=True)
        self.score = log.last_eval.get("loss")
        held_out = f", loss {log.last_eval['loss']:.4g} on the held-out steps" if log.last_eval else ""
        return f"{counted(trainer.step_count, 'gradient step')}{held_out}"

    def save(self, path: Path) -> None:
        """Saves the model."""
        self.model.save_pretrained(path)


def _found(place: str) -> tuple[str, Path]:
    """The data of the command line, named so that they are found from every working directory, and their path."""
    if is_address(place):
        return pinned_dataset(place)
    data = Path(place)
    if not data.exists():
        raise ConfigurationError(f"There is no file '{data}'. To record one: worldflux collect ENV --output {data}")
    return str(data.resolve()), data


def _build_model(model: str, buffers: Mapping[str, ReplayBuffer], settings: OfflineSettings) -> WorldModel:
    """The model, for the shapes of the data of each task.

    Raises:
        ConfigurationError: If a field of --set is unknown, does not fit the data, or would have no effect.
    """
    from worldflux.accel.randomness import seed_everything
    from worldflux.factory import create_world_model, find_preset
    from worldflux.training.fitting import overruled_fields
    from worldflux.validation import is_vector

    fields = fields_and_dtype(settings.set, settings.dtype)
    for name, reason in _DECIDED_ELSEWHERE.items():
        if name in fields:
            raise ConfigurationError(f"--set {name} would change nothing here: {reason}.")
    shapes: list[Any] = [buffer.obs_shape for buffer in buffers.values()]
    are_vectors = all(map(is_vector, shapes))
    own = {
        "obs_shape": max(shapes) if are_vectors else shapes[0],
        "action_dim": max(buffer.action_dim for buffer in buffers.values()),
    }
    preset, first = find_preset(model), next(iter(buffers.values()))
    if preset is not None:  # a saved model knows its actions and tasks
        fields = {**_task_fields(preset[1].config_class, buffers), **fields}
        if "action_type" not in fields and first.action_classes:
            fields |= {"action_type": first.action_type, "action_classes": first.action_classes}
    elif "" not in buffers:  # the data of tasks are padded to its width
        own = {}
    seed_everything(settings.seed)  # the initial weights are random, too
    built = create_world_model(model, **{**own, **fields})
    for name in overruled_fields(built):
        if name in fields:
            raise ConfigurationError(
                f"--set {name} would change nothing here: {option(name)} decides when a model is trained "
                "on recorded data."
            )
    return built


def _task_fields(config_class: type[WorldModelConfig], buffers: Mapping[str, ReplayBuffer]) -> dict[str, Any]:
    """The fields of a preset that follow from the tasks of the data.

    Raises:
        ConfigurationError: If there are several, and the family learns one.
    """
    from worldflux.accel import ranks

    names, dims = tuple(buffers), tuple(buffer.action_dim for buffer in buffers.values())
    if len(buffers) == 1:
        in_column = max(ranks.every(buffers[names[0]].num_tasks))
        if in_column <= 1:
            return {} if names == ("",) or not hasattr(config_class, "task_names") else {"task_names": names}
        names, dims = tuple(map(str, range(in_column))), ()
    if not hasattr(config_class, "num_tasks"):
        raise ConfigurationError(
            f"The data are of the tasks {', '.join(names)}, and {config_class.model_type} learns one. Choose TD-MPC2, "
            "'tdmpc2:5m' for example, or train a model on the data of each task."
        )
    return {"num_tasks": len(names), "task_names": names, "task_action_dims": dims}
