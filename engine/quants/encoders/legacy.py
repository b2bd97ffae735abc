"""Encoders of Q8_0, Q4_0, Q4_1, Q5_0 and Q5_1: blocks of 32. Layouts: `engine.quants.legacy`.

Without weights a block is rounded by its scale d, or rather its reciprocal, before that becomes a half:

    Q8_0         d = largest |x| / 127            q = x / d, halves away from zero
    Q4_0, Q5_0   d = x of largest size / -8, -16  q = x / d + 8.5, 16.5, cut      (of two such x the first)
    Q4_1, Q5_1   d = (max - min) / 15, 31         q = (x - min) / d + 0.5, cut    m = min

A reciprocal that overflows, of d below 2.9e-39, makes every q 0. With weights all but Q8_0 search:
`_searches`. Bytes are libgguf's; those of `gguf` 0.19 differ in the sign of a zero, d or m.
"""

from __future__ import annotations

import numpy as np

from engine.kernels._jit import kernel
from engine.quants.encoders._blocks import inverse_of, lower, put_half, take, upper
from engine.quants.encoders._lanes import (
    WIDTH,
    bits_of,
    bits_of_mask,
    cut,
    from_bits,
    largest_of,
    load,
    magnitude,
    select,
    splat,
    store,
)
from engine.quants.encoders._searches import encode_weighted
from engine.quants.encoders.k_search import farthest

_SIZE = 32 * WIDTH
_SIGN = np.int32(-(2**31))
_BELOW_HALF = np.float32(0.49999997)  # the float32 before 0.5: what is cut then, rounds halves away from zero


@kernel
def rounded(lanes):
    """Nearest whole numbers of floats below 2^23, halves away from zero."""
    half = from_bits((bits_of(lanes) & splat(_SIGN)) | bits_of(splat(_BELOW_HALF)))
    return cut(lanes + half)


@kernel
def encode_q8_0(values, weights, out):
    """Q8_0."""
    x, to = values.reshape(values.size), out.reshape(out.size)
    for block in range(x.size // 32):
        low, high, at = load(x, 32 * block), load(x, 32 * block + 16), 34 * block
        d = largest_of(upper(magnitude(low), magnitude(high))) / np.float32(127)
        inverse = splat(inverse_of(d))
        put_half(to, at, d)
        store(to, at + 2, rounded(low * inverse))
        store(to, at + 18, rounded(high * inverse))


@kernel
def _put_codes(low, high, top, has_fifths, out, at):
    """Clips 32 codes to `top`, writes their fifth bits if asked for and their nibbles behind."""
    low, high = lower(low, splat(np.int32(top))), lower(high, splat(np.int32(top)))
    if has_fifths:
        bit, zero = splat(np.int32(16)), splat(np.int32(0))
        for half, codes in enumerate((low, high)):
            bits = bits_of_mask((codes & bit) > zero)
            out[np.uintp(at + 2 * half)] = np.uint8(bits)
            out[np.uintp(at + 2 * half + 1)] = np.uint8(bits >> 8)
        at += 4
    nibble = splat(np.int32(15))
    store(out, at, (low & nibble) | (high & nibble) << splat(np.int32(4)))


@kernel
def _encode_symmetric(values, n, size, out):
    """Q4_0 and Q5_0, n half their number of codes, size their bytes a block."""
    x, to = values.reshape(values.size), out.reshape(out.size)
    n_blocks, zero = x.size // 32, splat(np.float32(0))
    spare, blocks = np.empty(_SIZE, np.float32), np.empty(_SIZE, np.float32)
    rows = np.empty((3, WIDTH), np.float32)
    scales, inverses, offsets = rows[0], rows[1], rows[2]
    for first in range(0, n_blocks, WIDTH):
        take(x, 32, 0, first, n_blocks - 1, spare, blocks)
        largest, _ = farthest(blocks, 0, 32)
        d = largest / splat(np.float32(-n))
        store(scales, 0, d)
        inverse = splat(np.float32(1)) / d
        is_finite = magnitude(inverse) < splat(np.float32(np.inf))
        store(inverses, 0, select(is_finite, inverse, zero))
        store(offsets, 0, select(is_finite | (d == zero), splat(np.float32(n) + np.float32(0.5)), zero))
        for i in range(min(WIDTH, n_blocks - first)):
            start, at = 32 * (first + i), size * (first + i)
            inverse, offset = splat(inverses[i]), splat(offsets[i])
            low, high = load(x, start) * inverse + offset, load(x, start + 16) * inverse + offset
            put_half(to, at, scales[i])
            _put_codes(cut(low), cut(high), 2 * n - 1, n == 16, to, at + 2)


@kernel
def _encode_from_minimum(values, top, size, out):
    """Q4_1 and Q5_1, top their largest code, size their bytes a block."""
    x, to = values.reshape(values.size), out.reshape(out.size)
    n_blocks, zero, half = x.size // 32, splat(np.float32(0)), splat(np.float32(0.5))
    infinite = splat(np.float32(np.inf))
    spare, blocks = np.empty(_SIZE, np.float32), np.empty(_SIZE, np.float32)
    rows = np.empty((4, WIDTH), np.float32)
    scales, inverses, minimums, shifts = rows[0], rows[1], rows[2], rows[3]
    for first in range(0, n_blocks, WIDTH):
        take(x, 32, 0, first, n_blocks - 1, spare, blocks)
        least = most = load(blocks, 0)
        for j in range(WIDTH, _SIZE, WIDTH):
            least, most = lower(load(blocks, j), least), upper(load(blocks, j), most)
        d = (most - least) / splat(np.float32(top))
        inverse = splat(np.float32(1)) / d
        store(scales, 0, d)
        store(minimums, 0, least)
        store(inverses, 0, select(inverse < infinite, inverse, zero))
        store(shifts, 0, select(d < infinite, least, zero))  # a range that overflows makes every q 0 too
        for i in range(min(WIDTH, n_blocks - first)):
            start, at = 32 * (first + i), size * (first + i)
            shift, inverse = splat(shifts[i]), splat(inverses[i])
            low, high = load(x, start) - shift, load(x, start + 16) - shift
            put_half(to, at, scales[i])
            put_half(to, at + 2, minimums[i])
            low, high = low * inverse + half, high * inverse + half
            _put_codes(cut(low), cut(high), top, top == 31, to, at + 4)


@kernel
def encode_q4_0(values, weights, out):
    """Q4_0."""
    if weights.size > 0:
        encode_weighted(values, weights, False, False, out)
    else:
        _encode_symmetric(values, 8, 18, out)


@kernel
def encode_q4_1(values, weights, out):
    """Q4_1."""
    if weights.size > 0:
        encode_weighted(values, weights, True, False, out)
    else:
        _encode_from_minimum(values, 15, 20, out)


@kernel
def encode_q5_0(values, weights, out):
    """Q5_0."""
    if weights.size > 0:
        encode_weighted(values, weights, False, True, out)
    else:
        _encode_symmetric(values, 16, 22, out)


@kernel
def encode_q5_1(values, weights, out):
    """Q5_1."""
    if weights.size > 0:
        encode_weighted(values, weights, True, True, out)
    else:
        _encode_from_minimum(values, 31, 24, out)
