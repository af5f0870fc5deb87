"""The gradient step itself: the loss, gradient and optimiser of each phase, then the model's `after_step`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from worldflux.accel import ranks
from worldflux.errors import ConfigurationError, TrainingError
from worldflux.models.base import LossOutput, Phase
from worldflux.models.evaluation import evaluating
from worldflux.replay.batch import Batch
from worldflux.replay.provider import Resumable, sample_from
from worldflux.training.config import TrainingConfig
from worldflux.training.optim import clip_by_global_norm


@dataclass(frozen=True)
class Updated:
    """The results of a gradient step besides the changed model, all without gradient."""

    losses: dict[str, Tensor]
    """Scalars: the loss terms, `"loss"` (the sum over the phases) and `"grad_norm"` before clipping."""
    extras: list[dict[str, Tensor]]
    """`LossOutput.extras` of each phase."""


class GradientStep:
    """Takes a gradient step of a model, in training mode and on the device of the batch.

    The operations do not depend on the values of tensors, and the host waits for nothing.

    Args:
        model: The model.
        phases: The phases of a step, in order.
        optimizers: The optimiser of each phase.
        grad_clip: Largest norm of the gradients of a phase; 0 turns clipping off.
    """

    def __init__(
        self, model: nn.Module, phases: Sequence[Phase], optimizers: Sequence[torch.optim.Optimizer], grad_clip: float
    ) -> None:
        self.model = model
        self.phases = phases
        self.optimizers = optimizers
        self.grad_clip = grad_clip
        self._averages = [ranks.GradientAverage(phase.trained) for phase in phases]

    def __call__(self, batch: Batch) -> Updated:
        """Takes the step on a batch that is on the model's device; with several ranks, on the batches of all of them.

        Gradients, normalisers and losses are then those of one batch that consists of all of these.
        """
        with ranks.reducing():
            return self._take(batch)

    def _take(self, batch: Batch) -> Updated:
        if not self.model.training:
            self.model.train()
        # All parameters of the model, because a phase's loss may reach some that it does not train.
        parameters = list(self.model.parameters())
        terms: dict[str, Tensor] = {}
        norms: list[Tensor] = []
        outputs: list[LossOutput] = []
        for phase, optimizer, average in zip(self.phases, self.optimizers, self._averages, strict=True):
            for parameter in parameters:
                parameter.grad = None
            output = as_loss_output(phase.loss(batch, outputs))
            output.loss.backward()
            average()
            norms.append(clip_by_global_norm(phase.trained, self.grad_clip))
            optimizer.step()
            outputs.append(output)
            named = output.terms
            if len(self.phases) > 1:
                named = {**named, f"{phase.name}_loss": output.loss, f"{phase.name}_grad_norm": norms[-1]}
            terms.update({name: value.detach() for name, value in named.items()})
        after_step = getattr(self.model, "after_step", None)
        if after_step is not None:
            after_step(outputs)

        losses = {name: value for name, value in terms.items() if name != "loss"}
        losses["loss"] = torch.stack([output.loss.detach() for output in outputs]).sum()
        if ranks.is_reducing():
            means = ranks.mean(torch.stack([value.float() for value in losses.values()])).unbind()
            losses = dict(zip(losses, means, strict=True))
        losses["grad_norm"] = torch.stack(norms).square().sum().sqrt() if len(norms) > 1 else norms[0]
        extras = [{name: value.detach() for name, value in output.extras.items()} for output in outputs]
        return Updated(losses, extras)


def phases_of(model: nn.Module) -> list[Phase]:
    """The model's own phases, or a single one of its `loss` over all trainable parameters."""
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


