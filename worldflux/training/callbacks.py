"""Callbacks of `Trainer.train`: progress, logs, checkpoints, early stopping.

The order of the calls is: `on_train_begin`; then for each gradient step `on_eval_end`, where an evaluation is due, and
`on_step_end`; finally `on_train_end`, also when training ends with an error. Callbacks are called in the order in which
they were added, and all of them also when one asks to stop. Only a `CheckpointCallback` comes after all others, so that
a checkpoint includes their states after the step.

Callbacks may change the trainer: save and load checkpoints, add callbacks, take further steps, and set `eval_data` and
the learning rates of the optimisers.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from worldflux.accel import ranks
from worldflux.errors import (
    CheckpointError,
    ConfigurationError,
    MissingDependencyError,
    TrainingError,
    install_hint,
    nearest,
)
from worldflux.files import checked_path
from worldflux.tracking import WandbTracker
from worldflux.training.saving import CheckpointDirectory
from worldflux.validation import whole_number

if TYPE_CHECKING:
    from worldflux.training.trainer import Trainer

logger = logging.getLogger("worldflux.training")


class Losses(Mapping[str, float]):
    """The losses of a step by name, copied from the device together when one of them is first read.

    A callback that reads them only occasionally costs nothing at the other steps. `losses.tensors` holds them as they
    are, for arithmetic on the device.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = dict(tensors)
        self._values: dict[str, float] | None = None

    def __getitem__(self, name: str) -> float:
        """The loss as a Python number."""
        if self._values is None:
            stacked = torch.stack([tensor.float() for tensor in self.tensors.values()])
            self._values = dict(zip(self.tensors, stacked.tolist(), strict=True))
        return self._values[name]

    def __contains__(self, name: object) -> bool:
        """Whether there is a loss of that name; reads nothing."""
        return name in self.tensors

    def __iter__(self) -> Iterator[str]:
        """Iterates over the names."""
        return iter(self.tensors)

    def __len__(self) -> int:
        """Number of losses."""
        return len(self.tensors)

    def __repr__(self) -> str:
        """Names and values."""
        return f"Losses({dict(self)})"


class Callback:
    """Base class of callbacks. Override the methods that you need.

    In a training on several ranks, callbacks are called on every rank, at the same steps and with the same losses.
    """

    first_rank_only: ClassVar[bool] = False
    """Whether only rank 0 calls it, as for logs and progress bars, which would appear several times."""

    def on_train_begin(self, trainer: Trainer) -> None:
        """Called once before the first step.

        Args:
            trainer: The trainer, with `model`, `config`, `step_count` (steps done) and `target_step` (the last step of
                this call).
        """

    def on_step_end(self, step: int, losses: Mapping[str, float]) -> bool | None:
        """Called after each gradient step.

        Args:
            step: Number of gradient steps done, from 1.
            losses: The model's loss terms, `"loss"`, which was differentiated, and `"grad_norm"`. Reading one waits
                for the device.

        Returns:
            False to stop training; anything else continues it.
        """
        return None

    def on_eval_end(self, step: int, metrics: Mapping[str, float]) -> None:
        """Called after each evaluation.

        Args:
            step: Number of gradient steps done.
            metrics: Means of the loss terms, including `"loss"`, over the evaluation batches.
        """

    def on_train_end(self, trainer: Trainer) -> None:
        """Called once after the last step.

        Args:
            trainer: The trainer. `trainer.finished` is False if an error or an interrupt ended the training; then
                `trainer.interrupted` tells whether it was a signal, which waits for the end of a step.
        """

    def state_dict(self) -> dict[str, Any]:
        """The state to save in a checkpoint, in a form that JSON can hold; empty for most callbacks."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a saved state; called after `on_train_begin`, and only if `state_dict` was not empty."""


