"""GGUF files, versions 2 and 3: read-only memory, by default one shared mapping, and views on it.

    | magic "GGUF" | version u32 | n_tensors u64 | n_keys u64 |
    | n_keys of    : key string | type u32 | value                                      |
    | n_tensors of : name string | n_dims u32 | n_dims of u64, fastest first | type u32 | offset u64 |
    | padding to the alignment | tensor data, each tensor at a multiple of the alignment |

All numbers are little-endian; a string is a u64 length and UTF-8 bytes; an array is its type (u32), its count
(u64) and its items.

Opening reads the header once and copies no data: tensors and arrays of numbers are views, strings in arrays
are located only. Nothing in the file is believed (see `engine.gguf_fields`): whatever is wrong raises
GGUFFormatError. A model may be split over several files (`engine.splits`), and there are other ways to bring
it into memory than a mapping (`engine.mapping`).

Whoever shortens a file while it is mapped makes its readers die of SIGBUS: replace models by renaming.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import copy
import os
from array import array
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from engine.errors import GGUFFormatError
from engine.ggml_types import GGML_TYPES, GGMLType
from engine.gguf_fields import CUT_SHORT, INDEX_BYTES, U32, U64, FieldReader, MetadataValue, StringArray
from engine.mapping import LOAD_MODES, Prefetch, Region, bring_in
from engine.splits import check_parts, other_parts

__all__ = ["GGUFFile", "MetadataValue", "StringArray", "Tensor", "open", "with_tensors"]

DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4

_FOREIGN = {  # first bytes of what people hand over instead of a GGUF file
    b"vers": "it may be a Git LFS pointer; run `git lfs pull`",
    b"<!do": "it may be a web page; download the file itself",
    b"<htm": "it may be a web page; download the file itself",
    b"pk\x03\x04": "it may be a PyTorch checkpoint; convert it to GGUF",
    b"tjgg": "it is a GGML file from before GGUF; convert the original model",
    b"lmgg": "it is a GGML file from before GGUF; convert the original model",
}


@dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """A tensor's place in the file.

    Attributes:
        shape: in NumPy's order, rows before columns: ggml's dimensions reversed.
        offset: of the first byte, from the start of its file.
        data: (n_bytes,) uint8, a read-only view on the file's memory; keeps it alive.
        part: rank of its file in `GGUFFile.paths`.
    """

    name: str
    type: GGMLType
    shape: tuple[int, ...]
    offset: int
    n_bytes: int
    data: NDArray[np.uint8]
    part: int = 0


class Part:
    """One file, its header read; a whole model, or a part of one.

    Attributes:
        memory_left: of the bytes that a model's headers may cost.
    """

    def __init__(
        self, path: str, rank: int = 0, *, copy: bool = False, memory_left: int = INDEX_BYTES
    ) -> None:
        """Opens `path`, raising as `engine.open`."""
        self.path = path
        self.metadata: dict[str, MetadataValue] = {}
        self.tensors: dict[str, Tensor] = {}
        self.region = Region(path, copy=copy)
        try:
            fields = FieldReader(path, self.region.map, self.region.whole, memory_left)
            self.version, n_tensors, n_keys = _read_preamble(fields)
            self.metadata, self.alignment, self.key_starts = _read_metadata(fields, n_keys)
            self.metadata_end = fields.at
            self.tensors, self.data_offset = _read_tensors(fields, n_tensors, self.alignment, rank)
            self.memory_left = fields.memory_left
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Gives the memory back as soon as no view is in use."""
        self.metadata, self.tensors = {}, {}
        self.region.close()


