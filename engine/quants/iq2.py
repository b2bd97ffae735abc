"""Decoders of IQ2_XXS, IQ2_XS and IQ2_S: super-blocks of 256 weights whose magnitudes are rows of a grid.

Offsets in bytes; d is an IEEE half, little-endian. A group g is eight weights: a row of magnitudes (8, 25 or
43) and a sign each; sub-blocks s, of 32 weights in IQ2_XXS and 16 in the others, have a scale of 4 bits:

    IQ2_XXS  66 B   d 0..1   qs 2..65                                             grid of 256
    IQ2_XS   74 B   d 0..1   qs 2..65   scales 66..73                             grid of 512
    IQ2_S    82 B   d 0..1   qs 2..33   signs 34..65   qh 66..73   scales 74..81  grid of 1,024

    all:  w = d * (sc[s] + 1/2) / 4 * (-1 where the sign is set) * row[g][j]

IQ2_XXS and IQ2_XS store seven signs of a group; the eighth makes the number of those set even. Products are
exact in float32 (11 bits of a half, 5 of a scale and 6 of a magnitude), so every order of operations gives
the bits of `gguf.quants`. All decoders share one signature, see `engine.quants`.
"""

from __future__ import annotations

import numpy as np

from engine.kernels._jit import kernel
from engine.quants._fields import byte_at, half_at, short_at, unsigned, word_at
from engine.quants._grids import EVEN_SIGNS, IQ2_S, IQ2_XS, IQ2_XXS, rows
from engine.quants._vectors import put_signed

_MAGNITUDES = (8, 25, 43)
_GRID_XXS, _GRID_XS, _GRID_S = (rows(digits, _MAGNITUDES) for digits in (IQ2_XXS, IQ2_XS, IQ2_S))


@kernel
def _scale(d, code):
    """d * (code + 1/2) / 4, written with whole numbers."""
    return d * np.float32(0.125) * unsigned(2 * code + 1)


@kernel
def decode_iq2_xxs(data, first_block, n_blocks, out):
    """IQ2_XXS.

    Eight bytes of qs for each sub-block: the rows of its four groups, a byte each, then a 32-bit word:

        31..28   27..21     20..14     13..7      6..0
        sc[s]    signs 6..0 of group 4s + 3, 4s + 2, 4s + 1, 4s
    """
    for block in range(n_blocks):
        at, to = (first_block + block) * 66, block * 256
        d = half_at(data, at)
        for sub in range(8):
            qs = at + 2 + 8 * sub
            word = word_at(data, qs + 4)
            scale = _scale(d, word >> 28)
            for group in range(4):
                row = _GRID_XXS[np.uintp(byte_at(data, qs + group))]
                signs = EVEN_SIGNS[np.uintp(word >> 7 * group & 127)]
                put_signed(out, to + 32 * sub + 8 * group, row, signs, scale)


@kernel
def decode_iq2_xs(data, first_block, n_blocks, out):
    """IQ2_XS.

    qs, a 16-bit word a group:   15..9        8..0
                                 signs 6..0   row
    scales, byte i:              7..4: sc[2i + 1]   3..0: sc[2i]
    """
    for block in range(n_blocks):
        at, to = (first_block + block) * 74, block * 256
        d = half_at(data, at)
        for pair in range(8):
            scales = byte_at(data, at + 66 + pair)
            for sub in range(2):
                scale = _scale(d, scales >> 4 * sub & 15)
                for group in range(2):
                    number = 4 * pair + 2 * sub + group
                    q = short_at(data, at + 2 + 2 * number)
                    row, signs = _GRID_XS[np.uintp(q & 511)], EVEN_SIGNS[np.uintp(q >> 9)]
                    put_signed(out, to + 8 * number, row, signs, scale)


@kernel
def decode_iq2_s(data, first_block, n_blocks, out):
    """IQ2_S.

    qs, byte g:      bits 7..0 of the row of group g         signs, byte g: bit j for weight 8g + j
    qh, byte i:      7..6         5..4         3..2         1..0
    bits 9..8 of     group 4i+3   group 4i+2   group 4i+1   group 4i        scales as in IQ2_XS
    """
    for block in range(n_blocks):
        at, to = (first_block + block) * 82, block * 256
        d = half_at(data, at)
        for pair in range(8):
            high, scales = byte_at(data, at + 66 + pair), byte_at(data, at + 74 + pair)
            for sub in range(2):
                scale = _scale(d, scales >> 4 * sub & 15)
                for group in range(2):
                    place = 2 * sub + group
                    qs = at + 2 + 4 * pair + place
                    row = byte_at(data, qs) | (high >> 2 * place & 3) << 8
                    signs = byte_at(data, qs + 32)
                    put_signed(out, to + 32 * pair + 8 * place, _GRID_S[np.uintp(row)], signs, scale)
