"""Evaluation of a model: without dropout and with separate random numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


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
