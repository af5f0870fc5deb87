"""The gradient step, and training on stored experience."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from worldflux.errors import CheckpointError, ConfigurationError, TrainingError
from worldflux.models.base import CONFIG_FILE, WEIGHTS_FILE, LossOutput, OptimizerSpec, Phase
from worldflux.training.batch import Batch
from worldflux.training.callbacks import Callback, Losses
from worldflux.training.checkpoint import (
    FORMAT,
    OPTIMIZER_FILE,
    TRAINER_FILE,
    atomic_directory,
    check_optimizers,
    check_progress,
    check_weights,
    random_state,
    read_checkpoint,
    seed_everything,
    set_random_state,
)
from worldflux.training.config import TrainingConfig, resolve_device, whole_number
from worldflux.training.data import BatchProvider, BatchRequestProvider, sample_from
from worldflux.training.optim import build_optimizer, clip_by_global_norm

ModelT = TypeVar("ModelT", bound=nn.Module)
Provider = BatchProvider | BatchRequestProvider

_EVAL_BATCHES = 8
_DEFAULT_SPEC = OptimizerSpec(kind="adam", learning_rate=3e-4)
"""For modules that don't say how they are optimised."""


@runtime_checkable
class _Resumable(Protocol):
    """A provider whose random stream can be started and continued, such as `ReplayBuffer`."""

    def seed(self, seed: int) -> None: ...

    def rng_state(self) -> dict[str, Any]: ...

    def set_rng_state(self, state: dict[str, Any]) -> None: ...


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
        eval_data: What is evaluated every `eval_interval` steps, or None.
        step_count: Gradient steps done.
        target_step: Step at which the current call of `train` ends.
        finished: True once `train` has ended without an error.

    Args:
        model: Moved to `config.device`.
        config: Defaults as documented in `TrainingConfig`.
        callbacks: Called in this order.
        eval_data: Experience kept from training, in the same forms as for `train`.

    Raises:
        ConfigurationError: If the model has no loss or nothing to train, or the device is not there.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainingConfig | None = None,
        callbacks: Iterable[Callback] = (),
        *,
        eval_data: Provider | None = None,
    ) -> None:
        self.config = config if config is not None else TrainingConfig()
        self.device = resolve_device(self.config.device)
        self.model = model.to(self.device)
        self.eval_data = eval_data
        self.step_count = 0
        self.target_step = 0
        self.finished = False
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
        self._phases = _phases_of(model)
        self._optimizers = [
            build_optimizer(spec if phase.eps is None else replace(spec, eps=phase.eps), phase.parameters)
            for phase in self._phases
        ]
        self._watch = _FiniteWatch()
        self._write_back = _WriteBack()
        self._sampler: Any = None
        self._restored: dict[str, Any] | None = None

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """The optimiser of each phase of a step, in order."""
        return self._optimizers

    def add_callback(self, callback: Callback) -> None:
        """Adds a callback behind the others.

        Raises:
            ConfigurationError: If it does not derive from `Callback`.
        """
        if not isinstance(callback, Callback):
            raise ConfigurationError(
                f"A callback derives from worldflux.training.Callback, got {type(callback).__name__}. "
                "Pass an instance, not a class."
            )
        self._callbacks.append(callback)

    # Training

    def train(self, buffer: Provider, num_steps: int | None = None) -> nn.Module:
        """Trains on batches of stored experience.

        A new trainer seeds Python, NumPy, torch and the buffer's sampler from `config.seed`, so two runs give the same
        bits on a CPU. One that has loaded a checkpoint continues those random streams instead.

        Args:
            buffer: A `ReplayBuffer`, or anything with `sample(batch_size, seq_len=None, device="cpu")` or
                `sample(BatchRequest)`.
            num_steps: Gradient steps to do now. None: what is missing from `config.total_steps`.

        Returns:
            The trained model, in evaluation mode.

        Raises:
            ConfigurationError: If `num_steps` is not a whole number from 0.
            TrainingError: If a loss is not finite, with the term and the step at which it was not for the first time.
        """
        config = self.config
        self.target_step = (
            config.total_steps if num_steps is None else self.step_count + whole_number("num_steps", num_steps, 0)
        )
        self.finished = False
        self._start_random_streams(buffer)
        try:
            for callback in self._callbacks:
                callback.on_train_begin(self)
            keep_going = True
            while keep_going and self.step_count < self.target_step:
                batch = sample_from(buffer, config.batch_size, config.sequence_length, self.device)
                losses = Losses(self.step(batch, buffer))
                if self.step_count % config.log_interval == 0:
                    self.check_finite()
                if self.eval_data is not None and self.step_count % config.eval_interval == 0:
                    metrics = self.evaluate(self.eval_data)
                    for callback in self._callbacks:
                        callback.on_eval_end(self.step_count, metrics)
                for callback in self._callbacks:
                    keep_going &= callback.on_step_end(self.step_count, losses) is not False
            self.check_finite()
            self._write_back.flush()
            self.finished = True
        finally:
            for callback in self._callbacks:
                callback.on_train_end(self)
        return self.model.eval()

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
        batch = batch.to(self.device)
        if not self.model.training:
            self.model.train()

        terms: dict[str, Tensor] = {}
        norms: list[Tensor] = []
        outputs: list[LossOutput] = []
        for phase, optimizer in zip(self._phases, self._optimizers, strict=True):
            # The whole model, because a phase's loss may reach parameters that it does not train.
            self.model.zero_grad(set_to_none=True)
            output = _as_loss_output(phase.loss(batch, outputs))
            output.loss.backward()
            norms.append(clip_by_global_norm(phase.trained, self.config.grad_clip))
            optimizer.step()
            outputs.append(output)
            named = output.terms
            if len(self._phases) > 1:
                named = {**named, f"{phase.name}_loss": output.loss, f"{phase.name}_grad_norm": norms[-1]}
            terms.update({name: value.detach() for name, value in named.items()})
        after_step = getattr(self.model, "after_step", None)
        if after_step is not None:
            after_step(outputs)
        self.step_count += 1

        losses = {name: value for name, value in terms.items() if name != "loss"}
        losses["loss"] = torch.stack([output.loss.detach() for output in outputs]).sum()
        losses["grad_norm"] = torch.stack(norms).square().sum().sqrt() if len(norms) > 1 else norms[0]
        self._watch.see(self.step_count, losses)
        self._store_extras(batch, outputs, buffer)
        return losses

    def check_finite(self) -> None:
        """Raises if a loss of any step so far was not finite. Waits for the device.

        Raises:
            TrainingError: Names the terms and the first step.
        """
        self._watch.check()

    @torch.no_grad()
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
        num_batches = whole_number("num_batches", num_batches, 1)
        sampler_state = data.rng_state() if isinstance(data, _Resumable) else None
        was_training = self.model.training
        self.model.eval()
        total: dict[str, Tensor] = {}
        try:
            with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
                torch.manual_seed(self.config.seed)
                if isinstance(data, _Resumable):
                    data.seed(self.config.seed)
                for _ in range(num_batches):
                    batch = sample_from(data, self.config.batch_size, self.config.sequence_length, self.device)
                    output = _as_loss_output(self.model.loss(batch))  # type: ignore[operator]
                    for name, value in {**output.terms, "loss": output.loss}.items():
                        total[name] = total.get(name, 0.0) + value.detach().float() / num_batches
        finally:
            self.model.train(was_training)
            if isinstance(data, _Resumable) and sampler_state is not None:
                data.set_rng_state(sampler_state)
        return dict(Losses(total))

    # Checkpoints

    def save_checkpoint(self, path: str | Path) -> None:
        """Writes everything that continuing needs into one directory, which appears whole or not at all.

        `model.safetensors` and `config.json` (if the model has a configuration) are what `save_pretrained` writes;
        `optimizer.pt` holds the optimisers, `trainer.json` the step, the settings and the random states, the buffer's
        sampler included. The buffer's content is not part of it.

        Args:
            path: The directory. One that holds a checkpoint is replaced.

        Raises:
            TrainingError: If a loss was not finite; the weights are lost then, and an older checkpoint is worth more.
            CheckpointError: If `path` holds something else, or cannot be written.
        """
        path = Path(path)
        self.check_finite()
        self._write_back.flush()
        if path.exists() and not (path / TRAINER_FILE).is_file() and not (path.is_dir() and not any(path.iterdir())):
            raise CheckpointError(f"{path} exists and is no checkpoint of a Trainer. Choose another path or remove it.")
        progress = {
            "format": FORMAT,
            "step": self.step_count,
            "training_config": self.config.to_dict(),
            "random": random_state(self.device),
            "sampler": self._sampler.rng_state() if isinstance(self._sampler, _Resumable) else None,
        }
        optimizers = {"kind": self._kind, "states": [optimizer.state_dict() for optimizer in self._optimizers]}
        try:
            with atomic_directory(path) as beside:
                safetensors.torch.save_file(_weights(self.model), beside / WEIGHTS_FILE)
                config = getattr(self.model, "config", None)
                if config is not None and hasattr(config, "save"):
                    config.save(beside / CONFIG_FILE)
                torch.save(optimizers, beside / OPTIMIZER_FILE)
                (beside / TRAINER_FILE).write_text(json.dumps(progress), encoding="utf-8")
        except (OSError, RuntimeError, safetensors.SafetensorError) as error:
            raise CheckpointError(
                f"The checkpoint {path} could not be written: {error}. What was there before is unchanged."
            ) from error

    def load_checkpoint(self, path: str | Path) -> None:
        """Continues from a checkpoint: weights, optimisers, step and random states become those that were saved.

        Everything is read and checked before anything is changed. Rate, warm-up, weight decay and betas stay those of
        this trainer's configuration. `train` and `step` then give the same bits as a run that did not stop (on a CPU,
        with the same buffer).

        Args:
            path: What `save_checkpoint` wrote.

        Raises:
            CheckpointError: If it is missing, damaged, or of another model.
        """
        path = Path(path)
        progress, weights, optimizers = read_checkpoint(path)
        check_progress(path, progress, self.device)
        check_weights(path, weights, self.model.state_dict())
        check_optimizers(path, optimizers, self._kind, self._optimizers)

        self.model.load_state_dict(weights)
        for optimizer, state in zip(self._optimizers, optimizers["states"], strict=True):
            settings = [{k: v for k, v in g.items() if k not in ("params", "updates")} for g in optimizer.param_groups]
            optimizer.load_state_dict(state)
            for group, setting in zip(optimizer.param_groups, settings, strict=True):
                group.update(setting)
        self.step_count = progress["step"]
        self._watch = _FiniteWatch()
        self._write_back = _WriteBack()
        set_random_state(progress["random"], self.device)
        self._restored = progress

    def _start_random_streams(self, buffer: Any) -> None:
        """Continues the streams of a checkpoint, or seeds those of a new run."""
        self._sampler = buffer
        if self._restored is not None:
            # Once more, because the streams may have been used between loading and here (to build the buffer, say).
            set_random_state(self._restored["random"], self.device)
            if self._restored["sampler"] is not None and isinstance(buffer, _Resumable):
                buffer.set_rng_state(self._restored["sampler"])
        elif self.step_count == 0:
            seed_everything(self.config.seed)
            if callable(getattr(buffer, "seed", None)):
                buffer.seed(self.config.seed)

    def _store_extras(self, batch: Batch, outputs: Sequence[LossOutput], buffer: Any) -> None:
        """Sends the latents that the step computed anew to the rows they belong to."""
        if buffer is None or batch.rows is None:
            return
        for output in outputs:
            values = {name: value.detach() for name, value in output.extras.items() if name in batch.extras}
            if values:
                steps = next(iter(values.values())).shape[1]
                self._write_back.push(buffer, batch.rows[:, -steps:], values)


