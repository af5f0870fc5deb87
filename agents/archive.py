"""The file of a saved agent: a zip in which nothing can run code.

| entry | content |
| --- | --- |
| `agent.json` | settings, spaces and counters |
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
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from worldflux.errors import CheckpointError

AGENT_FILE = "agent.json"
FORMAT = 1
_ENTRIES = (AGENT_FILE, "config.json", "model.safetensors", "optimizer.pt", "trainer.json")

ArchivePath = str | Path | io.BufferedIOBase


def write_archive(path: ArchivePath, description: dict[str, Any], save_checkpoint: Callable[[Path], None]) -> None:
    """Writes an agent's file, whole or not at all.

    Args:
        path: A path, to which `.zip` is appended if it has no suffix and whose directories are made, or a binary file.
        description: Content of `agent.json`.
        save_checkpoint: Writes the trainer's checkpoint into a directory that does not exist yet.
    """
    target = None if isinstance(path, io.IOBase) else _with_suffix(Path(path))
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the last move stays inside one file system.
    with tempfile.TemporaryDirectory(prefix=".agent-", dir=target and target.parent) as scratch:
        checkpoint = Path(scratch) / "checkpoint"
        save_checkpoint(checkpoint)
        whole = Path(scratch) / "agent.zip"
        with zipfile.ZipFile(whole, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr(AGENT_FILE, json.dumps({"format": FORMAT, **description}, indent=2))
            for entry in sorted(checkpoint.iterdir()):
                archive.write(entry, entry.name)
        if target is not None:
            os.replace(whole, target)
        else:
            with whole.open("rb") as source:
                shutil.copyfileobj(source, path)  # type: ignore[arg-type]


@contextmanager
def open_archive(path: ArchivePath) -> Iterator[tuple[dict[str, Any], Path]]:
    """The description in an agent's file, and a directory with its checkpoint that is removed afterwards.

    Args:
        path: As given to `write_archive`; `.zip` may be left out.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If it is not an agent's file, or damaged.
    """
    source: Any = path if isinstance(path, io.IOBase) else _existing(Path(path))
    with tempfile.TemporaryDirectory(prefix="agent-") as scratch:
        try:
            with zipfile.ZipFile(source) as archive:
                names = set(archive.namelist())
                missing = [entry for entry in _ENTRIES if entry not in names]
                if missing:
                    hint = " It was saved by stable-baselines3 itself." if "data" in names else ""
                    raise CheckpointError(
                        f"{path} has no {', '.join(missing)}.{hint} Pass a file that WorldFluxAgent.save wrote."
                    )
                for entry in _ENTRIES:  # these names only: a zip may hold any path
                    archive.extract(entry, scratch)
            description = json.loads((Path(scratch) / AGENT_FILE).read_text(encoding="utf-8"))
        except (zipfile.BadZipFile, EOFError, OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise CheckpointError(f"{path} is not a readable file of an agent: {error}.") from error
        if not isinstance(description, dict) or description.get("format") != FORMAT:
            found = description.get("format") if isinstance(description, dict) else None
            raise CheckpointError(f"{path} has format {found}, this version reads {FORMAT}. Use a newer worldflux.")
        yield description, Path(scratch)


def _with_suffix(path: Path) -> Path:
    return path if path.suffix else path.with_name(f"{path.name}.zip")


def _existing(path: Path) -> Path:
    """SB3's rule: the path as it is, else with `.zip` behind it."""
    candidates = (path, path.with_name(f"{path.name}.zip"))
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(f"There is no file {candidates[0]} or {candidates[1]}.")
