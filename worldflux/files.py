"""Writing files and directories so that a kill at any moment leaves the old or the new, never half of one."""

from __future__ import annotations

import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

_BESIDE = re.compile(r"^\..+\.(?P<host>[A-Za-z0-9-]*)-(?P<pid>\d{1,9})\.writing$")
_HOST = re.sub("[^A-Za-z0-9]+", "-", platform.node())
_ASIDE = ".replaced"
_LONGEST_WRITE = 24 * 3600.0
"""Seconds. What another machine has not touched for so long is nobody's any more."""

_in_use: set[str] = set()
"""What this process is writing in."""


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
def directory_beside(path: Path) -> Iterator[Path]:
    """Gives an empty directory beside `path` to write in, of which nothing is left afterwards.

    What writers that were killed left there is removed first.

    Args:
        path: Of what is to be written; missing parents are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent)
    beside = _beside(path)
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    _in_use.add(os.path.realpath(beside))
    try:
        yield beside
    finally:
        _in_use.discard(os.path.realpath(beside))
        shutil.rmtree(beside, ignore_errors=True)


@contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Gives an empty directory to fill, which becomes `path` when the block ends without an error.

    A directory that is already there stays until then. The files reach the disk before it is replaced. What writers
    that were killed left beside `path` is removed.

    Args:
        path: Target. Missing parents are made; an existing directory is replaced as a whole.
    """
    path = Path(path)
    recover_directory(path)
    with directory_beside(path) as beside:
        try:
            yield beside
            for entry in beside.rglob("*"):
                _sync(entry)
            _sync(beside)
            _replace(path, beside)
            _sync(path.parent)
        finally:
            recover_directory(path)


def _replace(path: Path, beside: Path) -> None:
    """Moves a directory to a path where another one may be, which is moved aside."""
    while True:
        if path.exists():
            # A directory cannot be renamed over a full one. A kill between the two renames is what
            # `recover_directory` mends.
            os.rename(path, path.with_name(f".{path.name}{_ASIDE}"))
        try:
            os.rename(beside, path)
            return
        except OSError:
            if not path.exists():
                raise
            # A reader came between the two and took the old one for what a kill had left.


def recover_directory(path: str | Path) -> None:
    """Brings back the directory that a killed `atomic_directory` had moved aside, if it left none at `path`."""
    path = Path(path)
    aside = path.with_name(f".{path.name}{_ASIDE}")
    if not aside.exists():
        return
    if not path.exists():
        try:
            os.rename(aside, path)
            return
        except OSError:
            if not path.exists():
                raise
            # Its writer was not killed, and quicker.
    shutil.rmtree(aside, ignore_errors=True)


def recover_directories(parent: Path, names: str) -> None:
    """Does the same for all directories in `parent` whose names match a pattern of `Path.glob`."""
    for aside in parent.glob(f".{names}{_ASIDE}"):
        recover_directory(parent / aside.name[1:].removesuffix(_ASIDE))


def remove_directory(path: Path) -> None:
    """Removes a directory so that a kill on the way does not leave half of it under its name."""
    going = _beside(path)
    try:
        os.rename(path, going)
    except FileNotFoundError:  # somebody else has removed it
        return
    shutil.rmtree(going, ignore_errors=True)


def remove_leftovers(directory: Path) -> None:
    """Removes what writers that no longer run left unfinished in `directory`.

    Of another machine that shares the directory, only what is a day old: nobody here knows what runs there.
    """
    for entry in directory.iterdir():
        match = _BESIDE.match(entry.name)
        if match and _is_abandoned(entry, match["host"], int(match["pid"])):
            shutil.rmtree(entry, ignore_errors=True)


def _beside(path: Path) -> Path:
    """The name beside `path` that says who is writing there."""
    return path.with_name(f".{path.name}.{_HOST}-{os.getpid()}.writing")


def _is_abandoned(entry: Path, host: str, pid: int) -> bool:
    if host != _HOST:
        try:
            return time.time() - entry.stat().st_mtime > _LONGEST_WRITE
        except FileNotFoundError:
            return False
    if pid == os.getpid():  # perhaps another one's, before this process got its number, as in a restarted container
        return os.path.realpath(entry) not in _in_use
    return not _is_running(pid)


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
