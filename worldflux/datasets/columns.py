"""Columns of rows `[N, ...]` that are read in slices: arrays in memory, in `.npz` files and in HDF5 files."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from worldflux.errors import BufferError, MissingDependencyError, install_hint
from worldflux.reading import open_regular
from worldflux.replay.npz import NpzFile, StoredArray

_MOST_EMPTY = 64 * 2**20
"""Bytes that an HDF5 file may claim without storing them: what was never written reads as zeros."""
_MOST_EXPANSION = 1100
"""Factor by which a compressed array may be larger than what is stored of it."""


class Column(Protocol):
    """An array that is read in slices of its first axis, in ascending order."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole array."""
        ...

    @property
    def dtype(self) -> Any:
        """Its dtype."""
        ...

    def __getitem__(self, part: slice) -> np.ndarray: ...


class StoredColumn:
    """An array of an `.npz` file, read once from its beginning to its end.

    Args:
        array: The array, of which nothing has been read.
    """

    def __init__(self, array: StoredArray) -> None:
        self._array, self._at = array, 0
        self.shape, self.dtype = array.shape, array.dtype

    def __getitem__(self, part: slice) -> np.ndarray:
        begin, end, _ = part.indices(self.shape[0])
        if begin > self._at:
            self._array.take(begin - self._at)
        self._at = max(begin, end)
        return self._array.take(self._at - begin)


