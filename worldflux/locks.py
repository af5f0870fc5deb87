"""Locks on directories, so that no two runs write into the same one, and on what threads share."""

from __future__ import annotations

import os
import platform
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

from worldflux.errors import ConfigurationError
from worldflux.files import reason
from worldflux.reading import open_regular

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

LOCK_FILE = ".lock"
"""Name of the lock file in a directory that is in use. A file left behind by a killed process does not lock it."""
_FAR = 2**30
"""Position of the locked byte on Windows, behind the text of the file, because locked bytes cannot be read there."""


MethodT = TypeVar("MethodT", bound=Callable[..., Any])


class ThreadLock:
    """A reentrant lock of threads in an object that can be copied and pickled; the copy has a lock of its own."""

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[ThreadLock], tuple[()]]:
        return type(self), ()


def locked(method: MethodT) -> MethodT:
    """A method of an object with a `ThreadLock` called `lock`, which is held while the method runs."""

    @wraps(method)
    def with_lock(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.lock:
            return method(self, *args, **kwargs)

    return with_lock  # type: ignore[return-value]


class DirectoryLock:
    """A lock on a directory, which the operating system releases when its process ends, even if it is killed.

    The lock is held on a file in the directory, which is removed on release. It works across machines on network file
    systems that support locks. On a file system without locks it is always granted.

    Args:
        directory: Directory to lock, which must exist.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / LOCK_FILE
        self._handle: int | None = None
        self._owner = 0

    def take(self) -> bool:
        """Acquires the lock and returns True, or returns False if another process or object holds it.

        Raises:
            OSError: If the directory is not writable.
        """
        while True:
            # A symbolic link is not followed: its target is not ours to write to.
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
            if not _lock(handle):
                os.close(handle)
                return False
            if self._is_of(handle):
                break
            os.close(handle)  # the previous holder removed the file in the meantime
        self._handle, self._owner = handle, os.getpid()
        with suppress(OSError):  # a full disk
            os.ftruncate(handle, 0)
            os.write(handle, _this_process().encode())
        return True

    def release(self) -> None:
        """Releases the lock if it is held."""
        handle, self._handle = self._handle, None
        if handle is None or os.getpid() != self._owner:  # this is a copy in a forked process
            return
        if sys.platform == "win32":  # open files cannot be removed there
            os.close(handle)
            handle = None
        with suppress(OSError):
            self.path.unlink()
        if handle is not None:
            _unlock(handle)
            os.close(handle)

    def holder(self) -> str:
        """Describes the process that holds the lock."""
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
    """Locks a directory for the duration of the block. A missing one is created, and removed again if it stays empty.

    Raises:
        ConfigurationError: If another run uses the directory, or it is not writable.
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
    """Returns the text that this process writes into its lock files."""
    return f"process {os.getpid()} on {platform.node()}"


def _lock(handle: int) -> bool:
    try:
        if sys.platform == "win32":
            os.lseek(handle, _FAR, os.SEEK_SET)
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
            os.lseek(handle, 0, os.SEEK_SET)
        else:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # Windows raises the latter
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _unlock(handle: int) -> None:
    """Unlocks explicitly: a forked process that inherited the open file would otherwise keep the lock."""
    if sys.platform != "win32":
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)
