"""The gradient step, and training on stored experience."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from worldflux.accel.allocator import keep_freed_memory
from worldflux.accel.compilation import captures, compiles
from worldflux.accel.cuda_graphs import CudaGraphCapturer
from worldflux.accel.device import resolve_device
from worldflux.accel.overriding import overridden
from worldflux.config import WorldModelConfig
from worldflux.diagnostics.health import Health, check_health
from worldflux.errors import CheckpointError, ConfigurationError, TrainingError
from worldflux.files import atomic_directory, checked_path, give_rights_of, remove_leftovers
from worldflux.models.base import CONFIG_FILE, WEIGHTS_FILE, OptimizerSpec, Phase, WorldModel
from worldflux.models.evaluation import evaluating
from worldflux.models.finite import first_not_finite, weights_of
from worldflux.models.weights import check_weights
from worldflux.reading import only_our_errors
from worldflux.replay.batch import Batch
from worldflux.replay.provider import (
    SAMPLES,
    Batches,
    BatchProvider,
    BatchRequestProvider,
    Resumable,
    batches_from,
    sample_from,
)
from worldflux.replay.sampler import WindowSampler
from worldflux.training.callbacks import Callback, CheckpointCallback, Losses
from worldflux.training.captured_step import CapturedStep
from worldflux.training.checkpoint import (
    EXTRAS_FILE,
    FORMAT,
    OPTIMIZER_FILE,
    TRAINER_FILE,
    check_progress,
    check_target,
    new_run,
    newest_checkpoint,
    read_checkpoint,
    read_optimizers,
    run_of,
    time_of_saving,
    weights_on_cpu,
    writing_checkpoint,
)
from worldflux.training.config import TrainingConfig
from worldflux.training.fitting import check_first_batch, check_kind, warn_of_overruled
from worldflux.training.gradient_step import (
    OF_BATCH,
    FiniteWatch,
    GradientStep,
    Updated,
    WriteBack,
    as_loss_output,
    phases_of,
)
from worldflux.training.optim import build_optimizer
from worldflux.training.randomness import random_state, seed_everything, set_random_state
from worldflux.training.saving import CheckpointDirectory, call_all
from worldflux.training.signals import StopRequest, stopping_on_signals
from worldflux.validation import whole_number

logger = logging.getLogger("worldflux.training")

ModelT = TypeVar("ModelT", bound=nn.Module)
Provider = BatchProvider | BatchRequestProvider

_EVAL_BATCHES = 8
_READ_IN_EACH_STEP = ("log_interval", "eval_interval")
_READ_BY_TRAIN = ("total_steps", "batch_size", "sequence_length", "save_interval", "seed")
"""Settings that a trainer does not build anything with."""
_DEFAULT_SPEC = OptimizerSpec(kind="adam", learning_rate=3e-4)
"""For modules that don't say how they are optimised."""


@runtime_checkable
class Digestible(Protocol):
    """Data that can be told from other data."""

    def digest(self) -> str:
        """A short text that other data would not have."""


