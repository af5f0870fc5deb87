"""Writing files and directories atomically: a kill at any moment leaves either the old or the new content."""

from __future__ import annotations

import errno
import itertools
import os
import platform
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TypeVar

from worldflux.errors import CheckpointError, ConfigurationError, WorldFluxError

T = TypeVar("T")

_BESIDE = re.compile(r"^\..+\.(?P<host>[A-Za-z0-9-]*)-(?P<pid>\d{1,9})\.writing(\.[A-Za-z0-9]+)?$")
_SUFFIX = re.compile(r"\.[A-Za-z0-9]{1,12}")
_HOST = re.sub("[^A-Za-z0-9]+", "-", platform.node())
_ASIDE = ".replaced"
_TOGETHER = ".replacing"
_ATTEMPTS = 12
_READINGS = 60
"""Number of attempts to read files while another process replaces them; about ten seconds in total."""
_LONGEST_WRITE = 24 * 3600.0
"""Seconds without a change after which the unfinished files of another machine count as abandoned."""
_LONGEST_NAME, _LONGEST_PATH = 255, 4095
"""Limits of common file systems, in bytes."""
_UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
"""Error numbers of operations that a file system does not support."""
_CONCURRENT = {errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT}
"""Error numbers of renaming a directory when another process was faster."""

_in_use: set[str] = set()
"""Paths that this process is writing to at present."""
_numbers = itertools.count()


def checked_path(name: str, given: object, *, within: Path | None = None, directory: bool = False) -> Path:
    """Returns a path from a user as an absolute one, so that it stays valid when the working directory changes.

    Args:
        name: Name of the path in the error message.
        given: Path that the user passed.
        within: Directory that a relative path refers to; the working directory if omitted.
        directory: Whether the path is that of a directory, which need not exist.

    Raises:
        ConfigurationError: If nothing can exist under this path: it is empty, contains invalid characters, is too
            long, begins with a `~` that only a shell would expand, or a file stands where a directory should be.
    """
    text = os.fspath(given) if isinstance(given, str | os.PathLike) else None
    expected = "expected the path of a directory" if directory else "expected a path"
    if not isinstance(text, str):
        raise ConfigurationError(f"{name} is {given!r}, {expected}.")
    wrong = _fault_in(text) if text else expected
    if wrong is not None:
        raise ConfigurationError(f"{name} is {_shortened(text)}, {wrong}. Choose another path.")
    if (expanded := os.path.expanduser(text)) != text:
        raise ConfigurationError(f"{name} is '{text}', whose ~ only a shell expands. Pass '{expanded}'.")
    try:
        path = Path(within or "", text).absolute()
    except OSError as error:
        raise ConfigurationError(
            f"{name} is '{text}', and the working directory no longer exists: {error}. Pass an absolute path."
        ) from error
    if len(os.fsencode(path)) > _LONGEST_PATH:
        raise ConfigurationError(f"{name} is {_shortened(text)}, which is too long for a path. Choose another path.")
    for place in (path, *path.parents) if directory else path.parents:
        if os.path.isdir(place):
            break
        if os.path.lexists(place):
            what = "a link to nothing" if os.path.islink(place) and not os.path.exists(place) else "a file"
            which = "which" if place == path else f"and '{place}'"
            raise ConfigurationError(f"{name} is '{text}', {which} is {what}, expected a directory.")
    return path


def _fault_in(text: str) -> str | None:
    """Explains why a text cannot be a path; None if it can."""
    if "\0" in text:
        return "which contains a NUL character, which no path can"
    try:
        longest = max(len(os.fsencode(part)) for part in re.split(r"[\\/]" if os.name == "nt" else "/", text))
    except UnicodeEncodeError:
        return "which contains a character that no path can"
    if longest > _LONGEST_NAME:
        return f"which has a name of {longest} bytes, expected at most {_LONGEST_NAME}"
    return None


def _shortened(text: str) -> str:
    shown = ascii(text)
    return shown if len(shown) <= 80 else f"{shown[:60]}...{shown[-16:]}"


def reason(error: BaseException) -> str:
    """Explains why something could not be written, in plain words if the disk is full."""
    cause: BaseException | None = error  # torch raises its own errors from those of the operating system
    while cause is not None and not (isinstance(cause, OSError) and cause.errno is not None):
        cause = cause.__cause__ or cause.__context__
    error = cause or error
    number = cause.errno if isinstance(cause, OSError) else None
    if number is None:
        match = re.search(r"os error (\d+)", str(error))  # the form that safetensors uses
        number = int(match[1]) if match else None
    if number == errno.ENOSPC:
        return f"the disk is full ({error})"
    if number == getattr(errno, "EDQUOT", errno.ENOSPC):
        return f"the disk quota is used up ({error})"
    if number == errno.EROFS:
        return f"the file system is read-only, choose another place ({error})"
    return str(error)


