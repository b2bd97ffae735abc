"""The fields of a GGUF header: numbers, names, values and arrays, read one after another.

Nothing that a file says is believed: each length and count is held against the bytes that are left before
anything is allocated or skipped by it, in Python integers, and what a header makes us keep is charged to a
fixed budget. Arrays of numbers are views on the mapping; strings in arrays are located now and decoded when
asked for.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import sys
from array import array
from collections.abc import Iterator, Sequence
from itertools import pairwise
from struct import Struct
from struct import error as StructError
from typing import Any, NoReturn, TypeAlias, overload

import numpy as np
from numpy.typing import NDArray

from engine.errors import GGUFFormatError

MAX_NESTING = 4  # arrays in arrays; models have no use for more than one level
MAX_NAME_BYTES = 65_535  # the format's limit for keys, applied to tensors' names too
INDEX_BYTES = 32 << 20  # what a header may cost in memory; a vocabulary of 256k with its merges costs 7 MB
_OBJECT_BYTES = 640  # charged for a tensor, a key or a nested array, with its view; measured: 350 to 600

U32, U64 = Struct("<I"), Struct("<Q")
_BOOL, _STRING, _ARRAY = 7, 8, 9
_SCALARS: dict[int, tuple[Struct, np.dtype[Any]]] = {  # type number -> layout, NumPy type of an array of it
    0: (Struct("<B"), np.dtype("u1")),
    1: (Struct("<b"), np.dtype("i1")),
    2: (Struct("<H"), np.dtype("<u2")),
    3: (Struct("<h"), np.dtype("<i2")),
    4: (U32, np.dtype("<u4")),
    5: (Struct("<i"), np.dtype("<i4")),
    6: (Struct("<f"), np.dtype("<f4")),
    _BOOL: (Struct("<B"), np.dtype("?")),
    10: (U64, np.dtype("<u8")),
    11: (Struct("<q"), np.dtype("<i8")),
    12: (Struct("<d"), np.dtype("<f8")),
}
CUT_SHORT = "is the download complete?"
DAMAGED = "the file is damaged or hostile; fetch it again and compare its SHA-256"


class StringArray(Sequence[str]):
    """An array of strings in the mapping: located when the file was opened, decoded on access.

    Access raises GGUFFormatError for bytes that are not UTF-8 (`raw` hands them out as they are), ValueError
    after the file was closed.
    """

    __slots__ = ("_map", "_starts", "_where")

    def __init__(self, mapping: mmap.mmap, starts: NDArray[np.int64], where: str) -> None:
        self._map, self._starts, self._where = mapping, starts, where

    def __len__(self) -> int:
        return len(self._starts) - 1

    def raw(self, i: int) -> bytes:
        """The bytes of string `i`; negative numbers count from the end."""
        n = len(self)
        if not -n <= i < n:
            raise IndexError(f"{self._where} has {n:,} strings, not one numbered {i}")
        i %= n
        return self._map[self._starts[i] : self._starts[i + 1] - 8]

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> list[str]: ...
    def __getitem__(self, i: int | slice) -> str | list[str]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        return self._decode(self.raw(i), i)

    def __iter__(self) -> Iterator[str]:
        for i, (start, following) in enumerate(pairwise(self._starts.tolist())):
            yield self._decode(self._map[start : following - 8], i)

    def to_list(self) -> list[str]:
        """All strings, decoded."""
        return list(self)

    def __repr__(self) -> str:
        return f"<StringArray {self._where}: {len(self):,} strings>"

    def _decode(self, raw: bytes, i: int) -> str:
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise GGUFFormatError(f"{self._where}: string {i} is not UTF-8 ({error}); {DAMAGED}") from None


MetadataValue: TypeAlias = "int | float | bool | str | NDArray[Any] | StringArray | tuple[MetadataValue, ...]"


class FieldReader:
    """Reads fields of a mapping; refuses what does not fit the file, or the memory a header may cost."""

    def __init__(
        self, path: str, mapping: mmap.mmap, whole: NDArray[np.uint8], memory_left: int = INDEX_BYTES
    ) -> None:
        self.path, self.map, self.whole = path, mapping, whole
        self.end = len(mapping)
        self.at = 0
        self.where = "header"  # what messages name: the key or the tensor
        self.memory_left = memory_left

    def fail(self, what: str, at: int | None = None, way_on: str = DAMAGED) -> NoReturn:
        """Raises GGUFFormatError for a field at byte `at` (default: where reading has come to)."""
        place = f"at byte {self.at if at is None else at:,}"
        raise GGUFFormatError(f"{self.path}: {self.where}: {what} ({place}); {way_on}")

    def need(self, n_bytes: int, what: str) -> None:
        """Fails unless `n_bytes` are left."""
        left = self.end - self.at
        if n_bytes > left:
            self.fail(f"{what} needs {n_bytes:,} bytes but the file has {left:,} left", way_on=CUT_SHORT)

    def number(self, layout: Struct, what: str) -> Any:
        """One scalar."""
        if self.end - self.at < layout.size:
            self.need(layout.size, what)
        (value,) = layout.unpack_from(self.map, self.at)
        self.at += layout.size
        return value

    def name(self, what: str) -> str:
        """A key or a tensor's name."""
        self._charge(_OBJECT_BYTES)
        return self._text(what, MAX_NAME_BYTES)

    def value(self) -> MetadataValue:
        """A value's type and the value."""
        begun = self.at
        type_id = self.number(U32, "a value's type")
        if type_id in _SCALARS:
            return self._scalar(type_id)
        if type_id == _STRING:
            return self._text("a string", self.end)
        if type_id == _ARRAY:
            return self._array(1)
        self.fail(f"unknown value type {type_id}, expected 0 to 12", begun)

    def _charge(self, n_bytes: int) -> None:
        self.memory_left -= n_bytes
        if self.memory_left < 0:
            self.fail(f"indexing the header would take more than {INDEX_BYTES >> 20} MiB of memory")

    def _text(self, what: str, longest: int) -> str:
        begun = self.at
        length = self.number(U64, f"the length of {what}")
        if length > longest:
            self.fail(f"{what} of {length:,} bytes, expected at most {longest:,}", begun)
        self.need(length, what)
        self._charge(5 * length)  # its bytes, and up to four for a character
        raw = self.map[self.at : self.at + length]
        self.at += length
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            self.fail(f"{what} that is not UTF-8 ({error})", begun)

    def _scalar(self, type_id: int) -> int | float | bool:
        begun = self.at
        value: int | float = self.number(_SCALARS[type_id][0], "a value")
        if type_id != _BOOL:
            return value
        if value > 1:
            self.fail(f"a bool of value {value}, expected 0 or 1", begun)
        return bool(value)

    def _array(self, nesting: int) -> MetadataValue:
        begun = self.at
        if nesting > MAX_NESTING:
            self.fail(f"arrays nested deeper than {MAX_NESTING}", begun)
        type_id = self.number(U32, "an array's type")
        count = self.number(U64, "an array's count")
        if type_id in _SCALARS:
            return self._numbers(type_id, count)
        if type_id == _STRING:
            self.need(8 * count, f"an array of {count:,} strings")
            self._charge(8 * (count + 1))
            return StringArray(self.map, self._locate(count), f"{self.path}: {self.where}")
        if type_id == _ARRAY:
            self.need(12 * count, f"an array of {count:,} arrays")
            self._charge(_OBJECT_BYTES * (count + 1))
            return tuple([self._array(nesting + 1) for _ in range(count)])
        self.fail(f"unknown array type {type_id}, expected 0 to 12", begun)

    def _numbers(self, type_id: int, count: int) -> NDArray[Any]:
        dtype = _SCALARS[type_id][1]
        n_bytes = dtype.itemsize * count
        self.need(n_bytes, f"an array of {count:,} numbers")
        raw = self.whole[self.at : self.at + n_bytes]
        if type_id == _BOOL and count:
            self._charge(n_bytes)  # the only numbers that are read now
            worst = int(raw.argmax())
            if raw[worst] > 1:
                self.fail(f"a bool of value {raw[worst]} in an array, expected 0 or 1", self.at + worst)
        self.at += n_bytes
        return raw.view(dtype)

    def _locate(self, count: int) -> NDArray[np.int64]:
        starts = locate_strings(self.whole, self.at, count)
        if starts[count] < 0:
            broken = -1 - int(starts[count])
            self.at = int(starts[broken]) - 8
            length = self.number(U64, f"the length of string {broken:,} of {count:,}")
            self.need(length, f"string {broken:,} of {count:,}")
        self.at = int(starts[count]) - 8
        return starts


