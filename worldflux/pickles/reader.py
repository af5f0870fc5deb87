"""Reading pickles of other projects without unpickling them.

`pickle` builds whatever a file names. Even with a list of allowed names, it runs code of NumPy and torch on numbers
that the file chooses. This reader interprets the few opcodes that such files need. Names are looked up in a table of
builders and never imported. Arrays are descriptions (type, shape, position of the bytes) until they have been checked;
only then are their bytes read.
"""

from __future__ import annotations

import math
import pickle
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import IO, Any, NamedTuple

import numpy as np

from worldflux.errors import a_type

Builder = Callable[..., Any]
"""Replaces a function that a pickle names: takes the pickle's arguments and returns a description."""

_MOST_OPCODES = 500_000
"""Largest number of opcodes, which bounds time and memory. Each array has a few dozen."""
_LONGEST_TEXT = 4096
"""Largest number of bytes of a text, which is always a name."""
_MOST_AXES = 8
_NUMBERS = re.compile("b1|[iu][1248]|f[248]")

_FIXED = {
    pickle.BININT1: "<B",
    pickle.BININT2: "<H",
    pickle.BININT: "<i",
    pickle.BINFLOAT: ">d",
}
_SINGLETONS = {pickle.NONE: None, pickle.NEWTRUE: True, pickle.NEWFALSE: False, pickle.EMPTY_TUPLE: ()}
_TEXTS = {pickle.SHORT_BINUNICODE: "<B", pickle.BINUNICODE: "<I", pickle.BINUNICODE8: "<Q"}
_BYTES = {pickle.SHORT_BINBYTES: "<B", pickle.BINBYTES: "<I", pickle.BINBYTES8: "<Q", pickle.BYTEARRAY8: "<Q"}
_TUPLES = {pickle.TUPLE1: 1, pickle.TUPLE2: 2, pickle.TUPLE3: 3}
_SAVES = {pickle.BINPUT: "<B", pickle.LONG_BINPUT: "<I"}
_RECALLS = {pickle.BINGET: "<B", pickle.LONG_BINGET: "<I"}


class Blob(NamedTuple):
    """Bytes in the pickle that were skipped."""

    offset: int
    size: int


class Name(NamedTuple):
    """Name of a function or class in a pickle; nothing was imported for it."""

    module: str
    name: str


class Described:
    """Result of a builder whose state the pickle may set later."""

    def set_state(self, state: Any) -> None:
        """Sets the state given by the pickle."""
        raise NotImplementedError