class GGUFFile:
    """An open GGUF model; see the top of this module. `engine.open` makes one; a context manager.

    Attributes:
        path: as it was given: the file, or the first part of a split model.
        paths: of all its files, in order.
        load: how it was brought into memory, one of `engine.mapping.LOAD_MODES`.
        n_bytes: the size of its files.
        version: 2 or 3; like the following, of the first file.
        alignment: of the tensors' offsets, in bytes.
        metadata_end: byte after the last metadata value.
        data_offset: byte from which the tensors' offsets count.
    """

    def __init__(self, path: str | os.PathLike[str], *, load: str = "mmap") -> None:
        """Opens `path`; see `engine.open`."""
        if load not in LOAD_MODES:
            raise ValueError(f"load={load!r}; expected one of {', '.join(LOAD_MODES)}")
        self.path, self.load = os.fspath(path), load
        self._closed = False
        self._prefetch: Prefetch | None = None
        self._parts: list[Part] = []
        try:
            self._parts = _read_parts(self.path)
            if load == "copy":  # not before all headers are found good
                self._release()
                self._parts = _read_parts(self.path, copy=True)
            self._prefetch = bring_in([part.region for part in self._parts], load)
        except BaseException:
            self.close()
            raise
        first = self._parts[0]
        self.paths = tuple(part.path for part in self._parts)
        self.n_bytes = sum(part.region.whole.size for part in self._parts)
        self.version, self.alignment = first.version, first.alignment
        self.metadata_end, self.data_offset = first.metadata_end, first.data_offset
        self._metadata = first.metadata
        self._tensors = {name: tensor for part in self._parts for name, tensor in part.tensors.items()}

    @property
    def metadata(self) -> Mapping[str, MetadataValue]:
        """Values by key, in file order; those of a split model's first part.

        Python scalars and strings; arrays of strings are StringArrays; arrays of numbers are read-only views,
        not always aligned (copy them for a kernel); arrays of arrays are tuples.
        """
        self._check_open()
        return self._metadata

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """Tensors by name, in the files' order."""
        self._check_open()
        return self._tensors

    def raw_metadata(self) -> dict[str, bytes]:
        """The bytes of every key of `metadata` as they are in the file: its name, its type and its value."""
        self._check_open()
        first = self._parts[0]
        spans = pairwise([*first.key_starts, first.metadata_end])
        return {
            key: first.region.map[begin:end] for key, (begin, end) in zip(first.metadata, spans, strict=True)
        }

    def release(self, tensor: Tensor, first: int, n_bytes: int) -> None:
        """Gives back the pages of some bytes of a tensor, which the system keeps as its cache if it likes.

        The bytes stay valid: they are read again when they are asked for. Nothing happens where pages are
        locked, or are the only ones: those of a copy.

        Args:
            first: of the bytes, from the tensor's beginning.
        """
        self._check_open()
        if self.load not in ("copy", "mlock"):
            self._parts[tensor.part].region.release(tensor.offset + first, n_bytes)

    def resident_bytes(self) -> int:
        """Bytes of all files in the page cache, in whole pages (mincore); for `copy`, of the copy in memory.

        The kernel calls every page resident for a process that neither owns a file nor may write it.
        """
        self._check_open()
        return sum(part.region.resident_bytes() for part in self._parts)

    def close(self) -> None:
        """Gives the memory back; views still in use keep it until they are gone, and stay valid."""
        if self._closed:
            return
        self._closed = True
        if self._prefetch is not None:
            self._prefetch.stop()
        self._metadata, self._tensors = {}, {}
        self._release()

    def _release(self) -> None:
        for part in self._parts:
            part.close()
        self._parts = []

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<GGUFFile {self.path}: version {self.version}, {self.n_bytes:,} bytes>"

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError(f"{self.path} is closed")


def open(path: str | os.PathLike[str], *, load: str = "mmap") -> GGUFFile:
    """Opens a GGUF model: reads its header, maps its tensors, copies nothing.

    Args:
        path: the file, or the first part of a split model; the other parts lie beside it.
        load: how its bytes come into memory: `mmap`, `populate`, `mlock`, `copy` or `prefetch`
            (`engine.mapping`). All headers are checked before anything else is read.

    Raises:
        GGUFFormatError: a file is not a whole and sound GGUF file; parts are missing or not of one model.
        CapacityError: `mlock`, and the process may not lock as much.
        ValueError: `load` is none of those.
        OSError: a file cannot be opened or read (FileNotFoundError, IsADirectoryError, PermissionError ...).
    """
    return GGUFFile(path, load=load)


def with_tensors(file: GGUFFile, other: GGUFFile, names: Collection[str]) -> GGUFFile:
    """A view of `file` in which the named tensors are those of `other`: no file is written, nothing copied.

    It is good as long as both are open; closing it closes neither.

    Raises:
        ValueError: one of them has no such tensor, or of another shape.
    """
    for name in names:
        shapes = [each.tensors[name].shape if name in each.tensors else None for each in (file, other)]
        if None in shapes or shapes[0] != shapes[1]:
            raise ValueError(
                f"tensor {name!r} is of shape {shapes[0]} in {file.path} and of {shapes[1]} in {other.path}; "
                "expected the same in both"
            )
    view = copy.copy(file)
    view._tensors = {**file.tensors, **{name: other.tensors[name] for name in names}}
    view._parts, view._prefetch = [], None
    return view


def _read_parts(path: str, *, copy: bool = False) -> list[Part]:
    """The file and, if it is the first part of a split model, all others; headers share one budget."""
    parts: list[Part] = []
    try:
        parts.append(Part(path, copy=copy))
        for rank, other in enumerate(other_parts(path, parts[0].metadata), 1):
            parts.append(Part(other, rank, copy=copy, memory_left=parts[-1].memory_left))
        check_parts(parts)
    except BaseException:
        for part in parts:
            part.close()
        raise
    return parts


