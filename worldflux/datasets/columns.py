"""Columns of rows `[N, ...]` that are read in slices: arrays in memory, in `.npz` files and in HDF5 files."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
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
    h5py = imported("h5py", "hdf5", "Reading HDF5 files")
    for part in path.split("/"):
        link = group.get(part, getlink=True) if isinstance(group, h5py.Group) else None
        if not isinstance(link, h5py.HardLink):
            return None
        group = group[part]
    return group


def hdf5_arrays(group: Any) -> dict[str, Any]:
    """The arrays of numbers in a group and the groups in it, by their paths."""
    found = {name: hdf5_entry(group, name) for name in hdf5_names(group)}
    arrays = {name: one for name, one in found.items() if one.dtype.kind in "biuf" and one.shape}
    for entry in arrays.values():
        check_dataset(entry)
    return arrays


def hdf5_names(group: Any) -> Iterator[str]:
    """The paths of the arrays in a group and in the groups in it, of which none is opened before it is asked for."""
    return _names(group, "", set())


def _names(group: Any, prefix: str, seen: set[int]) -> Iterator[str]:
    h5py = imported("h5py", "hdf5", "Reading HDF5 files")
    address = h5py.h5o.get_info(group.id).addr
    if address in seen:  # a group that is linked from several places, maybe from inside itself, is read once
        return
    seen.add(address)
    for name in group:
        is_inside = isinstance(group.get(name, getlink=True), h5py.HardLink)
        kind = group.get(name, getclass=True) if is_inside else None
        if kind is h5py.Group:
            yield from _names(group[name], f"{prefix}{name}/", seen)
        elif kind is h5py.Dataset:
            yield f"{prefix}{name}"


class Hdf5Columns(Mapping[str, Column]):
    """The arrays of numbers in a group of an HDF5 file; each is opened when it is asked for.

    Args:
        group: The group.
    """

    def __init__(self, group: Any) -> None:
        self._group = group

    def __getitem__(self, name: str) -> Column:
        if name not in self._group:
            raise BufferError(f"{self._group.name} has no array '{name}' (found: {', '.join(self) or 'none'}).")
        return hdf5_array(self._group, name)

    def __iter__(self) -> Iterator[str]:
        return hdf5_names(self._group)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def hdf5_array(group: Any, name: str) -> Any:
    """The array of numbers at a path in a group.

    Raises:
        BufferError: If there is none.
    """
    h5py = imported("h5py", "hdf5", "Reading HDF5 files")
    inner = hdf5_entry(group, name)
    if inner is None:
        raise BufferError(
            f"{group.name} has no array '{name}' (found: {', '.join(sorted(group)) or 'none'}). Links are not followed."
        )
    if not isinstance(inner, h5py.Dataset) or inner.dtype.kind not in "biuf" or not inner.shape:
        raise BufferError(f"{group.name}: '{name}' is no array of numbers.")
    check_dataset(inner)
    return inner


def check_dataset(entry: Any) -> None:
    """Raises a `BufferError` if an array of an HDF5 file is stored elsewhere, or claims more than is stored."""
    if entry.is_virtual or entry.external:
        raise BufferError(f"The array {entry.name!r} is stored in another file, which is not read.")
    size, stored = math.prod(entry.shape) * entry.dtype.itemsize, entry.id.get_storage_size()
    if size > _MOST_EMPTY + _MOST_EXPANSION * stored:
        raise BufferError(
            f"The array {entry.name!r} of shape {entry.shape} needs {size:,} bytes, and {stored:,} are stored: the "
            "file is damaged or was never filled."
        )
