"""Gradient steps that are recorded once and played back: forward, backward, clipping, optimisers and what follows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from worldflux.accel.cuda_graphs import Captures, GraphCapturer, places, signature_of
from worldflux.accel.guard import Changes, Tensors, Work
from worldflux.accel.overriding import steps_back
from worldflux.replay.batch import Batch
from worldflux.training.gradient_step import GradientStep, Updated
from worldflux.training.optim import Alike, CapturableOptimizer

MAX_FORMS = 4
"""Forms of batches whose steps are recorded; each takes the memory of a step. Others are computed plainly."""
_NUMBERS, _LOSSES = "numbers", "losses"
_SQUARES = {"nu", "exp_avg_sq"}
"""What optimisers call their running means of squared gradients."""


@dataclass
class _Form:
    """What is known of the steps on one form of batches."""

    updated: list[Sequence[Alike]]
    """What each optimiser updates."""
    numbers: list[int] = field(default_factory=list)
    """How many numbers each optimiser needs for that."""
    losses: list[str] = field(default_factory=list)
    """Their names."""


class StepChanges(Changes):
    """What a gradient step changes: parameters, buffers, gradients, and the optimisers' states and counts."""

    def __init__(self, step: GradientStep) -> None:
        self._step = step

    def tensors(self) -> dict[str, Tensor]:
        """Parameters, buffers, and what the optimisers keep of each parameter."""
        model, names = self._step.model, self._names()
        found = {name: p for p, name in names.items()} | dict(model.named_buffers())
        for optimizer in self._step.optimizers:
            for p, entries in optimizer.state.items():
                found |= {f"{names[p]} ({key})": x for key, x in entries.items() if isinstance(x, Tensor)}
        return found

    def noise(self, rounding: float) -> dict[str, Tensor]:
        """Parameters whose gradients are rounding alone, and their states: optimisers bring these to full size."""
        found: dict[str, Tensor] = {}
        names = self._names()
        for optimizer in self._step.optimizers:
            layers: defaultdict[str, dict[Tensor, Tensor]] = defaultdict(dict)
            for p, entries in optimizer.state.items():
                for key in _SQUARES & entries.keys():
                    layers[names[p].rpartition(".")[0]][p] = entries[key].mean()
            for means in layers.values():
                largest = torch.stack([*means.values()]).amax()
                for p, mean in means.items():
                    is_noise = mean <= rounding**2 * largest
                    found |= {f"{names[p]} ({key})": is_noise for key in optimizer.state[p]} | {names[p]: is_noise}
        return found

    def _names(self) -> dict[Tensor, str]:
        """Of all parameters, also of those that are trained and no part of the model."""
        names: dict[Tensor, str] = {p: name for name, p in self._step.model.named_parameters()}
        trained = (p for optimizer in self._step.optimizers for p in optimizer.state)
        return names | {p: f"parameter {number}" for number, p in enumerate(trained) if p not in names}

    def host(self) -> Any:
        """Settings and states of the optimisers as they refer to numbers and tensors, and the gradients."""
        return (
            [
                ([_without_parameters(g) for g in o.param_groups], {p: dict(entries) for p, entries in o.state.items()})
                for o in self._step.optimizers
            ],
            [p.grad for p in self._step.model.parameters()],
        )

    def set_host(self, host: Any) -> None:
        """Goes back to what `host` gave."""
        optimizers, gradients = host
        for optimizer, (settings, states) in zip(self._step.optimizers, optimizers, strict=True):
            for group, setting in zip(optimizer.param_groups, settings, strict=True):
                group.update(setting)
            for p, entries in states.items():
                optimizer.state[p].update(entries)
        for p, gradient in zip(self._step.model.parameters(), gradients, strict=True):
            p.grad = gradient


def _without_parameters(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}