class ProgressCallback(Callback):
    """Shows progress: a bar if tqdm is installed, otherwise a line at each `log_interval` of the trainer."""

    first_rank_only = True

    def __init__(self) -> None:
        self._bar: Any = None
        self._interval = 1
        self._target = 0

    def on_train_begin(self, trainer: Trainer) -> None:
        """Opens the bar."""
        self._interval, self._target = trainer.config.log_interval, trainer.target_step
        try:
            from tqdm.auto import tqdm
        except ImportError:
            self._bar = None
        else:
            self._bar = tqdm(total=self._target, initial=trainer.step_count, unit="step", dynamic_ncols=True)

    def on_step_end(self, step: int, losses: Mapping[str, float]) -> None:
        """Moves the bar, and shows the loss at the steps at which losses are read anyway."""
        due = step % self._interval == 0
        if self._bar is None:
            if due:
                print(f"step {step}/{self._target}  loss {losses['loss']:.4g}", file=sys.stderr, flush=True)
            return
        if due:
            self._bar.set_postfix_str(f"loss {losses['loss']:.4g}", refresh=False)
        self._bar.update(step - self._bar.n)  # backwards, where a callback has loaded a checkpoint

    def on_train_end(self, trainer: Trainer) -> None:
        """Closes the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class LoggingCallback(Callback):
    """Logs losses, health and evaluations to the Python logger `worldflux.training`, to TensorBoard, and to wandb.

    Health metrics (`Trainer.health`) are logged under `health/`; a value beyond its threshold is logged as a warning. A
    program that has not set up logging gets the lines on stderr.

    Attributes:
        tensorboard_log: Directory for TensorBoard ("runs"), in which each training creates one of its own. None writes
            no TensorBoard log.

    Args:
        log_interval: Steps between lines.
        use_wandb: Log to Weights & Biases as well, in the run that is open or in one that is opened here.

    Raises:
        ConfigurationError: If `log_interval` is below 1.
        MissingDependencyError: If `use_wandb` is set and wandb is not installed. When training begins, also if
            tensorboard is not installed, unless `tensorboard_log` is None.
    """

    first_rank_only = True

    def __init__(self, log_interval: int = 100, use_wandb: bool = False) -> None:
        self.log_interval = whole_number("log_interval", log_interval, 1)
        self.use_wandb = use_wandb
        self._tracker = WandbTracker() if use_wandb else None
        self.tensorboard_log: str | Path | None = "runs"
        self._begun_in = checked_path("the working directory", ".")
        self._writer: Any = None
        self._since: tuple[float, int] | None = None
        self._trainer: Trainer | None = None
        self._problems: set[str] = set()  # those that were bad at the last interval

    def on_train_begin(self, trainer: Trainer) -> None:
        """Starts the clock, and the wandb run if there is none."""
        if not logger.hasHandlers():
            logger.addHandler(logging.StreamHandler())
            logger.setLevel(logging.INFO)
        self._trainer = trainer
        if self._tracker is not None:
            self._tracker.start(trainer.config.to_dict())
        if self.tensorboard_log is not None:
            name = type(trainer.model).__name__.lower()
            parent = checked_path("tensorboard_log", self.tensorboard_log, within=self._begun_in, directory=True)
            self._writer = _import_writer()(_new_directory(parent, name))
        self._since = (time.perf_counter(), trainer.step_count)

    def on_step_end(self, step: int, losses: Mapping[str, float]) -> None:
        """Logs every `log_interval` steps."""
        if step % self.log_interval:
            return
        metrics = dict(losses)
        now = time.perf_counter()
        if self._since is not None and step > self._since[1]:
            metrics["steps_per_second"] = (step - self._since[1]) / max(now - self._since[0], 1e-9)
        self._write(step, metrics | self._health(step))
        self._since = (time.perf_counter(), step)

    def on_eval_end(self, step: int, metrics: Mapping[str, float]) -> None:
        """Logs every evaluation under `eval/`."""
        self._write(step, {f"eval/{name}": value for name, value in metrics.items()})

    def on_train_end(self, trainer: Trainer) -> None:
        """Closes TensorBoard's file, and the wandb run that was opened here."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if self._tracker is not None:
            self._tracker.finish("finished" if trainer.finished else "stopped" if trainer.interrupted else "failed")

    def _health(self, step: int) -> dict[str, float]:
        assert self._trainer is not None, "on_train_begin comes first"
        health = self._trainer.health()
        for problem in health.problems:
            if problem.name not in self._problems:
                logger.warning("step %d  %s", step, problem)
        self._problems = {problem.name for problem in health.problems}
        return {f"health/{name}": value for name, value in health.metrics().items()}

    def _write(self, step: int, metrics: dict[str, float]) -> None:
        logger.info("step %d  %s", step, "  ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
        if self._writer is not None:
            for name, value in metrics.items():
                self._writer.add_scalar(name, value, step)
        if self._tracker is not None:
            self._tracker.log(metrics, step)


class _ConfiguredInterval(int):
    """The documented default of an interval, which differs from the same number given by the user."""


class CheckpointCallback(Callback):
    """Saves checkpoints `output_dir/step-00010000`, each a directory for `Trainer.load_checkpoint`.

    Another one is saved when training ends between two intervals, whatever ends it: its last step, Ctrl-C, SIGTERM, or
    an error in a callback or a provider of data. Nothing is saved once a loss is not finite, so the newest checkpoint
    is a good one, from which `Trainer.train(buffer, resume=True)` continues.

    A directory belongs to one run. While a run uses it, no other can begin there; if another run has saved checkpoints
    in it, training ends at once with a `ConfigurationError` that says what to do.

    Args:
        output_dir: Directory of the checkpoints; created if it does not exist.
        save_interval: Steps between checkpoints. If it is not given, `TrainingConfig.save_interval` is used, whose
            default is also 10000.
        max_checkpoints: Number of checkpoints of this run to keep in `output_dir`; the oldest are removed.
        overwrite: Begin a new run even if another one has saved checkpoints in the directory; they are removed once
            this run has saved one of its own.

    Raises:
        ConfigurationError: If a number is below 1, or `output_dir` cannot be a directory.
    """

    def __init__(
        self,
        output_dir: str | Path,
        save_interval: int = _ConfiguredInterval(10_000),
        max_checkpoints: int = 5,
        *,
        overwrite: bool = False,
    ) -> None:
        self.directory = CheckpointDirectory(output_dir, max_checkpoints, overwrite)
        self.save_interval = save_interval
        if not isinstance(save_interval, _ConfiguredInterval):
            self.save_interval = whole_number("save_interval", save_interval, 1)
        self._trainer: Trainer | None = None
        self._saved_step: int | None = None

    @property
    def output_dir(self) -> Path:
        """Directory of the checkpoints."""
        return self.directory.path

    @property
    def max_checkpoints(self) -> int:
        """Number of checkpoints of the run that are kept."""
        return self.directory.max_checkpoints

    def on_train_begin(self, trainer: Trainer) -> None:
        """Remembers the trainer."""
        self._trainer = trainer
        self._saved_step = trainer.step_count
        if isinstance(self.save_interval, _ConfiguredInterval):
            self.save_interval = _ConfiguredInterval(trainer.config.save_interval)

    def on_step_end(self, step: int, losses: Mapping[str, float]) -> None:
        """Saves every `save_interval` steps."""
        if step % self.save_interval == 0:
            self._save(step)

    def on_train_end(self, trainer: Trainer) -> None:
        """Saves the last step."""
        begun, error = self._trainer is not None, sys.exc_info()[1]
        if trainer.in_step and error is not None and not isinstance(error, Exception):
            begun = False  # a second Ctrl-C, which may have come in the middle of anything
        if error is not None and ranks.size() > 1 and not trainer.interrupted:
            begun = False  # an error of one rank, of which the others know nothing
        try:
            if begun and trainer.step_count != self._saved_step:
                self._save(trainer.step_count)
        except TrainingError:
            if error is None:
                raise
            # The error that ended the training says why; the newest checkpoint is a good one.
        finally:
            self._trainer = None

    def _save(self, step: int) -> None:
        assert self._trainer is not None, "on_train_begin comes first"
        self._trainer.check_good()
        self.directory.save(step, self._trainer.run, self._trainer.save_checkpoint)
        self._saved_step = step


class EarlyStoppingCallback(Callback):
    """Stops when a loss has not fallen for a while.

    It compares means of the loss over each `TrainingConfig.log_interval`, or over `patience` steps if that is shorter:
    single batches are too noisy, and reading every step would wait for the device.

    Args:
        monitor: Name of a loss; `"eval/<name>"` for a loss of the evaluation.
        patience: Gradient steps without improvement after which to stop.
        min_delta: Amount by which the loss has to fall to count as improved.

    Raises:
        ConfigurationError: If a number is out of range; during training, if there is no loss of that name.
    """

    def __init__(self, monitor: str = "loss", patience: int = 5000, min_delta: float = 1e-4) -> None:
        self.monitor = monitor
        self.patience = whole_number("patience", patience, 1)
        if not (min_delta >= 0 and math.isfinite(min_delta)):
            raise ConfigurationError(f"min_delta is {min_delta}, expected a finite number from 0.")
        self.min_delta = min_delta
        self.best = math.inf
        self.best_step = 0
        self._interval = 1
        self._sum: Tensor | float = 0.0
        self._count = 0

    def on_train_begin(self, trainer: Trainer) -> None:
        """Restarts the patience; the best value so far stays."""
        self._interval = min(trainer.config.log_interval, self.patience)
        self.best_step = trainer.step_count
        self._sum, self._count = 0.0, 0
        if self.monitor.startswith("eval/") and trainer.eval_data is None:
            raise ConfigurationError(
                f"EarlyStoppingCallback monitors '{self.monitor}', and the trainer has no eval_data. "
                "Pass Trainer(..., eval_data=buffer), or eval_data=0.1 to hold out a tenth of the episodes."
            )

    def on_step_end(self, step: int, losses: Mapping[str, float]) -> bool:
        """Compares the mean of every interval; False once the patience has run out."""
        if not self.monitor.startswith("eval/"):
            values = losses.tensors if isinstance(losses, Losses) else losses
            self._sum = self._sum + self._pick(values, self.monitor)
            self._count += 1
            if step % self._interval == 0:
                self._compare(step, float(self._sum) / self._count)
                self._sum, self._count = 0.0, 0
        if step - self.best_step < self.patience:
            return True
        logger.info("step %d  stopped: %s is best since step %d (%.4g)", step, self.monitor, self.best_step, self.best)
        return False

    def on_eval_end(self, step: int, metrics: Mapping[str, float]) -> None:
        """Compares an evaluation, if that is what is monitored."""
        if self.monitor.startswith("eval/"):
            self._compare(step, self._pick(metrics, self.monitor.removeprefix("eval/")))

    def state_dict(self) -> dict[str, Any]:
        """The best value so far, its step, and the sum of the current interval."""
        best = self.best if math.isfinite(self.best) else None
        return {"best": best, "best_step": self.best_step, "sum": float(self._sum), "count": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a saved state.

        Raises:
            CheckpointError: If it is not a state of this callback.
        """
        best, total = (0.0 if state[name] is None else state[name] for name in ("best", "sum"))
        for name, value in (("best", best), ("sum", total)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise CheckpointError(f"The state of EarlyStoppingCallback has {name} {value!r}, expected a number.")
        self.best_step, self._count = (
            whole_number(f"{name} of EarlyStoppingCallback", state[name], 0, error=CheckpointError)
            for name in ("best_step", "count")
        )
        self.best, self._sum = math.inf if state["best"] is None else float(best), float(total)

    def _pick(self, values: Mapping[str, Any], name: str) -> Any:
        if name not in values:
            raise ConfigurationError(
                f"EarlyStoppingCallback monitors '{self.monitor}', which is no loss of this model"
                f"{nearest(name, values)} There are: {', '.join(values)}."
            )
        return values[name]

    def _compare(self, step: int, value: float) -> None:
        if value < self.best - self.min_delta:
            self.best, self.best_step = value, step


def _import_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingDependencyError(
            "LoggingCallback writes TensorBoard logs, which needs tensorboard. Install it with: "
            f"{install_hint('extra')}; or set its attribute tensorboard_log to None."
        ) from error
    return SummaryWriter


def _new_directory(parent: Path, name: str) -> Path:
    """The first of `name_1`, `name_2`, ... that does not exist yet."""
    number = 1
    while (parent / f"{name}_{number}").exists():
        number += 1
    return parent / f"{name}_{number}"