class NpzColumns(Mapping[str, Column]):
    """The arrays of an `.npz` file as columns; each is opened when it is asked for, from its beginning.

    Args:
        file: The file, which stays open as long as they are read.
    """

    def __init__(self, file: NpzFile) -> None:
        self._file = file

    def __getitem__(self, name: str) -> Column:
        if name not in self._file.names:
            raise KeyError(name)
        return StoredColumn(self._file.open(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._file.names)

    def __len__(self) -> int:
        return len(self._file.names)


def in_order(name: str) -> list[Any]:
    """A key that sorts names by the numbers in them: demo_2 comes before demo_10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def imported(package: str, extra: str, what: str) -> Any:
    """An optional package.

    Raises:
        MissingDependencyError: If it is not installed.
    """
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingDependencyError(
            f"{what} needs {package.partition('.')[0]}, which is not installed. Install it with: {install_hint(extra)}"
        ) from error


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        open_regular(path).close()  # libraries of C would wait for a pipe
        yield
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no file '{path}' (looked for {path.absolute()}).") from None
    except OSError as error:
        raise BufferError(f"{path.name} is not a readable HDF5 file (damaged or cut short): {error}") from error


def is_hdf5(path: Path) -> bool:
    """Whether a file begins as HDF5 files do."""
    with open_regular(path) as file:
        return file.read(8) == b"\x89HDF\r\n\x1a\n"


def open_hdf5(path: Path) -> Any:
    """An HDF5 file, open for reading.

    Raises:
        FileNotFoundError: If there is none.
        BufferError: If it is none, or damaged.
        MissingDependencyError: If h5py is not installed.
    """
    h5py = imported("h5py", "hdf5", f"{path.name} is an HDF5 file, which")
    with _readable(path):
        file = h5py.File(path, "r")
        cache = file.id.get_mdc_config()  # of the tables of contents: by default, it grows to more than 50 MB
        cache.set_initial_size, cache.initial_size, cache.min_size, cache.max_size = True, 2**20, 2**20, 2**20
        file.id.set_mdc_config(cache)
        return file


def hdf5_entry(group: Any, path: str) -> Any:
    """The group or array at a path in a group; None if there is none.

    Links by name are not followed: they may lead to other files, directly or through a link in this one, and h5py would
    open those.
    """
    for part in path.split("/"):
        if _kind_inside(group, part) is None:
            return None
        group = group[part]
    return group


def _kind_inside(group: Any, name: str) -> int | None:
    """What a name in a group is, without opening it; None if it is a link to elsewhere, or nothing."""
    import h5py  # the file is open

    encoded = name.encode("utf-8", "surrogateescape")
    if not isinstance(group, h5py.Group) or not name or not group.id.links.exists(encoded):
        return None
    if group.id.links.get_info(encoded).type != h5py.h5l.TYPE_HARD:
        return None
    return int(h5py.h5o.get_info(group.id, encoded).type)


def hdf5_group(group: Any, name: str) -> Any:
    """The group of a name in a group; None if there is none. See `hdf5_entry`, which takes twice as long."""
    import h5py  # the file is open

    if _kind_inside(group, name) != h5py.h5o.TYPE_GROUP:
        return None
    return h5py.Group(h5py.h5g.open(group.id, name.encode("utf-8", "surrogateescape")))


def hdf5_names(group: Any) -> Iterator[str]:
    """The paths of the arrays in a group and in the groups in it, none of which is opened."""
    return _names(group, "", set())


def _names(group: Any, prefix: str, seen: set[int]) -> Iterator[str]:
    import h5py  # the file is open

    address = h5py.h5o.get_info(group.id).addr
    if address in seen:  # a group that is linked from several places, maybe from inside itself, is read once
        return
    seen.add(address)
    for name in group:
        kind = _kind_inside(group, name)
        if kind == h5py.h5o.TYPE_GROUP:
            yield from _names(hdf5_group(group, name), f"{prefix}{name}/", seen)
        elif kind == h5py.h5o.TYPE_DATASET:
            yield f"{prefix}{name}"


class Hdf5Columns(Mapping[str, Column]):
    """The arrays of numbers in a group of an HDF5 file; each is opened when it is asked for.

    Args:
        group: The group.
    """

    def __init__(self, group: Any) -> None:
        self._group = group

    def __getitem__(self, name: str) -> Column:
        column = hdf5_column(self._group, name)
        if column is None:
            found = ", ".join(self) or "none"
            raise BufferError(
                f"{self._group.name} has no array '{name}' of numbers (found: {found}). Links are not followed."
            )
        return column

    def __contains__(self, name: object) -> bool:
        """Whether there is an array, of numbers or not."""
        import h5py  # the file is open

        *folders, last = str(name).split("/")
        return _kind_inside(_inner(self._group, folders), last) == h5py.h5o.TYPE_DATASET

    def __iter__(self) -> Iterator[str]:
        return (name for name in hdf5_names(self._group) if hdf5_column(self._group, name) is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)


class Hdf5Column:
    """An array of numbers in an HDF5 file, read without h5py's own indexing, which takes as long as small reads.

    Args:
        opened: Identifier of the array.
    """

    def __init__(self, opened: Any) -> None:
        self._opened = opened
        self.shape: tuple[int, ...] = opened.shape
        self.dtype = opened.dtype

    def __getitem__(self, part: slice) -> np.ndarray:
        import h5py  # the file is open

        begin, end, _ = part.indices(self.shape[0])
        found = np.empty((max(end - begin, 0), *self.shape[1:]), self.dtype)
        if found.size:
            place = self._opened.get_space()
            place.select_hyperslab((begin, *(0,) * (found.ndim - 1)), found.shape)
            self._opened.read(h5py.h5s.create_simple(found.shape), place, found)
        return found


def _inner(group: Any, folders: Iterable[str]) -> Any:
    for folder in folders:
        group = hdf5_group(group, folder)
    return group


def hdf5_column(group: Any, path: str) -> Hdf5Column | None:
    """The array of numbers at a path in a group; None if there is none."""
    import h5py  # the file is open

    *folders, name = path.split("/")
    group = _inner(group, folders)
    if _kind_inside(group, name) != h5py.h5o.TYPE_DATASET:
        return None
    opened = h5py.h5d.open(group.id, name.encode("utf-8", "surrogateescape"))
    column = Hdf5Column(opened)
    if column.dtype.kind not in "biuf" or not column.shape:
        return None
    _check_stored(h5py, opened, column)
    return column


def _check_stored(h5py: Any, opened: Any, column: Hdf5Column) -> None:
    """Raises a `BufferError` if an array of an HDF5 file is stored elsewhere, or claims more than is stored."""
    plan = opened.get_create_plist()
    if plan.get_layout() == h5py.h5d.VIRTUAL or plan.get_external_count():
        raise BufferError(f"The array {_name_of(h5py, opened)} is stored in another file, which is not read.")
    size, stored = math.prod(column.shape) * column.dtype.itemsize, opened.get_storage_size()
    if size > _MOST_EMPTY + _MOST_EXPANSION * stored:
        raise BufferError(
            f"The array {_name_of(h5py, opened)} of shape {column.shape} needs {size:,} bytes, and {stored:,} are "
            "stored: the file is damaged or was never filled."
        )


def _name_of(h5py: Any, opened: Any) -> str:
    return repr(h5py.h5i.get_name(opened).decode("utf-8", "replace"))
