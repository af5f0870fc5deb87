"""Checkpoints on disk: finding, writing, reading and checking them."""

from __future__ import annotations

import json
import logging
import math
import random
import re
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from worldflux.accel import ranks
from worldflux.accel.randomness import decoded, random_state, seed_everything
from worldflux.config import WorldModelConfig
from worldflux.errors import CheckpointError, WorldFluxError
from worldflux.files import (
    atomic_directory,
    give_rights_of,
    reason,
    recover_directories,
    recover_directory,
    remove_leftovers,
)
from worldflux.models.base import CONFIG_FILE, WEIGHTS_FILE
from worldflux.models.weights import check_finite, check_weights, read_weights
from worldflux.pickles.torch_files import StoredTensor, TorchFile
from worldflux.reading import only_our_errors, read_json
from worldflux.validation import whole_number

OPTIMIZER_FILE = "optimizer.pt"
TRAINER_FILE = "trainer.json"
EXTRAS_FILE = "extras.safetensors"
"""File of what training on stored data has written beside its rows, if it has written anything."""
FORMAT = 2
"""Version of the files' format; a change that older versions cannot read raises it."""

MOST_RANKS = 2**16
"""Upper bound of the ranks of a run."""

LARGEST_STEP = 2**48
"""Upper bound of the steps of a run; more than any run has."""

_STATES = {"laprop": ("start", "mu", "nu"), "adam": ("step", "exp_avg", "exp_avg_sq")}
"""What each kind of optimiser remembers of a parameter: a count of updates, and tensors of the parameter's shape."""

_NAME = re.compile(r"^step-\d{8,}$")

logger = logging.getLogger("worldflux.training")


def checkpoint_name(step: int) -> str:
    """Name of the checkpoint of a step in a directory of several."""
    return f"step-{step:08d}"


def checkpoints_in(directory: Path) -> list[Path]:
    """The complete checkpoints in a directory, in the order in which they were written.

    They are not ordered by their steps, so that a new run in the directory of an older, longer one continues from its
    own checkpoints.
    """
    return _sorted_out(directory)[0]


def incomplete_in(directory: Path) -> dict[Path, str]:
    """Directories that are named like a checkpoint but do not say of which run they are, each with what is wrong.

    An interrupted copy leaves such a directory; this library writes a checkpoint whole or not at all.
    """
    return _sorted_out(directory)[1]


def newest_checkpoint(directory: Path, *, warn: bool = False) -> Path | None:
    """The complete checkpoint in a directory that was written last; None if there is none.

    Args:
        directory: Directory of checkpoints.
        warn: Whether to log which checkpoints were skipped because they are incomplete.
    """
    found, incomplete = _sorted_out(directory)
    newest = found[-1] if found else None
    for path, fault in incomplete.items() if warn else ():
        instead = "" if newest is None else f" It was skipped, and {newest.name} is loaded."
        logger.warning("%s is not a complete checkpoint (%s).%s", path, fault, instead)
    return newest


def newest_for_all_ranks(directory: Path) -> Path | None:
    """The complete checkpoint in a directory that was written last, after leftovers were removed, as rank 0 sees it."""

    def find() -> str | None:
        remove_leftovers(directory)
        newest = newest_checkpoint(directory, warn=True)
        return None if newest is None else str(newest)

    newest = ranks.on_first(find)
    return None if newest is None else Path(newest)


def damaged(path: object, fault: object) -> CheckpointError:
    """The error for a checkpoint of which something is missing or cannot be read."""
    return CheckpointError(f"{path} is incomplete or damaged ({fault}). Load an earlier checkpoint of the run.")


def _sorted_out(directory: Path) -> tuple[list[Path], dict[Path, str]]:
    """The complete checkpoints of a directory in the order of writing, and the incomplete ones with the reason."""
    if not directory.is_dir():
        return [], {}
    recover_directories(directory, "step-*")
    times: dict[Path, float] = {}
    incomplete: dict[Path, str] = {}
    for entry in sorted(directory.iterdir()):
        if not entry.is_dir() or not _NAME.match(entry.name):
            continue
        progress = _progress(entry)
        if progress is not None:
            times[entry] = _saved_at(progress)
        else:
            there = (entry / TRAINER_FILE).is_file()
            incomplete[entry] = f"{TRAINER_FILE} cannot be read" if there else f"no {TRAINER_FILE}"
    return sorted(times, key=lambda entry: (times[entry], entry.name)), incomplete


