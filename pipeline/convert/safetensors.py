"""The safetensors format: a header in JSON, then the tensors, mapped and never loaded.

    8 bytes    length of the header, little-endian
    header     {"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}, ..., "__metadata__": {}}
    data       offsets count from here; tensors follow each other without holes

Nothing in a header is trusted: its length, every offset, shape and type are checked against the file's size
before the first weight is looked at.

Source: https://github.com/huggingface/safetensors, README, "Format".
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.convert.tensors import DTYPES, Tensor
from pipeline.errors import ModelError

_MOST_HEADER_BYTES = 100_000_000  # as in the library
_INCOMPLETE = "is the download complete? Fetch the file again"


def read_safetensors(path: Path) -> Iterator[Tensor]:
    """The tensors of a file, in the file's order; the mapping lives as long as one of them.

    Raises:
        ModelError: the file is not in the format, or cut short; a tensor has no type of DTYPES.
        OSError: it cannot be opened.
    """
    with path.open("rb") as file:
        size = path.stat().st_size
        if size < 8:
            raise ModelError(f"{path}: has {size} bytes, expected a safetensors file", _INCOMPLETE)
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    length = int.from_bytes(mapped[:8], "little")
    if not 2 <= length <= min(size - 8, _MOST_HEADER_BYTES):
        raise ModelError(
            f"{path}: its header is said to have {length:,} bytes, but the file has {size:,}; "
            "expected a safetensors file",
            _INCOMPLETE,
        )
    start = 8 + length
    header = _header(path, mapped[8:start])
    for name, row in header.items():
        if name != "__metadata__":
            yield _tensor(path, name, row, mapped, start, size)


def _header(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        header = json.loads(raw)
    except ValueError as error:
        raise ModelError(f"{path}: the header is not JSON ({error})", "is it a safetensors file?") from error
    if not isinstance(header, dict):
        raise ModelError(f"{path}: the header is no JSON object", "is it a safetensors file?")
    return header


def _tensor(path: Path, name: str, row: Any, mapped: mmap.mmap, start: int, size: int) -> Tensor:
    try:
        dtype, shape, (first, last) = row["dtype"], tuple(row["shape"]), row["data_offsets"]
        whole = all(type(n) is int and n >= 0 for n in (*shape, first, last))
    except (TypeError, KeyError, ValueError) as error:
        raise ModelError(
            f"{path}: the header's entry of {name!r} is {row!r}, expected dtype, shape and two data_offsets",
            "is it a safetensors file?",
        ) from error
    if dtype not in DTYPES:
        raise ModelError(
            f"{path}: tensor {name!r} has the type {dtype!r}, expected {', '.join(DTYPES)}",
            "convert a checkpoint that is not quantized",
        )
    kind = DTYPES[dtype]
    if not whole or not shape or 0 in shape or last - first != prod(shape) * kind.itemsize:
        raise ModelError(
            f"{path}: tensor {name!r} is {dtype} of shape {list(shape)}, which does not go into bytes "
            f"{first} to {last}",
            "fetch the file again",
        )
    if start + last > size:
        raise ModelError(
            f"{path}: tensor {name!r} ends at byte {start + last:,} but the file has {size:,}", _INCOMPLETE
        )
    data = np.frombuffer(mapped, kind, prod(shape), start + first)
    return Tensor(name, str(path), dtype, shape, data, (mapped, start + first))
