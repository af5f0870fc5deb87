"""Writing files and directories so that a kill at any moment leaves the old or the new, never half of one."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

_BESIDE = re.compile(r"^\.(?P<name>.+)\.(?P<pid>\d+)\.writing$")
_ASIDE = ".replaced"


@contextmanager
def replacing(path: str | Path) -> Iterator[IO[bytes]]:
    """Gives a binary file beside `path` to write to, which becomes `path` when the block ends without an error.

    Its content is on the disk before the old file is replaced. After an error nothing is left of it.

    Args:
        path: Target; its directory must exist.
    """
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files private; what is saved is as readable as any other file of the user.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_atomically(path: str | Path, data: bytes) -> None:
    """Writes a whole file through `replacing`."""
    with replacing(path) as file:
        file.write(data)


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
        aside = path.with_name(f".{path.name}{_ASIDE}")
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
    aside = path.with_name(f".{path.name}{_ASIDE}")
    if not aside.exists():
        return
    if path.exists():
        shutil.rmtree(aside, ignore_errors=True)
    else:
        os.rename(aside, path)


def recover_directories(parent: Path) -> None:
    """Does the same for all directories in `parent`."""
    for aside in parent.glob(f".*{_ASIDE}"):
        recover_directory(parent / aside.name[1:].removesuffix(_ASIDE))


def remove_directory(path: Path) -> None:
    """Removes a directory so that a kill on the way does not leave half of it under its name."""
    going = path.with_name(f".{path.name}.{os.getpid()}.writing")
    os.rename(path, going)
    shutil.rmtree(going, ignore_errors=True)


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
