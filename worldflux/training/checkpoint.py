"""Checkpoints on disk: which there are, what is in them, and whether they fit."""

from __future__ import annotations

import math
import os
import random
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from worldflux.errors import CheckpointError, WorldFluxError
from worldflux.files import reason, recover_directories, recover_directory
from worldflux.models.base import WEIGHTS_FILE
from worldflux.reading import read_json
from worldflux.training.config import whole_number
from worldflux.training.randomness import decoded

OPTIMIZER_FILE = "optimizer.pt"
TRAINER_FILE = "trainer.json"
EXTRAS_FILE = "extras.safetensors"
"""What training on stored data had written beside its rows; only where there is such."""
FORMAT = 1
"""Of the files; a change that older versions cannot read raises it."""

_MOMENTS = {"laprop": ("mu", "nu"), "adam": ("exp_avg", "exp_avg_sq")}
"""What each kind of optimiser remembers of a parameter, in its shape."""

_NAME = re.compile(r"^step-\d{8,}$")


def checkpoint_name(step: int) -> str:
    """Of the checkpoint of a step, in a directory of several."""
    return f"step-{step:08d}"


def checkpoints_in(directory: Path) -> list[Path]:
    """The checkpoints in a directory, the one written last at the end.

    They are ordered by when they were written and not by their steps: a new run into the directory of an older, longer
    one goes on from its own.
    """
    if not directory.is_dir():
        return []
    recover_directories(directory, "step-*")
    mine = [entry for entry in directory.iterdir() if entry.is_dir() and _NAME.match(entry.name)]
    return sorted(mine, key=lambda entry: (_saved_at(entry), entry.name))


def newest_checkpoint(directory: Path) -> Path | None:
    """The checkpoint in a directory that was written last; None if there is none."""
    found = checkpoints_in(directory)
    return found[-1] if found else None


def time_of_saving(directory: Path) -> float:
    """The time, and behind that of all checkpoints in `directory`, however the clocks that they were written by differ.

    A clock that was set back would otherwise make the newest checkpoint an old one, which is removed.
    """
    last = max((_saved_at(checkpoint) for checkpoint in checkpoints_in(directory)), default=0.0)
    return max(time.time(), math.nextafter(last, math.inf))


def new_run() -> str:
    """A name for a run that no other has. It is not drawn from the random streams of the run."""
    return uuid.uuid4().hex


def run_of(checkpoint: Path, progress: Any = None) -> str:
    """The name of the run that a checkpoint belongs to.

    Those that older versions wrote have no name; of them, all in one directory count as one run.

    Args:
        checkpoint: The directory.
        progress: What its `trainer.json` holds, if it was read already.
    """
    run = (_progress(checkpoint) if progress is None else progress).get("run")
    return run if isinstance(run, str) and run else os.path.realpath(checkpoint.parent)


@contextmanager
def writing_checkpoint(path: Path) -> Iterator[None]:
    """Turns what goes wrong while a checkpoint is written into a `CheckpointError`."""
    try:
        yield
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        if isinstance(error, WorldFluxError):
            raise
        raise CheckpointError(
            f"The checkpoint {path} could not be written: {reason(error)}. What was there before is unchanged."
        ) from error


def check_target(path: Path) -> None:
    """Raises a `CheckpointError` if a checkpoint would replace something that is none."""
    if path.exists() and not (path / TRAINER_FILE).is_file() and not (path.is_dir() and not any(path.iterdir())):
        raise CheckpointError(f"{path} exists and is no checkpoint. Choose another path or remove it.")


def read_checkpoint(path: Path) -> tuple[Any, dict[str, Tensor], Any, dict[str, Tensor]]:
    """What the files of a checkpoint hold: the trainer's progress, the weights, the optimisers' states, the extras.

    Raises:
        CheckpointError: If a file is missing or cannot be read.
    """
    recover_directory(path)
    for name in (TRAINER_FILE, WEIGHTS_FILE, OPTIMIZER_FILE):
        if not (path / name).is_file():
            raise CheckpointError(f"{path} has no {name}. Pass a directory written by Trainer.save_checkpoint.")
    return (
        read_json(path / TRAINER_FILE, finite=False),  # what callbacks remember may be infinite
        _read(path / WEIGHTS_FILE, safetensors.torch.load_file),
        _read(path / OPTIMIZER_FILE, lambda file: torch.load(file, map_location="cpu", weights_only=True)),
        _read(path / EXTRAS_FILE, safetensors.torch.load_file) if (path / EXTRAS_FILE).exists() else {},
    )


