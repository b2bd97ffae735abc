"""A plan and a vocabulary as a GGUF file: streamed, a block of rows at a time, whole or not at all.

The file is written beside its place under a name that begins with a dot, flushed to the disk, and renamed. On
any failure, and when the user interrupts, it is removed. The bytes are a function of the checkpoint, the
folder's name, and the settings: no dates, no paths.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from pipeline.convert.encode import KINDS, Kind, encode, kind_of, n_bytes
from pipeline.convert.plan import Plan, Target
from pipeline.convert.tensors import BLOCK_VALUES
from pipeline.errors import ModelError, StorageFailure, StoreError
from pipeline.memory import process_memory


@dataclass(frozen=True)
class Written:
    """A finished file; `peak_anonymous_bytes` is of this process, with a block in memory."""

    sha256: str
    n_bytes: int
    peak_anonymous_bytes: int


def check_place(out: Path, plan: Plan, wanted: str, *, overwrite: bool) -> None:
    """Refuses a place where the file cannot go.

    Raises:
        StoreError: there is a file, the folder is missing or cannot be written, or the disk is too full.
    """
    if out.exists() and not (overwrite and out.is_file()):
        raise StoreError(
            f"convert.out: {out} exists",
            "give another name, or convert.overwrite=true to replace it"
            if out.is_file()
            else "give a file's name",
        )
    if not out.parent.is_dir():
        raise StoreError(f"convert.out: there is no folder {out.parent}", "make the folder first")
    if not os.access(out.parent, os.W_OK | os.X_OK):
        raise StoreError(f"convert.out: {out.parent} cannot be written", "check its permissions")
    needed = sum(n_bytes(_kind(target, wanted), int(np.prod(target.shape))) for target in plan.targets)
    free = shutil.disk_usage(out.parent).free
    if free < needed:
        raise StoreError(
            f"convert.out: {out.parent} has {free:,} bytes free, and the file needs {needed:,}",
            "make room there",
        )


def write(plan: Plan, vocabulary: Mapping[str, Any], name: str, wanted: str, out: Path) -> Written:
    """Writes the file and puts it in its place, over one that is there.

    Args:
        vocabulary: metadata of the tokenizer.
        name: general.name.
        wanted: a key of KINDS.

    Raises:
        ModelError: a weight is not finite, or too large for its type.
        StorageFailure: the file could not be written.
    """
    temporary = out.with_name(f".{out.name}.{uuid.uuid4().hex}.tmp")
    try:
        written = _write(plan, vocabulary, name, wanted, temporary)
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


def _write(plan: Plan, vocabulary: Mapping[str, Any], name: str, wanted: str, path: Path) -> Written:
    from gguf import GGMLQuantizationType, GGUFWriter

    logging.getLogger("gguf").setLevel(logging.WARNING)  # it tells of the name that the file has meanwhile

    writer = GGUFWriter(path, plan.architecture)
    metadata = {
        "general.type": "model",
        "general.name": name,
        "general.file_type": KINDS[wanted].file_type,
        "general.quantization_version": 2,
        **plan.metadata,
        **vocabulary,
    }
    for key, value in metadata.items():
        _add(writer, key, value)
    kinds = [_kind(target, wanted) for target in plan.targets]
    for target, kind in zip(plan.targets, kinds, strict=True):
        size = n_bytes(kind, int(np.prod(target.shape)))
        writer.add_tensor_info(
            target.name, target.shape, np.dtype(np.float32), size, GGMLQuantizationType[kind.name]
        )
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        file: BinaryIO = writer.fout[0]
        writer.write_padding(file, file.tell())
        file.flush()
        with path.open("rb") as head:
            sha256 = hashlib.file_digest(head, "sha256")
        written, peak = file.tell(), _Peak()

        def put(array: NDArray[Any]) -> None:
            nonlocal written
            raw = array.reshape(-1).view(np.uint8)
            file.write(raw.data)
            sha256.update(raw.data)
            written += raw.size

        for target, kind in zip(plan.targets, kinds, strict=True):
            for i, values in enumerate(_blocks(target, kind)):
                encoded = encode(kind, values)
                if i == 0:
                    peak.look(values.size)
                put(encoded)
            if target.source is not None:
                target.source.release()
            put(np.zeros(-written % writer.data_alignment, np.uint8))
        file.flush()
        os.fsync(file.fileno())
        return Written(sha256.hexdigest(), written, peak.n_bytes)
    finally:
        for file in writer.fout or []:
            with suppress(OSError):  # what could not be written above cannot be flushed here
                file.close()


class _Peak:
    """The largest anonymous memory of this process, looked at where it can be: at blocks as large as any."""

    def __init__(self) -> None:
        self.n_bytes = self._largest = 0

    def look(self, n_values: int) -> None:
        """A block of so many weights is in memory, as float32 and encoded."""
        if n_values >= self._largest:
            self._largest = n_values
            self.n_bytes = max(self.n_bytes, int(process_memory()["anonymous_bytes"]))


def _blocks(target: Target, kind: Kind) -> Iterator[NDArray[np.float32]]:
    """float32 rows of a target, those of its source first, then zeros.

    Raises:
        ModelError: a weight is not finite, or too large for its type.
    """
    if target.values is not None:
        yield target.values.reshape(target.n_rows, target.n_columns)
        return
    source = target.source
    assert source is not None, "a target has a source or values"
    for block in source.blocks():
        values = source.rows(block if target.order is None else target.order[block])
        _check(target, kind, values, block, source.name)
        if target.change is not None:
            values = target.change(values)
            _check(target, kind, values, block, f"{target.name}, which is made of {source.name}")
        yield values
    n_zeros = target.n_rows * target.n_columns // source.n_columns - source.n_rows
    step = max(1, BLOCK_VALUES // source.n_columns)
    for first in range(0, n_zeros, step):
        yield np.zeros((min(step, n_zeros - first), source.n_columns), np.float32)


def _check(target: Target, kind: Kind, values: NDArray[np.float32], block: slice, name: str) -> None:
    """Raises ModelError for the first weight that is not finite or too large, naming it."""
    magnitude = float(np.abs(values).max())  # NaN if any of them is
    if magnitude <= kind.limit:
        return
    row, column = (int(i[0]) for i in np.nonzero(~(np.abs(values) <= kind.limit)))
    value = float(values[row, column])
    assert target.source is not None
    row = block.start + row if target.order is None else int(target.order[block][row])
    at = f"[{row}, {column}]" if len(target.source.shape) > 1 else f"[{column}]"
    if np.isfinite(value):
        raise ModelError(
            f"{target.source.path}: {name}{at} is {value:g}, too large for {kind.name}",
            "choose another convert.type; f32 and bf16 hold it",
        )
    raise ModelError(
        f"{target.source.path}: {name}{at} is {value}; expected a number",
        "the weights are broken: fetch the file again, or ask who trained the model",
    )


def _kind(target: Target, wanted: str) -> Kind:
    return kind_of(wanted, is_matrix=target.is_matrix, n_columns=target.n_columns)


def _add(writer: Any, key: str, value: Any) -> None:
    """A key of the metadata: ints are u32, floats f32, arrays i32 or f32."""
    from gguf import GGUFValueType

    if isinstance(value, np.ndarray):
        kind = GGUFValueType.FLOAT32 if value.dtype.kind == "f" else GGUFValueType.INT32
        writer.add_key_value(key, value.tolist(), GGUFValueType.ARRAY, kind)
    elif isinstance(value, list):
        writer.add_key_value(key, value, GGUFValueType.ARRAY, GGUFValueType.STRING)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    else:
        writer.add_string(key, value)


def _sync_folder(folder: Path) -> None:
    with suppress(OSError):  # some file systems cannot flush a folder; the file itself is flushed
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
