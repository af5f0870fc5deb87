"""Checkpoints on disk: which there are, what is in them, and whether they fit."""

from __future__ import annotations

import math
import os
import random
import re
import time
import uuid
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from torch import Tensor, nn

from worldflux.errors import CheckpointError, WorldFluxError
from worldflux.files import reason, recover_directories, recover_directory
from worldflux.models.base import WEIGHTS_FILE
from worldflux.models.weights import check_finite, read_weights
from worldflux.reading import check_stored, open_regular, read_json
from worldflux.training.config import whole_number
from worldflux.training.randomness import decoded

OPTIMIZER_FILE = "optimizer.pt"
TRAINER_FILE = "trainer.json"
EXTRAS_FILE = "extras.safetensors"
"""What training on stored data had written beside its rows; only where there is such."""
FORMAT = 1
"""Of the files; a change that older versions cannot read raises it."""

LARGEST_STEP = 2**48
"""No run has so many steps."""

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


def read_checkpoint(
    path: Path, *, allow_nonfinite: bool = False
) -> tuple[Any, dict[str, Tensor], Any, dict[str, Tensor]]:
    """What the files of a checkpoint hold: the trainer's progress, the weights, the optimisers' states, the extras.

    Raises:
        CheckpointError: If a file is missing or cannot be read, or a weight is not finite and that is not allowed.
    """
    recover_directory(path)
    for name in (TRAINER_FILE, WEIGHTS_FILE, OPTIMIZER_FILE):
        if not (path / name).is_file():
            raise CheckpointError(f"{path} has no {name}. Pass a directory written by Trainer.save_checkpoint.")
    return (
        read_json(path / TRAINER_FILE, finite=False),  # what callbacks remember may be infinite
        read_weights(path / WEIGHTS_FILE, allow_nonfinite=allow_nonfinite),
        _read_optimizers(path / OPTIMIZER_FILE),
        # What a model computed beside the rows is its own affair.
        read_weights(path / EXTRAS_FILE, allow_nonfinite=True) if (path / EXTRAS_FILE).exists() else {},
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
    if whole_number(f"{file}: step", progress["step"], 0, error=CheckpointError) >= LARGEST_STEP:
        raise CheckpointError(f"{file}: step is {progress['step']:.0e}, more than any run has. The file is damaged.")
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


def optimizer_states(
    path: Path, saved: Any, kind: str, own: Sequence[torch.optim.Optimizer], *, allow_nonfinite: bool = False
) -> list[dict[str, Any]]:
    """The states that optimisers go on from: of the saved ones what was counted and remembered, the rest is their own.

    Raises:
        CheckpointError: If they are of another kind, of other parameters, or lack what the next update needs.
    """
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
        taken = [_taken_over(state, optimizer, _MOMENTS[kind]) for state, optimizer in zip(states, own, strict=True)]
    except (AttributeError, ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{damaged.removesuffix('.')}: {error}.") from error
    if not allow_nonfinite:
        for state in taken:
            for index, entry in state["state"].items():
                check_finite(f"{path / OPTIMIZER_FILE}, parameter {index}", {n: entry[n] for n in _MOMENTS[kind]})
    return taken


def _taken_over(state: dict[str, Any], optimizer: torch.optim.Optimizer, moments: Sequence[str]) -> dict[str, Any]:
    """The state of an optimiser, with what the next update reads from a saved one.

    Raises:
        ValueError: If that is not there in the shapes of the parameters; or what Python raises for another structure.
    """
    own = optimizer.state_dict()["param_groups"]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if [index for group in state["param_groups"] for index in group["params"]] != list(range(len(parameters))):
        raise ValueError("its parameters are not in their order")
    groups = [
        {**group, "updates": int(_counted("updates", saved["updates"]))}
        for group, saved in zip(own, state["param_groups"], strict=True)
    ]
    entries: dict[int, dict[str, Any]] = {}
    for index, entry in state["state"].items():
        parameter = parameters[index]
        for name in moments:
            moment = entry[name]
            if moment.layout is not torch.strided or moment.device.type != "cpu" or not moment.is_floating_point():
                raise ValueError(f"{name} of parameter {index} holds no numbers")
            if moment.shape != parameter.shape or not (moment.is_contiguous() or moment.stride() == parameter.stride()):
                raise ValueError(f"{name} of parameter {index} has not the form {tuple(parameter.shape)}")
        step = _counted(f"step of parameter {index}", entry["step"])
        entries[index] = {"step": step, **{name: entry[name] for name in moments}}
    return {"state": entries, "param_groups": groups}


def _counted(name: str, value: Any) -> Any:
    """A count of updates, as it was saved: a number, or a tensor with one."""
    is_one = isinstance(value, Tensor) and value.numel() == 1 and value.device.type == "cpu"
    if isinstance(value, bool) or not (isinstance(value, int | float) or is_one):
        raise ValueError(f"{name} is no number")
    if not 0 <= float(value) < LARGEST_STEP or float(value) % 1:
        raise ValueError(f"{name} is {float(value)}, expected a whole number from 0")
    return value


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


def _read_optimizers(path: Path) -> Any:
    try:
        with open_regular(path) as file:
            with zipfile.ZipFile(file) as archive:
                check_stored(archive, file.seek(0, os.SEEK_END))
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged file makes unpickling raise is not a closed list
        raise CheckpointError(f"{path} cannot be read: {error}. It is damaged or not a checkpoint.") from error
