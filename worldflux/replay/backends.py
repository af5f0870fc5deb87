"""Where a replay buffer's arrays are stored: in memory, in files that are mapped into it, or on a device."""

from __future__ import annotations

import errno
import math
import mmap
import os
import re
import tempfile
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from worldflux.accel.device import resolve_device
from worldflux.accel.memory import Budget, free_device_memory, free_disk, free_memory
from worldflux.accel.transfers import to_device
from worldflux.errors import BufferError, ConfigurationError
from worldflux.files import checked_path
from worldflux.locks import ThreadLock
from worldflux.reading import open_regular

IN_PLACE = "in_place"
"""Name of the storage of rows that stay in their files."""
UNSEEN_AT = -(2**62)
"""Position in a file of an observation that was never recorded."""

_MOST_OPEN = 128
"""Files that are kept open for reading."""

_DEVICE = re.compile(r"(cpu|cuda|mps|xpu)(:\d+)?")
_NOT_RESERVABLE = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


class DeviceArray:
    """Rows in a tensor, read and written at NumPy arrays of indices as if they were in a NumPy array.

    Args:
        tensor: The rows. `[N, ...]`
        dtype: NumPy's name of the tensor's dtype.
    """

    def __init__(self, tensor: Tensor, dtype: np.dtype) -> None:
        self.tensor, self.dtype = tensor, dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of all rows, `[N, ...]`."""
        return tuple(self.tensor.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return self.tensor.numel() * self.dtype.itemsize

    def __getitem__(self, at: np.ndarray) -> np.ndarray:
        return self.tensor[self._index(at)].cpu().numpy()

    def __setitem__(self, at: np.ndarray, values: Any) -> None:
        """Writes one value into all rows `at`, or `values[i]` into row `at[i]`; of several for a row, the last stays.

        Values in a tensor on this array's device do not leave it.
        """
        if not isinstance(values, Tensor):
            values = torch.from_numpy(np.array(values, self.dtype))
        values = to_device(values.detach(), self.tensor.device).to(self.tensor.dtype)
        at = np.asarray(at)
        if values.dim():
            at, values = at.reshape(-1), values.reshape(at.size, *self.shape[1:])
            rows, first = np.unique(at[::-1], return_index=True)
            if len(rows) < len(at):  # which of them stays is not defined on a device
                at, values = rows, values[self._index(len(at) - 1 - first)]
        self.tensor[self._index(at)] = values

    def _index(self, at: np.ndarray) -> Tensor:
        return to_device(torch.as_tensor(at, dtype=torch.int64), self.tensor.device)


class RecordedFiles:
    """Files of which parts are read at any time, and which must not change meanwhile.

    Args:
        paths: Paths of the files.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = [path.absolute() for path in paths]
        self._identities = [_identity(os.stat(path)) for path in self.paths]
        self._open: OrderedDict[int, BinaryIO] = OrderedDict()  # used last comes last
        self._lock = ThreadLock()

    def __getstate__(self) -> dict[str, Any]:  # a copy, perhaps in another process, opens the files by itself
        return {**vars(self), "_open": OrderedDict()}

    def read(self, parts: Sequence[tuple[int, int, memoryview]]) -> None:
        """Reads parts of files into memory. Other threads run meanwhile.

        Args:
            parts: Number of the file, position in it, and where to write what is there, in the order of reading.

        Raises:
            BufferError: If a file has changed since it was loaded, or cannot be read.
        """
        number = 0
        with self._lock:
            try:
                if hasattr(os, "posix_fadvise"):  # so that the disk has all requests of a batch at once
                    for number, position, target in parts:
                        os.posix_fadvise(self._opened(number).fileno(), position, len(target), os.POSIX_FADV_WILLNEED)
                for number, position, target in parts:
                    _read_into(self._opened(number), position, target)
            except OSError as error:
                raise BufferError(f"{self.paths[number]} cannot be read: {error}") from error

    def _opened(self, number: int) -> BinaryIO:
        file = self._open.get(number)
        if file is not None:
            self._open.move_to_end(number)
            return file
        path = self.paths[number]
        try:
            file = self._open_file(path)
        except OSError as error:
            raise BufferError(f"{path} cannot be read any more: {error}. Load the data again.") from error
        if _identity(os.fstat(file.fileno())) != self._identities[number]:
            file.close()
            raise BufferError(f"{path} has changed since it was loaded. Load the data again.")
        if hasattr(os, "posix_fadvise"):  # what follows a window is rarely the next one
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        self._open[number] = file
        if len(self._open) > _MOST_OPEN:
            self._open.popitem(last=False)[1].close()
        return file

    def _open_file(self, path: Path) -> BinaryIO:
        """Opens a file; where the process may open no further ones, others of these files are closed."""
        while True:
            try:
                return open_regular(path)
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE) or not self._open:
                    raise
            self._open.popitem(last=False)[1].close()