def as_loss_output(result: Any) -> LossOutput:
    """The result of any `loss` as a `LossOutput`. Entries of a dict that are not scalars are left out."""
    if isinstance(result, Tensor):
        result = LossOutput(result, {})
    elif isinstance(result, Mapping) and "loss" in result:
        loss = result["loss"]
        scalars = {
            name: _scalar(value, loss.device)
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


def mean_losses(
    model: nn.Module, data: Any, config: TrainingConfig, device: torch.device, num_batches: int
) -> dict[str, Tensor]:
    """Means of a model's losses over batches, as `Trainer.evaluate` describes them; they stay on the device."""
    sampler_state = data.rng_state() if isinstance(data, Resumable) else None
    total: dict[str, Tensor] = {}
    try:
        with evaluating(model, device, config.seed):
            if isinstance(data, Resumable):
                data.seed(config.seed)
            for _ in range(num_batches):
                batch = sample_from(data, config.batch_size, config.sequence_length, device)
                output = as_loss_output(model.loss(batch))  # type: ignore[operator]
                for name, value in {**output.terms, "loss": output.loss}.items():
                    total[name] = total.get(name, 0.0) + value.detach().float() / num_batches
    finally:
        if isinstance(data, Resumable) and sampler_state is not None:
            data.set_rng_state(sampler_state)
    return total


def _scalar(value: float | Tensor, device: torch.device) -> Tensor:
    """A number, or a tensor of one number, as a scalar on the device; Python's numbers are filled in, not copied."""
    if isinstance(value, Tensor):
        return value.detach().to(device).reshape(())
    return torch.full((), value, device=device)


OF_BATCH = "The batch's "
"""Prefix of the names of a batch's tensors in `FiniteWatch`."""


class FiniteWatch:
    """Records on the device at which step each loss was not finite for the first time."""

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._first: Tensor | None = None

    def see(self, step: int, losses: Mapping[str, Tensor]) -> None:
        """Checks the losses of a step without reading them on the host."""
        values = torch.stack([value.float() for value in losses.values()])
        if self._first is None or self._names != tuple(losses):
            self.check()
            self._names = tuple(losses)
            self._first = torch.zeros(len(losses), dtype=torch.int64, device=values.device)  # 0: always finite
        bad_now = ~torch.isfinite(values) & (self._first == 0)
        self._first.masked_fill_(bad_now, step)

    def check(self) -> None:
        """Raises a `TrainingError` if a loss was not finite. Waits for the device."""
        if self._first is None:
            return
        first_bad = {name: step for name, step in zip(self._names, self._first.tolist(), strict=True) if step}
        if not first_bad:
            return
        step = min(first_bad.values())
        names = [name for name, bad_step in first_bad.items() if bad_step == step]
        of_batch = [name for name in names if name.startswith(OF_BATCH)]
        if of_batch:
            raise TrainingError(
                f"{' and '.join(of_batch)} {'was' if len(of_batch) == 1 else 'were'} not finite at gradient step "
                f"{step}. Look for where these data come from; the weights are lost."
            )
        # The total and the gradient are not finite because a term is not.
        for consequence in ("grad_norm", "loss"):
            if len(names) > 1 and consequence in names:
                names.remove(consequence)
        raise TrainingError(
            f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} not finite at gradient step {step}. "
            "Check the data for extreme values, lower learning_rate, or raise warmup_steps."
        )


class WriteBack:
    """Writes latents that a step has computed back to the buffer that the batch came from."""

    def __init__(self) -> None:
        self._pending: list[tuple[Any, Tensor, dict[str, Tensor], Any]] = []

    def push(self, buffer: Any, batch: Batch, extras: Sequence[dict[str, Tensor]]) -> None:
        """Stores the latents that a step computed anew beside the rows of its batch, if they came from there.

        Values on CUDA are stored at the next `push` or `flush`; a buffer on their own device gets them at once.

        Args:
            buffer: The source of the batch; None stores nothing.
            batch: The batch of the step.
            extras: `LossOutput.extras` of each phase, for the last T' rows. `[B, T', ...]` each
        """
        self.flush()
        if buffer is None or batch.row_ids is None:
            return
        for named in extras:
            values = {name: value for name, value in named.items() if name in batch.extras}
            if values:
                steps = next(iter(values.values())).shape[1]
                self._send(buffer, batch.row_ids[:, -steps:], values)

    def _send(self, buffer: Any, rows: Tensor, values: dict[str, Tensor]) -> None:
        there = getattr(buffer, "device", None)
        if all(not value.is_cuda or value.device == there for value in values.values()):
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
        """Stores the values that are still being copied."""
        for buffer, rows, copies, arrived in self._pending:
            arrived.synchronize()
            buffer.update_extras(rows, copies)
        self._pending.clear()
