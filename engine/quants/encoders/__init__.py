"""Tensor types that the engine can encode, and the way from a type's name to its encoder.

Every encoder is `encode_<type in small letters>(values, weights, out)`:

    values   (n_rows, columns) float32, C-contiguous and read-only; finite, columns whole blocks
    weights  (columns,) float32, read-only: how much the square of an error counts in each column, of all rows
             alike (an importance matrix); or (0,), where every type has its own rule
    out      (n_rows, row_bytes) uint8, C-contiguous, overwritten

It writes the bytes of ggml's reference encoders, `quantize_<type>` given the same weights, compiled without
contraction: those that the `libgguf` package computes. Types whose reference ignores the weights ignore them.
Nothing checks shapes: `engine.quants.encoding.quantize` does. Serial and without the GIL; a row's bytes
depend on that row and the weights alone. Any other dtype, layout or writability of the arrays would compile a
second version.

Encoders are imported, and compiled, one by one when asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import numpy as np
import numpy.typing as npt

Encoder = Callable[[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.uint8]], None]

_FAMILIES = {  # module: types
    "floats": ("F32", "F16", "BF16"),
    "legacy": ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"),
    "k_quants": ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    "iq4": ("IQ4_NL", "IQ4_XS"),
    "fp4": ("MXFP4",),
    "ternary": ("TQ1_0", "TQ2_0"),
}
_HOMES = {name: module for module, names in _FAMILIES.items() for name in names}

ENCODABLE: frozenset[str] = frozenset(_HOMES)
"""Names of the types that `encoder` knows."""


def encoder(type_name: str) -> Encoder:
    """The compiled-on-first-call kernel that encodes a type of `ENCODABLE`; KeyError for any other."""
    module = import_module(f"{__name__}.{_HOMES[type_name]}")
    kernel: Encoder = getattr(module, f"encode_{type_name.lower()}")
    return kernel
