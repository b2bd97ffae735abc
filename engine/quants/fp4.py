"""Decoders of the 4-bit floats: MXFP4 and NVFP4, whose weights are E2M1 numbers under a small scale.

    E2M1, bits   3  2 1  0        values by code 0..7: 0, 0.5, 1, 1.5, 2, 3, 4, 6; codes 8..15 the negative of
                 s  e e  m        those, but 8 is +0 here

The table holds twice these values, whole numbers, and a scale counts half for it. Offsets in bytes:

    MXFP4  17 B   e 0         qs 1..16     32 weights                  w = 2^(e - 128) * v[q]
    NVFP4  36 B   d 0..3      qs 4..35     4 sub-blocks s of 16        w = d[s] / 2 * v[q]

                       MXFP4, qs byte i        NVFP4, qs byte 8s + i
                       7......4 3......0        7......4 3......0
    weight              i + 16     i             16s+8+i  16s + i

Products are exact in float32, but for a scale of 2^127 times more than 1: infinite, as in `gguf.quants`. Both
share one signature, see `engine.quants`.

Sources: OCP Microscaling Formats 1.0 for E2M1 and E8M0; `gguf.quants.MXFP4` and `NVFP4` for the layouts.
"""

from __future__ import annotations

import numpy as np

from engine.kernels._jit import kernel
from engine.kernels.simd import bits_to_f32
from engine.quants._fields import byte_at
from engine.quants._vectors import put_nibbles_of

_put_mxfp4, _put_nvfp4 = put_nibbles_of((0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12))


@kernel
def _half_of_e8m0(e):
    """2^(e - 128), whose exponent's field is e - 1; the two smallest are subnormal."""
    bits = np.uint32((np.uint32(e) - 1) << 23) if e >= 2 else np.uint32(0x00200000 << e)
    return bits_to_f32(bits)


@kernel
def decode_mxfp4(data, first_block, n_blocks, out):
    """MXFP4; e is an exponent alone (E8M0), and 255 no NaN but 2^128."""
    for block in range(n_blocks):
        at = (first_block + block) * 17
        _put_mxfp4(out, block * 32, data, at + 1, _half_of_e8m0(byte_at(data, at)))


@kernel
def _half_of_e4m3(code):
    """Half of the number eeee mmm in bits 6..0: m / 8 * 2^-6 where e is 0, else (1 + m / 8) * 2^(e - 7).

    127 stands for 0. Bit 7 counts for nothing, but makes 255 a number: twice 240.
    """
    # The seven bits where a float32 keeps its exponent's low end: 2^-120 of the number, subnormal as it is.
    shifted = bits_to_f32(np.uint32(np.uint32(code & 127) << np.uint32(20)))
    return np.float32(0.0) if code == 127 else shifted * np.float32(2.0**119)


@kernel
def decode_nvfp4(data, first_block, n_blocks, out):
    """NVFP4."""
    for block in range(n_blocks):
        at, to = (first_block + block) * 36, block * 64
        for pair in range(2):
            scales = at + 2 * pair
            d0, d1 = _half_of_e4m3(byte_at(data, scales)), _half_of_e4m3(byte_at(data, scales + 1))
            _put_nvfp4(out, to + 32 * pair, data, at + 4 + 16 * pair, d0, d1)