def _read_preamble(fields: FieldReader) -> tuple[int, int, int]:
    """Version, number of tensors, number of keys."""
    magic = fields.map[:4]
    if magic != b"GGUF":
        hint = _FOREIGN.get(magic.lower(), "is it the right file?")
        fields.fail(f"starts with {magic!r}, expected b'GGUF': not a GGUF file", way_on=hint)
    fields.at = 4
    version = fields.number(U32, "the version")
    swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
    if version == 1:
        fields.fail("version 1, expected 2 or 3", 4, "convert the original model again")
    if version not in (2, 3):
        if swapped in (1, 2, 3):
            way_on = "rewrite it with `gguf-convert-endian FILE little` of the gguf package"
            fields.fail(f"a big-endian file of version {swapped}, expected a little-endian one", 4, way_on)
        fields.fail(f"version {version}, expected 2 or 3", 4, "a newer file needs a newer reader")
    n_tensors, n_keys = fields.number(U64, "the tensor count"), fields.number(U64, "the key count")
    fields.need(13 * n_keys + 32 * n_tensors, f"a header of {n_keys:,} keys and {n_tensors:,} tensors")
    return version, n_tensors, n_keys


def _read_metadata(fields: FieldReader, n_keys: int) -> tuple[dict[str, MetadataValue], int, array[int]]:
    """The metadata, the alignment it asks for, and the byte at which each key begins."""
    metadata: dict[str, MetadataValue] = {}
    alignment = DEFAULT_ALIGNMENT
    starts = array("Q")
    for i in range(n_keys):
        fields.where, begun = f"metadata key {i}", fields.at
        starts.append(begun)
        key = fields.name("a key")
        fields.where = f"key {_short(key)}"
        if key in metadata:
            fields.fail("the key is there twice", begun)
        begun = fields.at
        value = metadata[key] = fields.value()
        if key == "general.alignment":
            if not isinstance(value, int) or isinstance(value, bool) or value < 1 or value & (value - 1):
                fields.fail(f"an alignment of {value!r:.40}, expected a power of two", begun)
            alignment = value
    return metadata, alignment, starts


def _read_tensors(
    fields: FieldReader, n_tensors: int, alignment: int, part: int
) -> tuple[dict[str, Tensor], int]:
    """The tensors in file order, and the byte from which their offsets count."""
    rows: list[tuple[str, GGMLType, tuple[int, ...], int, int]] = []
    names: set[str] = set()
    for i in range(n_tensors):
        fields.where, begun = f"tensor {i}", fields.at
        name = fields.name("a tensor's name")
        fields.where = f"tensor {_short(name)}"
        if name in names:
            fields.fail("the name is there twice", begun)
        names.add(name)
        rows.append((name, *_read_tensor(fields, alignment)))
    data_offset = -(-fields.at // alignment) * alignment
    tensors = {}
    for name, type_, shape, n_bytes, offset in rows:
        begin = data_offset + offset
        if begin + n_bytes > fields.end:
            what = f"{fields.path}: tensor {_short(name)} ends at byte {begin + n_bytes:,} but the file has"
            raise GGUFFormatError(f"{what} {fields.end:,}; {CUT_SHORT}")
        data = fields.whole[begin : begin + n_bytes]
        tensors[name] = Tensor(name, type_, shape, begin, n_bytes, data, part)
    for one, other in pairwise(sorted(tensors.values(), key=lambda tensor: tensor.offset)):
        if one.offset + one.n_bytes > other.offset:
            fields.where = f"tensors {_short(one.name)} and {_short(other.name)}"
            fields.fail("they overlap", other.offset)
    return tensors, data_offset


def _read_tensor(fields: FieldReader, alignment: int) -> tuple[GGMLType, tuple[int, ...], int, int]:
    """Type, shape, bytes and relative offset of the tensor whose name was just read."""
    begun = fields.at
    n_dims = fields.number(U32, "the number of dimensions")
    if not 1 <= n_dims <= MAX_DIMS:
        fields.fail(f"{n_dims:,} dimensions, expected 1 to {MAX_DIMS}", begun)
    shape = tuple([fields.number(U64, "a dimension") for _ in range(n_dims)][::-1])
    n_elements = 1
    for dim in shape:
        n_elements *= dim
    if not 0 < n_elements < 1 << 63:
        fields.fail(f"dimensions {shape} make {n_elements:,} weights, expected 1 to 2**63 - 1", begun)
    begun = fields.at
    type_id = fields.number(U32, "the type")
    if type_id not in GGML_TYPES:
        fields.fail(f"unknown type {type_id}, withdrawn from ggml or newer", begun, "quantize the model anew")
    type_ = GGML_TYPES[type_id]
    if shape[-1] % type_.block_size:
        expected = f"expected a multiple of {type_.name}'s block of {type_.block_size}"
        fields.fail(f"rows of {shape[-1]:,} weights, {expected}", begun)
    begun = fields.at
    offset = fields.number(U64, "the offset")
    if offset % alignment:
        fields.fail(f"offset {offset:,}, expected a multiple of the alignment {alignment:,}", begun)
    return type_, shape, n_elements // type_.block_size * type_.block_bytes, offset


def _short(name: str) -> str:
    """A name for a message, however long it is."""
    return repr(name if len(name) <= 80 else f"{name[:77]}...")
