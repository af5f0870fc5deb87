"""The gradient step itself: each phase's loss, its gradient and its optimiser, then what follows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from worldflux.models.base import LossOutput, Phase
from worldflux.training.batch import Batch
from worldflux.training.optim import clip_by_global_norm
from worldflux.training.step import as_loss_output


@dataclass(frozen=True)
class Updated:
    """What a gradient step leaves behind besides a changed model; all without gradient."""

    losses: dict[str, Tensor]
    """Scalars: the loss terms, `"loss"` (the sum over the phases) and `"grad_norm"` before clipping."""
    extras: list[dict[str, Tensor]]
    """`LossOutput.extras` of each phase."""


class GradientStep:
    """One update of a model, in training mode and on the device of the batch.

    Nothing in it depends on the values of tensors, and the host waits for nothing.

    Args:
        model: Whose parameters they are.
        phases: In order.
        optimizers: Of each phase.
        grad_clip: Largest norm of the gradients of a phase; 0 turns clipping off.
    """

    def __init__(
        self, model: nn.Module, phases: Sequence[Phase], optimizers: Sequence[torch.optim.Optimizer], grad_clip: float
    ) -> None:
        self.model = model
        self.phases = phases
        self.optimizers = optimizers
        self.grad_clip = grad_clip

    def __call__(self, batch: Batch, update: Callable[[int], None] | None = None) -> Updated:
        """Takes the step.

        Args:
            batch: On the model's device.
            update: Updates the parameters of the phase of that number from their gradients; None: its optimiser's
                `step`.
        """
        if not self.model.training:
            self.model.train()
        # Of the whole model, because a phase's loss may reach parameters that it does not train.
        parameters = list(self.model.parameters())
        terms: dict[str, Tensor] = {}
        norms: list[Tensor] = []
        outputs: list[LossOutput] = []
        for index, phase in enumerate(self.phases):
            for parameter in parameters:
                parameter.grad = None
            output = as_loss_output(phase.loss(batch, outputs))
            output.loss.backward()
            norms.append(clip_by_global_norm(phase.trained, self.grad_clip))
            if update is None:
                self.optimizers[index].step()
            else:
                update(index)
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
        losses["grad_norm"] = torch.stack(norms).square().sum().sqrt() if len(norms) > 1 else norms[0]
        extras = [{name: value.detach() for name, value in output.extras.items()} for output in outputs]
        return Updated(losses, extras)
