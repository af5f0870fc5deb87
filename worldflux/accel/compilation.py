"""Decides from the setting `compile` and the device whether a model is compiled and captured."""

from __future__ import annotations

import logging
import os
import shutil
import sysconfig
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch

from worldflux.errors import ConfigurationError

logger = logging.getLogger("worldflux.training")

_CPP_COMPILERS = ("g++", "clang++", "cl")
_C_COMPILERS = ("gcc", "clang", "cc", "cl")


def checked_compile(value: Any) -> bool | Literal["auto"]:
    """Returns `value` if it is valid for the setting `compile`.

    Raises:
        ConfigurationError: If it is neither True, False nor "auto".
    """
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value == "auto":
        return "auto"
    raise ConfigurationError(f"compile is {value!r}, expected True, False, or 'auto' to compile on CUDA only.")


def compiles(setting: bool | Literal["auto"], device: torch.device) -> bool:
    """Returns whether the performance-critical functions of a model are compiled on a device.

    Args:
        setting: Value of `TrainingConfig.compile`.
        device: Device of the model.

    Raises:
        ConfigurationError: If the setting is True and a requirement of `torch.compile` is missing.
    """
    if setting is False or (setting == "auto" and device.type != "cuda"):
        return False
    missing = _missing(device)
    if missing is None:
        return True
    if setting is True:
        raise ConfigurationError(
            f"compile is True, but torch.compile needs {missing} for {device.type}, which was not found. "
            "Install it, or use compile='auto', which then does not compile."
        )
    logger.info("the model is not compiled: torch.compile needs %s, which was not found", missing)
    return False


def captures(setting: bool | Literal["auto"], device: torch.device, model: object) -> bool:
    """Returns whether gradient steps and actions are captured as CUDA graphs and replayed on a device.

    "auto" excludes models without `capturable`, because whatever they do in Python would not be replayed.

    Args:
        setting: Value of `TrainingConfig.compile`.
        device: Device of the model.
        model: Model to run; a `WorldModel` has the attribute `capturable`.
    """
    return device.type == "cuda" and (setting is True or (setting == "auto" and getattr(model, "capturable", False)))


def _missing(device: torch.device) -> str | None:
    """Returns a requirement of `torch.compile` that is missing for a device, or None if there is none."""
    if device.type == "cuda" and find_spec("triton") is None:
        return "Triton"
    names, variable = (_C_COMPILERS, "CC") if device.type == "cuda" else (_CPP_COMPILERS, "CXX")
    if not _found((os.environ.get(variable, ""), *names)):
        return "a C compiler (such as gcc)" if device.type == "cuda" else "a C++ compiler (such as g++)"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "Python's header files (such as the package python3-dev)"
    return None


def _found(compilers: Sequence[str]) -> bool:
    return any(name and shutil.which(name) for name in compilers)
