"""Decoders of IQ4_NL and IQ4_XS: a nibble chooses one of 16 values spaced by a bell curve.

Offsets in bytes; d is an IEEE half, little-endian; v is the table below:

    IQ4_NL   18 B   d 0..1   qs 2..17                                             w = d * v[q]
    IQ4_XS  136 B   d 0..1   scales_h 2..3   scales_l 4..7   qs 8..135            w = d * (sc[s] - 32) * v[q]

IQ4_NL holds 32 weights, IQ4_XS 256 in sub-blocks s of 32 with scales of 6 bits. 16 bytes of 32 weights:

    qs, byte i:     7......4 3......0
    weight:           i + 16     i

Products are exact in float32 (11 bits of a half, 5 of a scale and 7 of a value), so every order of operations
gives the bits of `gguf.quants`. Both share one signature, see `engine.quants`.

Source of the table: `kvalues` of `gguf.quants.IQ4_NL`.
"""

from __future__ import annotations

from engine.kernels._jit import kernel
from engine.quants._fields import byte_at, half_at, short_at, signed
from engine.quants._vectors import put_nibbles_of

_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_put, _ = put_nibbles_of(_VALUES)


@kernel
def decode_iq4_nl(data, first_block, n_blocks, out):
    """IQ4_NL."""
    for block in range(n_blocks):
        at = (first_block + block) * 18
        _put(out, block * 32, data, at + 2, half_at(data, at))


@kernel
def decode_iq4_xs(data, first_block, n_blocks, out):
    """IQ4_XS.

    scales_l, byte j:                7......4   3......0
    sc, bits 3..0, of sub-block       2j + 1       2j
    scales_h, a 16-bit word: its bits 2s + 1 and 2s are bits 5..4 of sc[s]
    """
    for block in range(n_blocks):
        at, to = (first_block + block) * 136, block * 256
        d, high = half_at(data, at), short_at(data, at + 2)
        for sub in range(8):
            low = byte_at(data, at + 4 + (sub >> 1)) >> ((sub & 1) << 2) & 15
            scale = d * signed((low | (high >> 2 * sub & 3) << 4) - 32)
            _put(out, to + 32 * sub, data, at + 8 + 16 * sub, scale)
