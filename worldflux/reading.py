"""Reading files from untrusted sources: regular files only, JSON within bounds, and no errors but worldflux's own."""

from __future__ import annotations

import errno
import json
import math
import os
import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from worldflux.errors import CheckpointError, ConfigurationError, WorldFluxError

MOST_JSON_BYTES = 32 * 2**20
"""Largest size of a JSON file. The parsed objects can take up to 25 times as much memory."""
MOST_JSON_DEPTH = 64
"""Largest nesting depth of objects and lists."""
_MOST_BITS = 1023
"""Largest number of bits of an integer; larger ones cannot be converted to a float."""


class InvalidJSONError(ConfigurationError, json.JSONDecodeError):
    """Raised for a configuration file that is not valid JSON; also a `json.JSONDecodeError`, as `json` raises."""


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Opens a regular file for reading bytes, never a pipe or device, on which a reader could block or read forever.

    Raises:
        OSError: If the file does not exist, cannot be read, or is a directory, a pipe or a device.
    """
    # Without O_NONBLOCK, opening a pipe blocks until another process opens it for writing.
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "it is a directory, a pipe or a device, expected a file", os.fspath(path))
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def read_json(
    path: str | os.PathLike[str],
    *,
    name: object = None,
    error: type[WorldFluxError] = CheckpointError,
    finite: bool = True,
) -> Any:
    """Returns the parsed content of a JSON file.

    Args:
        path: Path of the file.
        name: Name of the file in error messages; its path if omitted.
        error: Class of the error for invalid JSON and for JSON beyond `MOST_JSON_BYTES`, `MOST_JSON_DEPTH` or integers
            of 1023 bits. With `ConfigurationError`, the error for invalid JSON is also a `json.JSONDecodeError`.
        finite: Whether to refuse NaN and infinity.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    name = path if name is None else name
    try:
        with open_regular(path) as file:
            data = file.read(MOST_JSON_BYTES + 1)
        if len(data) > MOST_JSON_BYTES:
            raise ValueError(f"it has more than {MOST_JSON_BYTES // 2**20} MB")
        found = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
        _check_values(found, finite)
    except FileNotFoundError:
        raise
    except json.JSONDecodeError as cause:
        if error is ConfigurationError:
            raise InvalidJSONError(f"{name} cannot be read: {cause.msg}", cause.doc, cause.pos) from cause
        raise error(f"{name} cannot be read: {cause}. The file is damaged.") from cause
    except RecursionError as cause:
        raise error(f"{name} cannot be read: {_TOO_DEEP}. The file is damaged.") from cause
    except UnicodeDecodeError as cause:
        raise error(f"{name} cannot be read: it is not a text file, expected JSON. The file is damaged.") from cause
    except (OSError, ValueError, MemoryError) as cause:
        reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(cause)
        raise error(f"{name} cannot be read: {reason or 'no memory'}. The file is damaged.") from cause
    return found


_TOO_DEEP = f"objects and lists are nested more than {MOST_JSON_DEPTH} levels deep"


@contextmanager
def only_our_errors(name: object, error: type[WorldFluxError] = CheckpointError) -> Iterator[None]:
    """Converts any exception that a damaged file causes in a reader into a worldflux error.

    `WorldFluxError` and `FileNotFoundError` pass unchanged. This wraps a whole reader and is the last resort behind the
    checks that state precisely what is wrong.

    Args:
        name: Name of the file in the error message.
        error: Class of the error to raise.
    """
    try:
        yield
    except (WorldFluxError, FileNotFoundError):
        raise
    except Exception as cause:  # NumPy and torch raise many kinds of exceptions for unexpected values
        reason = f"{type(cause).__name__}: {cause}".rstrip(": .")
        raise error(f"{name} cannot be loaded ({reason}). It is damaged, or too large for this machine.") from cause


def check_stored(archive: zipfile.ZipFile, size: int) -> None:
    """Raises a `ValueError` unless all entries of an archive are stored uncompressed and within the size of the file.

    Args:
        archive: Archive to check. The archives that worldflux writes are never compressed.
        size: Size of the file in bytes.
    """
    members = archive.infolist()
    packed = next((one for one in members if one.compress_type != zipfile.ZIP_STORED or one.flag_bits & 0x1), None)
    if packed is not None:
        raise ValueError(f"its entry {packed.filename[:99]!r} is compressed or encrypted, expected an uncompressed one")
    claimed = sum(one.file_size for one in members)
    if claimed > size:
        raise ValueError(f"its entries claim {claimed:,} bytes, and the file has {size:,}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Builds a JSON object. Duplicate keys are refused, because parsers disagree on which value counts."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key[:40]!r} occurs twice")
        found[key] = value
    return found


def _check_values(found: Any, finite: bool) -> None:
    """Raises a `ValueError` for values that are nested too deeply and for numbers that are too large."""
    level: list[Any] = [found]
    for _ in range(MOST_JSON_DEPTH + 1):
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                inner.extend(value.values())
            elif isinstance(value, list):
                inner.extend(value)
            elif isinstance(value, int):
                if value.bit_length() > _MOST_BITS:
                    raise ValueError(f"a number has {len(str(value))} digits, expected at most 308")
            elif isinstance(value, float) and finite and not math.isfinite(value):
                raise ValueError(f"a number is {value}, expected finite ones")
        if not inner:
            return
        level = inner
    raise ValueError(_TOO_DEEP)
