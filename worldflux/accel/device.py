"""Resolving names of devices."""

from __future__ import annotations

import os

import torch
from torch import nn

from worldflux.errors import ConfigurationError


def resolve_device(name: str | torch.device, *, must_exist: bool = True, must_compute: bool = False) -> torch.device:
    """Returns the device with the given name.

    Args:
        name: Name in torch's notation, or "auto" for CUDA if available and the CPU otherwise.
        must_exist: Whether to reject a device that this machine does not have.
        must_compute: Whether to also reject "meta", where tensors have shapes but no values.

    Raises:
        ConfigurationError: If the name is not valid, or the device is not available or not supported.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ConfigurationError(f"device is {name!r}, expected 'auto', 'cpu', 'cuda' or 'cuda:<index>'.") from error
    if not must_exist or device.type in ("cpu", *(() if must_compute else ("meta",))):
        return device
    count = torch.cuda.device_count()
    if device.type != "cuda":
        raise ConfigurationError(
            f"device is '{device}', which worldflux does not support. It supports the CPU and CUDA devices, of which "
            f"torch sees {count} here. Use device='auto' or 'cpu'."
        )
    if (device.index or 0) >= count:
        raise ConfigurationError(
            f"device is '{device}', but torch sees {count} CUDA devices. "
            "Use device='auto' or 'cpu', or install a CUDA build of torch."
        )
    return device


_SMALL = 1_000_000
"""Number of parameters below which a second thread gains little."""


def is_small(model: nn.Module) -> bool:
    """Whether a second thread gains little for a model."""
    return sum(p.numel() for p in model.parameters()) < _SMALL


def choose_threads(model: nn.Module) -> None:
    """Lets torch use one thread for a small model, unless the environment variable OMP_NUM_THREADS says how many.

    The threads of small layers mostly wait for each other, on a machine that does other work for most of the time. This
    is for processes of our own: in others, the number of threads is not ours to choose.

    Args:
        model: The model that is going to be trained, or to act.
    """
    if is_small(model) and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
