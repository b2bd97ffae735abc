"""Tensor types that the engine can decode, and the way from a type's name to its decoder.

Every decoder is `decode(data, first_block, n_blocks, out)`:

    data          (n,) uint8, C-contiguous and read-only: the bytes of a whole tensor, as `Tensor.data` is
    first_block   block to start at; a tensor's rows are whole blocks one after the other, so row r starts at
                  r * columns // block_size
    n_blocks      blocks to decode, 0 or more
    out           float32, C-contiguous: weight j of the range goes to out[j], what lies beyond is left alone

It writes the numbers that `gguf.quants.dequantize` gives, bit by bit. Nothing checks bounds: the caller sees
to it that the blocks exist and fit. Serial and without the GIL; call it from Python or from another kernel.
Any other dtype, layout or writability of the arrays would compile a second version.

Decoders are imported, and compiled, one by one when asked for: a file of one type pays for one kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.errors import UnsupportedQuant
from engine.ggml_types import by_name

Decoder = Callable[[npt.NDArray[np.uint8], int, int, npt.NDArray[np.float32]], None]

_FAMILIES = {  # module: types, whose kernels are called decode_<type in small letters>
    "floats": ("F32", "F16", "BF16"),
    "legacy": ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    "k_quants": ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    "iq1": ("IQ1_S", "IQ1_M"),
    "iq2": ("IQ2_XXS", "IQ2_XS", "IQ2_S"),
    "iq3": ("IQ3_XXS", "IQ3_S"),
    "iq4": ("IQ4_NL", "IQ4_XS"),
    "ternary": ("TQ1_0", "TQ2_0"),
    "fp4": ("MXFP4", "NVFP4"),
}
_HOMES = {name: module for module, names in _FAMILIES.items() for name in names}

SUPPORTED: frozenset[str] = frozenset(_HOMES)
"""Names of the types that `decoder` knows."""


def decoder(type_name: str) -> Decoder:
    """The compiled-on-first-call kernel that decodes a tensor type, such as "Q4_1".

    Raises:
        UnsupportedQuant: the type has no decoder; the message lists those that have.
    """
    if type_name not in _HOMES:
        raise UnsupportedQuant(
            f"tensor type {type_name!r} cannot be decoded; supported are {', '.join(_HOMES)}: "
            "use a GGUF file of the model in one of these (llama.cpp's llama-quantize converts)"
        )
    kernel: Decoder = getattr(import_module(f"{__name__}.{_HOMES[type_name]}"), f"decode_{type_name.lower()}")
    return kernel


def dequantize(data: npt.NDArray[Any], type_name: str, n_elements: int) -> npt.NDArray[np.float32]:
    """Decodes a whole tensor, or any run of whole blocks.

    Args:
        data: (n_bytes,) uint8, C-contiguous; exactly the blocks of `n_elements` weights.

    Returns:
        (n_elements,) float32, newly allocated.

    Raises:
        UnsupportedQuant: no decoder for the type.
        TypeError: `data` is not bytes.
        ValueError: `data` is not one contiguous run, or its size is not that of `n_elements` weights.
    """
    decode = decoder(type_name)
    kind = by_name(type_name)
    if data.dtype != np.uint8:
        raise TypeError(f"{type_name} data must be uint8, not {data.dtype}; pass array.view(numpy.uint8)")
    if data.ndim != 1 or not data.flags.c_contiguous:
        raise ValueError(
            f"{type_name} data must be one contiguous run, not shape {data.shape}, strides {data.strides}"
        )
    n_blocks, rest = divmod(n_elements, kind.block_size)
    if n_elements < 0 or rest:
        raise ValueError(
            f"{n_elements} weights are not whole blocks of {type_name}, which hold {kind.block_size} each"
        )
    n_bytes = n_blocks * kind.block_bytes
    if data.size != n_bytes:
        raise ValueError(
            f"{n_elements} weights of {type_name} take {n_bytes:,} bytes, but data has {data.size:,}"
        )
    read_only = np.asarray(data).view()
    read_only.flags.writeable = False
    out = np.empty(n_elements, np.float32)
    decode(read_only, 0, n_blocks, out)
    return out