@contextmanager
def writing(path: str | Path, error: type[WorldFluxError]) -> Iterator[None]:
    """Converts an `OSError` while writing into a worldflux error.

    Args:
        path: Path that is written, for the message.
        error: Class of the error to raise.
    """
    try:
        yield
    except OSError as cause:
        if isinstance(cause, WorldFluxError):
            raise
        raise error(f"{path} could not be written: {reason(cause)}. What was there before is unchanged.") from cause


@contextmanager
def path_beside(path: Path) -> Iterator[Path]:
    """Yields an unused path beside `path`, with its suffix, for a file or directory that is then renamed to `path`.

    Leftovers of killed writers are removed from the directory first, and whatever remains under the yielded path is
    removed afterwards.

    Args:
        path: Target, whose directory must exist.
    """
    remove_leftovers(path.parent)
    beside = _beside(path)
    real = os.path.realpath(beside)
    _in_use.add(real)
    try:
        yield beside
    finally:
        _remove(beside)
        _in_use.discard(real)


@contextmanager
def replacing(path: str | Path) -> Iterator[IO[bytes]]:
    """Yields a binary file beside `path` to write to, which replaces `path` when the block ends without an error.

    Its content is flushed to disk before the old file is replaced. After an error it is removed. A symbolic link at
    `path` is replaced, not followed.

    Args:
        path: Target, whose directory must exist.
    """
    path = Path(path)
    with path_beside(path) as beside:
        with beside.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)


def write_atomically(path: str | Path, data: bytes) -> None:
    """Writes a file through `replacing`."""
    with replacing(path) as file:
        file.write(data)


def write_text(path: str | os.PathLike[str], text: str, error: type[WorldFluxError]) -> None:
    """Writes a text file atomically, and creates missing parent directories.

    Args:
        path: Path that the user passed.
        text: Content of the file.
        error: Class of the error that is raised if the file cannot be written.
    """
    target = checked_path("path", path)
    if target.is_dir():
        raise error(f"{target} is a directory, expected the path of a file. Add a name.")
    with writing(target, error):
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target, text.encode())


@contextmanager
def directory_beside(path: Path) -> Iterator[Path]:
    """Yields an empty directory beside `path`, which is removed afterwards.

    Leftovers of killed writers are removed first.

    Args:
        path: Target of the writing; missing parents are created.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path_beside(path) as beside:
        beside.mkdir()
        yield beside


@contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Yields an empty directory to fill, which replaces `path` when the block ends without an error.

    An existing directory stays in place until then. The new files are flushed to disk before it is replaced. Leftovers
    of killed writers beside `path` are removed.

    Args:
        path: Target. Missing parents are created. An existing directory is replaced as a whole; if `path` is a symbolic
            link, the directory that it points to is replaced.
    """
    path = Path(path)
    if path.is_symlink():
        path = Path(os.path.realpath(path))
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
    """Renames a directory to `path`, moving aside a directory that is there already."""
    for attempt in itertools.count(1):
        try:
            if path.exists():
                # A directory cannot be renamed over a non-empty one. `recover_directory` repairs the state after a kill
                # between the two renames.
                os.rename(path, path.with_name(f".{path.name}{_ASIDE}"))
            os.rename(beside, path)
            return
        except OSError as error:
            if attempt == _ATTEMPTS or error.errno not in _CONCURRENT:
                raise
            # In between came another writer, or a reader that mistook the old directory for the leftover of a kill.
            recover_directory(path)


def recover_directory(path: str | Path) -> None:
    """Restores the directory that a killed `atomic_directory` moved aside, if there is none at `path`.

    Raises:
        CheckpointError: If the directory cannot be moved back.
    """
    path = Path(path)
    if not path.name:  # the root of the file system
        return
    aside = path.with_name(f".{path.name}{_ASIDE}")
    if not aside.exists():
        return
    if not path.exists():
        try:
            os.rename(aside, path)
            return
        except OSError as error:
            if not path.exists():
                raise CheckpointError(
                    f"{path} was being replaced by a process that was killed, and what was there cannot be moved back "
                    f"from {aside.name}: {reason(error)}. Make the directory around it writable once."
                ) from error
            # The writer was not killed and has finished in the meantime.
    _remove(aside)


