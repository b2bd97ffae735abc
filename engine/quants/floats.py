"""Decoders of the types that are not quantized: F32, F16 and BF16. A block is one number, little-endian.

       bit  31 30......23 22........................0
    F32     s  eeeeeeee   mmmmmmmmmmmmmmmmmmmmmmm
    BF16    s  eeeeeeee   mmmmmmm                       the upper half of an F32
    F16     s  eeeee      mmmmmmmmmm                    exponent's bias 15 in place of 127

All decoders share one signature, described in `engine.quants`. Every value of these types is an F32 exactly.
"""

from __future__ import annotations

import numpy as np

from engine.kernels._jit import kernel
from engine.kernels.simd import bits_to_f32, half_to_f32


@kernel
def decode_f32(data, first_block, n_blocks, out):
    """Copies float32; the bits stay as they are, NaN payloads too."""
    words = data.view(np.uint32)
    for i in range(n_blocks):
        out[np.uintp(i)] = bits_to_f32(words[np.uintp(first_block + i)])


@kernel
def decode_f16(data, first_block, n_blocks, out):
    """IEEE half to float32."""
    halves = data.view(np.uint16)
    for i in range(n_blocks):
        out[np.uintp(i)] = half_to_f32(halves[np.uintp(first_block + i)])


@kernel
def decode_bf16(data, first_block, n_blocks, out):
    """bfloat16 to float32."""
    halves = data.view(np.uint16)
    for i in range(n_blocks):
        out[np.uintp(i)] = bits_to_f32(np.uint32(halves[np.uintp(first_block + i)]) << np.uint32(16))
