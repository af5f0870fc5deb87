"""`worldflux train-offline`: a model learns from recorded steps, in a directory from which it can go on."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from worldflux.cli import runs
from worldflux.cli.commands.train import ended_early, with_changes
from worldflux.cli.options import (
    Directory,
    Fields,
    ModelName,
    Number,
    Real,
    as_arguments,
    from_json,
    model_fields,
)
from worldflux.cli.runs import RunConfig
from worldflux.errors import BufferError, ConfigurationError
from worldflux.files import checked_path
from worldflux.locks import using

if TYPE_CHECKING:
    from worldflux.models.base import WorldModel
    from worldflux.replay.buffer import ReplayBuffer
    from worldflux.training.config import TrainingConfig
    from worldflux.training.trainer import Trainer

KIND = "train-offline"
_RULED_ELSEWHERE = {
    "device": "--device says where to train",
    "obs_shape": "the data has its shape of observations",
    "action_dim": "the data has its width of actions",
}
"""Fields of a model's configuration that follow from something else."""


@dataclass(frozen=True)
class OfflineSettings:
    """The options of `worldflux train-offline`; None takes the default of `TrainingConfig`."""

    steps: Number = None
    """Gradient steps of the whole run. Default: 100000."""
    eval_share: float = 0.1
    """Share of the data, in whole episodes, that is kept for evaluations; 0 trains on all."""
    seed: int = 42
    """Of everything that is random."""
    device: str = "auto"
    """Where to train: cpu, cuda, cuda:1; auto takes the GPU if there is one."""
    learning_rate: Real = None
    """Step size of the optimiser. Default: 3e-4."""
    batch_size: Number = None
    """Windows in a gradient step. Default: 16."""
    seq_len: Number = None
    """Time steps in each window. Default: 50."""
    grad_clip: Real = None
    """Largest norm of all gradients together; 0 turns it off. Default: 100."""
    warmup_steps: Number = None
    """Gradient steps over which the learning rate rises from zero. Default: 0."""
    set: Fields = ()
    """A field of the model's configuration, such as --set action_type=discrete."""
    checkpoint_interval: Number = None
    """Gradient steps between checkpoints; one more is saved at the end, and by Ctrl-C and SIGTERM. Default: 10000."""
    eval_interval: Number = None
    """Gradient steps between evaluations. Default: 1000."""
    log_interval: Number = None
    """Gradient steps between the rows of the log. Default: 100."""


_DEFAULTS = OfflineSettings()


def train_offline(
    model: ModelName = None,
    data: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="DATA", help_behavior_hint="")] = None,
    *,
    run: Directory = None,
    resume: Directory = None,
    settings: Annotated[OfflineSettings, tyro.conf.arg(name="")] = _DEFAULTS,
) -> int:
    """Train a world model on recorded steps, or go on with a run that was stopped.

    Args:
        model: A preset (worldflux models lists them), or a directory of WorldModel.save_pretrained.
        data: An .npz of worldflux collect, or of ReplayBuffer.save.
        run: Directory of the new run. Default: runs/<data>/<model>/<number>.
        resume: Directory of a run to go on with, by its config.json. --steps and --device may be given anew.
        settings: The others.

    Returns:
        0, or 130 and 143 after Ctrl-C and SIGTERM.
    """
    if resume is not None:
        if model is not None or data is not None or run is not None:
            raise ConfigurationError("--resume goes on with the MODEL, DATA and directory of the run. Leave them out.")
        resume = checked_path("--resume", resume)
        return _resume(resume, settings)
    if model is None or data is None:
        raise ConfigurationError(
            "MODEL and DATA are missing, such as: worldflux train-offline tdmpc2:5m walker.npz. "
            "A run that was stopped goes on with: worldflux train-offline --resume DIR"
        )
    root = checked_path("the directory of runs", runs.ROOT)
    return _start(model, data, runs.lasting("--run", run), root, settings)


def _start(model: str, data: Path, run: Path | None, root: Path, settings: OfflineSettings) -> int:
    """Begins a new run."""
    runs.check_free(run)
    buffer = _load(data)
    built = _build(model, buffer, settings)
    trainer = _trainer(built, settings)  # which checks the settings before there is a directory
    _check_data(built, buffer, trainer, settings)
    directory = runs.make_directory(run, data.stem, model, root)
    settings = replace(settings, steps=trainer.config.total_steps)
    with using(directory):
        runs.check_free(directory)
        RunConfig(
            kind=KIND,
            model=model,
            task=str(data.resolve()),
            settings=asdict(settings),
            command=f"worldflux train-offline {shlex.quote(model)} {shlex.quote(str(data))} {as_arguments(settings)}",
            versions=runs.versions(),
            started=runs.now(),
        ).write(directory)
        return _run(trainer, built, buffer, directory)


