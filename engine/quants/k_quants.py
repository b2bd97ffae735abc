"""Decoders of the K-quants: super-blocks of 256 weights, whose sub-blocks have small integer scales.

Offsets in bytes; d and dmin are IEEE halves, little-endian. s is the sub-block of the weight:

    Q2_K   84 B   scales 0..15   qs 16..79   d 80..81   dmin 82..83          w = d * sc[s] * q - dmin * mn[s]
    Q3_K  110 B   hmask 0..31   qs 32..95   scales 96..107   d 108..109      w = d * (sc[s] - 32) * (q - 4)
    Q4_K  144 B   d 0..1   dmin 2..3   scales 4..15   qs 16..143             w = d * sc[s] * q - dmin * mn[s]
    Q5_K  176 B   d 0..1   dmin 2..3   scales 4..15   qh 16..47   qs 48..175 w = d * sc[s] * q - dmin * mn[s]
    Q6_K  210 B   ql 0..127   qh 128..191   scales 192..207   d 208..209     w = d * sc[s] * (q - 32)

Sub-blocks are 16 weights in Q2_K, Q3_K and Q6_K, 32 in Q4_K and Q5_K; the scales of Q6_K are signed bytes.
Products are exact in float32 (11 bits of a half, 7 of a scale and 5 of a weight at most), so the subtraction
is the one rounding and every order of operations gives the bits of `gguf.quants`. All decoders share one
signature, see `engine.quants`.

Inner loops run over 16 or 32 bytes and write each bit field of a byte to its own contiguous run of weights,
so that LLVM vectorizes them; what differs between the runs (scales, masks) is hoisted.
"""

from __future__ import annotations

import numpy as np

from engine.kernels._jit import kernel
from engine.quants._fields import byte_at, field_if, half_at, signed, unsigned


@kernel
def decode_q2_k(data, first_block, n_blocks, out):
    """Q2_K.

    Two halves of 128 weights, each of 32 bytes of qs: four bit pairs a byte, 32 weights apart.

        qs, byte 32 * half + i:   7..6  5..4  3..2  1..0
        weight 128 * half +       i+96  i+64  i+32   i        sub-block s: weights 16 * s .. 16 * s + 15
        scales, byte s:           mn[s] in bits 7..4, sc[s] in bits 3..0
    """
    for block in range(n_blocks):
        at, to = (first_block + block) * 84, block * 256
        d, dmin = half_at(data, at + 80), half_at(data, at + 82)
        for group in range(4):  # 16 bytes of qs: half = group // 2, i = 16 * (group % 2) ..
            sub = 8 * (group >> 1) + (group & 1)
            s0, s1 = byte_at(data, at + sub), byte_at(data, at + sub + 2)
            s2, s3 = byte_at(data, at + sub + 4), byte_at(data, at + sub + 6)
            d0, m0 = d * unsigned(s0 & 15), dmin * unsigned(s0 >> 4)
            d1, m1 = d * unsigned(s1 & 15), dmin * unsigned(s1 >> 4)
            d2, m2 = d * unsigned(s2 & 15), dmin * unsigned(s2 >> 4)
            d3, m3 = d * unsigned(s3 & 15), dmin * unsigned(s3 >> 4)
            qs, w = at + 16 + 16 * group, to + 16 * sub
            for i in range(16):
                q = byte_at(data, qs + i)
                out[np.uintp(w + i)] = d0 * unsigned(q & 3) - m0
                out[np.uintp(w + 32 + i)] = d1 * unsigned(q >> 2 & 3) - m1
                out[np.uintp(w + 64 + i)] = d2 * unsigned(q >> 4 & 3) - m2
                out[np.uintp(w + 96 + i)] = d3 * unsigned(q >> 6) - m3


@kernel
def _scale_q3_k(data, scales, sub):
    """Scale of a sub-block of Q3_K, -32..31."""
    low = byte_at(data, scales + (sub & 7)) >> (sub >> 3 << 2) & 15
    high = byte_at(data, scales + 8 + (sub & 3)) >> (sub >> 2 << 1) & 3
    return signed((low | high << 4) - 32)


@kernel
def decode_q3_k(data, first_block, n_blocks, out):
    """Q3_K.

    qs as in Q2_K; bit 2 of a weight is in hmask, and its weight is subtracted where the bit is clear.

        hmask, byte i:    7      6      5      4      3     2     1    0
        bit 2 of weight  i+224  i+192  i+160  i+128  i+96  i+64  i+32  i
        scales, low 4 bits of sub-block s:   byte s % 8, bits 3..0 for s < 8, bits 7..4 for the others
                high 2 bits of sub-block s:  byte 8 + s % 4, bits 2 * (s // 4) and up
    """
    for block in range(n_blocks):
        at, to = (first_block + block) * 110, block * 256
        d = half_at(data, at + 108)
        for group in range(4):  # 16 bytes of qs: half = group // 2, i = 16 * (group % 2) ..
            half, sub = group >> 1, 8 * (group >> 1) + (group & 1)
            d0, d1 = d * _scale_q3_k(data, at + 96, sub), d * _scale_q3_k(data, at + 96, sub + 2)
            d2, d3 = d * _scale_q3_k(data, at + 96, sub + 4), d * _scale_q3_k(data, at + 96, sub + 6)
            qs, hmask, w = at + 32 + 16 * group, at + 16 * (group & 1), to + 16 * sub
            h0, h1 = np.uint8(1 << 4 * half), np.uint8(2 << 4 * half)
            h2, h3 = np.uint8(4 << 4 * half), np.uint8(8 << 4 * half)
            for i in range(16):
                q = byte_at(data, qs + i)
                h = byte_at(data, hmask + i)
                out[np.uintp(w + i)] = d0 * signed((q & 3 | field_if(h, h0, 4)) - 4)
                out[np.uintp(w + 32 + i)] = d1 * signed((q >> 2 & 3 | field_if(h, h1, 4)) - 4)
                out[np.uintp(w + 64 + i)] = d2 * signed((q >> 4 & 3 | field_if(h, h2, 4)) - 4)
                out[np.uintp(w + 96 + i)] = d3 * signed((q >> 6 | field_if(h, h3, 4)) - 4)


