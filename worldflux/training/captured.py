"""Gradient steps that are recorded once and played back: forward, backward, clipping, optimisers and what follows."""

from __future__ import annotations

from collections.abc import Hashable
from itertools import chain

import torch
from torch import Tensor

from worldflux.overriding import steps_back
from worldflux.training.batch import Batch
from worldflux.training.counted import Alike, CapturableOptimizer
from worldflux.training.graphs import Captures, Recorder, Tensors, places
from worldflux.training.update import GradientStep, Updated

MAX_FORMS = 4
"""Forms of batches whose steps are recorded; each takes the memory of a step. Others are computed plainly."""
_NUMBERS, _LOSSES = "numbers", "losses"


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

    def __init__(self, step: GradientStep, device: torch.device, recorder: Recorder) -> None:
        self._step = step
        self._device = device
        self._captures = Captures(f"The gradient step of {type(step.model).__name__}", device, recorder, MAX_FORMS)
        self._optimizers: list[CapturableOptimizer] = []
        for optimizer in step.optimizers:
            assert isinstance(optimizer, CapturableOptimizer)
            optimizer.make_capturable()
            self._optimizers.append(optimizer)
        self._tensors = [*step.model.parameters(), *step.model.buffers()]
        self._states: list[object] = [None for _ in self._optimizers]
        self._updated: dict[Hashable, list[list[Alike]]] = {}  # by form: what each optimiser updates
        self._names: dict[Hashable, list[str]] = {}  # of the losses, by form

    def __call__(self, batch: Batch) -> Updated:
        """Takes the step.

        Args:
            batch: On the device, or on the CPU.

        Returns:
            Losses that stay as they are, and extras that the next step may overwrite: copies of them have to be begun
            before.
        """
        self._check()
        tensors = batch.named_tensors()
        form = tuple((name, x.shape, x.dtype) for name, x in tensors.items())
        updated = self._updated.get(form)
        own = any(_has_own_step(optimizer) for optimizer in self._optimizers)
        alike = updated and all(o.are_alike(part) for o, part in zip(self._optimizers, updated, strict=True))
        if updated is None or own or not alike:
            return self._first_step(form, batch)
        numbers = [optimizer.count(part) for optimizer, part in zip(self._optimizers, updated, strict=True)]
        sizes = [len(part) for part in numbers]

        def function(inputs: Tensors) -> dict[str, Tensor]:
            parts = inputs[_NUMBERS].split(sizes)
            result = self._step(
                batch.with_tensors(inputs), lambda index: self._optimizers[index].update(parts[index], updated[index])
            )
            self._names[form] = list(result.losses)
            outputs = {_LOSSES: torch.stack([value.float() for value in result.losses.values()])}
            for index, extras in enumerate(result.extras):
                outputs |= {f"{index}/{name}": value for name, value in extras.items()}
            return outputs

        all_numbers = torch.tensor([*chain(*numbers)], dtype=torch.float32)
        outputs = self._captures(form, function, {**tensors, _NUMBERS: all_numbers})
        losses = dict(zip(self._names[form], outputs[_LOSSES].clone().unbind(), strict=True))
        extras: list[dict[str, Tensor]] = [{} for _ in self._step.phases]
        for name, value in outputs.items():
            if name != _LOSSES:
                index, _, key = name.partition("/")
                extras[int(index)][key] = value
        return Updated(losses, extras)

    def _first_step(self, form: Hashable, batch: Batch) -> Updated:
        """A step as without recordings, which shows what steps of this form update."""
        self._captures.drop(form)
        result = self._step(batch.to(self._device))
        self._updated[form] = [optimizer.updated for optimizer in self._optimizers]
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
            self._updated.clear()


def _has_own_step(optimizer: CapturableOptimizer) -> bool:
    """Whether somebody listens to the optimiser's steps or replaced them; schedulers of rates only count them."""
    step = vars(optimizer).get("step")
    changed = [name for name in ("pre", "post") if vars(optimizer)[f"_optimizer_step_{name}_hooks"]]
    if step is not None and not getattr(step, "_wrapped_by_lr_sched", False):
        changed.append("step")
    return steps_back("A recording of gradient steps", optimizer, changed)
