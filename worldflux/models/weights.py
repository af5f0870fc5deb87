"""Reading weights from files, and checking them before a model loads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import safetensors.torch
from torch import Tensor

from worldflux.errors import CheckpointError
from worldflux.models.finite import first_not_finite
from worldflux.reading import open_regular


def read_weights(path: Path, *, allow_nonfinite: bool = False) -> dict[str, Tensor]:
    """Reads the tensors of a safetensors file; they take as much memory as the size of the file.

    Raises:
        CheckpointError: If the file is missing or damaged, or contains a value that is not finite and `allow_nonfinite`
            is not set.
    """
    try:
        with open_regular(path) as file:
            data = file.read()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
    try:
        tensors = safetensors.torch.load(data)
    except Exception as error:  # safetensors raises its own Rust exception class
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}.") from error
    if not allow_nonfinite:
        check_finite(path, tensors)
    return tensors


def check_weights(
    path: object,
    saved: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    remedy: str = "Build the model with the configuration that was saved.",
) -> None:
    """Raises a `CheckpointError` unless saved weights have the names, shapes and kinds of dtype of a model's own.

    Args:
        path: Source of the weights.
        saved: The saved weights.
        own: The weights of the model.
        remedy: End of the message, which says what to do.
    """
    missing, unknown = sorted(own.keys() - saved.keys()), sorted(saved.keys() - own.keys())
    if missing or unknown:
        raise CheckpointError(
            f"{path} belongs to another model: it lacks {_some(missing)} and has {_some(unknown)} that this model "
            f"lacks. {remedy}"
        )
    for name, tensor in sorted(saved.items()):
        if tensor.shape != own[name].shape:
            raise CheckpointError(
                f"{path} belongs to another model: {name} has shape {tuple(tensor.shape)}, expected "
                f"{tuple(own[name].shape)}. {remedy}"
            )
        if tensor.dtype != own[name].dtype and not (tensor.is_floating_point() and own[name].is_floating_point()):
            raise CheckpointError(f"{path} has {name} as {tensor.dtype}, expected {own[name].dtype}.")


def _some(names: Sequence[str]) -> str:
    if not names:
        return "nothing"
    return f"'{names[0]}'" if len(names) == 1 else f"'{names[0]}' and {len(names) - 1} more"


def check_finite(where: object, tensors: Mapping[str, Tensor]) -> None:
    """Raises a `CheckpointError` that names the first tensor with a value that is not finite.

    Args:
        where: Source of the tensors, named in the error message.
        tensors: Tensors on one device.
    """
    problem = first_not_finite(tensors)
    if problem is not None:
        raise CheckpointError(
            f"{where}: {problem}. A model with these weights predicts NaN. Load an earlier checkpoint, or pass "
            "allow_nonfinite=True to examine this one."
        )