def _identity(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_ino, status.st_size, status.st_mtime_ns


def _read_into(file: BinaryIO, position: int, target: memoryview) -> None:
    """Fills `target` with what stands at a position. Reading takes fewer steps of the system than mapping."""
    while target:
        if hasattr(os, "preadv"):
            count = os.preadv(file.fileno(), [target], position)
        else:
            file.seek(position)
            count = file.readinto(target)  # type: ignore[attr-defined]
        if not count:
            raise OSError(errno.EIO, "it ends too early")
        position, target = position + count, target[count:]


class FileRows:
    """Rows of observations that stay in the files of a recording, read at NumPy arrays of indices.

    An episode is one piece of its file, except for the observation after its last step, which is stored elsewhere in
    the file. Consecutive rows are read together.

    Args:
        files: The files.
        shape: Shape of all rows, `[N, ...]`.
        dtype: Dtype of the rows.
        first: Index of the first row of each episode, ascending. `[S]`
        lengths: Transitions of each episode. `[S]`
        file: Number of the file of each episode. `[S]`
        begin: Position there of the first observation. `[S]`
        final: Position there of the observation after the last step; `UNSEEN_AT` if it was not recorded. `[S]`
    """

    def __init__(
        self,
        files: RecordedFiles,
        shape: tuple[int, ...],
        dtype: np.dtype,
        first: np.ndarray,
        lengths: np.ndarray,
        file: np.ndarray,
        begin: np.ndarray,
        final: np.ndarray,
    ) -> None:
        self.shape, self.dtype = shape, dtype
        self._files, self._first, self._lengths = files, first, lengths
        self._file, self._begin, self._final = file, begin, final
        self._row_bytes = math.prod(shape[1:]) * dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return self.shape[0] * self._row_bytes

    def __getitem__(self, at: np.ndarray) -> np.ndarray:
        flat = at.reshape(-1)
        rows = np.empty((flat.size, *self.shape[1:]), self.dtype)
        if flat.size:
            self._read(flat, rows)
        return rows.reshape(*at.shape, *self.shape[1:])

    def _read(self, at: np.ndarray, rows: np.ndarray) -> None:
        episode = self._first.searchsorted(at, side="right") - 1
        step = at - self._first[episode]
        position = np.where(
            step < self._lengths[episode], self._begin[episode] + step * self._row_bytes, self._final[episode]
        )
        file = self._file[episode]
        breaks = (position[1:] != position[:-1] + self._row_bytes) | (file[1:] != file[:-1])
        starts = np.flatnonzero(np.append(True, breaks))
        ends = np.append(starts[1:], at.size)
        unseen = position[starts] == UNSEEN_AT
        rows[starts[unseen]] = 0
        seen = np.flatnonzero(~unseen)
        seen = seen[np.lexsort((position[starts[seen]], file[starts[seen]]))]
        target = rows.reshape(-1).view(np.uint8).data
        pieces = zip(file[starts[seen]].tolist(), position[starts[seen]].tolist(), strict=True)
        bounds = zip((starts[seen] * self._row_bytes).tolist(), (ends[seen] * self._row_bytes).tolist(), strict=True)
        self._files.read([(*piece, target[slice(*bound)]) for piece, bound in zip(pieces, bounds, strict=True)])
        if self.dtype.kind == "f" and not np.isfinite(rows).all():
            bad = int(np.flatnonzero(~np.isfinite(rows.reshape(at.size, -1)).all(1))[0])
            raise BufferError(
                f"{self._files.paths[file[bad]]} has an observation that is not finite, {step[bad]} steps after the "
                "beginning of its episode. Data that are read in place are checked when they are sampled."
            )

    def __setitem__(self, at: np.ndarray, values: Any) -> None:
        raise BufferError(_READ_ONLY)


RowArray = np.ndarray | DeviceArray | FileRows
"""An array of rows: a NumPy array without gaps, one on a device that is read and written like it, or files."""

_READ_ONLY = (
    "The buffer reads its observations from the files that it was loaded from (storage='in_place'), and nothing can be "
    "added to it or dropped from it. Load it into memory or with storage='<directory>' to add to it, or record into a "
    "buffer of its own and save it beside these files."
)


class Storage:
    """A place that stores arrays of rows. This class stores them in memory, which is taken as rows are written."""

    place: str | Path | torch.device = "memory"
    """The place, as given to `ReplayBuffer(storage=...)`."""
    takes_all_at_once = False
    """Whether arrays take their space when they are created, not when they are first written to."""
    has_obs = True
    """Whether observations are stored here, too."""

    def check_writable(self) -> None:
        """Raises a `BufferError` if rows cannot be added or dropped."""

    def budget(self) -> Budget:
        """The space that is free now."""
        return Budget(free_memory(), "this machine", "memory", "storage='<directory>' to keep it on disk")

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype) -> RowArray:
        """Creates an array of zeros.

        Raises:
            BufferError: If there is no room for it.
        """
        return np.zeros(shape, dtype)


