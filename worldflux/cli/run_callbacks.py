"""Callbacks of runs: evaluations, progress, and the files of the log."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import KVWriter, Logger, make_output_format
from stable_baselines3.common.vec_env import VecEnv

from worldflux.agents import WorldFluxAgent
from worldflux.agents.collecting import env_of, policy_for
from worldflux.agents.progress import ProgressBar
from worldflux.cli.options import counted
from worldflux.cli.provenance import installed_version
from worldflux.cli.runs import (
    BEST_AGENT_FILE,
    EVALUATIONS_FILE,
    Evaluation,
    read_evaluations,
    write_evaluations,
)
from worldflux.envs import TaskVecEnv
from worldflux.errors import StoppedError
from worldflux.training.callbacks import Callback
from worldflux.training.trainer import Trainer

LINES = 20
"""Number of progress lines in a whole run if stderr is not a terminal."""

EVALUATION_SEED = 10_000
"""Offset from the seed of the run to that of its evaluations. Every evaluation starts with the same episodes, so that
scores can be compared and a resumed run evaluates like one that was never stopped."""


def run_logger(directory: Path, outputs: Sequence[KVWriter] = ()) -> Logger:
    """A logger of SB3 that writes new files for each part of a run: `progress.csv`, `progress-2.csv`, ...

    Args:
        directory: Directory for the files.
        outputs: Further outputs.
    """
    directory.mkdir(parents=True, exist_ok=True)
    formats = ["csv", "json", *(["tensorboard"] if installed_version("tensorboard") else [])]
    part = 1 + len(list(directory.glob("progress*.csv")))
    # SB3 would overwrite existing files, and follow links.
    while any(os.path.lexists(directory / f"progress{_suffix(part)}.{kind}") for kind in ("csv", "json")):
        part += 1
    files = [make_output_format(name, str(directory), _suffix(part)) for name in formats]
    return Logger(str(directory), [*files, *outputs])


def _suffix(part: int) -> str:
    return "" if part == 1 else f"-{part}"


class ProgressLines:
    """Prints `LINES` lines about the progress of a whole run on stderr.

    Args:
        total: Number of steps of the whole run.
        done: Number of steps when this part of the run begins.
        unit: Name of what is counted.
    """

    def __init__(self, total: int, done: int, unit: str = "step") -> None:
        self._total, self._last, self._unit = total, done, unit
        self._began = (time.monotonic(), done)

    def is_due(self, step: int) -> bool:
        """Whether a line is due at this step. Every step is asked for once."""
        before, self._last = self._last, step
        return step * LINES // self._total > before * LINES // self._total

    def line(self, step: int, text: str) -> str:
        """The line for a step."""
        since, before = self._began
        rate = (step - before) / max(time.monotonic() - since, 1e-9)
        shown = f"{rate:,.0f}" if rate >= 1000 else f"{rate:.3g}"
        return f"{self._unit} {step}/{self._total}  {text}{shown} {self._unit}s/s"


class Progress(ProgressBar):
    """Shows the progress of an agent's run on stderr: a bar on a terminal if tqdm is installed, otherwise lines.

    Args:
        total: Number of steps of the whole run.
    """

    def __init__(self, total: int) -> None:
        super().__init__(total)
        self._whole = total
        self._lines = ProgressLines(total, 0)

    def say(self, text: str) -> None:
        """Prints a line, above the bar if there is one."""
        if self._bar is None:
            print(text, file=sys.stderr, flush=True)
        else:
            self._bar.write(text, file=sys.stderr)

    def _on_training_start(self) -> None:
        self._lines = ProgressLines(self._whole, self.num_timesteps)
        if sys.stderr.isatty() and installed_version("tqdm"):
            super()._on_training_start()

    def _on_step(self) -> bool:
        if self._bar is None and self._lines.is_due(self.num_timesteps):
            line = self._lines.line(self.num_timesteps, f"{self._score()}  " if self._score() else "")
            self.say(", ".join(part for part in (line, super().text()) if part))
        return super()._on_step()

    def text(self) -> str:
        """What stands behind the bar: the mean score, and the remaining time."""
        return ", ".join(part for part in (self._score().partition(" (")[0], super().text()) if part)

    def _score(self) -> str:
        infos = self.model.ep_info_buffer
        if not infos:
            return ""
        return f"training score {np.mean([info['r'] for info in infos]):.4g} (mean of {counted(len(infos), 'episode')})"


class Evaluations(BaseCallback):
    """Evaluates the agent at an interval, and writes the learning curve and the best agent.

    Args:
        envs: Environments of the evaluations.
        directory: Directory of the run.
        interval: Environment steps between two evaluations.
        episodes: Number of episodes in each evaluation, of each task.
        seed: Seed of the run.
        say: Prints a line.
    """

    model: WorldFluxAgent

    def __init__(
        self, envs: VecEnv, directory: Path, *, interval: int, episodes: int, seed: int, say: Callable[[str], None]
    ) -> None:
        super().__init__()
        self.envs, self.interval, self.episodes, self.seed, self.say = envs, interval, episodes, seed, say
        self.path, self.best_path = directory / EVALUATIONS_FILE, directory / BEST_AGENT_FILE
        self.rows: list[Evaluation] = []
        self._began = 0.0

    @property
    def best(self) -> Evaluation | None:
        """The first evaluation with the highest score; None before the first evaluation."""
        return max(self.rows, key=lambda row: row.score, default=None)

    def _on_training_start(self) -> None:
        # A killed run may have written evaluations after its last checkpoint; they are repeated.
        self.rows = [row for row in read_evaluations(self.path) if row.step <= self.num_timesteps]
        self._began = time.monotonic() - (self.rows[-1].seconds if self.rows else 0.0)
        self._evaluate_if_due()  # the run may have been stopped in the middle of an evaluation

    def _on_step(self) -> bool:
        self._evaluate_if_due()
        return True

    def _evaluate_if_due(self) -> None:
        last = self.rows[-1].step if self.rows else 0
        if self.num_timesteps // self.interval > last // self.interval and not self.model.stopping:
            self._evaluate()

    def _evaluate(self) -> None:
        self.envs.seed(self.seed + EVALUATION_SEED)
        envs = env_of(self.envs, like=self.model)
        parts = envs.parts() if isinstance(envs, TaskVecEnv) else {"": envs}
        scores: list[float] = []
        lengths: list[int] = []
        tasks: dict[str, float] = {}
        try:
            for name, part in parts.items():
                policy = policy_for(self.model, part)
                found: Any = evaluate_policy(
                    policy, part, self.episodes, callback=self._go_on, return_episode_rewards=True
                )
                scores, lengths = scores + found[0], lengths + found[1]
                tasks[name] = round(float(np.mean(found[0])), 4)
        except StoppedError:
            return
        row = Evaluation(
            step=self.num_timesteps,
            score=round(float(np.mean(scores)), 4),
            std=round(float(np.std(scores)), 4),
            length=float(np.mean(lengths)),
            episodes=len(scores),
            seconds=round(time.monotonic() - self._began, 1),
            seed=self.seed,
            tasks=tasks if len(tasks) > 1 else {},
        )
        improved = self.best is None or row.score > self.best.score
        if improved:
            self.model.save(self.best_path)
        self.rows.append(row)
        write_evaluations(self.path, self.rows)
        self.logger.record("eval/mean_reward", row.score)
        for name, score in row.tasks.items():
            self.logger.record(f"eval/mean_reward/{name}", score)
        self.logger.record("eval/mean_ep_length", row.length)
        self.logger.record("time/total_timesteps", self.num_timesteps, exclude="tensorboard")
        self.logger.dump(self.num_timesteps)
        best = "the best so far" if improved else f"the best is {self.best.score:g}" if self.best else ""
        over = counted(row.episodes, "episode")
        if row.tasks:
            over += f" ({', '.join(f'{name} {score:.4g}' for name, score in row.tasks.items())})"
        self.say(f"step {row.step}  evaluation: {row.score:.4g} ± {row.std:.3g} over {over}, {best}")

    def _go_on(self, *args: Any) -> None:
        if self.model.stopping:  # a user who waits for the end of the step should not wait for many episodes
            raise StoppedError("The run was asked to stop, so that its evaluation ends.")


def progress_bar(total: int, done: int = 0, unit: str = "step") -> Any:
    """A progress bar of tqdm on stderr; None if tqdm is not installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(total=total, initial=done, unit=unit, dynamic_ncols=True, file=sys.stderr)