class PickleReader:
    """Interprets one pickle.

    A damaged pickle raises a `ValueError`, or the error that Python raises for a missing operand.

    Args:
        file: File to read from its current position. The pickle must end within `size` bytes.
        size: Number of available bytes.
        builders: Replacement for each allowed name; None if it is only mentioned and never called.
        persistent: Builds the object for a persistent id.
        keys: Allowed types of the keys of mappings.
    """

    def __init__(
        self,
        file: IO[bytes],
        size: int,
        builders: Mapping[tuple[str, str], Builder | None],
        persistent: Builder | None = None,
        keys: tuple[type, ...] = (str,),
    ) -> None:
        self._keys = keys
        self._file, self._left, self._builders, self._persistent = file, size, builders, persistent
        self._stack: list[Any] = []
        self._outer: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def read(self) -> Any:
        """The content of the pickle: plain containers, texts, numbers, and results of the builders."""
        for _ in range(_MOST_OPCODES):
            opcode = self._take(1)
            if opcode == pickle.STOP:
                return self._pop()
            self._step(opcode)
        raise ValueError(f"the pickle has more than {_MOST_OPCODES:,} steps")

    def _step(self, opcode: bytes) -> None:
        push = self._stack.append
        if opcode == pickle.MEMOIZE:
            self._memo[len(self._memo)] = self._stack[-1]
        elif opcode in _SAVES:
            self._memo[self._number(_SAVES[opcode])] = self._stack[-1]
        elif opcode in _RECALLS:
            push(self._memo[self._number(_RECALLS[opcode])])
        elif opcode in _SINGLETONS:
            push(_SINGLETONS[opcode])
        elif opcode in _FIXED:
            push(self._number(_FIXED[opcode]))
        elif opcode == pickle.LONG1:
            push(int.from_bytes(self._take(self._number("<B")), "little", signed=True))
        elif opcode in _TEXTS:
            push(self._text(self._number(_TEXTS[opcode])))
        elif opcode in _BYTES:
            push(self._pass_over(self._number(_BYTES[opcode])))
        elif opcode in _TUPLES:
            push(self._several(_TUPLES[opcode]))
        elif opcode == pickle.MARK:
            self._outer.append(self._stack)
            self._stack = []
        elif opcode == pickle.TUPLE:
            items = self._since_mark()
            self._stack.append(tuple(items))
        elif opcode == pickle.EMPTY_LIST:
            push([])
        elif opcode == pickle.EMPTY_DICT:
            push({})
        elif opcode in (pickle.APPEND, pickle.APPENDS):
            added = [self._pop()] if opcode == pickle.APPEND else self._since_mark()
            self._top(list).extend(added)
        elif opcode in (pickle.SETITEM, pickle.SETITEMS):
            pairs = self._several(2) if opcode == pickle.SETITEM else self._since_mark()
            self._set(self._top(dict), pairs)
        elif opcode == pickle.GLOBAL:
            push(self._name(self._line(), self._line()))
        elif opcode == pickle.STACK_GLOBAL:
            push(self._name(*self._several(2)))
        elif opcode in (pickle.REDUCE, pickle.NEWOBJ):
            push(self._called(*self._several(2)))
        elif opcode == pickle.BUILD:
            state = self._pop()
            if isinstance(self._stack[-1], Described):
                self._stack[-1].set_state(state)
            else:  # the attributes of an OrderedDict
                self._top(dict)
        elif opcode == pickle.BINPERSID and self._persistent is not None:
            push(self._persistent(self._pop()))
        elif opcode == pickle.PROTO:
            self._take(1)
        elif opcode == pickle.FRAME:
            self._take(8)
        else:
            raise ValueError(f"the pickle has the opcode {opcode!r}, which files of arrays do not need")

    # Operands of an opcode

    def _take(self, size: int) -> bytes:
        data = self._file.read(size) if size <= self._left else b""
        if len(data) != size:
            raise ValueError("the pickle ends too early")
        self._left -= size
        return data

    def _number(self, layout: str) -> Any:
        return struct.unpack(layout, self._take(struct.calcsize(layout)))[0]

    def _text(self, size: int) -> str:
        if size > _LONGEST_TEXT:
            raise ValueError(f"the pickle has a text of {size:,} bytes, expected names of up to {_LONGEST_TEXT:,}")
        return self._take(size).decode()

    def _line(self) -> str:
        line = self._file.readline(min(self._left, _LONGEST_TEXT))
        self._left -= len(line)
        if not line.endswith(b"\n"):
            raise ValueError("the pickle has a name without an end")
        return line[:-1].decode()

    def _pass_over(self, size: int) -> Blob:
        if size > self._left:
            raise ValueError(f"the pickle claims {size:,} bytes where {self._left:,} are left")
        offset = self._file.tell()
        self._file.seek(offset + size)
        self._left -= size
        return Blob(offset, size)

    # The stack

    def _pop(self) -> Any:
        return self._stack.pop()

    def _several(self, count: int) -> tuple[Any, ...]:
        if len(self._stack) < count:
            raise ValueError("the pickle takes more than it has given")
        items = tuple(self._stack[-count:])
        del self._stack[-count:]
        return items

    def _since_mark(self) -> list[Any]:
        items = self._stack
        self._stack = self._outer.pop()
        return items

    def _top(self, kind: type[Any]) -> Any:
        if type(self._stack[-1]) is not kind:
            raise ValueError(f"the pickle changes {a_type(self._stack[-1])}, expected a {kind.__name__}")
        return self._stack[-1]

    def _set(self, target: dict[Any, Any], pairs: Any) -> None:
        if len(pairs) % 2 or not all(type(key) in self._keys for key in pairs[::2]):
            raise ValueError("the pickle has a mapping with keys that are no names")
        target.update(zip(pairs[::2], pairs[1::2], strict=True))

    def _name(self, module: Any, name: Any) -> Name:
        if type(module) is not str or type(name) is not str:
            raise ValueError("the pickle refers to something without a name")
        if (module, name) not in self._builders:
            raise ValueError(
                f"the pickle refers to {module}.{name}, expected arrays and plain containers only; it is not loaded, "
                "because it could run code"
            )
        return Name(module, name)

    def _called(self, name: Any, arguments: Any) -> Any:
        builder = self._builders.get(name) if type(name) is Name else None
        if builder is None or type(arguments) is not tuple:
            raise ValueError(f"the pickle calls {a_type(name)}, expected what makes an array")
        return builder(*arguments)


