"""Evaluation of a model: its states on recorded rows, without dropout and with separate random numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from worldflux.models.base import State, WorldModel
from worldflux.replay.batch import Batch


@contextmanager
def evaluating(model: nn.Module, device: torch.device, seed: int) -> Iterator[None]:
    """Sets evaluation mode, disables gradients and seeds the random numbers with `seed` inside the block.

    Afterwards the modes of all modules and torch's random states are restored.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            # torch.manual_seed would also seed CUDA devices whose random states are not restored.
            torch.default_generator.manual_seed(seed)
            if device.type == "cuda":
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def observed_states(model: WorldModel, batch: Batch) -> State:
    """Returns the most likely states of a model that sees every row of a batch with `is_first`. `[T, B, ...]`

    The state is reset at the first row of each window and wherever an episode starts.
    """
    assert batch.is_first is not None
    states: list[State] = []
    state = model.initial_state(batch.batch_size)
    for t in range(batch.seq_len):
        if "task" in state and "task" in batch.extras:  # the model has several tasks
            state = State({**state, "task": batch.extras["task"][:, t].long()})
        state = model.update(
            state,
            batch.actions[:, max(t - 1, 0)].float(),
            {k: v[:, t] for k, v in batch.obs.items()} if isinstance(batch.obs, dict) else batch.obs[:, t],
            is_first=batch.is_first[:, t] if t else torch.ones_like(batch.is_first[:, 0]),
            deterministic=True,
        )
        states.append(state)
    return State.stack(states)
