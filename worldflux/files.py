"""Writing files and directories so that a kill at any moment leaves the old or the new, never half of one."""

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
"""How often files are read again that somebody replaces; ten seconds in all."""
_LONGEST_WRITE = 24 * 3600.0
"""Seconds. What another machine has not touched for so long is nobody's any more."""
_LONGEST_NAME, _LONGEST_PATH = 255, 4095
"""Bytes that common file systems take."""
_NO_SUCH_CALL = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
"""What file systems answer that cannot do something."""

_SOMEBODY_ELSE = {errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT}
"""What renaming a directory answers if somebody was quicker."""

_in_use: set[str] = set()
"""What this process is writing in."""
_numbers = itertools.count()


def checked_path(name: str, given: object, *, within: Path | None = None, directory: bool = False) -> Path:
    """The path that a user has given, as an absolute one: it stays the same when the working directory changes.

    Args:
        name: What it is called in the message.
        given: By the user.
        within: What a relative path is relative to; None: the working directory.
        directory: Whether it is the path of a directory. It need not exist.

    Raises:
        ConfigurationError: If there can be nothing under this path: it is empty, holds what no path can hold, is too
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
            f"{name} is '{text}', and there is no working directory any more: {error}. Pass an absolute path."
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
    """Why a text is no path; None if it can be one."""
    if "\0" in text:
        return "which holds a NUL character, as no path can"
    try:
        longest = max(len(os.fsencode(part)) for part in re.split(r"[\\/]" if os.name == "nt" else "/", text))
    except UnicodeEncodeError:
        return "which holds a character that no path can hold"
    if longest > _LONGEST_NAME:
        return f"which has a name of {longest} bytes, expected at most {_LONGEST_NAME}"
    return None


def _shortened(text: str) -> str:
    shown = ascii(text)
    return shown if len(shown) <= 80 else f"{shown[:60]}...{shown[-16:]}"


def reason(error: BaseException) -> str:
    """Why something could not be written, with the words for it if that is a full disk."""
    cause: BaseException | None = error  # where torch made an error of its own of what the system answered
    while cause is not None and not (isinstance(cause, OSError) and cause.errno is not None):
        cause = cause.__cause__ or cause.__context__
    error = cause or error
    number = cause.errno if isinstance(cause, OSError) else None
    if number is None:
        told = re.search(r"os error (\d+)", str(error))  # as safetensors says it
        number = int(told[1]) if told else None
    if number == errno.ENOSPC:
        return f"the disk is full ({error})"
    if number == getattr(errno, "EDQUOT", errno.ENOSPC):
        return f"the disk quota is used up ({error})"
    if number == errno.EROFS:
        return f"the file system is read-only, choose another place ({error})"
    return str(error)


@contextmanager
def writing(path: str | Path, error: type[WorldFluxError]) -> Iterator[None]:
    """Turns what the system says when it cannot write into an error of ours.

    Args:
        path: Of what is written.
        error: The kind of error.
    """
    try:
        yield
    except OSError as cause:
        if isinstance(cause, WorldFluxError):
            raise
        raise error(f"{path} could not be written: {reason(cause)}. What was there before is unchanged.") from cause


@contextmanager
def path_beside(path: Path) -> Iterator[Path]:
    """Gives a free name beside `path` and with its suffix, to write a file or a directory there that becomes `path`.

    What writers that were killed left in the directory is removed first, and what is left under the name afterwards.

    Args:
        path: Target; its directory must exist.
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
    """Gives a binary file beside `path` to write to, which becomes `path` when the block ends without an error.

    Its content is on the disk before the old file is replaced. After an error nothing is left of it. A symbolic link
    at `path` is replaced, not followed.

    Args:
        path: Target; its directory must exist.
    """
    path = Path(path)
    with path_beside(path) as beside:
        with beside.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)


def write_atomically(path: str | Path, data: bytes) -> None:
    """Writes a whole file through `replacing`."""
    with replacing(path) as file:
        file.write(data)


def write_text(path: str | os.PathLike[str], text: str, error: type[WorldFluxError]) -> None:
    """Writes a text file where a user wants it, whole or not at all; directories above it are made.

    Args:
        path: As the user has given it.
        text: Its content.
        error: Raised if it cannot be written.
    """
    target = checked_path("path", path)
    if target.is_dir():
        raise error(f"{target} is a directory, expected the path of a file. Add a name.")
    with writing(target, error):
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target, text.encode())