def time_of_saving(directory: Path) -> float:
    """The current time, but later than that of all checkpoints in `directory`, whatever clocks they were written by.

    If a clock was set back, the newest checkpoint would otherwise count as an old one and be removed.
    """
    last = max((_saved_at(_progress(checkpoint) or {}) for checkpoint in checkpoints_in(directory)), default=0.0)
    return max(time.time(), math.nextafter(last, math.inf))


def new_run() -> str:
    """A unique name for a run, which is not drawn from the random streams of the run."""
    return uuid.uuid4().hex


def run_of(checkpoint: Path) -> str:
    """The name of the run that a checkpoint belongs to; empty if it cannot be read."""
    return (_progress(checkpoint) or {"run": ""})["run"]


@contextmanager
def writing_checkpoint(path: Path) -> Iterator[None]:
    """Turns errors while a checkpoint is written into a `CheckpointError`."""
    try:
        yield
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        if isinstance(error, WorldFluxError):
            raise
        raise CheckpointError(
            f"The checkpoint {path} could not be written: {reason(error)}. What was there before is unchanged."
        ) from error


def check_target(path: Path) -> None:
    """Raises a `CheckpointError` if a checkpoint would replace something that is not a checkpoint."""
    if path.exists() and not (path / TRAINER_FILE).is_file() and not (path.is_dir() and not any(path.iterdir())):
        raise CheckpointError(f"{path} exists and is no checkpoint. Choose another path or remove it.")


@dataclass(frozen=True)
class SavedState:
    """The content of a checkpoint that fits a trainer."""

    progress: dict[str, Any]
    """The content of `trainer.json`."""
    weights: dict[str, Tensor]
    """Parameters and buffers of the model."""
    optimizers: list[dict[str, Any]]
    """The state of each optimiser."""
    extras: dict[str, Tensor]
    """What training on stored data had written beside its rows."""


def write_files(
    directory: Path,
    model: nn.Module,
    kind: str,
    optimizers: Sequence[torch.optim.Optimizer],
    progress: dict[str, Any],
    extras: dict[str, Tensor],
    *,
    of_all_ranks: bool = False,
) -> None:
    """Writes the files of a checkpoint; `trainer.json` is the last.

    Args:
        directory: A directory that has no such files yet.
        model: Its weights are saved, and its configuration, if it has one.
        kind: Kind of the optimisers.
        optimizers: The optimisers of the gradient step.
        progress: Entries of `trainer.json`; the format and the time are added.
        extras: What training on stored data has written beside its rows.
        of_all_ranks: Whether all ranks write into the directory. Those but the first only add their random states, and
            the extras of their data.
    """
    progress = {"format": FORMAT, "ranks": ranks.size() if of_all_ranks else 1, **progress}
    part = part_of_rank(directory, ranks.rank() if of_all_ranks else 0)
    part.mkdir(exist_ok=True)
    if part == directory:
        progress["saved_at"] = time_of_saving(directory.parent)
        safetensors.torch.save_file(weights_on_cpu(model), directory / WEIGHTS_FILE)
        config = getattr(model, "config", None)
        if isinstance(config, WorldModelConfig):
            (directory / CONFIG_FILE).write_text(config.to_json(), encoding="utf-8")
        elif config is not None and hasattr(config, "save"):
            config.save(directory / CONFIG_FILE)
        states = {"kind": kind, "states": [optimizer.state_dict() for optimizer in optimizers]}
        with (directory / OPTIMIZER_FILE).open("wb") as file:  # given a path, torch would not say what went wrong
            torch.save(states, file)
    if extras:
        safetensors.torch.save_file(extras, part / EXTRAS_FILE)
    (part / TRAINER_FILE).write_text(json.dumps(progress), encoding="utf-8")
    for name in (WEIGHTS_FILE, EXTRAS_FILE):  # which safetensors makes readable to their owner alone
        give_rights_of(part / name, part / TRAINER_FILE)


@contextmanager
def directory_of_all_ranks(path: Path) -> Iterator[Path]:
    """Yields an empty directory that all ranks fill together, like `atomic_directory`; it replaces `path` at the end.

    Nothing may be exchanged between the ranks inside the block: it is where one of them may fail.

    Args:
        path: Target, in a file system that all ranks share.

    Raises:
        CheckpointError: If another rank could not write its part.
    """
    with ExitStack() as stack:
        beside = Path(ranks.on_first(lambda: str(stack.enter_context(atomic_directory(path)))))
        failed: BaseException | None = None
        try:
            yield beside
        except BaseException as error:
            failed = error
            raise
        finally:
            # All ranks meet here, whatever happened: a directory to which one has not added its part is not complete.
            fault = None if failed is None else f"{type(failed).__name__}: {failed}"
            faults = {rank: text for rank, text in enumerate(ranks.every(fault)) if text is not None}
            if faults and failed is None:
                rank, text = next(iter(faults.items()))
                raise CheckpointError(f"Rank {rank} could not write its part of the checkpoint {path}: {text}")
            if not faults:
                ranks.on_first(stack.close)