class CapturedStep:
    """Takes gradient steps like `GradientStep`, after the first few of a form of batches by playing back a recording.

    Each of them is a step of the training, also those before the recording: the first is taken as without all this,
    and shows which parameters get a gradient; some follow in which everything runs as it will be recorded.

    What changes from step to step comes in as inputs: the batch, and the numbers of each optimiser's update (rates,
    warm-up, bias corrections), which the host works out beforehand. Recordings are dropped, and made again, if a
    parameter or buffer moves, is frozen or thawed, if an optimiser loads a state, or if a setting of its other than the
    learning rate changes. Values that are written into the parameters, as `load_state_dict` does, change nothing.

    Args:
        step: The step to record. Its optimisers are `CapturableOptimizer`s.
        device: Where the model is.
        recorder: Records it.
    """

    def __init__(self, step: GradientStep, device: torch.device, recorder: GraphCapturer) -> None:
        self._step = step
        self._device = device
        self._captures = Captures("The gradient step", step.model, device, recorder, MAX_FORMS)
        self._changes = StepChanges(step)
        self._optimizers: list[CapturableOptimizer] = []
        for optimizer in step.optimizers:
            assert isinstance(optimizer, CapturableOptimizer)
            self._optimizers.append(optimizer)
        self._prepare_optimizers(True)
        self._tensors = [*step.model.parameters(), *step.model.buffers()]
        self._states: list[object] = [None for _ in self._optimizers]
        self._forms: dict[Hashable, _Form] = {}

    def __call__(self, batch: Batch) -> Updated:
        """Takes the step.

        Args:
            batch: On the device, or on the CPU.

        Returns:
            Losses that stay as they are, and extras that the next step may overwrite: copies of them have to be begun
            before.
        """
        if self._captures.given_up:
            return self._plain_step(batch)
        self._check()
        tensors = batch.named_tensors()
        key = signature_of(tensors)
        form = self._forms.get(key)
        own = any(_has_own_step(optimizer) for optimizer in self._optimizers)
        alike = form and all(o.are_alike(part) for o, part in zip(self._optimizers, form.updated, strict=True))
        if form is None or own or not alike:
            return self._first_step(key, batch)
        if not self._captures.takes(key):
            return self._plain_step(batch)

        def inputs() -> Tensors:
            numbers = [optimizer.count(part) for optimizer, part in zip(self._optimizers, form.updated, strict=True)]
            form.numbers = [len(part) for part in numbers]
            return {**tensors, _NUMBERS: torch.tensor([*chain(*numbers)], dtype=torch.float32)}

        def function(given: Tensors) -> dict[str, Tensor]:
            parts = given[_NUMBERS].split(form.numbers)
            return outputs_of(
                self._step(
                    batch.with_tensors(given),
                    lambda index: self._optimizers[index].update(parts[index], form.updated[index]),
                )
            )

        def plain() -> dict[str, Tensor]:
            self._prepare_optimizers(False)
            return outputs_of(self._plain_step(batch))

        def outputs_of(result: Updated) -> dict[str, Tensor]:
            form.losses = list(result.losses)
            outputs = {_LOSSES: torch.stack([value.float() for value in result.losses.values()])}
            for index, extras in enumerate(result.extras):
                outputs |= {f"{index}/{name}": value for name, value in extras.items()}
            return outputs

        def named(given: Tensors) -> Tensors:
            return {**given, **dict(zip(form.losses, given[_LOSSES], strict=True))}

        outputs = self._captures(key, Work(function, inputs, plain, self._changes, named))
        if self._captures.given_up:
            self._prepare_optimizers(False)
        losses = dict(zip(form.losses, outputs[_LOSSES].clone().unbind(), strict=True))
        extras: list[dict[str, Tensor]] = [{} for _ in self._step.phases]
        for name, value in outputs.items():
            if name != _LOSSES:
                index, _, extra = name.partition("/")
                extras[int(index)][extra] = value
        return Updated(losses, extras)

    def _plain_step(self, batch: Batch) -> Updated:
        return self._step(batch.to(self._device))

    def _prepare_optimizers(self, capturable: bool) -> None:
        for optimizer in self._optimizers:
            optimizer.make_capturable(capturable)

    def _first_step(self, key: Hashable, batch: Batch) -> Updated:
        """A step as without recordings, which shows what steps on this form of batches update."""
        self._captures.drop(key)
        result = self._plain_step(batch)
        self._forms[key] = _Form([optimizer.updated for optimizer in self._optimizers])
        return result

    def _check(self) -> None:
        """Drops the recordings if what they read besides their inputs is no longer what and where it was."""
        states: list[object] = [optimizer.state for optimizer in self._optimizers]
        settings = [
            [value for name, value in group.items() if name not in ("params", "lr", "updates")]
            for optimizer in self._optimizers
            for group in optimizer.param_groups
        ]
        kept = self._captures.keep_while((places(self._tensors), settings))
        loaded = any(state is not seen for state, seen in zip(states, self._states, strict=True))
        if loaded:
            self._captures.clear()
            self._states = states
        if loaded or not kept:
            self._forms.clear()


def _has_own_step(optimizer: CapturableOptimizer) -> bool:
    """Whether somebody listens to the optimiser's steps or replaced them; schedulers of rates only count them."""
    step = vars(optimizer).get("step")
    changed = [name for name in ("pre", "post") if vars(optimizer)[f"_optimizer_step_{name}_hooks"]]
    if step is not None and not getattr(step, "_wrapped_by_lr_sched", False):
        changed.append("step")
    return steps_back("A recording of gradient steps", optimizer, changed)