class OfflineLog(Callback):
    """Logs the losses (`train/`) at each `log_interval` of the trainer, and the evaluations (`eval/`).

    If stderr is not a terminal, it also prints lines about the progress.

    Attributes:
        last_eval: Mean losses of the last evaluation; empty before the first one.

    Args:
        directory: Directory for the files.
        outputs: Further outputs of the log.
    """

    first_rank_only = True

    def __init__(self, directory: Path, outputs: Sequence[KVWriter] = ()) -> None:
        self.directory, self.outputs = directory, tuple(outputs)
        self.last_eval: Mapping[str, float] = {}
        self._logger: Logger | None = None
        self._interval = 1
        self._began = 0.0
        self._lines = ProgressLines(1, 0)

    def on_train_begin(self, trainer: Trainer) -> None:
        """Opens the files for this part of the run."""
        self._logger = run_logger(self.directory, self.outputs)
        self._interval, self._began = trainer.config.log_interval, time.monotonic()
        self._lines = ProgressLines(trainer.target_step, trainer.step_count)

    def on_step_end(self, step: int, losses: Mapping[str, float]) -> None:
        """Writes a row and prints a line where they are due."""
        if step % self._interval == 0:
            self._write(step, {f"train/{name}": value for name, value in losses.items()})
        if self._lines.is_due(step) and not sys.stderr.isatty():
            held_out = f", {self.last_eval['loss']:.4g} on the held-out steps" if self.last_eval else ""
            print(self._lines.line(step, f"loss {losses['loss']:.4g}{held_out}  "), file=sys.stderr)

    def on_eval_end(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes the evaluation as a row of its own."""
        self.last_eval = dict(metrics)
        self._write(step, {f"eval/{name}": value for name, value in metrics.items()})

    def on_train_end(self, trainer: Trainer) -> None:
        """Closes the files."""
        if self._logger is not None:
            self._logger.close()

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        assert self._logger is not None, "on_train_begin has opened it"
        for name, value in values.items():
            self._logger.record(name, value)
        self._logger.record("time/total_timesteps", step, exclude="tensorboard")
        self._logger.record("time/time_elapsed", int(time.monotonic() - self._began), exclude="tensorboard")
        self._logger.dump(step)
