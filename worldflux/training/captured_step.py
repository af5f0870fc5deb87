"""Gradient steps captured in CUDA graphs: forward, backward, clipping, optimisers and what follows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from worldflux.accel.cuda_graphs import Captures, GraphCapturer, places, signature_of
from worldflux.accel.guard import Changes, Tensors, Work
from worldflux.accel.overriding import steps_back
from worldflux.replay.batch import Batch
from worldflux.training.gradient_step import GradientStep, Updated
from worldflux.training.optim import CapturableOptimizer

MAX_FORMS = 4
"""Number of signatures of batches whose steps are captured; each takes the memory of a step."""
_RATES, _LOSSES = "rates", "losses"
_SQUARES = {"nu", "exp_avg_sq"}
"""Names that optimisers give to their running means of squared gradients."""


class StepChanges(Changes):
    """What a gradient step changes: parameters, buffers, gradients, and the optimisers' states and counts."""

    def __init__(self, step: GradientStep) -> None:
        self._step = step

    def tensors(self) -> dict[str, Tensor]:
        """Returns parameters, buffers, and what the optimisers keep for each group and each parameter."""
        model, names = self._step.model, self._names()
        found = {name: p for p, name in names.items()} | dict(model.named_buffers())
        for number, optimizer in enumerate(self._step.optimizers):
            for place, group in enumerate(optimizer.param_groups):
                found[f"updates of group {place} of optimiser {number}"] = group["updates"]
            for p, entries in optimizer.state.items():
                found |= {f"{names[p]} ({key})": x for key, x in entries.items() if isinstance(x, Tensor)}
        return found

    def noise(self, rounding: float) -> dict[str, Tensor]:
        """Finds parameters whose gradients are rounding alone, and their states: optimisers scale these up."""
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
        """Returns the names of all parameters, also of those that are trained but not part of the model."""
        names: dict[Tensor, str] = {p: name for name, p in self._step.model.named_parameters()}
        trained = (p for optimizer in self._step.optimizers for p in optimizer.state)
        return names | {p: f"parameter {number}" for number, p in enumerate(trained) if p not in names}

    def host(self) -> Any:
        """Returns settings and states of the optimisers with their references to tensors, and the gradients."""
        return (
            [
                ([_without_parameters(g) for g in o.param_groups], {p: dict(entries) for p, entries in o.state.items()})
                for o in self._step.optimizers
            ],
            [p.grad for p in self._step.model.parameters()],
        )

    def set_host(self, host: Any) -> None:
        """Restores what `host` returned."""
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
    """Takes gradient steps like `GradientStep`; after the first few on batches of a signature, it replays a graph.

    The first few are steps of the training, too, in which everything runs as it will be captured.

    What changes from step to step is passed as inputs: the batch, and the learning rate of each group of parameters.
    Graphs are dropped and captured again if a parameter or buffer moves, is frozen or thawed, if an optimiser loads a
    state, or if one of its settings other than the learning rate changes. Values that are written into the parameters,
    as `load_state_dict` does, need no new graph.

    Args:
        step: The step to capture. Its optimisers are `CapturableOptimizer`s.
        device: Device of the model.
        capturer: Captures the step.
    """

    def __init__(self, step: GradientStep, device: torch.device, capturer: GraphCapturer) -> None:
        self._step = step
        self._device = device
        self._captures = Captures("The gradient step", step.model, device, capturer, MAX_FORMS)
        self._changes = StepChanges(step)
        self._optimizers: list[CapturableOptimizer] = []
        for optimizer in step.optimizers:
            assert isinstance(optimizer, CapturableOptimizer)
            self._optimizers.append(optimizer)
        self._prepare_optimizers(True)
        self._tensors = [*step.model.parameters(), *step.model.buffers()]
        self._states: list[object] = [None for _ in self._optimizers]
        self._loss_names: dict[Hashable, list[str]] = {}

    def __call__(self, batch: Batch) -> Updated:
        """Takes the step.

        Args:
            batch: A batch on the device or on the CPU.

        Returns:
            Losses that stay as they are, and extras that the next step may overwrite: copying them has to begin before
            it.
        """
        if self._captures.given_up:
            return self._plain_step(batch)
        self._check()
        tensors = batch.named_tensors()
        key = signature_of(tensors)
        own = any(_has_own_step(optimizer) for optimizer in self._optimizers)
        if own or not self._captures.takes(key):
            return self._plain_step(batch)

        def inputs() -> Tensors:
            rates = [float(group["lr"]) for optimizer in self._optimizers for group in optimizer.param_groups]
            return {**tensors, _RATES: torch.tensor(rates, dtype=torch.float32)}

        def function(given: Tensors) -> dict[str, Tensor]:
            with self._rates_of(given[_RATES]):
                return outputs_of(self._step(batch.with_tensors(given)))

        def plain() -> dict[str, Tensor]:
            self._prepare_optimizers(False)
            return outputs_of(self._plain_step(batch))

        def outputs_of(result: Updated) -> dict[str, Tensor]:
            self._loss_names[key] = list(result.losses)
            outputs = {_LOSSES: torch.stack([value.float() for value in result.losses.values()])}
            for index, extras in enumerate(result.extras):
                outputs |= {f"{index}/{name}": value for name, value in extras.items()}
            return outputs

        def losses_in(given: Tensors) -> dict[str, Tensor]:
            return dict(zip(self._loss_names[key], given[_LOSSES].clone().unbind(), strict=True))

        def named(given: Tensors) -> Tensors:
            return {**given, **losses_in(given)}

        outputs = self._captures(key, Work(function, inputs, plain, self._changes, named))
        if self._captures.given_up:
            self._prepare_optimizers(False)
        extras: list[dict[str, Tensor]] = [{} for _ in self._step.phases]
        for name, value in outputs.items():
            if name != _LOSSES:
                index, _, extra = name.partition("/")
                extras[int(index)][extra] = value
        return Updated(losses_in(outputs), extras)

    def _plain_step(self, batch: Batch) -> Updated:
        return self._step(batch.to(self._device))

    def _prepare_optimizers(self, capturable: bool) -> None:
        for optimizer in self._optimizers:
            optimizer.make_capturable(capturable)

    @contextmanager
    def _rates_of(self, rates: Tensor) -> Iterator[None]:
        """Inside the block the optimisers find their learning rates on the device. `[groups]`"""
        groups = [group for optimizer in self._optimizers for group in optimizer.param_groups]
        given = [group["lr"] for group in groups]
        for group, rate in zip(groups, rates.unbind(), strict=True):
            group["lr"] = rate
        try:
            yield
        finally:
            for group, rate in zip(groups, given, strict=True):
                group["lr"] = rate

    def _check(self) -> None:
        """Drops the graphs if what they read besides their inputs has changed or moved."""
        states: list[object] = [optimizer.state for optimizer in self._optimizers]
        settings = [
            [value for name, value in group.items() if name not in ("params", "lr", "updates")]
            for optimizer in self._optimizers
            for group in optimizer.param_groups
        ]
        self._captures.keep_while((places(self._tensors), settings))
        if any(state is not seen for state, seen in zip(states, self._states, strict=True)):
            self._captures.clear()
            self._states = states


def _has_own_step(optimizer: CapturableOptimizer) -> bool:
    """Whether the optimiser's step was replaced or has hooks; schedulers of learning rates only count the steps."""
    step = vars(optimizer).get("step")
    changed = [name for name in ("pre", "post") if vars(optimizer)[f"_optimizer_step_{name}_hooks"]]
    if step is not None and not getattr(step, "_wrapped_by_lr_sched", False):
        changed.append("step")
    return steps_back("A CUDA graph of gradient steps", optimizer, changed)