def whole_numbers(what: str, numbers: Any, *, least: int = 0) -> tuple[int, ...]:
    """Checks that a shape or strides are a tuple of at most eight whole numbers."""
    if type(numbers) is not tuple or len(numbers) > _MOST_AXES:
        raise ValueError(f"{what} is no tuple of up to {_MOST_AXES} numbers")
    if not all(type(number) is int and least <= number < 2**63 for number in numbers):
        raise ValueError(f"{what} holds something else than whole numbers from {least} on")
    return numbers


@dataclass(eq=False)
class _DType(Described):
    """A type of numbers. `align` and `copy` are arguments of NumPy's constructor."""

    code: Any
    align: Any = False
    copy: Any = False
    order: Any = "|"

    def set_state(self, state: Any) -> None:
        # Version, byte order, and entries that only types other than numbers have.
        if type(state) is not tuple or len(state) != 8 or state[2:7] != (None, None, None, -1, -1):
            raise ValueError("the pickle has a type of something else than numbers")
        self.order = state[1]

    def resolved(self) -> np.dtype[Any]:
        if type(self.code) is not str or not _NUMBERS.fullmatch(self.code) or self.order not in ("<", ">", "|", "="):
            what = "Python objects" if type(self.code) is str and self.code.startswith("O") else "no numbers"
            raise ValueError(f"the pickle has an array of {what}, expected booleans, integers or floats")
        return np.dtype(self.code).newbyteorder(self.order)


@dataclass(eq=False)
class StoredArray(Described):
    """An array whose numbers are still in the file."""

    dtype: Any = None
    shape: Any = ()
    data: Any = None
    order: Any = "C"
    axes: Any = None

    def set_state(self, state: Any) -> None:
        """Sets the state of `numpy.ndarray`: version, shape, dtype, Fortran order, bytes."""
        if type(state) is not tuple or len(state) != 5:
            raise ValueError("the pickle has an array in an unknown form")
        _, self.shape, self.dtype, fortran, self.data = state
        self.order = "F" if fortran is True else "C"

    def checked(self) -> tuple[np.dtype[Any], tuple[int, ...]]:
        """Type and shape, if they agree with each other and with the number of bytes in the file.

        Raises:
            ValueError: If they do not.
        """
        if type(self.dtype) is not _DType:
            raise ValueError("the pickle has an array without a type")
        dtype, shape = self.dtype.resolved(), whole_numbers("the shape of an array", self.shape, least=1)
        if type(self.data) is not Blob or math.prod(shape) * dtype.itemsize != self.data.size:
            raise ValueError(f"the pickle has an array of shape {shape} and {dtype} with other bytes than it needs")
        if self.order not in ("C", "F", "K") or (self.order == "K") != (self.axes is not None):
            raise ValueError("the pickle has an array in an unknown order")
        if self.axes is not None and sorted(whole_numbers("the order of axes", self.axes)) != list(range(len(shape))):
            raise ValueError("the pickle has an array whose axes are in no order")
        return dtype, shape

    @property
    def nbytes(self) -> int:
        """Memory that the array takes, if it is valid."""
        dtype, shape = self.checked()
        return math.prod(shape) * dtype.itemsize

    def load(self, file: IO[bytes]) -> np.ndarray[Any, Any]:
        """Reads the array."""
        dtype, shape = self.checked()
        flat = np.empty(math.prod(shape), dtype)
        file.seek(self.data.offset)
        if file.readinto(flat.view(np.uint8)) != flat.nbytes:  # type: ignore[attr-defined]
            raise ValueError("the file ends too early")
        if self.axes is not None:
            return flat.reshape(shape).transpose(self.axes)
        return flat.reshape(shape, order=self.order)


def _reconstruct(subtype: Any, shape: Any, code: Any) -> StoredArray:
    return StoredArray()


def _scalar(dtype: Any, data: Any) -> StoredArray:
    return StoredArray(dtype, (), data)


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any, axes: Any = None) -> StoredArray:
    return StoredArray(dtype, shape, data, order, axes)


NUMPY: Mapping[tuple[str, str], Builder | None] = {
    ("numpy", "ndarray"): None,
    ("numpy", "dtype"): _DType,
    **{
        (f"numpy.{core}.{module}", name): builder
        for core in ("core", "_core")
        for module, name, builder in (
            ("multiarray", "_reconstruct", _reconstruct),
            ("multiarray", "scalar", _scalar),
            ("numeric", "_frombuffer", _from_buffer),
        )
    },
}
"""Names in pickles of NumPy arrays, for NumPy 1 and 2."""
