"""Checkpoints on disk: directories that appear whole or not at all, the random state in them, and whether they fit."""

from __future__ import annotations

import base64
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from worldflux.errors import CheckpointError
from worldflux.models.base import WEIGHTS_FILE
from worldflux.training.config import whole_number

OPTIMIZER_FILE = "optimizer.pt"
TRAINER_FILE = "trainer.json"
FORMAT = 1
"""Of the files; a change that older versions cannot read raises it."""

_MOMENTS = {"laprop": ("mu", "nu"), "adam": ("exp_avg", "exp_avg_sq")}
"""What each kind of optimiser remembers of a parameter, in its shape."""

_BESIDE = re.compile(r"^\.(?P<name>.+)\.(?P<pid>\d+)\.writing$")
_ASIDE = ".{name}.replaced"


@contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Gives an empty directory to fill, which becomes `path` when the block ends without an error.

    A directory that is already there stays until then. The files reach the disk before it is replaced. What writers
    that were killed left beside `path` is removed.

    Args:
        path: Target. Missing parents are made; an existing directory is replaced as a whole.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    recover_directory(path)
    remove_leftovers(path.parent)
    beside = path.with_name(f".{path.name}.{os.getpid()}.writing")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        yield beside
        for entry in beside.rglob("*"):
            _sync(entry)
        _sync(beside)
        aside = path.with_name(_ASIDE.format(name=path.name))
        if path.exists():
            # A directory cannot be renamed over a full one. A kill between the two renames is what
            # `recover_directory` mends.
            os.rename(path, aside)
        os.rename(beside, path)
        _sync(path.parent)
        shutil.rmtree(aside, ignore_errors=True)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        recover_directory(path)
        raise


def recover_directory(path: str | Path) -> None:
    """Brings back the directory that a killed `atomic_directory` had moved aside, if it left none at `path`."""
    path = Path(path)
    aside = path.with_name(_ASIDE.format(name=path.name))
    if not aside.exists():
        return
    if path.exists():
        shutil.rmtree(aside, ignore_errors=True)
    else:
        os.rename(aside, path)


def remove_directory(path: Path) -> None:
    """Removes a directory so that a kill on the way does not leave half of it under its name."""
    going = path.with_name(f".{path.name}.{os.getpid()}.writing")
    os.rename(path, going)
    shutil.rmtree(going, ignore_errors=True)


def random_state(device: torch.device) -> dict[str, Any]:
    """State of the global random streams of Python, NumPy and torch, as JSON can hold it.

    Args:
        device: Its own stream is included if it is a CUDA device.
    """
    version, words, gauss = random.getstate()
    legacy = np.random.get_state(legacy=False)
    assert isinstance(legacy, dict), legacy
    streams = {"cpu": _encode(torch.get_rng_state())}
    if device.type == "cuda":
        streams["cuda"] = _encode(torch.cuda.get_rng_state(device))
    return {
        "python": [version, list(words), gauss],
        "numpy": {**legacy, "state": {k: np.asarray(v).tolist() for k, v in legacy["state"].items()}},
        "torch": streams,
    }


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Continues the streams that `random_state` described.

    A CUDA stream is continued where both it and the device are there.
    """
    python, legacy, streams = _decoded(state)
    random.setstate(python)
    np.random.set_state(legacy)
    torch.set_rng_state(streams["cpu"])
    if device.type == "cuda" and "cuda" in streams:
        torch.cuda.set_rng_state(streams["cuda"], device)


def seed_everything(seed: int) -> None:
    """Starts the global random streams of Python, NumPy and torch (on every device)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def read_checkpoint(path: Path) -> tuple[Any, dict[str, Tensor], Any]:
    """What the files of a checkpoint hold: the trainer's progress, the model's weights, the optimisers' states.

    Raises:
        CheckpointError: If a file is missing or cannot be read.
    """
    recover_directory(path)
    for name in (TRAINER_FILE, WEIGHTS_FILE, OPTIMIZER_FILE):
        if not (path / name).is_file():
            raise CheckpointError(f"{path} has no {name}. Pass a directory written by Trainer.save_checkpoint.")
    return (
        _read(path / TRAINER_FILE, lambda file: json.loads(file.read_text(encoding="utf-8"))),
        _read(path / WEIGHTS_FILE, safetensors.torch.load_file),
        _read(path / OPTIMIZER_FILE, lambda file: torch.load(file, map_location="cpu", weights_only=True)),
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
    try:
        python, legacy, streams = _decoded(progress["random"])
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


def _some(names: Sequence[str]) -> str:
    if not names:
        return "nothing"
    return f"'{names[0]}'" if len(names) == 1 else f"'{names[0]}' and {len(names) - 1} more"


def _read(path: Path, reader: Callable[[Path], Any]) -> Any:
    try:
        return reader(path)
    except Exception as error:  # what a damaged file makes unpickling raise is not a closed list
        raise CheckpointError(f"{path} cannot be read: {error}. It is damaged or not a checkpoint.") from error


def _encode(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def _decoded(state: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, Tensor]]:
    """The states in the form in which Python, NumPy and torch take them."""
    version, words, gauss = state["python"]
    internal = {k: np.array(v, np.uint32) if isinstance(v, list) else v for k, v in state["numpy"]["state"].items()}
    streams = {
        name: torch.tensor(list(base64.b64decode(text)), dtype=torch.uint8) for name, text in state["torch"].items()
    }
    return (version, tuple(words), gauss), {**state["numpy"], "state": internal}, streams


def remove_leftovers(directory: Path) -> None:
    """Removes what writers that no longer run left unfinished in `directory`."""
    for entry in directory.iterdir():
        match = _BESIDE.match(entry.name)
        if match and not _is_running(int(match["pid"])):
            shutil.rmtree(entry, ignore_errors=True)


def _is_running(pid: int) -> bool:
    if os.name == "nt":  # os.kill ends processes there
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync(path: Path) -> None:
    """Waits until a file or a directory's entries are on the disk."""
    if os.name == "nt" and path.is_dir():  # directories cannot be opened there
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