class _FiniteWatch:
    """Remembers on the device at which step each loss was not finite for the first time."""

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._first: Tensor | None = None

    def see(self, step: int, losses: Mapping[str, Tensor]) -> None:
        """Looks at the losses of a step without reading them."""
        values = torch.stack([value.float() for value in losses.values()])
        if self._first is None or self._names != tuple(losses):
            self.check()
            self._names = tuple(losses)
            self._first = torch.zeros(len(losses), dtype=torch.int64, device=values.device)  # 0: always finite
        bad_now = ~torch.isfinite(values) & (self._first == 0)
        self._first.masked_fill_(bad_now, step)

    def check(self) -> None:
        """Reads what was seen."""
        if self._first is None:
            return
        first_bad = {name: step for name, step in zip(self._names, self._first.tolist(), strict=True) if step}
        if not first_bad:
            return
        step = min(first_bad.values())
        names = [name for name, bad_step in first_bad.items() if bad_step == step]
        # The total and the gradient follow the term that went wrong.
        for consequence in ("grad_norm", "loss"):
            if len(names) > 1 and consequence in names:
                names.remove(consequence)
        raise TrainingError(
            f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} not finite at step {step}. "
            "Check the data for extreme values, lower learning_rate, or raise warmup_steps."
        )


class _WriteBack:
    """Carries values from the device to the buffer they belong to."""

    def __init__(self) -> None:
        self._pending: list[tuple[Any, Tensor, dict[str, Tensor], Any]] = []

    def push(self, buffer: Any, rows: Tensor, values: dict[str, Tensor]) -> None:
        """Stores values `[B, T', ...]` at rows `[B, T']`; those from CUDA at the next `push` or `flush`."""
        self.flush()
        if not any(value.is_cuda for value in values.values()):
            buffer.update_extras(rows, values)
            return
        copies = {}
        for name, value in values.items():
            copies[name] = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            copies[name].copy_(value, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self._pending.append((buffer, rows, copies, arrived))

    def flush(self) -> None:
        """Stores what is still on its way."""
        for buffer, rows, copies, arrived in self._pending:
            arrived.synchronize()
            buffer.update_extras(rows, copies)
        self._pending.clear()


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
    callbacks: Iterable[Callback] = (),
    eval_data: Provider | None = None,
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
        callbacks: Called in this order.
        eval_data: Experience kept from training.

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
    )
    Trainer(model, config, callbacks, eval_data=eval_data).train(buffer)
    return model


