"""Devices of torch, by the names that settings give them."""

from __future__ import annotations

import torch

from worldflux.errors import ConfigurationError


def resolve_device(name: str | torch.device, *, must_exist: bool = True, must_compute: bool = False) -> torch.device:
    """The device that a setting names.

    Args:
        name: As torch writes it, or "auto": CUDA if there is a device, else the CPU.
        must_exist: Refuse a device that this machine does not have.
        must_compute: Refuse "meta", too, on which tensors have shapes and no values.

    Raises:
        ConfigurationError: If the name is no device, or the device is not there or not supported.
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
            f"device is '{device}', which worldflux does not support: it computes on the CPU and on CUDA devices, of "
            f"which torch sees {count} here. Use device='auto' or 'cpu'."
        )
    if (device.index or 0) >= count:
        raise ConfigurationError(
            f"device is '{device}', and torch sees {count} CUDA devices here. "
            "Use device='auto' or 'cpu', or install a CUDA build of torch."
        )
    return device
