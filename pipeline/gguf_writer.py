"""GGUF files, streamed: a piece of a tensor is in memory at a time, and the file appears whole or not at all.

    | "GGUF" | version u32 = 3 | n_tensors u64 | n_keys u64 |
    | n_keys of    : key string | type u32 | value                                                    |
    | n_tensors of : name string | n_dims u32 | n_dims of u64, fastest first | type u32 | offset u64 |
    | padding to the alignment | tensors, each padded to the alignment |

The file is written beside its place under a name that begins with a dot, flushed to the disk, and renamed. On
any failure, and when the user interrupts, it is removed. Its SHA-256 is computed on the way.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
import uuid
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

import engine
from pipeline.errors import StorageFailure, StoreError
from pipeline.memory import process_memory

ALIGNMENT = 32
"""Of a file that says nothing of it."""

TYPES: dict[str, engine.GGMLType] = {row.name: row for row in engine.GGML_TYPES.values()}
"""Tensor types by name."""

_LOOK_BYTES = 64 << 20
_U32, _I32, _F32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9


@dataclass(frozen=True)
class Entry:
    """A tensor of the file's table; `shape` in NumPy's order, its rows whole blocks of `type`."""

    name: str
    shape: tuple[int, ...]
    type: engine.GGMLType

    @property
    def n_values(self) -> int:
        """Weights."""
        return prod(self.shape)

    @property
    def n_bytes(self) -> int:
        """Bytes in the file, without padding."""
        return self.n_values // self.type.block_size * self.type.block_bytes


@dataclass(frozen=True)
class Written:
    """A finished file; `peak_anonymous_bytes` is of this process, with a piece in memory."""

    sha256: str
    n_bytes: int
    peak_anonymous_bytes: int


def field(key: str, value: Any) -> bytes:
    """A key of the metadata: ints are u32, floats f32, arrays i32 or f32, lists of strings."""
    if isinstance(value, np.ndarray):
        is_float = value.dtype.kind == "f"
        items = value.astype("<f4" if is_float else "<i4")
        packed = struct.pack("<IIQ", _ARRAY, _F32 if is_float else _I32, items.size) + items.tobytes()
    elif isinstance(value, list):
        packed = struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(_string, value))
    elif isinstance(value, bool):
        packed = struct.pack("<I?", _BOOL, value)
    elif isinstance(value, float):
        packed = struct.pack("<If", _F32, value)
    elif isinstance(value, int):
        packed = struct.pack("<II", _U32, value)
    else:
        packed = struct.pack("<I", _STRING) + _string(value)
    return _string(key) + packed


def head(fields: Sequence[bytes], entries: Sequence[Entry], alignment: int = ALIGNMENT) -> bytes:
    """Everything before the first tensor.

    Args:
        fields: as `field` gives them; general.alignment among them where `alignment` is not ALIGNMENT.
    """
    parts = [struct.pack("<4sIQQ", b"GGUF", 3, len(entries), len(fields)), *fields]
    offset = 0
    for entry in entries:
        n_dims = len(entry.shape)
        dims = struct.pack(f"<I{n_dims}Q", n_dims, *reversed(entry.shape))
        parts += [_string(entry.name), dims, struct.pack("<IQ", entry.type.id, offset)]
        offset += _padded(entry.n_bytes, alignment)
    made = b"".join(parts)
    return made.ljust(_padded(len(made), alignment), b"\0")


def file_bytes(fields: Sequence[bytes], entries: Sequence[Entry], alignment: int = ALIGNMENT) -> int:
    """Size of the file."""
    tensors = sum(_padded(entry.n_bytes, alignment) for entry in entries)
    return len(head(fields, entries, alignment)) + tensors


def check_place(key: str, out: Path, needed: int, *, overwrite: bool) -> None:
    """Refuses a place where a file cannot go.

    Args:
        key: of the setting that names it, such as "convert.out"; the one beside it is called `overwrite`.
        needed: bytes of the file.

    Raises:
        StoreError: there is a file, the folder is missing or cannot be written, or the disk is too full.
    """
    if out.exists() and not (overwrite and out.is_file()):
        job = key.partition(".")[0]
        way_on = f"give another name, or {job}.overwrite=true to replace it"
        raise StoreError(f"{key}: {out} exists", way_on if out.is_file() else "give a file's name")
    if not out.parent.is_dir():
        raise StoreError(f"{key}: there is no folder {out.parent}", "make the folder first")
    if not os.access(out.parent, os.W_OK | os.X_OK):
        raise StoreError(f"{key}: {out.parent} cannot be written", "check its permissions")
    free = shutil.disk_usage(out.parent).free
    if free < needed:
        raise StoreError(
            f"{key}: {out.parent} has {free:,} bytes free, and the file needs {needed:,}",
            "make room there",
        )


def write(
    out: Path,
    fields: Sequence[bytes],
    entries: Sequence[Entry],
    pieces: Callable[[int], Iterable[NDArray[Any]]],
    alignment: int = ALIGNMENT,
) -> Written:
    """Writes the file and puts it in its place, over one that is there.

    Args:
        fields: the metadata, as `field` gives them.
        pieces: rank of an entry -> its bytes in order, as arrays that are C-contiguous; called once for each
            in order.

    Raises:
        StorageFailure: the file could not be written; nothing is left of it. What else `pieces` raises goes
            through.
    """
    temporary = out.with_name(f".{out.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            written = _write(file, head(fields, entries, alignment), entries, pieces, alignment)
        temporary.replace(out)
        _sync_folder(out.parent)
    except OSError as error:
        raise StorageFailure(
            f"{out}: cannot be written: {error.strerror or error}; nothing is left of it",
            "make room and run the same command again",
            kind=type(error).__name__,
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    return written


def _write(
    file: BinaryIO,
    before: bytes,
    entries: Sequence[Entry],
    pieces: Callable[[int], Iterable[NDArray[Any]]],
    alignment: int,
) -> Written:
    sha256, peak = hashlib.sha256(), _Peak()
    n_written = 0

    def put(raw: bytes | memoryview) -> None:
        nonlocal n_written
        file.write(raw)
        sha256.update(raw)
        n_written += len(raw)

    put(before)
    for rank, entry in enumerate(entries):
        begun = n_written
        for piece in pieces(rank):
            raw = piece.reshape(-1).view(np.uint8)
            peak.look(raw.size // entry.type.block_bytes * entry.type.block_size, n_written)
            put(raw.data)
        assert n_written - begun == entry.n_bytes, f"{entry.name}: {n_written - begun} bytes"
        put(bytes(-n_written % alignment))
    file.flush()
    os.fsync(file.fileno())
    return Written(sha256.hexdigest(), n_written, peak.n_bytes)


class _Peak:
    """The largest anonymous memory of this process, looked at now and then: a look takes milliseconds."""

    def __init__(self) -> None:
        self.n_bytes = self._largest = self._next = 0

    def look(self, n_values: int, n_written: int) -> None:
        """A piece of so many weights is in memory, so many bytes of the file are written."""
        if n_values > self._largest or n_written >= self._next:
            self._largest, self._next = max(n_values, self._largest), n_written + _LOOK_BYTES
            self.n_bytes = max(self.n_bytes, int(process_memory()["anonymous_bytes"]))


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _padded(n_bytes: int, alignment: int) -> int:
    return n_bytes + -n_bytes % alignment


def _sync_folder(folder: Path) -> None:
    with suppress(OSError):  # some file systems cannot flush a folder; the file itself is flushed
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