def _phases_of(model: nn.Module) -> list[Phase]:
    """The model's own phases, or one of its `loss` over all that is trainable."""
    if hasattr(model, "phases"):
        phases: list[Phase] = model.phases()  # type: ignore[operator]
        return phases
    loss = getattr(model, "loss", None)
    if not callable(loss):
        raise ConfigurationError(
            f"{type(model).__name__} has no method loss(batch). A model to train returns its loss from there: "
            "a scalar tensor, a dict with 'loss', or a LossOutput."
        )
    trainable = [p for p in model.parameters() if p.requires_grad]
    return [Phase("model", trainable, lambda batch, previous: loss(batch))]


def _as_loss_output(result: Any) -> LossOutput:
    """Whatever a `loss` may return, in one form. Entries of a dict that are no scalars are left out."""
    if isinstance(result, Tensor):
        result = LossOutput(result, {})
    elif isinstance(result, Mapping) and "loss" in result:
        loss = result["loss"]
        scalars = {
            name: torch.as_tensor(value, device=loss.device).detach().reshape(())
            for name, value in result.items()
            if isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1)
        }
        result = LossOutput(loss, scalars)
    if not isinstance(result, LossOutput):
        raise TrainingError(
            f"loss(batch) gave {type(result).__name__}, expected a scalar tensor, a dict with 'loss', or a LossOutput."
        )
    if result.loss.dim() != 0:
        raise TrainingError(f"The loss has shape {tuple(result.loss.shape)}, expected a scalar. Reduce it to its mean.")
    if torch.is_grad_enabled() and not result.loss.requires_grad:
        raise TrainingError("The loss depends on no parameter that requires a gradient, so there is nothing to learn.")
    return result


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers on the CPU, each with memory of its own, as safetensors wants them."""
    weights: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in model.state_dict().items():
        tensor = tensor.detach().cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        weights[name] = tensor.clone() if memory in taken else tensor
        taken.add(memory)
    return weights
