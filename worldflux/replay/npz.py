"""`.npz` files in pieces: written and read without a second copy of the data in memory, and without pickle.

The files are ordinary ones that `numpy.load` reads; `ReplayBuffer.save` documents the arrays.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO
from weakref import WeakSet

import numpy as np
from numpy.lib import format as npy

from worldflux.errors import BufferError
from worldflux.files import replacing
from worldflux.reading import open_regular
from worldflux.replay.backends import RowArray

OTHER_NAMES = {
    "terminals": "dones",
    "terminations": "dones",
    "terminated": "dones",
    "done": "dones",
    "observations": "obs",
    "observation": "obs",
    "action": "actions",
    "reward": "rewards",
    "truncated": "truncations",
    "timeout": "truncations",
}
"""Names that D4RL, Minari, LeRobot and Gymnasium give to the arrays."""

CHUNK_BYTES = 16 * 2**20

_MOST_EXPANSION = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: 1040}
"""Factor by which an array can be larger than the file, for each kind of compression; NumPy writes no other kinds, and
some of those expand without a bound."""


def rows_per_chunk(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Number of rows of this shape (without the leading axis) that make up `CHUNK_BYTES`; at least one."""
    return max(1, CHUNK_BYTES // max(1, math.prod(shape) * dtype.itemsize))


@dataclass(frozen=True)
class ArrayChunks:
    """An array that is written in chunks along its first axis."""

    shape: tuple[int, ...]
    """Shape of the whole array."""
    dtype: np.dtype
    chunks: Iterable[np.ndarray]
    """The chunks in order; together they have `shape`."""


def gathered(stored: RowArray, at: np.ndarray, mask: np.ndarray | None = None) -> ArrayChunks:
    """Rows `at` of an array in chunks, zero where `mask` is False."""

    def chunks() -> Iterator[np.ndarray]:
        step = rows_per_chunk(stored.shape[1:], stored.dtype)
        for start in range(0, len(at), step):
            chunk = stored[at[start : start + step]]
            if mask is not None:
                chunk[~mask[start : start + step]] = 0
            yield chunk

    return ArrayChunks((len(at), *stored.shape[1:]), stored.dtype, chunks())


def write_npz(path: str | Path, arrays: Mapping[str, np.ndarray | ArrayChunks]) -> None:
    """Writes exactly `path`, uncompressed; directories above it are created.

    The file is written beside its target and moved into place, so that a kill or a full disk at any moment leaves the
    old file or the new one.

    Args:
        path: Path of the file; no suffix is appended.
        arrays: Arrays to write, by name.

    Raises:
        OSError: If it cannot be written: a full disk, no permission. The old file stays.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            _write_array(archive, name, array)


def _write_array(archive: zipfile.ZipFile, name: str, array: np.ndarray | ArrayChunks) -> None:
    # A ZipInfo made by hand carries no time of writing: equal buffers give equal files.
    info = zipfile.ZipInfo(f"{name}.npy")
    if info.filename != f"{name}.npy" or not name.isprintable():  # zipfile cuts names at a NUL
        raise BufferError(f"An array cannot be saved under the name {name!r}. Use printable characters in keys.")
    with archive.open(info, "w", force_zip64=True) as member:
        if isinstance(array, np.ndarray):
            npy.write_array(member, array, allow_pickle=False)
            return
        header = {"descr": npy.dtype_to_descr(array.dtype), "fortran_order": False, "shape": array.shape}
        npy.write_array_header_1_0(member, header)
        for chunk in array.chunks:
            member.write(np.ascontiguousarray(chunk, array.dtype).data.cast("B"))


_AGENT_FILE = "agent.json"
"""Entry that only the zip of an agent has."""

_LOCAL_HEADER = 30
"""Bytes in front of a name and the data of an entry of a zip archive."""

_LONGEST_END = 22 + 0xFFFF
"""Bytes of the last record of a zip archive, with the longest comment."""


class NpzFile:
    """An `.npz` file open for reading; every way in which it can be broken is a `BufferError` that names it.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: If there is none.
        BufferError: If it is no zip archive, a truncated one, or one with two arrays of the same name.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            open_regular(self.path).close()  # zipfile would wait for a pipe
            self._archive = zipfile.ZipFile(self.path)
            self._bytes = self.path.stat().st_size
            _check_count(self.path, len(self._archive.infolist()))
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"There is no file '{self.path.name}' (looked for {self.path.absolute()}). Pass what "
                "save_replay_buffer or ReplayBuffer.save wrote."
            ) from error
        except Exception as error:  # what a damaged table of contents makes zipfile raise is not a closed list
            kind = _other_format(self.path)
            if kind is not None:
                raise BufferError(f"{self.path} is not a readable .npz file, but {kind}") from error
            raise BufferError(
                f"{self.path} is not a readable .npz file (damaged or cut short): {_reason(error)}"
            ) from error
        members = [name for name in self._archive.namelist() if name.endswith(".npy")]
        if not members and _AGENT_FILE in self._archive.namelist():
            self._archive.close()
            raise BufferError(
                f"{self.path} is a saved agent, which has no replay data in it. Pass what save_replay_buffer wrote; "
                "those of a checkpoint's directory are read by WorldFluxAgent.load(directory, env, resume=True)."
            )
        if any(name.endswith("/data.pkl") for name in self._archive.namelist()):  # of torch.save
            self._archive.close()
            raise BufferError(f"{self.path} is not a readable .npz file, but {_PICKLE}")
        self._opened: WeakSet[IO[bytes]] = WeakSet()
        self.names = [name.removesuffix(".npy") for name in members]
        """Names of the arrays; other files in the archive are ignored."""
        repeated = [name for name, count in Counter(self.names).items() if count > 1]
        if repeated:
            self._archive.close()
            raise BufferError(
                f"{self.path.name} has several arrays {', '.join(map(repr, repeated[:3]))}, expected one of each name."
            )

    def __enter__(self) -> NpzFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file."""
        for file in self._opened:  # each of them would keep the archive open
            file.close()
        self._archive.close()

    @property
    def checksum(self) -> int:
        """Checksum of the table of contents, which has a checksum of each array that is compared when it is read."""
        return zlib.crc32(repr([(info.filename, info.CRC) for info in self._archive.infolist()]).encode())

    def require(self, names: Iterable[str]) -> None:
        """Raises a `BufferError` that lists what is missing and what is there unless the file has all `names`."""
        missing = [name for name in names if name not in self.names]
        if missing:
            raise BufferError(
                f"{self.path.name} has no array {', '.join(map(repr, missing))} "
                f"(found: {', '.join(sorted(self.names)) or 'none'}).{self._other_names(missing)} "
                "See ReplayBuffer.save for the schema."
            )

    def _other_names(self, missing: Iterable[str]) -> str:
        """Hints at the names that other formats give to what is missing, if the file has these."""
        pairs = [(theirs, ours) for theirs, ours in OTHER_NAMES.items() if ours in missing and theirs in self.names]
        return "".join(f" Rename '{theirs}' to '{ours}'." for theirs, ours in pairs)

    def read(self, name: str) -> np.ndarray:
        """The whole array."""
        return self.open(name).take()

    def open(self, name: str) -> StoredArray:
        """An array of which the shape and dtype are known at once, and whose rows are read when they are asked for."""
        # What a damaged or hostile header makes zipfile and numpy raise is not a closed list.
        try:
            info = self._archive.getinfo(f"{name}.npy")
            file = self._archive.open(info)
        except Exception as error:
            raise self.unreadable(name, error) from error
        self._opened.add(file)
        if info.compress_type not in _MOST_EXPANSION:
            raise BufferError(
                f"{self.path.name}: array {name!r} is compressed in a way that NumPy does not use. "
                "Write the file with numpy.savez or numpy.savez_compressed."
            )
        try:
            version = npy.read_magic(file)
            read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, is_fortran, dtype = read_header(file)
        except Exception as error:
            raise self.unreadable(name, error) from error
        if dtype.kind not in "biuf":
            raise BufferError(
                f"{self.path.name}: array {name!r} has dtype {dtype}, expected numbers. Objects are never unpickled."
            )
        if any(size < 0 for size in shape):
            raise BufferError(f"{self.path.name}: array {name!r} says that its shape is {shape}.")
        # Before anything is read: a size that is made up asks for no memory.
        size, there = math.prod(shape) * dtype.itemsize, info.file_size - file.tell()
        most = self._bytes * _MOST_EXPANSION[info.compress_type]
        if size != there or info.file_size > most:
            raise BufferError(
                f"{self.path.name}: array {name!r} of shape {shape} needs {size} bytes, the file has "
                f"{min(there, most)}."
            )
        return StoredArray(self, name, file, shape, dtype, is_fortran)

    def place_of(self, array: StoredArray) -> int | None:
        """Position in the file of an array that was just opened; None if it cannot be read there as it is.

        It can be unless it is compressed or Fortran-ordered.
        """
        info = self._archive.getinfo(f"{array.name}.npy")
        if info.compress_type != zipfile.ZIP_STORED or array.is_fortran:
            return None
        size = math.prod(array.shape) * array.dtype.itemsize
        with open_regular(self.path) as file:
            file.seek(info.header_offset)
            header = file.read(_LOCAL_HEADER)  # the lengths here may differ from those of the table of contents
        before = sum(int.from_bytes(header[at : at + 2], "little") for at in (26, 28)) + info.file_size - size
        start = info.header_offset + _LOCAL_HEADER + before
        if start + size > self._bytes or info.compress_size != info.file_size:
            raise BufferError(
                f"{self.path.name}: array {array.name!r} of {size} bytes begins at byte {start} of {self._bytes}. The "
                "file is damaged."
            )
        return start

    def unreadable(self, name: str, error: Exception) -> BufferError:
        """The error for an array that cannot be read."""
        return BufferError(f"{self.path.name}: array {name!r} cannot be read: {_reason(error)}")


class StoredArray:
    """An array of an `NpzFile`, read once from its beginning to its end; `NpzFile.open` makes it.

    Attributes:
        name: Name of the array.
        shape: Shape of the whole array.
        dtype: Its dtype.
        is_fortran: Whether its last axis is the outer one.
    """

    def __init__(
        self, source: NpzFile, name: str, file: IO[bytes], shape: tuple[int, ...], dtype: np.dtype, is_fortran: bool
    ) -> None:
        self.name, self.shape, self.dtype, self.is_fortran = name, shape, dtype, is_fortran
        self._source, self._file = source, file
        self._taken = 0
        self._left = math.prod(shape) * dtype.itemsize  # bytes
        self._whole: np.ndarray | None = None  # of an array whose first axis is not the outer one

    def take(self, count: int | None = None) -> np.ndarray:
        """The next `count` rows, or the whole array. `[count, ...]`"""
        if count is None:
            return self._next(self.shape)
        start, self._taken = self._taken, min(self._taken + count, self.shape[0])
        if self.is_fortran:
            self._whole = self._next(self.shape) if self._whole is None else self._whole
            return self._whole[start : self._taken]
        return self._next((self._taken - start, *self.shape[1:]))

    def skip(self, count: int) -> None:
        """Passes over the next `count` rows."""
        step = rows_per_chunk(self.shape[1:], self.dtype)
        for start in range(0, count, step):
            self.take(min(step, count - start))

    def reopened(self, file: NpzFile) -> StoredArray:
        """The array of the same name of a file, from its beginning."""
        return file.open(self.name)

    def _next(self, shape: tuple[int, ...]) -> np.ndarray:
        size = math.prod(shape) * self.dtype.itemsize
        try:
            data = self._file.read(size)
            self._left -= size
            if not self._left:
                data += self._file.read(1)  # the checksum is compared at the end, which reading nothing never reaches
        except Exception as error:  # a wrong checksum, a broken compressed stream, no memory
            raise self._source.unreadable(self.name, error) from error
        if len(data) != size:
            raise BufferError(
                f"{self._source.path.name}: array {self.name!r} of shape {shape} needs {size} bytes, the file has "
                f"{len(data)}."
            )
        # A byte that is neither 0 nor 1 would be a bool of its own kind.
        array = np.frombuffer(data, np.uint8) != 0 if self.dtype == np.bool_ else np.frombuffer(data, self.dtype)
        try:
            return array.reshape(shape, order="F" if self.is_fortran else "C")
        except (OverflowError, ValueError) as error:  # no rows, each of a size beyond all measure
            raise self._source.unreadable(self.name, error) from error


def npz_files(path: Path) -> list[Path]:
    """The file at a path, or all `.npz` files of the directory there, sorted by their names.

    Raises:
        BufferError: If a directory has none, or is a checkpoint.
    """
    if not path.is_dir():
        return [path]
    if (kind := _other_format(path)) is not None:
        raise BufferError(f"{path} is {kind}")
    files = [file for file in path.glob("*.npz") if not file.is_dir()]
    found = sorted(file for file in files if not file.name.startswith("."))  # of unfinished writers
    if not found:
        raise BufferError(
            f"The directory {path} has no .npz files, expected those that ReplayBuffer.save or worldflux collect wrote."
        )
    return found


def _check_count(path: Path, found: int) -> None:
    """Raises a `BadZipFile` if the archive's last record counts other entries than `zipfile` found.

    A damaged length in the table of contents makes one entry swallow the next ones, and zipfile does not mind: arrays
    that may be missing would be missed.
    """
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _LONGEST_END))
        end = file.read()
    at = end.rfind(b"PK\x05\x06")
    counted = int.from_bytes(end[at + 10 : at + 12], "little")
    if counted not in (found, 0xFFFF):  # the latter: more than fit in this record, see zip64
        raise zipfile.BadZipFile(f"its table of contents has {found} entries where {counted} were written")


_REMEDY = "Read its episodes with {reader}, store them with ReplayBuffer.add_episode, and call save."
_PICKLE = (
    "a pickle. Pickles can run code and are never read here: load it yourself if you trust it, store its episodes with "
    "ReplayBuffer.add_episode, and call save."
)
_TEXT = "a text file. " + _REMEDY.format(reader="pandas or json")
_FORMATS = {
    b"\x89HDF\r\n\x1a\n": "an HDF5 file. worldflux.datasets.load reads those of several formats, and your own arrays.",
    b"PAR1": "a Parquet file. " + _REMEDY.format(reader="pandas"),
    b"ARROW1": "an Arrow file. " + _REMEDY.format(reader="pyarrow"),
    b"SQLite format 3\x00": "an SQLite database. " + _REMEDY.format(reader="sqlite3"),
    b"\x1f\x8b": "one that is compressed with gzip. Unpack it first.",
    b"\x28\xb5\x2f\xfd": "one that is compressed with Zstandard. Unpack it first.",
    b"\xfd7zXZ\x00": "one that is compressed with xz. Unpack it first.",
    b"version https://": "a pointer of Git LFS to the data. Fetch them with: git lfs pull.",
    b"\x93NUMPY": "a .npy file with a single array. ReplayBuffer.save tells which arrays are needed.",
}
"""First bytes of other files that people pass, and what to do with them."""


def _other_format(path: Path) -> str | None:
    """What kind of file this is, with what to do, if it is no zip archive; None if that is not known."""
    for checkpoint in (path, path.parent):
        if path.is_dir() and (checkpoint / "replay" / "replay.json").is_file():
            return f"a checkpoint. WorldFluxAgent.load({str(checkpoint)!r}, env, resume=True) reads its replay data."
    if path.is_dir():
        return None
    try:
        with open_regular(path) as file:
            start = file.read(16)
    except OSError:
        return None
    if start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return _PICKLE
    if not start:
        return "an empty one."
    known = next((kind for magic, kind in _FORMATS.items() if start.startswith(magic)), None)
    is_text = known is None and start.isascii() and "".join(start.decode().split()).isprintable()
    return _TEXT if is_text else known


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__  # a MemoryError says nothing
