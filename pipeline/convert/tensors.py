"""A tensor of a checkpoint where it lies on the disk, and how its rows become float32."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
"""Types of weights that are read, by safetensors' names; NumPy has no bfloat16, so its bits stay integers."""

BLOCK_VALUES = 1 << 20
"""Weights that are float32 at a time: 4 MiB."""


@dataclass(frozen=True, eq=False)
class Tensor:
    """A tensor of a checkpoint; nothing of it is read before `rows` is called.

    Attributes:
        name: as in the file.
        path: the file.
        dtype: a key of DTYPES.
        shape: none of it 0.
        data: its values in a flat array of DTYPES[dtype], read-only, on the mapped file.
        mapping: the map below `data`, and where in it the data begin; None if it is torch's own.
    """

    name: str
    path: str
    dtype: str
    shape: tuple[int, ...]
    data: NDArray[Any]
    mapping: tuple[mmap.mmap, int] | None = None

    @property
    def n_rows(self) -> int:
        """Length of the first axis; a vector is one row."""
        return self.shape[0] if len(self.shape) > 1 else 1

    @property
    def n_columns(self) -> int:
        """Weights in a row."""
        return prod(self.shape) // self.n_rows

    def rows(self, which: slice | NDArray[np.int64]) -> NDArray[np.float32]:
        """float32 (n, n_columns), newly allocated: some of the rows, in the order asked for."""
        raw = self.data.reshape(self.n_rows, self.n_columns)[which]
        if self.dtype == "BF16":
            return (raw.astype(np.uint32) << 16).view(np.float32)
        return np.array(raw, np.float32, order="C")

    def blocks(self) -> Iterator[slice]:
        """Slices of rows, BLOCK_VALUES weights or one row each, that cover the tensor."""
        step = max(1, BLOCK_VALUES // self.n_columns)
        for first in range(0, self.n_rows, step):
            yield slice(first, min(first + step, self.n_rows))

    def release(self) -> None:
        """Gives the pages that were read back to the system, which keeps them as its cache if it likes."""
        if self.mapping is not None:
            mapped, start = self.mapping
            first = start - start % mmap.PAGESIZE
            mapped.madvise(mmap.MADV_DONTNEED, first, start + self.data.nbytes - first)


def same_values(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same weights, NaN included, whatever their types."""
    if one.shape != other.shape:
        return False
    same = all(np.array_equal(one.rows(block), other.rows(block), equal_nan=True) for block in one.blocks())
    one.release()
    other.release()
    return same