@contextmanager
def replacing_together(directory: Path) -> Iterator[Path]:
    """Yields an empty directory whose files then replace those of the same names in `directory`, all or none.

    Other files in `directory` stay. Use `reading_together` to read several of the files consistently.

    Args:
        directory: Target, which is created if it does not exist.
    """
    with directory_beside(directory / _TOGETHER) as beside:
        yield beside
        for entry in (*beside.iterdir(), beside):
            _sync(entry)
        while True:
            finish_replacing(directory)
            try:
                # From here on the new files count: after a kill, `finish_replacing` moves them into place.
                os.rename(beside, directory / _TOGETHER)
                break
            except OSError:
                if not (directory / _TOGETHER).exists():
                    raise
                # The pending files of another writer are in the way.
    finish_replacing(directory)
    _sync(directory)


def finish_replacing(directory: Path) -> None:
    """Moves files into place that a killed `replacing_together` had not moved yet."""
    pending = directory / _TOGETHER
    if pending.is_symlink() or not pending.is_dir():
        return
    for entry in list(pending.iterdir()):
        with suppress(FileNotFoundError):  # another process was faster
            os.replace(entry, directory / entry.name)
    with suppress(OSError):  # another process was faster, or the next writer has begun
        pending.rmdir()


def reading_together(directory: Path, names: Sequence[str], read: Callable[[], T]) -> T:
    """Returns the result of `read`, repeating it until none of the files was replaced in the meantime.

    Args:
        directory: Directory of the files.
        names: Names of the files.
        read: Reads the files. It is called again if one of them was replaced.

    Raises:
        CheckpointError: If files that a killed writer left half replaced cannot be moved into place, or another process
            keeps replacing the files.
    """

    def identities() -> list[tuple[int, int, int] | None]:
        return [_identity(directory / name) for name in (*names, _TOGETHER)]

    for attempt in range(_READINGS):
        time.sleep(min(0.01 * attempt, 0.2))
        try:
            finish_replacing(directory)
        except OSError as error:  # perhaps only the writer has the rights to write here, and is about to finish
            if attempt < _ATTEMPTS:
                continue
            raise CheckpointError(
                f"{directory} was being replaced by a process that was killed, and its files cannot be moved into "
                f"place: {reason(error)}. Make the directory writable once."
            ) from error
        before = identities()
        try:
            found = read()
        except Exception:
            if before == identities():
                raise
            continue
        if before == identities():
            return found
    raise CheckpointError(f"Another process keeps replacing {directory}. Read it again when that process has ended.")


def _identity(path: Path) -> tuple[int, int, int] | None:
    """Returns what distinguishes a file from all others that were ever at its path; None if there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def recover_directories(parent: Path, names: str) -> None:
    """Calls `recover_directory` for all directories in `parent` whose names match a pattern of `Path.glob`."""
    for aside in parent.glob(f".{names}{_ASIDE}"):
        recover_directory(parent / aside.name[1:].removesuffix(_ASIDE))


def remove_directory(path: Path) -> None:
    """Removes a directory so that a kill does not leave a part of it under its name."""
    going = _beside(path)
    try:
        os.rename(path, going)
    except FileNotFoundError:  # another process has removed it
        return
    _remove(going)


def remove_leftovers(directory: Path) -> None:
    """Removes unfinished files from `directory` whose writers no longer run.

    Those of another machine that shares the directory are removed after a day only, since its processes are unknown.
    """
    try:
        entries = list(directory.iterdir())
    except PermissionError:  # writing may be allowed all the same
        return
    for entry in entries:
        match = _BESIDE.match(entry.name)
        if match and _is_abandoned(entry, match["host"], int(match["pid"])):
            _remove(entry)


def _beside(path: Path) -> Path:
    """Returns a path beside `path` whose name identifies the writing process."""
    suffix = path.suffix if _SUFFIX.fullmatch(path.suffix) else ""
    return path.with_name(f".{path.name[:40]}.{next(_numbers)}.{_HOST}-{os.getpid()}.writing{suffix}")


def give_rights_of(path: Path, other: Path) -> None:
    """Copies the permissions of another file, if the file system supports them."""
    with suppress(OSError):
        os.chmod(path, stat.S_IMODE(other.stat().st_mode))


def _remove(path: Path) -> None:
    """Removes a file or directory as far as possible. Symbolic links are removed, not followed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    with suppress(OSError):
        path.unlink(missing_ok=True)


def _is_abandoned(entry: Path, host: str, pid: int) -> bool:
    if host != _HOST:
        try:
            return time.time() - entry.stat().st_mtime > _LONGEST_WRITE
        except FileNotFoundError:
            return False
    if pid == os.getpid():  # an earlier process may have had the same id, as in a restarted container
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
    """Flushes a file, or the entries of a directory, to disk."""
    is_directory = path.is_dir()
    if os.name == "nt" and is_directory:  # directories cannot be opened there
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if not is_directory or error.errno not in _UNSUPPORTED:  # some network file systems cannot flush directories
            raise
    finally:
        os.close(handle)
