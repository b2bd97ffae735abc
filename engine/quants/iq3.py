"""Decoders of IQ3_XXS and IQ3_S: super-blocks of 256 weights whose magnitudes are rows of a grid.

Offsets in bytes; d is an IEEE half, little-endian. Two rows of four magnitudes make a group g of eight
weights with a sign each; a sub-block s of 32 weights has a scale of 4 bits:

    IQ3_XXS   98 B   d 0..1   qs 2..65   words 66..97                                  grid of 256
                                         w = d * (sc[s] + 1/2) / 2 * (-1 where the sign is set) * row[j]
    IQ3_S    110 B   d 0..1   qs 2..65   qh 66..73   signs 74..105   scales 106..109   grid of 512
                                         w = d * (2 * sc[s] + 1) * (-1 where the sign is set) * row[j]

    qs, byte i:  bits 7..0 of the row of weights 4i .. 4i + 3

Magnitudes are 4, 12, 20, 28, 36, 44, 52, 62 in IQ3_XXS and the odd numbers 1 .. 15 in IQ3_S. Products are
exact in float32 (11 bits of a half, 5 of a scale and 6 of a magnitude), so every order of operations gives
the bits of `gguf.quants`. Both share one signature, see `engine.quants`.
"""

from __future__ import annotations

import numpy as np

from engine.kernels._jit import kernel
from engine.quants._fields import byte_at, half_at, unsigned, word_at
from engine.quants._grids import EVEN_SIGNS, IQ3_S, IQ3_XXS, rows
from engine.quants._vectors import put_signed

_GRID_XXS = rows(IQ3_XXS, (4, 12, 20, 28, 36, 44, 52, 62))
_GRID_S = rows(IQ3_S, range(1, 16, 2))


@kernel
def _joined(first, second):
    """Two rows of four weights as one of eight."""
    return np.uint64(first) | np.uint64(second) << np.uint64(32)


@kernel
def decode_iq3_xxs(data, first_block, n_blocks, out):
    """IQ3_XXS.

    Word s, 32 bits; the eighth sign of a group makes the number of those set even:

        31..28   27..21     20..14     13..7      6..0
        sc[s]    signs 6..0 of group 4s + 3, 4s + 2, 4s + 1, 4s
    """
    for block in range(n_blocks):
        at, to = (first_block + block) * 98, block * 256
        d = half_at(data, at)
        for sub in range(8):
            word = word_at(data, at + 66 + 4 * sub)
            scale = d * np.float32(0.25) * unsigned(2 * (word >> 28) + 1)
            for group in range(4):
                qs = at + 2 + 8 * sub + 2 * group
                first = _GRID_XXS[np.uintp(byte_at(data, qs))]
                second = _GRID_XXS[np.uintp(byte_at(data, qs + 1))]
                signs = EVEN_SIGNS[np.uintp(word >> 7 * group & 127)]
                put_signed(out, to + 32 * sub + 8 * group, _joined(first, second), signs, scale)


@kernel
def decode_iq3_s(data, first_block, n_blocks, out):
    """IQ3_S.

    qh, byte s: bit j is bit 8 of the row of byte 8s + j of qs
    signs, byte g: bit j for weight 8g + j
    scales, byte i:   7..4: sc[2i + 1]   3..0: sc[2i]
    """
    for block in range(n_blocks):
        at, to = (first_block + block) * 110, block * 256
        d = half_at(data, at)
        for sub in range(8):
            high = np.uint32(byte_at(data, at + 66 + sub)) << 8
            scale = d * unsigned(2 * (byte_at(data, at + 106 + (sub >> 1)) >> ((sub & 1) << 2) & 15) + 1)
            for group in range(4):
                qs = at + 2 + 8 * sub + 2 * group
                first = _GRID_S[np.uintp(byte_at(data, qs) | high >> 2 * group & 256)]
                second = _GRID_S[np.uintp(byte_at(data, qs + 1) | high >> 2 * group + 1 & 256)]
                signs = byte_at(data, at + 74 + 4 * sub + group)
                put_signed(out, to + 32 * sub + 8 * group, _joined(first, second), signs, scale)
