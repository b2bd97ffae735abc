"""Decoders of the ternary types: 256 weights of -1, 0 or 1 times one scale.

Offsets in bytes; d is an IEEE half, little-endian:

    TQ1_0  54 B   qs 0..47   qh 48..51   d 52..53         w = d * (t - 1)     five weights a byte, base 3
    TQ2_0  66 B   qs 0..63   d 64..65                     w = d * (q - 1)     four weights a byte, 2 bits each

Products are exact. Both share one signature, see `engine.quants`.
"""

from __future__ import annotations

import numpy as np

from engine.kernels._jit import kernel
from engine.quants._fields import byte_at, half_at, signed


@kernel
def _digit(q, power):
    """Digit k, 0..2, of q / 256 written in base 3, as TQ1_0 keeps five of them; `power` is 3**k."""
    rest = np.uint8(q * power)
    return np.uint16(rest * np.uint16(3)) >> 8


@kernel
def decode_tq1_0(data, first_block, n_blocks, out):
    """TQ1_0.

    qs, byte i < 32:        digit 0  1     2     3     4          of q / 256 in base 3, first one first
    weight                  i        i+32  i+64  i+96  i+128
    qs, byte 32 + i:        weight 160 + 16 * digit + i           i < 16
    qh, byte i:             weight 240 + 4 * digit + i            i < 4, the fifth digit unused
    """
    for block in range(n_blocks):
        at, to = (first_block + block) * 54, block * 256
        d = half_at(data, at + 52)
        for i in range(32):
            q = byte_at(data, at + i)
            out[np.uintp(to + i)] = d * signed(_digit(q, 1) - 1)
            out[np.uintp(to + 32 + i)] = d * signed(_digit(q, 3) - 1)
            out[np.uintp(to + 64 + i)] = d * signed(_digit(q, 9) - 1)
            out[np.uintp(to + 96 + i)] = d * signed(_digit(q, 27) - 1)
            out[np.uintp(to + 128 + i)] = d * signed(_digit(q, 81) - 1)
        for i in range(16):
            q = byte_at(data, at + 32 + i)
            out[np.uintp(to + 160 + i)] = d * signed(_digit(q, 1) - 1)
            out[np.uintp(to + 176 + i)] = d * signed(_digit(q, 3) - 1)
            out[np.uintp(to + 192 + i)] = d * signed(_digit(q, 9) - 1)
            out[np.uintp(to + 208 + i)] = d * signed(_digit(q, 27) - 1)
            out[np.uintp(to + 224 + i)] = d * signed(_digit(q, 81) - 1)
        for i in range(4):
            q = byte_at(data, at + 48 + i)
            out[np.uintp(to + 240 + i)] = d * signed(_digit(q, 1) - 1)
            out[np.uintp(to + 244 + i)] = d * signed(_digit(q, 3) - 1)
            out[np.uintp(to + 248 + i)] = d * signed(_digit(q, 9) - 1)
            out[np.uintp(to + 252 + i)] = d * signed(_digit(q, 27) - 1)


@kernel
def decode_tq2_0(data, first_block, n_blocks, out):
    """TQ2_0.

    qs, byte 32 * half + i:    7..6  5..4  3..2  1..0
    weight 128 * half +        i+96  i+64  i+32   i          the fourth value of two bits means 2 * d
    """
    for block in range(n_blocks):
        at, to = (first_block + block) * 66, block * 256
        d = half_at(data, at + 64)
        for half in range(2):
            qs, w = at + 32 * half, to + 128 * half
            for i in range(32):
                q = byte_at(data, qs + i)
                out[np.uintp(w + i)] = d * signed((q & 3) - 1)
                out[np.uintp(w + 32 + i)] = d * signed((q >> 2 & 3) - 1)
                out[np.uintp(w + 64 + i)] = d * signed((q >> 4 & 3) - 1)
                out[np.uintp(w + 96 + i)] = d * signed((q >> 6) - 1)
