"""The file of a saved agent, a zip in which nothing can run code; and the same entries in a checkpoint's directory.

| entry | content |
| --- | --- |
| `agent.json` | settings, spaces and counters; the versions that it was saved with |
| `config.json`, `model.safetensors` | the model, as `WorldModel.save_pretrained` writes it |
| `optimizer.pt`, `trainer.json` | the trainer's checkpoint; tensors only, read with `weights_only=True` |
"""

from __future__ import annotations

import io
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, Literal, TypeGuard

from stable_baselines3.common.utils import get_system_info

from worldflux.errors import CheckpointError, ConfigurationError
from worldflux.files import checked_path, directory_beside, recover_directory
from worldflux.reading import check_stored, open_regular, read_json
from worldflux.training.checkpoint import newest_checkpoint, writing_checkpoint

AGENT_FILE = "agent.json"
FORMAT = 1
_ENTRIES = (AGENT_FILE, "config.json", "model.safetensors", "optimizer.pt", "trainer.json")

_NAMELESS = "the file object"
"""What errors call a file that has no path."""

ArchivePath = str | Path | io.BufferedIOBase | IO[bytes]


def is_file(given: object, to: Literal["read", "write"]) -> TypeGuard[IO[bytes]]:
    """Whether `given` is a file object and not a path.

    Args:
        given: By the user.
        to: What it has to be open for.

    Raises:
        ConfigurationError: If it is neither, or a file that is closed, opened for text or for the other direction.
    """
    if isinstance(given, str | os.PathLike):
        return False
    if not hasattr(given, to):
        raise ConfigurationError(f"The file is given as {given!r}, expected a path or a binary file object.")
    if getattr(given, "closed", False):
        raise ConfigurationError(f"The file object {given!r} is closed. Open it in mode '{to[0]}b'.")
    able = getattr(given, {"read": "readable", "write": "writable"}[to], None)
    if hasattr(given, "encoding") or isinstance(given, io.TextIOBase) or (able is not None and not able()):
        raise ConfigurationError(f"The file object {given!r} cannot {to} bytes. Open it in mode '{to[0]}b'.")
    return True


@contextmanager
def path_to_write(target: ArchivePath) -> Iterator[str | Path]:
    """A path to write to for who knows nothing of file objects: the one that was given, or that of a scratch file."""
    if not is_file(target, "write"):
        yield target  # type: ignore[misc]
        return
    with tempfile.TemporaryDirectory(prefix="agent-") as scratch:
        path = Path(scratch) / _NAMELESS
        yield path
        with path.open("rb") as source:
            shutil.copyfileobj(source, target)


@contextmanager
def path_to_read(source: ArchivePath) -> Iterator[str | Path]:
    """The same for reading. Of a file object everything is read, wherever it stands."""
    if not is_file(source, "read"):
        yield source  # type: ignore[misc]
        return
    with tempfile.TemporaryDirectory(prefix="agent-") as scratch:
        path = Path(scratch) / _NAMELESS
        source.seek(0)
        with path.open("wb") as target:
            shutil.copyfileobj(source, target)
        yield path


def write_archive(path: ArchivePath, description: dict[str, Any], write_checkpoint: Callable[[Path], None]) -> None:
    """Writes an agent's file, whole or not at all.

    Args:
        path: A path, to which `.zip` is appended if it has no suffix and whose directories are made, or a binary file.
        description: Content of `agent.json`.
        write_checkpoint: Writes the trainer's checkpoint into an empty directory.

    Raises:
        CheckpointError: If the path is a directory, or cannot be written.
        ConfigurationError: If it is neither a path nor a binary file that can be written.
    """
    target = None if is_file(path, "write") else _with_suffix(checked_path("path", path))
    if target is not None and (target.is_dir() or os.path.basename(os.fspath(path)) in ("", ".", "..")):  # type: ignore[arg-type]
        name = target if target.is_dir() else path
        raise CheckpointError(f"{name} is a directory, expected the path of a file. Add a name, such as agent.zip.")
    with _scratch(target) as scratch:
        checkpoint = scratch / "checkpoint"
        checkpoint.mkdir()
        write_checkpoint(checkpoint)
        whole = scratch / "agent.zip"
        with whole.open("wb") as file:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                archive.writestr(AGENT_FILE, _as_text(description))
                for entry in sorted(checkpoint.iterdir()):
                    archive.write(entry, entry.name)
            file.flush()
            # On the disk before the old file is gone.
            os.fsync(file.fileno())
        if target is not None:
            os.replace(whole, target)
        else:
            with whole.open("rb") as source:
                shutil.copyfileobj(source, path)  # type: ignore[arg-type]


