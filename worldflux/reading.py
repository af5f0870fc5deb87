"""Reading files that anybody may have written: regular files alone, JSON within bounds, and only our own errors."""

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
"""Of a file. Python needs up to 25 times as much memory for what it holds."""
MOST_JSON_DEPTH = 64
"""Of objects and lists in each other."""
_MOST_BITS = 1023
"""Of a whole number; larger ones have no float."""


class InvalidJSONError(ConfigurationError, json.JSONDecodeError):
    """Raised for a configuration that is no JSON; the second base is what `json` itself raises."""


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Opens a regular file to read bytes from; never one that a reader would wait for, or never see the end of.

    Raises:
        OSError: If there is none, it cannot be read, or it is a directory, a pipe or a device.
    """
    # Opening a pipe without this flag waits for somebody who writes.
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
    """What a JSON file holds.

    Args:
        path: The file.
        name: What errors call it. None: its path.
        error: Raised for what is no JSON, and for JSON beyond these bounds: `MOST_JSON_BYTES`, `MOST_JSON_DEPTH`, whole
            numbers of 1023 bits. Where that is `ConfigurationError`, what is no JSON is a `json.JSONDecodeError`, too.
        finite: Refuse NaN and infinity.

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


_TOO_DEEP = f"objects and lists lie in each other more than {MOST_JSON_DEPTH} times"


@contextmanager
def only_our_errors(name: object, error: type[WorldFluxError] = CheckpointError) -> Iterator[None]:
    """Turns whatever a damaged file makes a reader raise into one of our errors; these pass, as a missing file does.

    It stands around a reader as a whole, behind the checks that say precisely what is wrong.

    Args:
        name: What is read.
        error: Raised.
    """
    try:
        yield
    except (WorldFluxError, FileNotFoundError):
        raise
    except Exception as cause:  # what numbers that nobody thought of make NumPy and torch raise is no closed list
        reason = f"{type(cause).__name__}: {cause}".rstrip(": .")
        raise error(f"{name} cannot be loaded ({reason}). It is damaged, or too large for this machine.") from cause


def check_stored(archive: zipfile.ZipFile, size: int) -> None:
    """Raises a `ValueError` for an archive that unpacks to more bytes than it has itself.

    Args:
        archive: None of ours is compressed.
        size: Bytes of the file.
    """
    members = archive.infolist()
    packed = next((one for one in members if one.compress_type != zipfile.ZIP_STORED or one.flag_bits & 0x1), None)
    if packed is not None:
        raise ValueError(f"its entry {packed.filename[:99]!r} is compressed or encrypted, expected it as it is")
    claimed = sum(one.file_size for one in members)
    if claimed > size:
        raise ValueError(f"its entries claim {claimed:,} bytes, and the file has {size:,}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of a key that is there twice, readers would take either value."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key[:40]!r} is there twice")
        found[key] = value
    return found


def _check_values(found: Any, finite: bool) -> None:
    """Raises a `ValueError` for what lies too deep, and for numbers that are too large."""
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