class Trainer:
    """Owns the gradient step of a model: optimisers, clipping, what follows a step, and how all of it is saved.

    A `WorldModel` says through `optimizer_spec`, `phases` and `after_step` how it is optimised. Any other `nn.Module`
    with a `loss(batch)` is trained with Adam; its loss may be a scalar tensor, a dict of scalars with the key `"loss"`,
    or a `LossOutput`. Of the specification, the kind, betas, eps and adaptive clipping are used; rate, warm-up, weight
    decay and clipping by the global norm come from `config`.

    Attributes:
        model: The model, on `device`.
        config: The settings.
        device: Where training takes place.
        eval_data: What is evaluated every `eval_interval` steps, or None; what `train` holds out, while it runs.
        step_count: Gradient steps done.
        target_step: Step at which the current call of `train` ends.
        finished: True once `train` has ended without an error.
        interrupted: True once Ctrl-C or SIGTERM has ended `train` behind a whole step.
        in_step: True inside a gradient step, also once an error has ended it there.
        run: Name of the run, which no other has; a checkpoint that is loaded brings that of its run.

    Args:
        model: Moved to `config.device`.
        config: Defaults as documented in `TrainingConfig`.
        callbacks: Called in this order, a `CheckpointCallback` behind the others: it saves what they remember.
        eval_data: Experience kept from training, in the same forms as for `train`; or a share between 0 and 1, which
            `train` then holds out of its buffer, in whole episodes that `config.seed` draws.

    Raises:
        ConfigurationError: If the model has no loss or nothing to train, or the device is not there.
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
        self.device = resolve_device(self.config.device)
        self.model = model.to(self.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        self._held_out_share = _share(eval_data) if isinstance(eval_data, int | float) else None
        self.eval_data = None if isinstance(eval_data, int | float) else eval_data
        self.step_count = 0
        self.target_step = 0
        self.finished = False
        self.interrupted = False
        self.in_step = False
        self.run = new_run()
        self._batches: Batches | None = None  # while `train` runs
        self._callbacks: list[Callback] = []
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
        warn_of_overruled(self.model, self.config)
        self._watch = FiniteWatch()
        self._write_back = WriteBack()
        self._sampler: Any = None  # what the last batch came from
        self._restored: dict[str, Any] | None = None
        self._restored_extras: dict[str, Tensor] = {}
        self._data_digest: str | None = None
        self._last_batch: Batch | None = None

    def __getstate__(self) -> dict[str, Any]:
        self._write_back.flush()
        return {name: value for name, value in vars(self).items() if name != "_take_step"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # The losses of the phases are bound to their model: those of a copy belong to the copied model.
        vars(self).update(state)
        self._take_step = self._step_of(phases_of(self.model))

    def _step_of(self, phases: list[Phase]) -> Callable[[Batch], Updated]:
        """What takes a gradient step on a batch from anywhere, as `config.compile` asks for."""
        if compiles(self.config.compile, self.device) and isinstance(self.model, WorldModel):
            self.model.compile_functions()
        step = GradientStep(self.model, phases, self._optimizers, self.config.grad_clip)
        if captures(self.config.compile, self.device, self.model):
            return CapturedStep(step, self.device, CudaGraphCapturer(self.device))
        return lambda batch: step(batch.to(self.device))

    @property
    def config(self) -> TrainingConfig:
        """The settings. Those that nothing was built with can be set: intervals, also while `train` runs, and before
        it the sizes of batches, `total_steps` and `seed`.
        """
        return self._config

    @config.setter
    def config(self, config: TrainingConfig) -> None:
        before = self._config.to_dict()
        changed = [name for name, value in config.to_dict().items() if value != before[name]]
        if built_in := [name for name in changed if name not in (*_READ_IN_EACH_STEP, *_READ_BY_TRAIN)]:
            raise ConfigurationError(
                f"{', '.join(built_in)} cannot be changed: the trainer was made with it. Make another one, "
                "Trainer(model, config), and let it load_checkpoint what this one saved. A learning rate can be set: "
                "trainer.optimizers[0].param_groups[0]['lr'] = ..., and so for each of them."
            )
        if self._batches is not None and (begun := [name for name in changed if name in _READ_BY_TRAIN]):
            raise ConfigurationError(
                f"{', '.join(begun)} cannot be changed while train runs. Let the callback return False to end it, and "
                "call train() again with the other settings."
            )
        self._config = config

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """The optimiser of each phase of a step, in order."""
        return self._optimizers

    def add_callback(self, callback: Callback) -> None:
        """Adds a callback behind the others; only a `CheckpointCallback` stays behind it.

        One that is added while `train` runs takes part from the next call on, after its `on_train_begin`.

        Raises:
            ConfigurationError: If it does not derive from `Callback`.
        """
        if not isinstance(callback, Callback):
            raise ConfigurationError(
                f"A callback derives from worldflux.training.Callback, got {type(callback).__name__}. "
                "Pass an instance, not a class."
            )
        if self._batches is not None:
            if isinstance(callback, CheckpointCallback):
                callback.directory.hold()
                callback.directory.check_owner(self.run, "resume it instead of this one")
            callback.on_train_begin(self)
        # A new list: this may be called by a callback, while the old one is gone through.
        self._callbacks = sorted([*self._callbacks, callback], key=lambda one: isinstance(one, CheckpointCallback))

    # Training

    def train(self, buffer: Provider, num_steps: int | None = None, *, resume: bool = False) -> nn.Module:
        """Trains on batches of stored experience.

        A new trainer seeds Python, NumPy, torch and the buffer's sampler from `config.seed`, so two runs give the same
        bits on a CPU. One that has loaded a checkpoint continues those random streams instead: with the same data, it
        gives the bits of a run that did not stop.

        Ctrl-C and SIGTERM end the training when the step is done and a `CheckpointCallback` has saved it; then
        `KeyboardInterrupt` is raised, or `SystemExit(143)`.

        While a batch trains, the next one is sampled from a `ReplayBuffer` on another thread. Providers of your own are
        asked on this one.

        Args:
            buffer: A `ReplayBuffer`, or anything with `sample(batch_size, seq_len=None, device="cpu")` or
                `sample(BatchRequest)`.
            num_steps: Gradient steps to do now. None: what is missing from `config.total_steps`.
            resume: Go on from the newest checkpoint of this trainer's `CheckpointCallback`, or begin if there is none
                yet: a job that is started again with the same command continues.

        Returns:
            The trained model, in evaluation mode.

        Raises:
            ConfigurationError: If `num_steps` is not a whole number from 0, `resume` is neither True nor False, nothing
                can be held out of the buffer, there is no `CheckpointCallback` to resume from, or a callback calls it.
            CheckpointError: If the checkpoint is damaged, of another model, or was trained on other data.
            TrainingError: If a loss is not finite, with the term and the step at which it was not for the first time.
        """
        if self._batches is not None:
            raise ConfigurationError(
                "A callback has called train() of the trainer that is training. Let the callback return False to end "
                "this call, and call train() again after it; step(batch) takes a single step more."
            )
        if not isinstance(resume, bool | np.bool_):
            raise ConfigurationError(
                f"resume is {resume!r}, expected True or False. With True, training goes on from the newest checkpoint "
                "in the directory of the CheckpointCallback: "
                "train(..., callbacks=[CheckpointCallback(DIRECTORY)], resume=True)."
            )
        with ExitStack() as held:
            held.callback(self._release_directories)  # also of callbacks that are added meanwhile
            for directory in self._directories():
                directory.hold()
            if resume:
                self._load_newest()
            for directory in self._directories():
                directory.check_owner(self.run, "pass resume=True to train")
            self._train(buffer, num_steps, resume)
        return self.model.eval()

    def _train(self, buffer: Provider, num_steps: int | None, resume: bool) -> None:
        """`train`, once the directories for checkpoints are this run's."""
        config = self.config
        self.target_step = (
            config.total_steps if num_steps is None else self.step_count + whole_number("num_steps", num_steps, 0)
        )
        self.finished = self.interrupted = False
        data = self._hold_out(buffer)
        for source in (data, self.eval_data):
            check_kind(self.model, source)
        self._data_digest = data.digest() if isinstance(data, Digestible) else None
        self._check_data(resume)
        self._start_random_streams(data)
        try:
            with stopping_on_signals() as stop:
                try:
                    with batches_from(data, config.batch_size, config.sequence_length, self.device) as self._batches:
                        self._run(self._batches, stop)
                finally:
                    self._batches = None
                    call_all(partial(callback.on_train_end, self) for callback in self._callbacks)
        finally:
            if self._held_out_share is not None:
                self.eval_data = None

    def _run(self, batches: Batches, stop: StopRequest) -> None:
        """The loop of `train`."""
        for callback in self._callbacks:
            callback.on_train_begin(self)
        self._restore_callbacks()
        keep_going = True
        while keep_going and not stop and self.step_count < self.target_step:
            losses = Losses(self.step(batches.next(), batches.provider))
            batches.settle()
            if self.step_count % self.config.log_interval == 0:
                self.check_finite()
            if self.eval_data is not None and self.step_count % self.config.eval_interval == 0:
                metrics = self.evaluate(self.eval_data)
                for callback in self._callbacks:
                    callback.on_eval_end(self.step_count, metrics)
            for callback in self._callbacks:
                keep_going &= callback.on_step_end(self.step_count, losses) is not False
            if self._restored is not None:  # a callback has gone back to a checkpoint
                batches.forget()
                self._start_random_streams(batches.provider)
        self.check_finite()
        self._write_back.flush()
        self.interrupted = bool(stop)
        self.finished = not self.interrupted

    def step(self, batch: Batch, buffer: Any = None) -> dict[str, Tensor]:
        """One gradient step: each phase's loss, its gradient and its optimiser; then the model's `after_step`.

        The host waits for nothing here. Call `check_finite` where losses are read.

        Args:
            batch: Windows to learn from; moved to the device if they are elsewhere.
            buffer: Where the batch came from. What the model computed to be stored beside the rows
                (`LossOutput.extras`) goes back into it, if the batch brought that from there. On CUDA this happens one
                step later, when the values have arrived.

        Returns:
            Detached scalars on the device: the loss terms, `"loss"` (the sum over the phases) and `"grad_norm"` before
            clipping (of all phases together). A model with several phases also has `"<phase>_loss"` for each.
        """
        self._restored = None
        if buffer is not None:
            self._sampler = buffer
        if self._last_batch is None and buffer is not None:
            check_first_batch(self.model, batch, self.step_count + 1)
        self._last_batch = batch
        self.in_step = True
        updated = self._take_step(batch)
        self.step_count += 1
        self.in_step = False
        self._watch.see(self.step_count, {**self._inputs_seen(batch, buffer), **updated.losses})
        self._store_extras(batch, updated.extras, buffer)
        return updated.losses

    def _inputs_seen(self, batch: Batch, buffer: Any) -> dict[str, Tensor]:
        """Of a batch from who may hand out anything: zero for each tensor that is finite, NaN for the others."""
        if isinstance(buffer, WindowSampler) and not overridden(buffer, *SAMPLES):
            return {}  # which stores nothing else
        floats = {name: x for name, x in batch.named_tensors().items() if x.is_floating_point()}
        return {f"{OF_BATCH}{name}": (x.detach().to(self.device) * 0).sum() for name, x in floats.items()}

    def check_finite(self) -> None:
        """Raises if a loss of any step so far was not finite. Waits for the device.

        Raises:
            TrainingError: Names the terms and the first step.
        """
        self._watch.check()

    def check_good(self) -> None:
        """Raises unless the model is worth saving: all losses so far and all weights are finite.

        Raises:
            TrainingError: Names what is not.
        """
        self.check_finite()
        if found := first_not_finite(weights_of(self.model)):
            raise TrainingError(
                f"Nothing is saved: of the model's weights {found}. Take an earlier checkpoint, or train again with a "
                "lower learning_rate."
            )

    def evaluate(self, data: Provider, num_batches: int = _EVAL_BATCHES) -> dict[str, float]:
        """Mean losses on experience that is not trained on.

        Every evaluation uses the same random numbers and, of a buffer that can be seeded, the same windows, so that the
        numbers of a run can be compared with each other. Training is not affected: the model, torch's random stream
        and the buffer's sampler are as before.

        Args:
            data: In the same forms as for `train`.
            num_batches: How many batches of `config.batch_size` windows to average over.

        Raises:
            ConfigurationError: If `num_batches` is not a whole number from 1.
        """
        config, num_batches = self.config, whole_number("num_batches", num_batches, 1)
        sampler_state = data.rng_state() if isinstance(data, Resumable) else None
        total: dict[str, Tensor] = {}
        try:
            with evaluating(self.model, self.device, config.seed):
                if isinstance(data, Resumable):
                    data.seed(config.seed)
                for _ in range(num_batches):
                    batch = sample_from(data, config.batch_size, config.sequence_length, self.device)
                    output = as_loss_output(self.model.loss(batch))  # type: ignore[operator]
                    for name, value in {**output.terms, "loss": output.loss}.items():
                        total[name] = total.get(name, 0.0) + value.detach().float() / num_batches
        finally:
            if isinstance(data, Resumable) and sampler_state is not None:
                data.set_rng_state(sampler_state)
        return dict(Losses(total))

    def health(self) -> Health:
        """How the model is, on the batch that it was trained on last.

        What a family measures, and from where on a value is bad, stands at `DreamerV3.health` and `TDMPC2.health`:
        latents that say nothing, codes or groups that are never used or saturated, values beyond what rewards allow.
        It costs one forward pass, waits for the device, and leaves training as it was. `LoggingCallback` and the
        agent's log call it at their intervals.

        Raises:
            TrainingError: If there was no step yet.
        """
        if self._last_batch is None:
            raise TrainingError("There was no gradient step yet, so there is no batch to look at. Train first.")
        return check_health(self.model, self._last_batch, seed=self.config.seed)

    # Checkpoints

    def save_checkpoint(self, path: str | Path) -> None:
        """Writes everything that continuing needs into one directory, which appears whole or not at all.

        `model.safetensors` and `config.json` (if the model has a configuration) are what `save_pretrained` writes;
        `optimizer.pt` holds the optimisers, `trainer.json` the step, the settings, the callbacks' states and the random
        states, the buffer's sampler included. The buffer's content is not part of it; what `train` was given is named
        by a digest, so that resuming on other data is noticed.

        Args:
            path: The directory. One that holds a checkpoint is replaced.

        Raises:
            TrainingError: If a loss or a weight is not finite: an older checkpoint is worth more then.
            CheckpointError: If `path` holds something else, or cannot be written.
        """
        path = checked_path("path", path)
        check_target(path)
        with writing_checkpoint(path), atomic_directory(path) as beside:
            self.write_checkpoint(beside)

    def write_checkpoint(self, directory: Path) -> None:
        """Writes the same files into a directory that exists, for who adds others to them.

        Args:
            directory: Without such files yet.

        Raises:
            TrainingError: If a loss or a weight is not finite.
        """
        self.check_good()
        self._write_back.flush()
        states = [{"type": type(callback).__name__, "state": callback.state_dict()} for callback in self._callbacks]
        progress = {
            "format": FORMAT,
            "step": self.step_count,
            "run": self.run,
            "saved_at": time_of_saving(directory.parent),
            "training_config": self.config.to_dict(),
            "random": random_state(self.device),
            "sampler": self._sampler_state(),
            "data": self._data_digest,
            "callbacks": [entry for entry in states if entry["state"]],
        }
        extras = {}
        # Of data that `train` was given; an agent stores its own.
        if self._data_digest is not None and isinstance(self._sampler, WindowSampler):
            extras = self._sampler.extras_state()
        if self._restored is not None and self._batches is None:  # a checkpoint that nothing has gone on from yet
            progress |= {name: self._restored.get(name, progress[name]) for name in ("sampler", "data", "callbacks")}
            extras = self._restored_extras
        safetensors.torch.save_file(weights_on_cpu(self.model), directory / WEIGHTS_FILE)
        config = getattr(self.model, "config", None)
        if isinstance(config, WorldModelConfig):
            (directory / CONFIG_FILE).write_text(config.to_json(), encoding="utf-8")
        elif config is not None and hasattr(config, "save"):
            config.save(directory / CONFIG_FILE)
        optimizers = {"kind": self._kind, "states": [optimizer.state_dict() for optimizer in self._optimizers]}
        with (directory / OPTIMIZER_FILE).open("wb") as file:  # of a path, torch would not say what went wrong
            torch.save(optimizers, file)
        if extras:
            safetensors.torch.save_file(extras, directory / EXTRAS_FILE)
        (directory / TRAINER_FILE).write_text(json.dumps(progress), encoding="utf-8")
        for name in (WEIGHTS_FILE, EXTRAS_FILE):  # which safetensors makes readable to their owner alone
            give_rights_of(directory / name, directory / TRAINER_FILE)

    def load_checkpoint(self, path: str | Path, *, allow_nonfinite: bool = False) -> None:
        """Continues from a checkpoint: weights, optimisers, step and random states become those that were saved.

        A callback may call it while `train` runs, to go back: the next step is the one after the checkpoint, on the
        batch that came then, and callbacks keep what they remember.

        Everything is read and checked before anything is changed. Rate, warm-up, weight decay and betas stay those of
        this trainer's configuration. `train` and `step` then give the same bits as a run that did not stop (on a CPU,
        with the same buffer).

        Args:
            path: What `save_checkpoint` wrote.
            allow_nonfinite: Take weights and optimiser states with NaN or infinite numbers, to look at them.

        Raises:
            CheckpointError: If it is missing, damaged, of another model, or its numbers are not finite.
        """
        path = checked_path("path", path)
        with only_our_errors(path):
            progress, weights, extras = read_checkpoint(path, allow_nonfinite=allow_nonfinite)
            check_progress(path, progress, self.device)
            check_weights(path, weights, self.model.state_dict())
            states = read_optimizers(path, self._kind, self._optimizers, allow_nonfinite=allow_nonfinite)

        self.model.load_state_dict(weights)
        for optimizer, state in zip(self._optimizers, states, strict=True):
            optimizer.load_state_dict(state)
        self.step_count = progress["step"]
        self.run = run_of(path, progress)
        self._watch = FiniteWatch()
        self._write_back = WriteBack()
        set_random_state(progress["random"], self.device)
        self._restored, self._restored_extras = progress, extras

    def _directories(self) -> list[CheckpointDirectory]:
        """Where this trainer's callbacks save checkpoints."""
        return [callback.directory for callback in self._callbacks if isinstance(callback, CheckpointCallback)]

    def _release_directories(self) -> None:
        for directory in self._directories():
            directory.release()

    def _load_newest(self) -> None:
        """Loads the newest checkpoint of this trainer's `CheckpointCallback`, if there is one."""
        directories = self._directories()
        if not directories:
            raise ConfigurationError(
                "resume=True goes on from what a CheckpointCallback saved, and this trainer has none. Add one, or call "
                "load_checkpoint(directory) before train(buffer)."
            )
        directory = directories[0].path
        remove_leftovers(directory)
        newest = newest_checkpoint(directory, warn=True)
        if newest is None:
            logger.info("no checkpoint in %s yet: training begins", directory)
            return
        self.load_checkpoint(newest)
        logger.info("resumed from %s at step %d", newest, self.step_count)

    def _hold_out(self, buffer: Provider) -> Any:
        """What to train on: the buffer, or what is left of it beside the part that `eval_data` becomes."""
        if self._held_out_share is None:
            return buffer
        split = getattr(buffer, "split", None)
        if not callable(split):
            raise ConfigurationError(
                f"eval_data is {self._held_out_share}, and {type(buffer).__name__} has no split(fraction, seed, "
                "seq_len) as ReplayBuffer has. Pass a provider of its own as eval_data."
            )
        config = self.config
        part, self.eval_data = split(self._held_out_share, seed=config.seed, seq_len=config.sequence_length)
        return part

    def _check_data(self, resume: bool) -> None:
        """Raises a `CheckpointError` if a resumed run would go on with other data."""
        trained_on = self._restored.get("data") if self._restored is not None else None
        if resume and trained_on is not None and trained_on != self._data_digest:
            raise CheckpointError(
                "The buffer holds other data than the one that the checkpoint was trained on, so the run cannot be "
                "continued exactly. Pass the same data, or call load_checkpoint(directory) and train(buffer) without "
                "resume to go on with these."
            )

    def _restore_callbacks(self) -> None:
        """Gives the states in a checkpoint back to the callbacks that have the same types, in their order."""
        saved = list(self._restored.get("callbacks", [])) if self._restored is not None else []
        for callback in self._callbacks:
            mine = next((entry for entry in saved if entry["type"] == type(callback).__name__), None)
            if mine is not None:
                saved.remove(mine)
                with only_our_errors(f"What {mine['type']} remembered in the checkpoint"):
                    callback.load_state_dict(mine["state"])

    def _sampler_state(self) -> dict[str, Any] | None:
        if self._batches is not None:
            return self._batches.rng_state()
        return self._sampler.rng_state() if isinstance(self._sampler, Resumable) else None

    def _start_random_streams(self, buffer: Any) -> None:
        """Continues the streams of a checkpoint, or seeds those of a new run."""
        self._sampler = buffer
        if self._restored is not None:
            # Once more, because the streams may have been used between loading and here (to build the buffer, say).
            set_random_state(self._restored["random"], self.device)
            if self._restored["sampler"] is not None and isinstance(buffer, Resumable):
                buffer.set_rng_state(self._restored["sampler"])
            if self._restored_extras and isinstance(buffer, WindowSampler):
                buffer.load_extras_state(self._restored_extras)
        elif self.step_count == 0:
            seed_everything(self.config.seed)
            if callable(getattr(buffer, "seed", None)):
                buffer.seed(self.config.seed)

    def _store_extras(self, batch: Batch, extras: Sequence[dict[str, Tensor]], buffer: Any) -> None:
        """Sends the latents that the step computed anew to the rows they belong to."""
        if buffer is None or batch.row_ids is None:
            return
        for named in extras:
            values = {name: value for name, value in named.items() if name in batch.extras}
            if values:
                steps = next(iter(values.values())).shape[1]
                self._write_back.push(buffer, batch.row_ids[:, -steps:], values)