def check_progress(path: Path, progress: Any, device: torch.device) -> None:
    """Raises a `CheckpointError` unless a trainer can go on from this step and these random states."""
    file = path / TRAINER_FILE
    if not isinstance(progress, dict) or not {"format", "step", "random", "sampler"} <= progress.keys():
        raise CheckpointError(f"{file} is not the progress of a Trainer. The file is damaged.")
    if progress["format"] != FORMAT:
        raise CheckpointError(
            f"{path} has format {progress['format']}, this version reads {FORMAT}. Load it with a newer worldflux."
        )
    whole_number(f"{file}: step", progress["step"], 0, error=CheckpointError)
    if not isinstance(progress["sampler"], dict | None):
        raise CheckpointError(f"{file}: sampler is {progress['sampler']!r}, expected a state. The file is damaged.")
    callbacks = progress.get("callbacks", [])
    if not isinstance(callbacks, list) or not all(
        isinstance(entry, dict) and isinstance(entry.get("type"), str) and isinstance(entry.get("state"), dict)
        for entry in callbacks
    ):
        raise CheckpointError(f"{file}: callbacks is {callbacks!r}, expected a list of states. The file is damaged.")
    try:
        python, legacy, streams = decoded(progress["random"])
        random.Random().setstate(python)
        np.random.RandomState().set_state(legacy)
        if not 0 <= legacy["state"]["pos"] <= len(legacy["state"]["key"]):  # NumPy would read beyond its words
            raise ValueError(f"pos is {legacy['state']['pos']}")
        torch.Generator().set_state(streams["cpu"])
        if device.type == "cuda" and "cuda" in streams:
            torch.Generator(device).set_state(streams["cuda"])
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{file}: random is not the state of random streams ({error!r}). The file is damaged."
        ) from error


def weights_on_cpu(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers on the CPU, each with memory of its own, as safetensors wants them."""
    weights: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in model.state_dict().items():
        tensor = tensor.detach().cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        weights[name] = tensor.clone() if memory in taken else tensor
        taken.add(memory)
    return weights


def check_weights(path: Path, saved: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Raises a `CheckpointError` unless saved weights have the names and shapes of a model's own."""
    missing, unknown = sorted(own.keys() - saved.keys()), sorted(saved.keys() - own.keys())
    if missing or unknown:
        raise CheckpointError(
            f"{path} is of another model: it lacks {_some(missing)} and has {_some(unknown)} that this model lacks. "
            "Build the model with the configuration that was saved."
        )
    for name, tensor in saved.items():
        if tensor.shape != own[name].shape:
            raise CheckpointError(
                f"{path} is of another model: {name} has shape {tuple(tensor.shape)}, expected "
                f"{tuple(own[name].shape)}. Build the model with the configuration that was saved."
            )


def check_optimizers(path: Path, saved: Any, kind: str, own: Sequence[torch.optim.Optimizer]) -> None:
    """Raises a `CheckpointError` unless saved optimisers are of this kind and have all that the own ones go on from."""
    expected = [[len(group["params"]) for group in optimizer.param_groups] for optimizer in own]
    damaged = f"{path / OPTIMIZER_FILE} is not the state of an optimiser. The file is damaged."
    try:
        saved_kind, states = saved["kind"], saved["states"]
        found = [[len(group["params"]) for group in state["param_groups"]] for state in states]
    except (AttributeError, LookupError, TypeError) as error:
        raise CheckpointError(damaged) from error
    if saved_kind != kind:
        raise CheckpointError(f"{path} was trained with '{saved_kind}', and this model uses '{kind}'.")
    if found != expected:
        raise CheckpointError(
            f"{path} has optimisers for {found} parameters, and this model trains {expected}. "
            "Freeze the same parameters as when it was saved."
        )
    try:
        fit = all(_continues(state, optimizer, _MOMENTS[kind]) for state, optimizer in zip(states, own, strict=True))
    except (AttributeError, LookupError, TypeError) as error:
        raise CheckpointError(damaged) from error
    if not fit:
        raise CheckpointError(damaged)


def _continues(state: dict[str, Any], optimizer: torch.optim.Optimizer, moments: Sequence[str]) -> bool:
    """Whether a saved state has what the optimiser's next update reads, in the shapes of its parameters."""
    shapes = [parameter.shape for group in optimizer.param_groups for parameter in group["params"]]
    saved = state["state"].items()
    return (
        [index for group in state["param_groups"] for index in group["params"]] == list(range(len(shapes)))
        and all(isinstance(group["updates"], int) for group in state["param_groups"])
        and all(isinstance(entry["step"], int | float | Tensor) for _, entry in saved)
        and all(entry[name].shape == shapes[index] for index, entry in saved for name in moments)
    )


def _saved_at(checkpoint: Path) -> float:
    try:
        saved_at = float(_progress(checkpoint)["saved_at"])
    except (ValueError, LookupError, TypeError):
        return 0.0
    return saved_at if math.isfinite(saved_at) else 0.0


def _progress(checkpoint: Path) -> dict[str, Any]:
    """What `trainer.json` holds; nothing where it cannot be read."""
    try:
        progress = read_json(checkpoint / TRAINER_FILE, finite=False)
    except (FileNotFoundError, CheckpointError):
        return {}
    return progress if isinstance(progress, dict) else {}


def _some(names: Sequence[str]) -> str:
    if not names:
        return "nothing"
    return f"'{names[0]}'" if len(names) == 1 else f"'{names[0]}' and {len(names) - 1} more"


def _read(path: Path, reader: Callable[[Path], Any]) -> Any:
    try:
        return reader(path)
    except Exception as error:  # what a damaged file makes unpickling raise is not a closed list
        raise CheckpointError(f"{path} cannot be read: {error}. It is damaged or not a checkpoint.") from error
