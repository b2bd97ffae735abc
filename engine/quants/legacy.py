"""Decoders of ggml's first formats: blocks of 32 weights with a scale (`_0`) or scale and minimum (`_1`).

Offsets in bytes; d and m are IEEE halves, little-endian:

    Q4_0  18 B   d 0..1   qs 2..17                          w = d * (q - 8)
    Q4_1  20 B   d 0..1   m 2..3   qs 4..19                 w = d * q + m
    Q5_0  22 B   d 0..1   qh 2..5   qs 6..21                w = d * (q - 16)
    Q5_1  24 B   d 0..1   m 2..3   qh 4..7   qs 8..23       w = d * q + m
    Q8_0  34 B   d 0..1   q 2..33, signed bytes             w = q * d

    qs, byte i:            7......4 3......0      qh, a 32-bit word: bit j is bit 4 of weight j
    low bits of weight:      i + 16     i

So the low nibbles of 16 bytes are weights 0..15, the high ones 16..31, and each run is contiguous.

Products are exact (11 bits of a half times 8 at most), so the sum is the one rounding and every order of
operations gives the bits of `gguf.quants`. All decoders share one signature, see `engine.quants`.
"""

from __future__ import annotations

import numpy as np

from engine.kernels._jit import kernel
from engine.quants._fields import byte_at, half_at, signed, unsigned, word_at

# Looked up in the loops: a shift by a variable would take 64-bit lanes.
_BIT = np.uint32(1) << np.arange(32, dtype=np.uint32)


@kernel
def _opaque(width, out):
    """`width` in a form that LLVM cannot prove constant.

    LLVM unrolls a short loop of constant length before it vectorizes, and then cannot move loads of `data`
    past stores to `out`: scalar code, 4 times slower. `out` holds a block, so it is never shorter.
    """
    return min(width, out.size)


@kernel
def decode_q4_0(data, first_block, n_blocks, out):
    """Q4_0: d * (q - 8)."""
    width = _opaque(16, out)
    for block in range(n_blocks):
        at, to = (first_block + block) * 18, block * 32
        d = half_at(data, at)
        for i in range(width):
            q = byte_at(data, at + 2 + i)
            out[np.uintp(to + i)] = d * signed((q & 15) - 8)
            out[np.uintp(to + 16 + i)] = d * signed((q >> 4) - 8)


@kernel
def decode_q4_1(data, first_block, n_blocks, out):
    """Q4_1: d * q + m."""
    width = _opaque(16, out)
    for block in range(n_blocks):
        at, to = (first_block + block) * 20, block * 32
        d, m = half_at(data, at), half_at(data, at + 2)
        for i in range(width):
            q = byte_at(data, at + 4 + i)
            out[np.uintp(to + i)] = d * unsigned(q & 15) + m
            out[np.uintp(to + 16 + i)] = d * unsigned(q >> 4) + m


@kernel
def decode_q5_0(data, first_block, n_blocks, out):
    """Q5_0: d * (q - 16)."""
    width = _opaque(16, out)
    for block in range(n_blocks):
        at, to = (first_block + block) * 22, block * 32
        d, high = half_at(data, at), word_at(data, at + 2)
        for i in range(width):
            q = byte_at(data, at + 6 + i)
            h0, h1 = np.uint32(high & _BIT[i]), np.uint32(high & _BIT[16 + i])
            out[np.uintp(to + i)] = d * signed((q & 15 | (16 if h0 else 0)) - 16)
            out[np.uintp(to + 16 + i)] = d * signed((q >> 4 | (16 if h1 else 0)) - 16)


@kernel
def decode_q5_1(data, first_block, n_blocks, out):
    """Q5_1: d * q + m."""
    width = _opaque(16, out)
    for block in range(n_blocks):
        at, to = (first_block + block) * 24, block * 32
        d, m, high = half_at(data, at), half_at(data, at + 2), word_at(data, at + 4)
        for i in range(width):
            q = byte_at(data, at + 8 + i)
            h0, h1 = np.uint32(high & _BIT[i]), np.uint32(high & _BIT[16 + i])
            out[np.uintp(to + i)] = d * signed(q & 15 | (16 if h0 else 0)) + m
            out[np.uintp(to + 16 + i)] = d * signed(q >> 4 | (16 if h1 else 0)) + m


@kernel
def decode_q8_0(data, first_block, n_blocks, out):
    """Q8_0: q * d."""
    width = _opaque(32, out)
    for block in range(n_blocks):
        at, to = (first_block + block) * 34, block * 32
        d = half_at(data, at)
        for i in range(width):
            out[np.uintp(to + i)] = signed(byte_at(data, at + 2 + i)) * d