def write_description(directory: Path, description: dict[str, Any]) -> None:
    """Writes `agent.json` beside the trainer's files in a checkpoint's directory."""
    (directory / AGENT_FILE).write_text(_as_text(description), encoding="utf-8")


@contextmanager
def open_saved(path: ArchivePath) -> Iterator[tuple[dict[str, Any], Path]]:
    """The description of a saved agent, and a directory with its checkpoint that may be gone afterwards.

    Args:
        path: As given to `write_archive`, where `.zip` may be left out; or the directory of a checkpoint, or one that
            holds several, of which the newest is taken.

    Raises:
        FileNotFoundError: If there is nothing.
        CheckpointError: If it is no agent, or damaged.
        ConfigurationError: If it is neither a path nor a binary file that can be read.
    """
    from_file = is_file(path, "read")
    holder = None if from_file else checked_path("path", path)
    if holder is not None:
        recover_directory(holder)
    if holder is None or not holder.is_dir():
        with _open_archive(path) as opened:
            yield opened
        return
    directory = holder if (holder / AGENT_FILE).is_file() else newest_checkpoint(holder)
    if directory is None:
        raise FileNotFoundError(
            f"The directory {path} holds no checkpoint of an agent. Pass one that save_checkpoint wrote, or that "
            "holds several of them."
        )
    yield _checked(read_json(directory / AGENT_FILE), directory), directory


def print_saved_system(description: dict[str, Any]) -> None:
    """Prints the versions that an agent was saved with, under SB3's headline."""
    print("== SAVED MODEL SYSTEM INFO ==")
    versions = description.get("system_info")
    if not isinstance(versions, dict):
        versions = {"Versions": "not in the file, which an older worldflux wrote"}
    print("".join(f"- {name}: {version}\n" for name, version in versions.items()))


@contextmanager
def _open_archive(path: ArchivePath) -> Iterator[tuple[dict[str, Any], Path]]:
    """The same for a zip."""
    from_file = is_file(path, "read")
    existing = None if from_file else _existing(Path(path))  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory(prefix="agent-") as scratch:
        try:
            with ExitStack() as stack:
                source: Any = path if existing is None else stack.enter_context(open_regular(existing))
                archive = stack.enter_context(zipfile.ZipFile(source))
                names = set(archive.namelist())
                missing = [entry for entry in _ENTRIES if entry not in names]
                if missing:
                    hint = " It was saved by stable-baselines3 itself." if "data" in names else ""
                    raise CheckpointError(
                        f"{path} has no {', '.join(missing)}.{hint} Pass a file that WorldFluxAgent.save wrote."
                    )
                check_stored(archive, source.seek(0, os.SEEK_END))
                for entry in _ENTRIES:  # these names only: a zip may hold any path
                    archive.extract(entry, scratch)
        except CheckpointError:
            raise
        except Exception as error:  # what a damaged zip makes zipfile raise is not a closed list
            raise CheckpointError(f"{path} is not a readable file of an agent: {error}.") from error
        description = read_json(Path(scratch) / AGENT_FILE, name=f"{path}: {AGENT_FILE}")
        yield _checked(description, path), Path(scratch)


@contextmanager
def _scratch(target: Path | None) -> Iterator[Path]:
    """A directory to write in, which is removed afterwards.

    It lies beside the target, so that the last move stays inside one file system.
    """
    if target is None:
        with tempfile.TemporaryDirectory(prefix="agent-") as directory:
            yield Path(directory)
        return
    with writing_checkpoint(target), directory_beside(target) as beside:
        yield beside


def _as_text(description: dict[str, Any]) -> str:
    system, _ = get_system_info(print_info=False)
    return json.dumps({"format": FORMAT, "system_info": system, **description}, indent=2)


def _checked(description: Any, path: object) -> dict[str, Any]:
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        found = description.get("format") if isinstance(description, dict) else None
        raise CheckpointError(f"{path} has format {found}, this version reads {FORMAT}. Use a newer worldflux.")
    return description


def _with_suffix(path: Path) -> Path:
    return path if path.suffix else path.with_name(f"{path.name}.zip")


def _existing(path: Path) -> Path:
    """SB3's rule: the path as it is, else with `.zip` behind it."""
    candidates = (path, path.with_name(f"{path.name}.zip"))
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(f"There is no file {candidates[0]} or {candidates[1]}.")