class InPlace(Storage):
    """Observations in the files that were loaded, and what is small in memory; read-only once all is loaded."""

    place = IN_PLACE
    has_obs = False
    is_loaded = False
    """Whether the rows are complete."""

    def check_writable(self) -> None:
        """Raises a `BufferError` if the rows are complete."""
        if self.is_loaded:
            raise BufferError(_READ_ONLY)


StoragePlace = str | os.PathLike[str] | torch.device | Storage | None


class DiskStorage(Storage):
    """Arrays in files that are mapped into memory; the system keeps as much of them in memory as it has room for.

    The files are working space and not meant to be kept. They have no names (on Windows, they are removed when they are
    closed), so nothing is left of them once the buffer or its process is gone, even if it was killed, and any number of
    buffers can share a directory. All of the space is reserved at once, so a disk that is too small is noticed then.

    Args:
        directory: Created if it is missing, and not removed.

    Raises:
        BufferError: If it cannot be created.
    """

    place: Path
    takes_all_at_once = True

    def __init__(self, directory: Path) -> None:
        self.place = directory
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BufferError(f"The directory '{directory}' of the replay buffer cannot be made: {error}") from error

    def budget(self) -> Budget:
        """The space that is free on the disk."""
        return Budget(free_disk(self.place), f"'{self.place}'", "disk space", "a directory on another disk")

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype) -> RowArray:
        """Creates an array of zeros in a file of its own."""
        size = math.prod(shape) * dtype.itemsize
        try:
            with tempfile.TemporaryFile(dir=self.place) as file:
                _reserve(file.fileno(), size)
                mapped = mmap.mmap(file.fileno(), size)
        except OSError as error:
            raise BufferError(f"The replay buffer cannot have {size} bytes in '{self.place}': {error}") from error
        return np.frombuffer(mapped, dtype).reshape(shape)


class DeviceStorage(Storage):
    """Arrays in the memory of a device, where batches are gathered as well.

    Args:
        device: A device of torch.

    Raises:
        ConfigurationError: If there is no such device.
    """

    place: torch.device
    takes_all_at_once = True

    def __init__(self, device: torch.device) -> None:
        self.place = resolve_device(device)

    def budget(self) -> Budget:
        """The memory that is free on the device."""
        return Budget(free_device_memory(self.place), f"'{self.place}'", "memory", "storage='memory'")

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype) -> RowArray:
        """Creates an array of zeros in a tensor."""
        if dtype.kind == "u" and dtype.itemsize > 1:  # of these, torch cannot write single rows
            raise ConfigurationError(
                f"An array of dtype {dtype} cannot be stored on '{self.place}'. Use a signed dtype, or uint8."
            )
        torch_dtype = torch.from_numpy(np.zeros(0, dtype)).dtype
        try:
            return DeviceArray(torch.zeros(shape, dtype=torch_dtype, device=self.place), dtype)
        except RuntimeError as error:  # torch's errors of memory are all of this kind
            raise BufferError(
                f"The replay buffer cannot have {math.prod(shape) * dtype.itemsize} bytes on '{self.place}': {error}"
            ) from error


def storage_at(place: StoragePlace) -> Storage:
    """The storage that an argument names.

    Args:
        place: None or "memory"; a device of torch or its name ("cuda", "cuda:1", "cpu", ...); a storage, which is
            returned; anything else is the path of a directory. A directory of such a name is written "./cuda".

    Raises:
        ConfigurationError: If it is none of these, or there is no such device.
        BufferError: If the directory cannot be created.
    """
    if isinstance(place, Storage):
        return place
    if place is None or place == "memory":
        return Storage()
    if place == IN_PLACE:
        raise _only_for_files()
    if isinstance(place, torch.device) or (isinstance(place, str) and _DEVICE.fullmatch(place)):
        return DeviceStorage(torch.device(place))
    if not place or not isinstance(place, str | os.PathLike):
        raise ConfigurationError(f"storage is {place!r}, expected 'memory', the path of a directory, or a device.")
    return DiskStorage(checked_path("storage", place, directory=True))


def lasting_place(name: str, place: str | os.PathLike[str] | torch.device) -> str:
    """The place as text; a directory becomes an absolute path, which stays valid when the working directory changes.

    Args:
        name: Name of the argument in errors.
        place: As for `storage_at`.
    """
    text = str(place)
    if text == IN_PLACE:
        raise _only_for_files()
    if text == "memory" or _DEVICE.fullmatch(text):
        return text
    return str(checked_path(name, place, directory=True))


def _only_for_files() -> ConfigurationError:
    return ConfigurationError(
        "storage is 'in_place', which is for data that are in files already: ReplayBuffer.load(path, "
        "storage='in_place'). Pass 'memory', the path of a directory, or a device; a directory of this name is "
        "'./in_place'."
    )


def _reserve(file: int, size: int) -> None:
    """Gives a file its size and all of its blocks: a hole that a full disk cannot fill later kills the process."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file, 0, size)
            return
        except OSError as error:
            if error.errno not in _NOT_RESERVABLE:
                raise
    os.truncate(file, size)