@kernel
def _scale_min_k4(data, scales, sub):
    """Scale and minimum, 0..63 each, of a sub-block of Q4_K or Q5_K.

    scales, byte j and bits:      7..6                 5..0             (j < 4)
        j                         sc[j + 4] bits 5..4  sc[j]
        j + 4                     mn[j + 4] bits 5..4  mn[j]
        j + 8                     7..4: mn[j + 4] bits 3..0    3..0: sc[j + 4] bits 3..0
    """
    a, b = byte_at(data, scales + (sub & 3)), byte_at(data, scales + 4 + (sub & 3))
    c = byte_at(data, scales + 8 + (sub & 3))
    if sub < 4:
        return unsigned(a & 63), unsigned(b & 63)
    return unsigned(c & 15 | a >> 6 << 4), unsigned(c >> 4 | b >> 6 << 4)


@kernel
def decode_q4_k(data, first_block, n_blocks, out):
    """Q4_K.

    Four runs of 32 bytes of qs, 64 weights each; sub-block s is weights 32 * s .. 32 * s + 31.

        qs, byte 32 * run + i:    7....4  3....0
        weight 64 * run +          i+32     i
    """
    for block in range(n_blocks):
        at, to = (first_block + block) * 144, block * 256
        d, dmin = half_at(data, at), half_at(data, at + 2)
        for run in range(4):
            sc0, mn0 = _scale_min_k4(data, at + 4, 2 * run)
            sc1, mn1 = _scale_min_k4(data, at + 4, 2 * run + 1)
            d0, m0, d1, m1 = d * sc0, dmin * mn0, d * sc1, dmin * mn1
            qs, w = at + 16 + 32 * run, to + 64 * run
            for i in range(32):
                q = byte_at(data, qs + i)
                out[np.uintp(w + i)] = d0 * unsigned(q & 15) - m0
                out[np.uintp(w + 32 + i)] = d1 * unsigned(q >> 4) - m1


@kernel
def decode_q5_k(data, first_block, n_blocks, out):
    """Q5_K.

    Scales and qs as in Q4_K; bit s of qh's byte i is bit 4 of weight 32 * s + i.
    """
    for block in range(n_blocks):
        at, to = (first_block + block) * 176, block * 256
        d, dmin = half_at(data, at), half_at(data, at + 2)
        for run in range(4):
            sc0, mn0 = _scale_min_k4(data, at + 4, 2 * run)
            sc1, mn1 = _scale_min_k4(data, at + 4, 2 * run + 1)
            d0, m0, d1, m1 = d * sc0, dmin * mn0, d * sc1, dmin * mn1
            qs, w = at + 48 + 32 * run, to + 64 * run
            h0, h1 = np.uint8(1 << 2 * run), np.uint8(2 << 2 * run)
            for i in range(32):
                q = byte_at(data, qs + i)
                h = byte_at(data, at + 16 + i)
                out[np.uintp(w + i)] = d0 * signed(q & 15 | field_if(h, h0, 16)) - m0
                out[np.uintp(w + 32 + i)] = d1 * signed(q >> 4 | field_if(h, h1, 16)) - m1


@kernel
def decode_q6_k(data, first_block, n_blocks, out):
    """Q6_K.

    Two halves of 128 weights, each 64 bytes of ql and 32 of qh; sub-block s is weights 16 * s .. 16 * s + 15.

        ql, byte 64 * half + i:        7....4 3....0       ql, byte 64 * half + 32 + i:   7....4 3....0
        low bits, weight 128 * half +   i+64    i                                          i+96   i+32
        qh, byte 32 * half + i:        7..6  5..4  3..2  1..0
        bits 5..4, weight 128 * half + i+96  i+64  i+32   i
    """
    for block in range(n_blocks):
        at, to = (first_block + block) * 210, block * 256
        d = half_at(data, at + 208)
        for group in range(4):  # 16 of the 32 values of i: half = group // 2, i = 16 * (group % 2) ..
            sub = 8 * (group >> 1) + (group & 1)
            scales = at + 192 + sub
            d0 = d * signed(byte_at(data, scales))
            d1 = d * signed(byte_at(data, scales + 2))
            d2 = d * signed(byte_at(data, scales + 4))
            d3 = d * signed(byte_at(data, scales + 6))
            ql, qh, w = at + 64 * (group >> 1) + 16 * (group & 1), at + 128 + 16 * group, to + 16 * sub
            for i in range(16):
                a, b, h = byte_at(data, ql + i), byte_at(data, ql + 32 + i), byte_at(data, qh + i)
                out[np.uintp(w + i)] = d0 * signed((a & 15 | (h & 3) << 4) - 32)
                out[np.uintp(w + 32 + i)] = d1 * signed((b & 15 | (h & 12) << 2) - 32)
                out[np.uintp(w + 64 + i)] = d2 * signed((a >> 4 | h & 48) - 32)
                out[np.uintp(w + 96 + i)] = d3 * signed((b >> 4 | (h & 192) >> 2) - 32)
