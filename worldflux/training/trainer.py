"""The `Trainer`, which owns the gradient step and training on stored experience."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from worldflux.accel import ranks
from worldflux.accel.allocator import keep_freed_memory
from worldflux.accel.compilation import captures, compiles
from worldflux.accel.cuda_graphs import CudaGraphCapturer
from worldflux.accel.device import resolve_device
from worldflux.accel.randomness import random_state
from worldflux.diagnostics.health import Health, check_health
from worldflux.errors import ConfigurationError, TrainingError
from worldflux.files import checked_path
from worldflux.models.base import OptimizerSpec, Phase, WorldModel
from worldflux.models.finite import first_not_finite, weights_of
from worldflux.reading import only_our_errors
from worldflux.replay.batch import Batch
from worldflux.replay.provider import (
    Batches,
    BatchProvider,
    BatchRequestProvider,
    TaskReplay,
    batches_from,
)
from worldflux.replay.sampler import WindowSampler
from worldflux.training.callback_list import CallbackList
from worldflux.training.callbacks import Callback, CheckpointCallback, Losses
from worldflux.training.captured_step import CapturedStep
from worldflux.training.checkpoint import (
    check_target,
    directory_of_all_ranks,
    new_run,
    newest_for_all_ranks,
    of_rank,
    read_checkpoint,
    write_files,
    writing_checkpoint,
)
from worldflux.training.config import TrainingConfig, check_changes
from worldflux.training.continuation import Continuation, checked_share, held_out
from worldflux.training.fitting import check_first_batch, check_kind, inputs_to_watch, provider_for, warn_of_overruled
from worldflux.training.gradient_step import (
    FiniteWatch,
    GradientStep,
    Updated,
    WriteBack,
    mean_losses,
    phases_of,
)
from worldflux.training.optim import build_optimizer
from worldflux.training.signals import StopRequest, agreed, stopping_on_signals
from worldflux.validation import check_flag, whole_number

logger = logging.getLogger("worldflux.training")

Provider = BatchProvider | BatchRequestProvider | Mapping[str, WindowSampler]

_EVAL_BATCHES = 8
_DEFAULT_SPEC = OptimizerSpec(kind="adam", learning_rate=3e-4)
"""The optimiser of modules that do not say how they are optimised."""


class Trainer:
    """Owns the gradient step of a model: its optimisers, clipping, what follows a step, and how all of it is saved.

    A `WorldModel` says through `optimizer_spec`, `phases` and `after_step` how it is optimised. Any other `nn.Module`
    with a `loss(batch)` is trained with Adam; its loss may be a scalar tensor, a dict of scalars with the key `"loss"`,
    or a `LossOutput`. The kind of optimiser, its betas and eps and its adaptive clipping come from the specification;
    the learning rate, warm-up, weight decay and clipping by the global norm come from `config`.

    Attributes:
        model: The model, on `device`.
        config: The settings.
        device: Where training takes place.
        eval_data: The data evaluated every `eval_interval` steps, or None. While `train` runs with a share to hold
            out, the data held out.
        step_count: Number of gradient steps done.
        target_step: Step at which the current call of `train` ends.
        finished: True once `train` has ended without an error.
        interrupted: True once Ctrl-C or SIGTERM has ended `train` after a whole step.
        in_step: True inside a gradient step, and after an error that was raised inside one.
        run: Unique name of the run. Loading a checkpoint sets it to that of the checkpoint's run.

    Args:
        model: The model to train; it is moved to `config.device`.
        config: The settings; None takes the defaults of `TrainingConfig`.
        callbacks: Called in this order; a `CheckpointCallback` comes after all others, whose states it saves.
        eval_data: Data for evaluation, in the same forms as for `train`; or a share between 0 and 1 of the episodes in
            the buffer of `train`, which are drawn with `config.seed` and not trained on.

    Raises:
        ConfigurationError: If the model has no loss or nothing to train, or the device does not exist.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainingConfig | None = None,
        callbacks: Iterable[Callback] = (),
        *,
        eval_data: Provider | float | None = None,
    ) -> None:
        self._config = config if config is not None else TrainingConfig()
        ranks.join()
        self.device = resolve_device(self.config.device)
        self.model = model.to(self.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        self._held_out_share = checked_share(eval_data) if isinstance(eval_data, int | float) else None
        self.eval_data = None if isinstance(eval_data, int | float) else eval_data
        self.step_count = self.target_step = 0
        self.finished = self.interrupted = self.in_step = False
        self.run = new_run()
        self._batches: Batches | None = None  # while `train` runs
        self._callbacks = CallbackList()
        for callback in callbacks:
            self.add_callback(callback)

        spec = replace(
            getattr(model, "optimizer_spec", _DEFAULT_SPEC),
            learning_rate=self.config.learning_rate,
            warmup_steps=self.config.warmup_steps,
            weight_decay=self.config.weight_decay,
        )
        self._kind = spec.kind
        phases = phases_of(model)
        self._optimizers = [build_optimizer(spec, phase.parameters) for phase in phases]
        self._take_step = self._step_of(phases)
        ranks.spread(model)
        warn_of_overruled(self.model, self.config)
        self._watch = FiniteWatch()
        self._write_back = WriteBack()
        self._data = Continuation(self.device)
        self._last_batch: Batch | None = None

    def __getstate__(self) -> dict[str, Any]:
        self._write_back.flush()
        return {name: value for name, value in vars(self).items() if name != "_take_step"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # The losses of the phases are bound to a model: in a copy, to the copied model.
        vars(self).update(state)
        self._take_step = self._step_of(phases_of(self.model))

    def _step_of(self, phases: list[Phase]) -> Callable[[Batch], Updated]:
        """The function that takes a gradient step on a batch from any device, as `config.compile` asks for."""
        if compiles(self.config.compile, self.device) and isinstance(self.model, WorldModel):
            self.model.compile_functions()
        step = GradientStep(self.model, phases, self._optimizers, self.config.grad_clip)
        if ranks.size() == 1 and captures(self.config.compile, self.device, self.model):
            return CapturedStep(step, self.device, CudaGraphCapturer(self.device))
        return lambda batch: step(batch.to(self.device))

    def __repr__(self) -> str:
        """The model's class, the sizes of a step, and the steps done."""
        c = self.config
        return (
            f"Trainer({type(self.model).__name__}, batches of {c.batch_size} x {c.sequence_length}, "
            f"learning_rate={c.learning_rate:g}, device={str(self.device)!r}, step_count={self.step_count})"
        )

    @property
    def config(self) -> TrainingConfig:
        """The settings. `log_interval` and `eval_interval` may be changed at any time, and the sizes of batches,
        `total_steps`, `save_interval` and `seed` between two calls of `train`.
        """
        return self._config

    @config.setter
    def config(self, config: TrainingConfig) -> None:
        check_changes(self._config, config, running=self._batches is not None)
        self._config = config

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """The optimisers, one for each phase of a step, in order."""
        return self._optimizers

    def add_callback(self, callback: Callback) -> None:
        """Adds a callback after the others, but before any `CheckpointCallback`.

        If `train` is running, `on_train_begin` of the callback is called at once.

        Raises:
            ConfigurationError: If it does not derive from `Callback`.
        """
        self._callbacks.check(callback)
        if self._batches is not None:
            if isinstance(callback, CheckpointCallback):
                callback.directory.hold()
                callback.directory.check_owner(self.run, "resume it instead of this one")
            callback.on_train_begin(self)
        self._callbacks.add(callback)

    # Training

    def train(self, buffer: Provider, num_steps: int | None = None, *, resume: bool = False) -> nn.Module:
        """Trains on batches of stored experience.

        A new trainer seeds Python, NumPy, torch and the buffer's sampler with `config.seed`, so that two runs on a CPU
        give the same bits. A trainer that has loaded a checkpoint continues the checkpoint's random streams instead:
        with the same data, it gives the bits of a run that was not interrupted.

        After Ctrl-C or SIGTERM the current step is finished and saved by the `CheckpointCallback`, if there is one;
        then `KeyboardInterrupt` or `SystemExit(143)` is raised.

        While the model trains on a batch, the next one is sampled from a `ReplayBuffer` on another thread. The `sample`
        of other providers is called on this thread.

        Args:
            buffer: A `ReplayBuffer`, or anything with `sample(batch_size, seq_len=None, device="cpu")` or
                `sample(BatchRequest)`; or several buffers by the names of their tasks.
            num_steps: Number of gradient steps to do now. None: as many as are left of `config.total_steps`.
            resume: Continue from the newest checkpoint of this trainer's `CheckpointCallback`, or begin if there is
                none yet. A job that is started again with the same command then continues.

        Returns:
            The trained model, in evaluation mode.

        Raises:
            ConfigurationError: If `num_steps` is not a whole number from 0, `resume` is neither True nor False, nothing
                can be held out of the buffer, there is no `CheckpointCallback` to resume from, or a callback calls this
                method.
            CheckpointError: If the checkpoint is damaged, of another model, or was trained on other data.
            TrainingError: If a loss is not finite; it names the term and the first such step.
        """
        if self._batches is not None:
            raise ConfigurationError(
                "A callback has called train() of the trainer that is training. Let the callback return False to end "
                "this call, and call train() again after it; step(batch) takes a single further step."
            )
        check_flag(
            "resume",
            resume,
            " With True, training goes on from the newest checkpoint in the directory of the CheckpointCallback: "
            "train(..., callbacks=[CheckpointCallback(DIRECTORY)], resume=True).",
        )
        self.run = ranks.on_first(lambda: self.run)
        with ExitStack() as held:
            held.callback(self._callbacks.release_directories)  # also of callbacks that are added meanwhile
            for directory in self._callbacks.directories:
                directory.hold()
            if resume:
                self._load_newest()
            for directory in self._callbacks.directories:
                directory.check_owner(self.run, "pass resume=True to train")
            self._train(buffer, num_steps, resume)
        return self.model.eval()

    def _train(self, buffer: Provider, num_steps: int | None, resume: bool) -> None:
        """Does what `train` does, once the directories of checkpoints are known to be this run's."""
        config = self.config
        self.target_step = (
            config.total_steps if num_steps is None else self.step_count + whole_number("num_steps", num_steps, 0)
        )
        self.finished = self.interrupted = False
        data = provider_for(self.model, buffer)
        if self._held_out_share is not None:
            seq_len = config.sequence_length
            data, self.eval_data = held_out(data, self._held_out_share, seed=config.seed, seq_len=seq_len)
        for source in (data, self.eval_data):
            check_kind(self.model, provider_for(self.model, source))
        self._data.check_data(data, resume=resume)
        batch_size = ranks.share_of("batch_size", config.batch_size)
        self._data.start(data, seed=ranks.seed_of_rank(config.seed) if self.step_count == 0 else None)
        try:
            with stopping_on_signals() as stop:
                try:
                    with batches_from(data, batch_size, config.sequence_length, self.device) as self._batches:
                        self._run(self._batches, stop)
                finally:
                    self._batches = None
                    self._callbacks.on_train_end(self)
        finally:
            if self._held_out_share is not None:
                self.eval_data = None

    def _run(self, batches: Batches, stop: StopRequest) -> None:
        """Runs the loop of `train`."""
        for callback in self._callbacks:
            callback.on_train_begin(self)
        if self._data.restored is not None:
            self._callbacks.load_states(self._data.restored.get("callbacks", []))
        keep_going = agreed(True, stop)
        while keep_going and self.step_count < self.target_step:
            with stop.timing():
                losses = Losses(self.step(batches.next(), batches.provider))
            batches.settle()
            if self.step_count % self.config.log_interval == 0:
                self.check_finite()
            if self.eval_data is not None and self.step_count % self.config.eval_interval == 0:
                self._callbacks.on_eval_end(self.step_count, ranks.on_first(partial(self.evaluate, self.eval_data)))
            keep_going = agreed(self._callbacks.on_step_end(self.step_count, losses), stop)
            if self._data.restored is not None:  # a callback has loaded a checkpoint
                batches.forget()
                self._data.start(batches.provider, seed=None)
        self.check_finite()
        self._write_back.flush()
        self.interrupted = bool(stop)
        self.finished = not self.interrupted

    def step(self, batch: Batch, buffer: Any = None) -> dict[str, Tensor]:
        """Takes a gradient step: each phase's loss, its gradient and its optimiser; then the model's `after_step`.

        The host waits for nothing here. Call `check_finite` where losses are read.

        Args:
            batch: Windows to learn from; they are moved to the device if necessary.
            buffer: The source of the batch. If the batch brought extras from there, those that the model has computed
                anew (`LossOutput.extras`) are written back; on CUDA one step later, when they have arrived.

        Returns:
            Detached scalars on the device: the loss terms, `"loss"` (the sum over the phases) and `"grad_norm"` before
            clipping (over all phases). For a model with several phases also `"<phase>_loss"` and `"<phase>_grad_norm"`.
        """
        self._data.restored = None
        if buffer is not None:
            self._data.source = buffer
        if self._last_batch is None and not batch.rewards.is_meta:  # meta tensors have no values
            check_first_batch(self.model, batch, self.step_count + 1)
        self._last_batch = batch
        self.in_step = True
        updated = self._take_step(batch)
        self.step_count += 1
        self.in_step = False
        self._watch.see(self.step_count, {**inputs_to_watch(batch, buffer, self.device), **updated.losses})
        self._write_back.push(buffer, batch, updated.extras)
        return updated.losses

    def check_finite(self) -> None:
        """Checks that the losses of all steps so far were finite. Waits for the device.

        Raises:
            TrainingError: If one was not; it names the terms and the first such step.
        """
        self._watch.check()

    def check_good(self) -> None:
        """Checks that the model is worth saving: all losses so far and all weights are finite.

        Raises:
            TrainingError: If one is not; it names the term or the weight.
        """
        self.check_finite()
        if found := first_not_finite(weights_of(self.model)):
            raise TrainingError(
                f"Nothing is saved: of the model's weights {found}. Take an earlier checkpoint, or train again with a "
                "lower learning_rate."
            )

    def evaluate(self, data: Provider, num_batches: int = _EVAL_BATCHES) -> dict[str, float]:
        """Computes mean losses on data that is not trained on.

        Every evaluation uses the same random numbers and, if the data can be seeded, the same windows, so that the
        results of a run can be compared with each other. Training is not affected: the model, torch's random stream
        and the sampler of the data are as before.

        Args:
            data: The data, in the same forms as for `train`.
            num_batches: Number of batches of `config.batch_size` windows to average over.

        Returns:
            The means of the loss terms and of `"loss"`; with data of several tasks also `"loss/<task>"` of each.

        Raises:
            ConfigurationError: If `num_batches` is not a whole number from 1.
        """
        num_batches, source = whole_number("num_batches", num_batches, 1), provider_for(self.model, data)
        total = mean_losses(self.model, source, self.config, self.device, num_batches)
        for task, part in source.parts().items() if isinstance(source, TaskReplay) else ():
            total[f"loss/{task}"] = mean_losses(self.model, part, self.config, self.device, num_batches)["loss"]
        return dict(Losses(total))

    def health(self) -> Health:
        """Measures the health of the model on the batch that it was trained on last.

        `DreamerV3.health` and `TDMPC2.health` list what each family measures and the thresholds: latents that carry no
        information, codes that are never used, saturated groups, values beyond what the rewards allow. The call costs
        one forward pass, waits for the device, and does not affect training. `LoggingCallback` and the agent's log
        call it at their intervals.

        Raises:
            TrainingError: If no step was taken yet.
        """
        if self._last_batch is None:
            raise TrainingError("There was no gradient step yet, so there is no batch to look at. Train first.")
        return check_health(self.model, self._last_batch, seed=self.config.seed)

    # Checkpoints

    def save_checkpoint(self, path: str | Path) -> None:
        """Writes everything that a run needs to be continued into a directory, whole or not at all.

        `model.safetensors` and `config.json` (if the model has a configuration) are what `save_pretrained` writes;
        `optimizer.pt` holds the states of the optimisers, `trainer.json` the step, the settings, the callbacks' states
        and the random states, that of the buffer's sampler included. The buffer's content is not saved; a digest of
        the data that `train` was given is, so that resuming on other data is noticed.

        Args:
            path: The directory. If it holds a checkpoint, that is replaced.

        Raises:
            TrainingError: If a loss or a weight is not finite: then an older checkpoint is worth more.
            CheckpointError: If `path` holds something else, or cannot be written.
        """
        path = checked_path("path", path)
        ranks.on_first(partial(check_target, path))
        with writing_checkpoint(path), directory_of_all_ranks(path) as beside:
            self.write_checkpoint(beside, of_all_ranks=True)

    def write_checkpoint(self, directory: Path, *, of_all_ranks: bool = False) -> None:
        """Writes the same files into a directory that exists and that others add further files to.

        Args:
            directory: A directory that has no such files yet.
            of_all_ranks: Whether all ranks write into this directory: every rank its random states and what belongs to
                its own data, rank 0 also the rest. Otherwise only this rank writes, and everything.

        Raises:
            TrainingError: If a loss or a weight is not finite.
        """
        self.check_good()
        self._write_back.flush()
        entries, extras = self._data.saved(self._batches, self._callbacks.states())
        progress = {
            "step": self.step_count,
            "run": self.run,
            "training_config": self.config.to_dict(),
            "random": random_state(self.device),
            **entries,
        }
        write_files(directory, self.model, self._kind, self._optimizers, progress, extras, of_all_ranks=of_all_ranks)

    def load_checkpoint(self, path: str | Path, *, allow_nonfinite: bool = False) -> None:
        """Restores the weights, the states of the optimisers, the step and the random states of a checkpoint.

        `train` and `step` then give the same bits as a run that was not interrupted (on a CPU, with the same buffer).
        The learning rate, warm-up, weight decay and betas stay those of this trainer's configuration. Everything is
        read and checked before anything is changed.

        A callback may call this method while `train` runs, to go back: the next step is the one after the checkpoint,
        on the same batch as before. The callbacks keep their states.

        Args:
            path: A directory that `save_checkpoint` wrote.
            allow_nonfinite: Accept NaN and infinite numbers in weights and optimiser states, to inspect them.

        Raises:
            CheckpointError: If it is missing, damaged, of another model, or its numbers are not finite.
        """
        path = checked_path("path", path)
        with only_our_errors(path):
            saved = read_checkpoint(
                path, self.model, self._kind, self._optimizers, self.device, allow_nonfinite=allow_nonfinite
            )
            progress, extras = of_rank(path, saved, ranks.rank(), ranks.size(), self.device)
        self.model.load_state_dict(saved.weights)
        for optimizer, state in zip(self._optimizers, saved.optimizers, strict=True):
            optimizer.load_state_dict(state)
        self.step_count = saved.progress["step"]
        self.run = saved.progress["run"]
        self._watch = FiniteWatch()
        self._write_back = WriteBack()
        self._data.load(progress, extras)

    def _load_newest(self) -> None:
        """Loads the newest checkpoint of this trainer's `CheckpointCallback`, if there is one."""
        directories = self._callbacks.directories
        if not directories:
            raise ConfigurationError(
                "resume=True goes on from what a CheckpointCallback saved, and this trainer has none. Add one, or call "
                "load_checkpoint(directory) before train(buffer)."
            )
        directory = directories[0].path
        if (newest := newest_for_all_ranks(directory)) is None:
            logger.info("no checkpoint in %s yet: training begins", directory)
            return
        self.load_checkpoint(newest)
        logger.info("resumed from %s at step %d", newest, self.step_count)
