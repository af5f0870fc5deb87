"""Reading files of `torch.save` without unpickling them; see `reader`."""

from __future__ import annotations

import io
import math
import os
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from worldflux.pickles.reader import Builder, Name, PickleReader, whole_numbers

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_LOCAL_HEADER = 30
"""Bytes in front of a member's name in a zip archive."""
_MOST_COPIES = 4
"""How many times larger than the file its tensors may be: TD-MPC2's value networks have up to three names."""


@dataclass(eq=False)
class _Storage:
    """Consecutive numbers in a member of the archive."""

    dtype: torch.dtype
    member: str
    count: int


@dataclass(eq=False)
class StoredTensor:
    """A tensor whose numbers are still in the file."""

    storage: Any
    offset: Any
    shape: Any
    strides: Any

    def checked(self) -> _Storage:
        """The storage, if the tensor lies within it and repeats none of its numbers.

        Raises:
            ValueError: If it does not.
        """
        shape = whole_numbers("the shape of a tensor", self.shape, least=1)
        strides = whole_numbers("the strides of a tensor", self.strides)
        (offset,) = whole_numbers("the offset of a tensor", (self.offset,))
        if type(self.storage) is not _Storage or len(shape) != len(strides):
            raise ValueError("it has a tensor without numbers")
        # In the order of strides, each stride is larger than everything reached before: no number is repeated.
        reached = 1
        for stride, size in sorted(zip(strides, shape, strict=True)):
            if size > 1 and stride < reached:
                raise ValueError(f"it has a tensor of shape {shape} and strides {strides}, which repeats its numbers")
            reached += stride * (size - 1)
        if offset + reached > self.storage.count:
            raise ValueError(f"it has a tensor of shape {shape} with fewer numbers than that")
        return self.storage


class TorchFile:
    """A file of `torch.save`, whose tensors are read to the CPU.

    A damaged file raises a `ValueError`, or the error that Python raises for a damaged archive.

    Args:
        path: The zip archive that torch writes since version 1.6.
        keys: Allowed types of the keys of mappings.
        builders: Replacements for further names; see `PickleReader`.
    """

    def __init__(
        self,
        path: Path,
        keys: tuple[type, ...] = (str,),
        builders: Mapping[tuple[str, str], Builder | None] | None = None,
    ) -> None:
        self._path, self._keys, self._builders = path, keys, {**_BUILDERS, **(builders or {})}
        self._size = os.path.getsize(path)
        if not zipfile.is_zipfile(path):
            raise ValueError("it is no archive, which is what torch.save writes since torch 1.6")
        self._archive = zipfile.ZipFile(path)
        self._members = {info.filename: info for info in self._archive.infolist()}
        self._loaded: dict[str, Tensor] = {}  # bytes of the members, each of which may contain several tensors
        for info in self._members.values():
            if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 0x1 or info.file_size != info.compress_size:
                raise ValueError(f"its member {info.filename[:99]!r} is compressed, and torch writes none that are")
        if sum(info.file_size for info in self._members.values()) > self._size:
            raise ValueError("its members claim more bytes than the file has")

    def __enter__(self) -> TorchFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self._archive.close()

    def read(self) -> Any:
        """The content: containers, names, numbers, and descriptions of tensors for `tensors`."""
        found = [name for name in self._members if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(found) != 1:
            raise ValueError("it has no data.pkl, as files of torch.save have")
        folder = found[0].partition("/")[0]
        order = self._members.get(f"{folder}/byteorder")
        if order is not None and self._archive.open(order).read(16) != b"little":
            raise ValueError("it was written on a machine with another order of bytes")
        with self._archive.open(found[0]) as file:
            size = self._members[found[0]].file_size
            buffered = io.BufferedReader(cast(io.RawIOBase, file))
            return PickleReader(buffered, size, self._builders, partial(self._storage, folder), self._keys).read()

    def tensors(self, mapping: Mapping[str, Any], *, mapped: bool = False) -> dict[str, Tensor]:
        """The tensors in a mapping that `read` has returned. Other values are left out.

        Args:
            mapping: The mapping.
            mapped: Whether the file is mapped into memory, for tensors that are larger, instead of read.
        """
        described = {name: value for name, value in mapping.items() if type(value) is StoredTensor}
        storages = {name: value.checked() for name, value in described.items()}
        claimed = sum(math.prod(value.shape) * storages[name].dtype.itemsize for name, value in described.items())
        if claimed > _MOST_COPIES * self._size:
            raise ValueError(f"its tensors claim {claimed:,} bytes, and the file has {self._size:,}")
        for storage in storages.values():
            if storage.member not in self._loaded:
                self._loaded[storage.member] = self._mapped(storage) if mapped else self._read(storage)
        return {
            name: self._loaded[storages[name].member]
            .view(storages[name].dtype)
            .as_strided(value.shape, value.strides, value.offset)
            for name, value in described.items()
        }

    def _read(self, storage: _Storage) -> Tensor:
        return torch.frombuffer(bytearray(self._archive.read(storage.member)), dtype=torch.uint8)

    def _mapped(self, storage: _Storage) -> Tensor:
        info = self._members[storage.member]
        with self._path.open("rb") as file:
            file.seek(info.header_offset)
            header = file.read(_LOCAL_HEADER)
        # The lengths of the name and of what follows it may be others than in the archive's table of contents.
        begin = info.header_offset + len(header) + sum(struct.unpack("<HH", header[26:30]))
        size = storage.count * storage.dtype.itemsize
        if header[:4] != b"PK\x03\x04" or begin + size > self._size:
            raise ValueError(f"its member {storage.member!r} is not where its table of contents says")
        return torch.from_numpy(np.memmap(self._path, np.uint8, "c", begin, (size,)))  # "c": changes stay in memory

    def _storage(self, folder: str, reference: Any) -> _Storage:
        """The storage for a persistent id `("storage", type, key, device, count)`."""
        if type(reference) is not tuple or len(reference) != 5 or type(reference[1]) is not Name:
            raise ValueError("it refers to something else than numbers")
        _, kind, key, _, count = reference
        if kind.name not in _STORAGES or type(key) is not str or type(count) is not int:
            raise ValueError("it refers to numbers of an unknown type")
        dtype, member = _STORAGES[kind.name], f"{folder}/data/{key}"
        if member not in self._members or self._members[member].file_size != count * dtype.itemsize:
            raise ValueError(f"it refers to {count:,} numbers that it does not have")
        return _Storage(dtype, member, count)


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> StoredTensor:
    return StoredTensor(storage, offset, shape, strides)


_BUILDERS: Mapping[tuple[str, str], Builder | None] = {
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): lambda data, *rest: data,
    ("collections", "OrderedDict"): lambda: {},
    ("torch", "Size"): lambda sizes: sizes,
    ("torch", "device"): lambda *name: None,
    **{("torch", name): None for name in _STORAGES},
}
