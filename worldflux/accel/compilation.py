"""Whether and how the setting `compile` can be followed on a device."""

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
    """`value` as the setting `compile`.

    Raises:
        ConfigurationError: If it is neither True, False nor "auto".
    """
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value == "auto":
        return "auto"
    raise ConfigurationError(f"compile is {value!r}, expected True, False, or 'auto' to compile on CUDA only.")


def compiles(setting: bool | Literal["auto"], device: torch.device) -> bool:
    """Whether a model's hot functions are compiled on a device.

    Args:
        setting: As in `TrainingConfig.compile`.
        device: Where the model is.

    Raises:
        ConfigurationError: If the setting is True and something is missing that compiling needs.
    """
    if setting is False or (setting == "auto" and device.type != "cuda"):
        return False
    missing = _missing(device)
    if missing is None:
        return True
    if setting is True:
        raise ConfigurationError(
            f"compile is True, and torch.compile needs {missing} for {device.type}, which is not to be found here. "
            "Install it, or use compile='auto', which goes without."
        )
    logger.info("the model is not compiled: torch.compile needs %s, which is not to be found here", missing)
    return False


def captures(setting: bool | Literal["auto"], device: torch.device, model: object) -> bool:
    """Whether gradient steps and actions are played back from recordings on a device.

    "auto" leaves out modules that do not say that they can be recorded: what they do in Python would be lost.

    Args:
        setting: As in `TrainingConfig.compile`.
        device: Where the model is.
        model: Has `capturable` if it is a `WorldModel`.
    """
    return device.type == "cuda" and (setting is True or (setting == "auto" and getattr(model, "capturable", False)))


def _missing(device: torch.device) -> str | None:
    """What `torch.compile` needs on a device and does not find; None if all is there."""
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
