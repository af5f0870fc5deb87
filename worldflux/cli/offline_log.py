"""The log of a training without an environment, in the files that SB3's logger writes for an agent."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path

from stable_baselines3.common.logger import Logger

from worldflux.cli.run_callbacks import LINES, run_logger
from worldflux.training.callbacks import Callback
from worldflux.training.trainer import Trainer


class OfflineLog(Callback):
    """Writes losses (`train/`) at each `log_interval` of the trainer, and evaluations (`eval/`).

    Where there is no terminal for a bar, some lines on stderr say how far the training is.

    Attributes:
        last_eval: The means of the last evaluation; empty before the first.

    Args:
        directory: For the files.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.last_eval: Mapping[str, float] = {}
        self._logger: Logger | None = None
        self._interval = 1
        self._began = (0.0, 0)
        self._target = 1

    def on_train_begin(self, trainer: Trainer) -> None:
        """Opens the files, of the next part if the run goes on."""
        self._logger = run_logger(self.directory)
        self._interval, self._target = trainer.config.log_interval, trainer.target_step
        self._began = (time.monotonic(), trainer.step_count)
        if trainer.step_count:
            print(f"worldflux: going on at step {trainer.step_count} of {self._target}", file=sys.stderr)

    def on_step_end(self, step: int, losses: Mapping[str, float]) -> None:
        """Writes a row where one is due."""
        if step % self._interval == 0:
            self._write(step, {f"train/{name}": value for name, value in losses.items()})
        if not sys.stderr.isatty() and step * LINES // self._target > (step - 1) * LINES // self._target:
            since, before = self._began
            rate = (step - before) / max(time.monotonic() - since, 1e-9)
            kept = f", {self.last_eval['loss']:.4g} on the steps that are kept" if self.last_eval else ""
            print(f"step {step}/{self._target}  loss {losses['loss']:.4g}{kept}  {rate:.3g} steps/s", file=sys.stderr)

    def on_eval_end(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes a row of its own."""
        self.last_eval = dict(metrics)
        self._write(step, {f"eval/{name}": value for name, value in metrics.items()})

    def on_train_end(self, trainer: Trainer) -> None:
        """Closes the files."""
        if self._logger is not None:
            self._logger.close()

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        assert self._logger is not None, "on_train_begin comes first"
        for name, value in values.items():
            self._logger.record(name, value)
        self._logger.record("time/total_timesteps", step, exclude="tensorboard")
        self._logger.record("time/time_elapsed", int(time.monotonic() - self._began[0]), exclude="tensorboard")
        self._logger.dump(step)