def _resume(directory: Path, given: OfflineSettings) -> int:
    """Goes on with a run."""
    config = RunConfig.read(directory)
    if config.kind != KIND:
        raise ConfigurationError(
            f"{runs.shown(directory)} is a run of worldflux {config.kind}, which has a --resume of its own."
        )
    settings = from_json(OfflineSettings, config.settings, directory / runs.CONFIG_FILE)
    settings = with_changes(settings, given, directory)
    done = runs.newest_step(directory)
    if done is not None and settings.steps is not None and done >= settings.steps:
        if (directory / runs.MODEL_DIRECTORY).is_dir():
            print(
                f"{runs.shown(directory)} has finished its {settings.steps} steps. A larger --steps goes on: "
                f"worldflux train-offline --resume {runs.shown(directory)} --steps {2 * settings.steps}"
            )
            return 0
    buffer = _load(Path(config.task))
    built = _build(config.model, buffer, settings)
    trainer = _trainer(built, settings)
    with using(directory):
        replace(config, settings=asdict(settings)).write(directory)
        return _run(trainer, built, buffer, directory)


def _load(data: Path) -> ReplayBuffer:
    from worldflux.replay.buffer import ReplayBuffer

    if not data.is_file():
        raise ConfigurationError(f"There is no file '{data}'. worldflux collect ENV --output {data} records one.")
    return ReplayBuffer.load(data)


def _check_data(model: WorldModel, buffer: ReplayBuffer, trainer: Trainer, settings: OfflineSettings) -> None:
    """What training would refuse later, when there is a directory already."""
    from worldflux.training.fitting import check_kind

    check_kind(model, buffer)
    if not settings.eval_share:
        return
    config = trainer.config
    try:
        buffer.split(settings.eval_share, seed=config.seed, seq_len=config.sequence_length)
    except BufferError as error:
        raise ConfigurationError(f"{error} Or train on all of it: --eval-share 0.") from error


def _build(model: str, buffer: ReplayBuffer, settings: OfflineSettings) -> WorldModel:
    """The model, for the shapes of the data."""
    from worldflux.factory import create_world_model, find_preset
    from worldflux.training.fitting import overruled_fields
    from worldflux.training.randomness import seed_everything

    fields = model_fields(settings.set)
    for name, ruling in _RULED_ELSEWHERE.items():
        if name in fields:
            raise ConfigurationError(f"--set {name} would change nothing here: {ruling}.")
    if find_preset(model) is not None and "action_type" not in fields and buffer.action_classes:
        # As the file says; TD-MPC2 refuses what is not continuous. A saved model knows its actions.
        fields |= {"action_type": buffer.action_type, "action_classes": buffer.action_classes}
    seed_everything(_training_config(settings).seed)  # its first weights are random, too
    built = create_world_model(model, obs_shape=buffer.obs_shape, action_dim=buffer.action_dim, **fields)
    for name in overruled_fields(built):
        if name in fields:
            raise ConfigurationError(
                f"--set {name} would change nothing here: --{name.replace('_', '-')} rules when a model learns from "
                "data."
            )
    return built


def _training_config(settings: OfflineSettings) -> TrainingConfig:
    """The settings under their names in the library."""
    from worldflux.training.config import TrainingConfig

    named = {
        "total_steps": settings.steps,
        "batch_size": settings.batch_size,
        "sequence_length": settings.seq_len,
        "learning_rate": settings.learning_rate,
        "grad_clip": settings.grad_clip,
        "warmup_steps": settings.warmup_steps,
        "log_interval": settings.log_interval,
        "eval_interval": settings.eval_interval,
        "save_interval": settings.checkpoint_interval,
        "device": settings.device,
        "seed": settings.seed,
    }
    given: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
    return TrainingConfig(**given)


def _trainer(model: WorldModel, settings: OfflineSettings) -> Trainer:
    from worldflux.training.trainer import Trainer

    return Trainer(model, _training_config(settings), eval_data=settings.eval_share or None)


def _run(trainer: Trainer, model: WorldModel, buffer: ReplayBuffer, directory: Path) -> int:
    """Trains until the run has its steps, or somebody stops it."""
    from worldflux.cli.run_callbacks import OfflineLog
    from worldflux.training.callbacks import CheckpointCallback, ProgressCallback

    config = trainer.config
    log = OfflineLog(directory / runs.LOGS)
    trainer.add_callback(log)
    trainer.add_callback(CheckpointCallback(directory / runs.CHECKPOINTS, config.save_interval, max_checkpoints=2))
    if sys.stderr.isatty():
        trainer.add_callback(ProgressCallback())
    print(f"worldflux: {runs.shown(directory)}, {buffer.num_transitions} steps of data", file=sys.stderr)
    try:
        trainer.train(buffer, resume=True)
    except BaseException as error:
        return ended_early(error, directory, KIND)
    model.save_pretrained(directory / runs.MODEL_DIRECTORY)
    print(f"{runs.shown(directory)}: {trainer.step_count} gradient steps{_found(log.last_eval)}.")
    return 0


def _found(metrics: Mapping[str, float]) -> str:
    return f", loss {metrics['loss']:.4g} on the steps that were kept" if metrics else ""
