"""float32 weights as GGUF stores them: which types there are to choose from, and what they can hold.

A block quantization needs rows of whole blocks; a matrix whose rows are not becomes F16, as in llama.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

import engine
from pipeline.gguf_writer import TYPES


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

    @property
    def type(self) -> engine.GGMLType:
        """Its block."""
        return TYPES[self.name]


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
    return KINDS["f16"] if n_columns % KINDS[wanted].type.block_size else KINDS[wanted]


def encode(kind: Kind, values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """`values` (rows, columns) in a type, each row by itself; C-contiguous."""
    return engine.quantize(np.ascontiguousarray(values), kind.name)
