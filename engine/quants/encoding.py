"""Matrices of float32 into any tensor type that has an encoder, over several threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from engine.errors import UnsupportedQuant
from engine.ggml_types import by_name
from engine.quants import SUPPORTED
from engine.quants.encoders import ENCODABLE, encoder

__all__ = ["ENCODABLE", "quantize"]

_TERNARY = ("TQ1_0", "TQ2_0")  # for ternary models, not to be proposed for others
_PARTS_A_THREAD = 4  # a thread that is held up leaves its last parts to the others


def quantize(
    values: npt.NDArray[np.float32],
    type_name: str,
    weights: npt.NDArray[np.float32] | None = None,
    *,
    threads: int = 1,
) -> npt.NDArray[np.uint8]:
    """Encodes a matrix, row by row: the bytes of ggml's reference encoders, for any number of threads.

    Args:
        values: (rows, columns) float32, C-contiguous, all finite: nothing checks it.
        weights: (columns,) float32, C-contiguous, finite and not negative: an importance matrix, how much the
            square of an error counts in each column. Types whose reference ignores it, as Q8_0, ignore it.

    Returns:
        (rows, row_bytes) uint8, newly allocated.

    Raises:
        UnsupportedQuant: no encoder for the type; says which comes nearest.
        TypeError: arrays of another dtype.
        ValueError: arrays of another shape or layout, columns that are not whole blocks, no threads.
    """
    if type_name not in ENCODABLE:
        raise UnsupportedQuant(_refusal(type_name))
    kind = by_name(type_name)
    for name, array in (("values", values), ("weights", weights)):
        if array is not None and array.dtype != np.float32:
            raise TypeError(f"{name} must be float32, not {array.dtype}; pass array.astype(numpy.float32)")
    if values.ndim != 2 or not values.flags.c_contiguous:
        raise ValueError(
            "values must be a C-contiguous matrix (rows, columns), "
            f"not shape {values.shape}, strides {values.strides}"
        )
    n_rows, columns = values.shape
    if columns == 0 or columns % kind.block_size:
        raise ValueError(
            f"rows of {columns} columns are not whole blocks of {type_name}, of {kind.block_size} each"
        )
    if weights is not None and (weights.shape != (columns,) or not weights.flags.c_contiguous):
        raise ValueError(
            f"weights must be one contiguous run of {columns} numbers, one a column, "
            f"not shape {weights.shape}, strides {weights.strides}"
        )
    if threads < 1:
        raise ValueError(f"threads must be at least 1, not {threads}")

    out = np.empty((n_rows, columns // kind.block_size * kind.block_bytes), np.uint8)
    rows, counts = _read_only(values), _read_only(np.empty(0, np.float32) if weights is None else weights)
    encode = encoder(type_name)
    n_parts = min(n_rows, threads * _PARTS_A_THREAD if threads > 1 else 1)
    cuts = [n_rows * part // n_parts for part in range(n_parts + 1)] if n_parts else []
    parts = [slice(*ends) for ends in pairwise(cuts)]
    if len(parts) < 2:
        for part in parts:
            encode(rows[part], counts, out[part])
        return out
    with ThreadPoolExecutor(min(threads, len(parts))) as pool:
        for future in [pool.submit(encode, rows[part], counts, out[part]) for part in parts]:
            future.result()
    return out


def _read_only(array: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """A view that cannot be written: kernels are compiled once, for such."""
    view = np.asarray(array).view()
    view.flags.writeable = False
    return view


def _refusal(type_name: str) -> str:
    """Why a type is not encoded, and by what to replace it."""
    known = ", ".join(sorted(ENCODABLE))
    if type_name not in SUPPORTED:
        return f"tensor type {type_name!r} cannot be encoded; choose one of {known}"
    asked = by_name(type_name)
    kinds = [by_name(name) for name in (*ENCODABLE, type_name)]
    bits = {kind.name: 8 * kind.block_bytes / kind.block_size for kind in kinds}

    def distance(name: str) -> tuple[float, bool, str]:
        return abs(bits[name] - bits[type_name]), by_name(name).block_size > asked.block_size, name

    nearest = min(ENCODABLE - set(_TERNARY), key=distance)
    return (
        f"tensor type {type_name!r} can be decoded but not encoded; the nearest that can be is {nearest} "
        f"({bits[nearest]:g} bits a weight in place of {bits[type_name]:g}), all are {known}"
    )
