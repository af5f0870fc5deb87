"""A model as it is evaluated: without dropout, and with random numbers of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module, device: torch.device, seed: int) -> Iterator[None]:
    """Inside the block nothing is trained: evaluation mode, no gradients, and random numbers that start from `seed`.

    Behind it the modes of all modules and torch's random streams are as before.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            # torch.manual_seed would reach CUDA devices whose streams are not brought back.
            torch.default_generator.manual_seed(seed)
            if device.type == "cuda":
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
            yield
    finally:
        for module, training in modes.items():
            module.training = training