def locate_strings(whole: NDArray[np.uint8], first: int, count: int) -> NDArray[np.int64]:
    """Where the bytes of each of `count` strings begin: (count + 1,) int64, as the kernel's docstring says.

    By the kernel where Numba is loaded already. Otherwise by a plain walk, which is sooner done (0.15 us a
    string) than Numba is imported (0.4 s and more): a process that only looks at a file loads no compiler.

    Args:
        whole: (n_bytes,) uint8, the file.
        first: byte at which the first string's length begins.
    """
    if "numba" not in sys.modules:
        return locate_strings_plainly(whole, first, count)
    from engine.kernels import strings

    starts = np.empty(count + 1, np.int64)
    strings.locate_strings(whole, first, starts)
    return starts


def locate_strings_plainly(whole: NDArray[np.uint8], first: int, count: int) -> NDArray[np.int64]:
    """The twin of `engine.kernels.strings.locate_strings` without Numba."""
    data = whole.data
    starts = array("q")
    keep, unpack, at = starts.append, U64.unpack_from, first
    try:
        for _ in range(count):
            (length,) = unpack(data, at)  # fails past the end: a string that is too long ends the next turn
            at += 8
            keep(at)
            at += length
    except (StructError, OverflowError):
        pass
    if at <= len(data):
        keep(at + 8)  # of the string that would follow, or of the one whose length is cut short
    if at > len(data) or len(starts) <= count:
        broken = len(starts) - 1
        starts.extend([0] * (count - len(starts)))
        keep(-1 - broken)
    return np.frombuffer(starts, np.int64)
