"""float32 weights as GGUF stores them, by the gguf package's encoders: bit-equal to llama.cpp's reference.

A block quantization needs rows of whole blocks; a matrix whose rows are not becomes F16, as in llama.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Kind:
    """A type that the user can choose.

    Attributes:
        name: ggml's.
        file_type: general.file_type of a file of it.
        limit: the largest magnitude that it, or the scale of one of its blocks, can hold.
    """

    name: str
    file_type: int
    limit: float


_HALF, _BFLOAT = 65519.99, 3.3961e38  # what lies above rounds to infinity

KINDS = {
    "f32": Kind("F32", 0, float(np.finfo(np.float32).max)),
    "f16": Kind("F16", 1, _HALF),
    "bf16": Kind("BF16", 32, _BFLOAT),
    "q8_0": Kind("Q8_0", 7, 127 * _HALF),
    "q4_0": Kind("Q4_0", 2, 8 * _HALF),
}
"""By `convert.type`."""


def kind_of(wanted: str, *, is_matrix: bool, n_columns: int) -> Kind:
    """How a tensor is stored in a file of the type `wanted`."""
    if not is_matrix:
        return KINDS["f32"]
    return KINDS["f16"] if n_columns % _sizes(KINDS[wanted])[0] else KINDS[wanted]


def n_bytes(kind: Kind, n_values: int) -> int:
    """Bytes of so many weights."""
    block, size = _sizes(kind)
    return n_values // block * size


def encode(kind: Kind, values: NDArray[np.float32]) -> NDArray[Any]:
    """`values` (rows, columns) in a type, each row by itself; C-contiguous."""
    from gguf import GGMLQuantizationType, quants

    with np.errstate(all="ignore"):  # a block of denormals has an infinite inverse scale, and a scale of 0
        return np.ascontiguousarray(quants.quantize(values, GGMLQuantizationType[kind.name]))


def _sizes(kind: Kind) -> tuple[int, int]:
    """Weights and bytes of a block."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind.name]]
    return int(block), int(size)
