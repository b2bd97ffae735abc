"""Decoders of IQ1_S and IQ1_M: super-blocks of 256 weights of -1, 0 or 1, all of eight moved by 1/8.

Offsets in bytes; d is an IEEE half, fields of 16 bits, little-endian. A group g is eight weights, a row of a
grid of 2,048; an eighth e[g] is 1/8 or -1/8; sub-blocks s are 32 weights in IQ1_S, 16 in IQ1_M:

    IQ1_S  50 B   d 0..1   qs 2..33   qh 34..49
    IQ1_M  56 B   qs 0..31   qh 32..47   scales 48..55

    both:  w = d * (2 * sc[s] + 1) * (row[g][j] + e[g])

Byte g of qs is bits 7..0 of a group's row number. Products are exact in float32 (11 bits of a half, 4 of a
scale and 4 of a weight), so every order of operations gives the bits of `gguf.quants`. Both share one
signature, see `engine.quants`.
"""

from __future__ import annotations

import numpy as np

from engine.kernels._jit import kernel
from engine.kernels.simd import half_to_f32
from engine.quants._fields import byte_at, half_at, short_at, unsigned
from engine.quants._grids import IQ1, rows
from engine.quants._vectors import put_shifted

_GRID = rows(IQ1, (-1, 0, 1))
_EIGHTH = np.float32(0.125)


@kernel
def decode_iq1_s(data, first_block, n_blocks, out):
    """IQ1_S.

    qh, word s:   15          14..12   11..9     8..6      5..3      2..0
                  e[g] < 0    sc[s]    bits 10..8 of the row of group 4s + 3, 4s + 2, 4s + 1, 4s
    """
    for block in range(n_blocks):
        at, to = (first_block + block) * 50, block * 256
        d = half_at(data, at)
        for sub in range(8):
            high = short_at(data, at + 34 + 2 * sub)
            scale = d * unsigned(2 * (high >> 12 & 7) + 1)
            eighth = -_EIGHTH if high & 0x8000 else _EIGHTH
            for group in range(4):
                row = byte_at(data, at + 2 + 4 * sub + group) | (high >> 3 * group & 7) << 8
                put_shifted(out, to + 32 * sub + 8 * group, _GRID[np.uintp(row)], eighth, scale)


@kernel
def decode_iq1_m(data, first_block, n_blocks, out):
    """IQ1_M.

    qh, byte i:         7              6..4             3             2..0
                        e[2i+1] < 0    bits 10..8 of    e[2i] < 0     bits 10..8 of the row of group 2i
                                       group 2i + 1
    scales, word k:     15..12             11..9       8..6        5..3        2..0
                        bits of d, 4k up   sc[4k + 3]  sc[4k + 2]  sc[4k + 1]  sc[4k]
    """
    for block in range(n_blocks):
        at, to = (first_block + block) * 56, block * 256
        w0, w1 = short_at(data, at + 48), short_at(data, at + 50)
        w2, w3 = short_at(data, at + 52), short_at(data, at + 54)
        d = half_to_f32(np.uint16(w0 >> 12 | w1 >> 12 << 4 | w2 >> 12 << 8 | w3 >> 12 << 12))
        for sub in range(16):
            scales = short_at(data, at + 48 + (sub >> 2 << 1))
            scale = d * unsigned(2 * (scales >> 3 * (sub & 3) & 7) + 1)
            high = byte_at(data, at + 32 + sub)
            for group in range(2):
                code = high >> 4 * group & 15
                row = byte_at(data, at + 2 * sub + group) | (code & 7) << 8
                eighth = -_EIGHTH if code & 8 else _EIGHTH
                put_shifted(out, to + 16 * sub + 8 * group, _GRID[np.uintp(row)], eighth, scale)
