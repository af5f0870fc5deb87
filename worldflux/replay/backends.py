"""Where a replay buffer's arrays are stored: in memory, in files that are mapped into it, or on a device."""

from __future__ import annotations

import errno
import math
import mmap
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from worldflux.accel.device import resolve_device
from worldflux.accel.transfers import to_device
from worldflux.errors import BufferError, ConfigurationError
from worldflux.files import checked_path

StoragePlace = str | os.PathLike[str] | torch.device | None

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


RowArray = np.ndarray | DeviceArray
"""An array of rows: a NumPy array without gaps, or one on a device that is read and written like it."""


class Storage:
    """A place that stores arrays of rows. This class stores them in memory, which is taken as rows are written."""

    place: str | Path | torch.device = "memory"
    """The place, as given to `ReplayBuffer(storage=...)`."""
    takes_all_at_once = False
    """Whether arrays take their space when they are created, not when they are first written to."""

    def budget(self) -> Budget:
        """The space that is free now."""
        return Budget(free_memory(), "this machine", "memory", "storage='<directory>' to keep it on disk")

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype) -> RowArray:
        """Creates an array of zeros.

        Raises:
            BufferError: If there is no room for it.
        """
        return np.zeros(shape, dtype)


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
        place: None or "memory"; a device of torch or its name ("cuda", "cuda:1", "cpu", ...); anything else is the path
            of a directory. A directory of a device's name is written "./cuda".

    Raises:
        ConfigurationError: If it is none of these, or there is no such device.
        BufferError: If the directory cannot be created.
    """
    if place is None or place == "memory":
        return Storage()
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
    if text == "memory" or _DEVICE.fullmatch(text):
        return text
    return str(checked_path(name, place, directory=True))


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


@dataclass(frozen=True)
class Budget:
    """The free space of one place, and the parts of the error message if it is too small."""

    free: int | None
    """Number of free bytes. None if the system does not report it; then nothing is refused."""
    holder: str
    """Subject of the error's sentence, such as "this machine"."""
    kind: str
    """Kind of space, such as "memory"."""
    remedy: str
    """Remedy besides a smaller capacity, as the end of a sentence."""

    def require(self, needed: int, *, what: str, fits: int) -> None:
        """Checks that there is room.

        Args:
            needed: Number of bytes.
            what: Subject of the error's sentence, which takes these bytes.
            fits: The capacity that would fit; 0 if none does.

        Raises:
            BufferError: If less is free than is needed.
        """
        if self.free is None or needed <= self.free:
            return
        smaller = f"Use a smaller capacity ({_rounded_down(fits):,} would fit), or " if fits else "Use "
        raise BufferError(
            f"{what} takes {human(needed)}, and {self.holder} has {human(self.free)} of free {self.kind}. "
            f"{smaller}{self.remedy}."
        )


def human(count: int) -> str:
    """A number of bytes with its unit, such as "13.1 GB" (powers of 1000)."""
    value, units = float(count), ["bytes", "kB", "MB", "GB", "TB", "PB"]
    while value >= 999.95 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.0f} {units[0]}" if units[0] == "bytes" else f"{value:.1f} {units[0]}"


def free_memory(root: Path = Path("/")) -> int | None:
    """Bytes that this process can still take without swapping: what the machine has, or its container if that is less.

    Memory in which the system only caches files counts as free. Without `/proc` (macOS), all of the machine's memory is
    returned, and None if the system does not report that either (Windows).

    Args:
        root: Directory that contains `proc` and `sys`; tests pass their own.
    """
    found = [*_machine_memory(root), *_container_memory(root)]
    if found:
        return max(0, min(found))
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def free_disk(directory: Path) -> int:
    """Bytes that this user can still write to the file system of `directory`, which need not exist yet."""
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def free_device_memory(device: torch.device) -> int | None:
    """Bytes that torch can still take on a device: what is free there, and what torch holds there unused.

    None for a device that does not report it.
    """
    if device.type == "cpu":
        return free_memory()
    if device.type != "cuda":
        return None
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def _machine_memory(root: Path) -> Iterator[int]:
    for line in _lines(root / "proc/meminfo"):
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) * 1024


def _container_memory(root: Path) -> Iterator[int]:
    """What is left below the limit of each control group of this process, the groups above them included."""
    for line in _lines(root / "proc/self/cgroup"):
        number, controllers, path = line.split(":", 2)
        if number == "0":  # version 2
            top, limit_name, used_name, cached = root / "sys/fs/cgroup", "memory.max", "memory.current", ""
        elif "memory" in controllers.split(","):  # version 1
            top = root / "sys/fs/cgroup/memory"
            limit_name, used_name, cached = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
        else:
            continue
        group = top / path.lstrip("/")
        # Inside a container the path may be the one outside of it; the group itself is at the top then.
        for place in (group, *group.parents):
            if top not in (place, *place.parents):
                break
            limit, used = _lines(place / limit_name), _lines(place / used_name)
            if limit and used and limit[0] != "max":
                stat = dict(entry.split(maxsplit=1) for entry in _lines(place / "memory.stat"))
                files = sum(int(stat.get(f"{cached}{kind}_file", 0)) for kind in ("inactive", "active"))
                yield int(limit[0]) - int(used[0]) + files


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def _rounded_down(count: int) -> int:
    """A number rounded down to two digits, because the free space changes from moment to moment."""
    unit = 10 ** max(0, len(str(count)) - 2)
    return count // unit * unit