@contextmanager
def directory_beside(path: Path) -> Iterator[Path]:
    """Gives an empty directory beside `path` to write in, of which nothing is left afterwards.

    What writers that were killed left there is removed first.

    Args:
        path: Of what is to be written; missing parents are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path_beside(path) as beside:
        beside.mkdir()
        yield beside


@contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Gives an empty directory to fill, which becomes `path` when the block ends without an error.

    A directory that is already there stays until then. The files reach the disk before it is replaced. What writers
    that were killed left beside `path` is removed.

    Args:
        path: Target. Missing parents are made; an existing directory is replaced as a whole, the one that it links to
            if it is a symbolic link.
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
    """Moves a directory to a path where another one may be, which is moved aside."""
    for attempt in itertools.count(1):
        try:
            if path.exists():
                # A directory cannot be renamed over a full one. A kill between the two renames is what
                # `recover_directory` mends.
                os.rename(path, path.with_name(f".{path.name}{_ASIDE}"))
            os.rename(beside, path)
            return
        except OSError as error:
            if attempt == _ATTEMPTS or error.errno not in _SOMEBODY_ELSE:
                raise
            # Another writer, or a reader who took the old one for what a kill had left, came between the two.
            recover_directory(path)


def recover_directory(path: str | Path) -> None:
    """Brings back the directory that a killed `atomic_directory` had moved aside, if it left none at `path`.

    Raises:
        CheckpointError: If nothing can be moved there.
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
            # Its writer was not killed, and quicker.
    _remove(aside)


@contextmanager
def replacing_together(directory: Path) -> Iterator[Path]:
    """Gives an empty directory to write files in, which replace those of the same names in `directory`, all or none.

    What else is in `directory` stays. Whoever reads several of the files calls `reading_together`.

    Args:
        directory: Made if it does not exist.
    """
    with directory_beside(directory / _TOGETHER) as beside:
        yield beside
        for entry in (*beside.iterdir(), beside):
            _sync(entry)
        while True:
            finish_replacing(directory)
            try:
                # From here on the new files are what counts: a kill before they are at their places is mended.
                os.rename(beside, directory / _TOGETHER)
                break
            except OSError:
                if not (directory / _TOGETHER).exists():
                    raise
                # Another writer's.
    finish_replacing(directory)
    _sync(directory)


def finish_replacing(directory: Path) -> None:
    """Moves the files to their places that a killed `replacing_together` had not moved yet."""
    pending = directory / _TOGETHER
    if pending.is_symlink() or not pending.is_dir():
        return
    for entry in list(pending.iterdir()):
        with suppress(FileNotFoundError):  # somebody else was quicker
            os.replace(entry, directory / entry.name)
    with suppress(OSError):  # somebody else was quicker, or the next writer is there
        pending.rmdir()


def reading_together(directory: Path, names: Sequence[str], read: Callable[[], T]) -> T:
    """What `read` makes of files in a directory, none of which was replaced in between.

    Args:
        directory: Of the files.
        names: Of the files.
        read: Called again if somebody was quicker.

    Raises:
        CheckpointError: If files that a killed writer left half replaced cannot be moved to their places, or others
            replace the files all the time.
    """

    def identities() -> list[tuple[int, int, int] | None]:
        return [_identity(directory / name) for name in (*names, _TOGETHER)]

    for attempt in range(_READINGS):
        time.sleep(min(0.01 * attempt, 0.2))
        try:
            finish_replacing(directory)
        except OSError as error:  # perhaps nothing can be written here, but by the one who writes
            if attempt < _ATTEMPTS:
                continue
            raise CheckpointError(
                f"{directory} was being replaced by a process that was killed, and its files cannot be moved to their "
                f"places: {reason(error)}. Make the directory writable once."
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
    raise CheckpointError(f"{directory} is replaced by another process again and again. Read it when that has ended.")


def _identity(path: Path) -> tuple[int, int, int] | None:
    """What tells a file from every other that was ever at its place; None if there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


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
    _remove(going)


def remove_leftovers(directory: Path) -> None:
    """Removes what writers that no longer run left unfinished in `directory`.

    Of another machine that shares the directory, only what is a day old: nobody here knows what runs there.
    """
    try:
        entries = list(directory.iterdir())
    except PermissionError:  # one may be allowed to write there all the same
        return
    for entry in entries:
        match = _BESIDE.match(entry.name)
        if match and _is_abandoned(entry, match["host"], int(match["pid"])):
            _remove(entry)


def _beside(path: Path) -> Path:
    """A name beside `path` that says who is writing there."""
    suffix = path.suffix if _SUFFIX.fullmatch(path.suffix) else ""
    return path.with_name(f".{path.name[:40]}.{next(_numbers)}.{_HOST}-{os.getpid()}.writing{suffix}")


def give_rights_of(path: Path, other: Path) -> None:
    """Makes a file as readable as another one, if the file system knows rights."""
    with suppress(OSError):
        os.chmod(path, stat.S_IMODE(other.stat().st_mode))


def _remove(path: Path) -> None:
    """Removes whatever is there as far as that is possible; of a symbolic link only the link."""
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
    is_directory = path.is_dir()
    if os.name == "nt" and is_directory:  # directories cannot be opened there
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if not is_directory or error.errno not in _NO_SUCH_CALL:  # of directories, some network file systems cannot
            raise
    finally:
        os.close(handle)