def train(
    model: ModelT,
    buffer: Provider,
    total_steps: int = 100_000,
    batch_size: int = 16,
    sequence_length: int = 50,
    learning_rate: float = 3e-4,
    *,
    weight_decay: float = 0.0,
    grad_clip: float = 100.0,
    warmup_steps: int = 0,
    log_interval: int = 100,
    eval_interval: int = 1000,
    save_interval: int = 10_000,
    device: str = "auto",
    seed: int = 42,
    compile: bool | Literal["auto"] = "auto",
    callbacks: Iterable[Callback] = (),
    eval_data: Provider | float | None = None,
    resume: bool = False,
) -> ModelT:
    """Trains a model on stored experience; `Trainer` in one call.

        train(model, ReplayBuffer.load("walker.npz"), total_steps=50_000).save_pretrained("walker-model")

    Args:
        model: A `WorldModel`, or any `nn.Module` with `loss(batch)`. It is trained in place.
        buffer: A `ReplayBuffer` or another provider of batches.
        total_steps: This and the following up to `seed`: see `TrainingConfig`.
        batch_size: Windows in each gradient step.
        sequence_length: Time steps in each window.
        learning_rate: Step size of the optimiser.
        weight_decay: Decoupled weight decay.
        grad_clip: Largest norm of all gradients together; 0 turns it off.
        warmup_steps: Steps over which the rate rises from zero.
        log_interval: Steps between checks of the losses.
        eval_interval: Steps between evaluations on `eval_data`.
        save_interval: Steps between checkpoints of a `CheckpointCallback` without an interval of its own.
        device: "auto" takes CUDA if there is a device.
        seed: Start of every random stream.
        compile: Compile the model and record its gradient steps; "auto" does so on CUDA.
        callbacks: Called in this order.
        eval_data: Experience kept from training, or the share of the buffer to hold out.
        resume: Go on from the newest checkpoint of the `CheckpointCallback` among `callbacks`.

    Returns:
        The same model, trained, on the device and in evaluation mode.
    """
    config = TrainingConfig(
        total_steps=total_steps,
        batch_size=batch_size,
        sequence_length=sequence_length,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        grad_clip=grad_clip,
        warmup_steps=warmup_steps,
        log_interval=log_interval,
        eval_interval=eval_interval,
        save_interval=save_interval,
        device=device,
        seed=seed,
        compile=compile,
    )
    Trainer(model, config, callbacks, eval_data=eval_data).train(buffer, resume=resume)
    return model


def _share(value: float) -> float:
    if isinstance(value, bool) or not 0 < value < 1:
        raise ConfigurationError(f"eval_data is {value!r}, expected a buffer, or a share between 0 and 1 to hold out.")
    return float(value)
