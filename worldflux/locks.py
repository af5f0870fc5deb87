"""Locks on directories, so that no two runs write in one."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from worldflux.errors import ConfigurationError
from worldflux.files import reason
from worldflux.reading import open_regular

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

LOCK_FILE = ".lock"
"""In a directory that is in use; what a killed process leaves of it keeps nobody away."""
_FAR = 2**30
"""Windows lets nobody read a byte that is locked, so it is one behind the text."""


class DirectoryLock:
    """A lock on a directory, which the system takes away from a process that ends, however that happens.

    It is a file in the directory that is locked, and removed in the end. It holds across the machines of a network file
    system that knows locks; where a file system knows none, nobody is kept away.

    Args:
        directory: Must exist.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / LOCK_FILE
        self._handle: int | None = None
        self._owner = 0

    def take(self) -> bool:
        """Takes the lock; False if somebody else has it.

        Raises:
            OSError: If nothing can be written in the directory.
        """
        while True:
            # What a link in there names is not ours to write to.
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
            if not _lock(handle):
                os.close(handle)
                return False
            if self._is_of(handle):
                break
            os.close(handle)  # whoever had it has removed the file in between
        self._handle, self._owner = handle, os.getpid()
        with suppress(OSError):  # a full disk
            os.ftruncate(handle, 0)
            os.write(handle, _this_process().encode())
        return True

    def release(self) -> None:
        """Gives it back, if it was taken."""
        handle, self._handle = self._handle, None
        if handle is None or os.getpid() != self._owner:  # a copy in a forked process
            return
        if sys.platform == "win32":  # which removes no file that is open
            os.close(handle)
            handle = None
        with suppress(OSError):
            self.path.unlink()
        if handle is not None:
            _unlock(handle)
            os.close(handle)

    def holder(self) -> str:
        """Who has it, in words."""
        try:
            with open_regular(self.path) as file:
                return file.read(200).decode(errors="replace") or "another process"
        except OSError:
            return "another process"

    def _is_of(self, handle: int) -> bool:
        try:
            return os.path.samestat(os.fstat(handle), os.stat(self.path))
        except FileNotFoundError:
            return False


@contextmanager
def using(directory: Path) -> Iterator[None]:
    """Keeps a directory for this run alone. One that does not exist is made, and removed if it is empty in the end.

    Raises:
        ConfigurationError: If another run uses it, or nothing can be written there.
    """
    lock, is_new = DirectoryLock(directory), not directory.exists()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        taken = lock.take()
    except OSError as error:
        raise ConfigurationError(
            f"Nothing can be written in {directory}: {reason(error)}. Choose another directory."
        ) from error
    if not taken and lock.holder() == _this_process():
        raise ConfigurationError(
            f"{directory} is in use: another callback of this program writes there. Give each a directory of its own."
        )
    if not taken:
        raise ConfigurationError(
            f"{directory} is in use by {lock.holder()}, which writes there. Wait until it has ended, or choose another "
            "directory."
        )
    try:
        yield
    finally:
        lock.release()
        if is_new:
            with suppress(OSError):  # it is not empty
                directory.rmdir()


def _this_process() -> str:
    """What lock files of this process hold."""
    return f"process {os.getpid()} on {platform.node()}"


def _lock(handle: int) -> bool:
    try:
        if sys.platform == "win32":
            os.lseek(handle, _FAR, os.SEEK_SET)
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
            os.lseek(handle, 0, os.SEEK_SET)
        else:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # the second is how Windows says it
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _unlock(handle: int) -> None:
    """A forked process may have the file open, too, and would keep the lock."""
    if sys.platform != "win32":
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)