def part_of_rank(checkpoint: Path, rank: int) -> Path:
    """The directory in a checkpoint for what belongs to a rank alone; for the first, the checkpoint itself."""
    return checkpoint / f"rank-{rank:04d}" if rank else checkpoint


def ranks_of(checkpoint: Path, progress: dict[str, Any] | None = None) -> int:
    """The number of ranks that have written a checkpoint.

    Args:
        checkpoint: The checkpoint.
        progress: The content of its `trainer.json`; None reads it.

    Raises:
        CheckpointError: If it cannot be read.
    """
    progress = _progress(checkpoint) if progress is None else progress
    if progress is None:
        raise damaged(checkpoint, f"{TRAINER_FILE} cannot be read")
    name = f"{checkpoint / TRAINER_FILE}: ranks"
    return whole_number(name, progress.get("ranks", 1), 1, below=MOST_RANKS, error=CheckpointError)


def of_rank(
    path: Path, saved: SavedState, rank: int, size: int, device: torch.device
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a rank continues from: the progress with its own random states, and the extras of its data.

    If the checkpoint was written by another number of ranks, no rank can continue exactly: all ranks but the first
    begin new random streams, and extras are left out.

    Raises:
        CheckpointError: If the rank's part is missing or damaged.
    """
    written_by = ranks_of(path, saved.progress)
    if rank == 0 and written_by == size:
        return saved.progress, saved.extras
    if written_by != size:
        if rank == 0:
            logger.info("%s was written by %d ranks and goes on with %d", path, written_by, size)
            return saved.progress, {}
        seed_everything(ranks.seed_of_rank(saved.progress["step"]))
        return {**saved.progress, "random": random_state(device), "sampler": None}, {}
    own = part_of_rank(path, rank)
    if not (own / TRAINER_FILE).is_file():
        raise damaged(path, f"no {own.name}/{TRAINER_FILE}")
    progress = read_json(own / TRAINER_FILE, finite=False)
    check_progress(own, progress, device)
    extras = read_weights(own / EXTRAS_FILE, allow_nonfinite=True) if (own / EXTRAS_FILE).exists() else {}
    return progress, extras


def read_checkpoint(
    path: Path,
    model: nn.Module,
    kind: str,
    optimizers: Sequence[torch.optim.Optimizer],
    device: torch.device,
    *,
    allow_nonfinite: bool = False,
) -> SavedState:
    """Reads a checkpoint and checks that a trainer with this model and these optimisers can continue from it.

    Raises:
        CheckpointError: If a file is missing or cannot be read, the content is that of another model or does not fit,
            or a weight or a state of an optimiser is not finite and `allow_nonfinite` is not set.
    """
    recover_directory(path)
    names = (TRAINER_FILE, WEIGHTS_FILE, OPTIMIZER_FILE)
    missing = [name for name in names if not (path / name).is_file()]
    if len(missing) == len(names):
        raise CheckpointError(f"{path} has no {missing[0]}. Pass a directory written by Trainer.save_checkpoint.")
    if missing:
        raise damaged(path, f"no {', '.join(missing)}")
    progress = read_json(path / TRAINER_FILE, finite=False)  # what callbacks remember may be infinite
    weights = read_weights(path / WEIGHTS_FILE, allow_nonfinite=allow_nonfinite)
    # What a model computed beside the rows is its own affair.
    extras = read_weights(path / EXTRAS_FILE, allow_nonfinite=True) if (path / EXTRAS_FILE).exists() else {}
    check_progress(path, progress, device)
    check_weights(path, weights, model.state_dict())
    states = read_optimizers(path, kind, optimizers, allow_nonfinite=allow_nonfinite)
    return SavedState(progress, weights, states, extras)


def check_progress(path: Path, progress: Any, device: torch.device) -> None:
    """Raises a `CheckpointError` unless a trainer can continue from this step and these random states."""
    file = path / TRAINER_FILE
    if not isinstance(progress, dict) or not {"format", "step", "run", "random", "sampler"} <= progress.keys():
        raise CheckpointError(f"{file} is not the progress of a Trainer. The file is damaged.")
    if progress["format"] != FORMAT:
        raise CheckpointError(
            f"{path} has format {progress['format']}, this version reads {FORMAT}. Load it with the version of "
            "worldflux that wrote it."
        )
    whole_number(f"{file}: step", progress["step"], 0, below=LARGEST_STEP, error=CheckpointError)
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


def read_optimizers(
    path: Path, kind: str, own: Sequence[torch.optim.Optimizer], *, allow_nonfinite: bool = False
) -> list[dict[str, Any]]:
    """Reads the states that optimisers continue from: saved counts and moments, with the optimisers' own settings.

    Raises:
        CheckpointError: If the file cannot be read, holds optimisers of another kind or of other parameters, or lacks
            what the next update needs; or if a number is not finite and `allow_nonfinite` is not set.
    """
    file = path / OPTIMIZER_FILE
    with only_our_errors(file):
        with TorchFile(file, keys=(str, int)) as archive:
            saved = archive.read()
            saved_kind, states = saved["kind"], saved["states"]
            if saved_kind != kind:
                raise CheckpointError(f"{path} was trained with '{saved_kind}', and this model uses '{kind}'.")
            expected = [[len(group["params"]) for group in optimizer.param_groups] for optimizer in own]
            most = 1 + max(len(expected), *map(len, expected))  # a file may repeat one state any number of times
            found = [[len(group["params"]) for group in state["param_groups"][:most]] for state in states[:most]]
            if found != expected:
                raise CheckpointError(
                    f"{path} has optimisers for {found} parameters, and this model trains {expected}. "
                    "Freeze the same parameters as when it was saved."
                )
            taken = [_taken_over(archive, state, one, *_STATES[kind]) for state, one in zip(states, own, strict=True)]
    for state in taken if not allow_nonfinite else ():
        for index, entry in state["state"].items():
            check_finite(f"{file}, parameter {index}", {name: entry[name] for name in _STATES[kind][1:]})
    return taken


def _taken_over(
    archive: TorchFile, state: dict[str, Any], optimizer: torch.optim.Optimizer, count: str, *moments: str
) -> dict[str, Any]:
    """The state of an optimiser with the counts and moments of a saved one.

    Raises:
        ValueError: If they are missing or do not have the shapes of the parameters. Other structures raise whatever
            Python raises.
    """
    own = optimizer.state_dict()["param_groups"]
    parameters = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
    if [index for group in state["param_groups"] for index in group["params"]] != list(parameters):
        raise ValueError("its parameters are not in their order")
    groups: list[dict[str, Any]] = []
    updates: dict[int, int] = {}
    for group, saved in zip(own, state["param_groups"], strict=True):
        read = archive.tensors({"updates": saved["updates"]})
        groups.append({**group, "updates": int(_counted("updates", read.get("updates", saved["updates"])))})
        updates |= dict.fromkeys(saved["params"], groups[-1]["updates"])
    entries: dict[int, dict[str, Any]] = {}
    for index, entry in state["state"].items():
        for name in moments:
            if not isinstance(entry[name], StoredTensor) or entry[name].shape != tuple(parameters[index].shape):
                raise ValueError(f"{name} of parameter {index} has not the shape {tuple(parameters[index].shape)}")
        read = archive.tensors({name: entry[name] for name in (count, *moments)})
        for name in moments:
            if not read[name].is_floating_point():
                raise ValueError(f"{name} of parameter {index} is of type {read[name].dtype}")
        counted = _counted(f"{count} of parameter {index}", read.get(count, entry[count]))
        if int(counted) > updates[index]:
            raise ValueError(f"{count} of parameter {index} is {int(counted)}, more than its {updates[index]} updates")
        entries[index] = {count: int(counted), **{name: read[name] for name in moments}}  # ordered as while training
    return {"state": entries, "param_groups": groups}


def _counted(name: str, value: Any) -> Any:
    """A count of updates as it was saved: a number, or a tensor with one number."""
    is_one = isinstance(value, Tensor) and value.numel() == 1
    if isinstance(value, bool) or not (isinstance(value, int | float) or is_one):
        raise ValueError(f"{name} is no number")
    if not 0 <= float(value) < LARGEST_STEP or float(value) % 1:
        raise ValueError(f"{name} is {float(value)}, expected a whole number from 0")
    return value


def _saved_at(progress: dict[str, Any]) -> float:
    try:
        saved_at = float(progress["saved_at"])
    except (ValueError, LookupError, TypeError):
        return 0.0
    return saved_at if math.isfinite(saved_at) else 0.0


def _progress(checkpoint: Path) -> dict[str, Any] | None:
    """The content of `trainer.json`; None if it cannot be read or does not name its run."""
    try:
        progress = read_json(checkpoint / TRAINER_FILE, finite=False)
    except (FileNotFoundError, CheckpointError):
        return None
    return progress if isinstance(progress, dict) and isinstance(progress.get("run"), str) else None
