"""Blocks into lanes and back: what the encoders share around `_lanes`.

Of n_rows rows of whole blocks the blocks are numbered through, whichever row they are in; the searching
encoders take 16 of them at a time, and in the last turn the last one several times.
"""

from __future__ import annotations

import numpy as np

from engine.kernels._jit import kernel
from engine.kernels.simd import f32_to_half
from engine.quants.encoders._lanes import (
    WIDTH,
    load,
    select,
    splat,
    square_root,
    store,
    transpose,
)


@kernel
def put_half(out, at, value):
    """Writes a float32 as the IEEE half of bytes at, at + 1, low one first."""
    half = f32_to_half(np.float32(value))
    out[np.uintp(at)] = np.uint8(half)
    out[np.uintp(at + 1)] = np.uint8(half >> 8)


@kernel
def inverse_of(d):
    """float32 1 / d, and 0 where that is infinite."""
    inverse = np.float32(1) / d
    return inverse if abs(inverse) < np.float32(np.inf) else np.float32(0)


@kernel
def lower(a, b):
    """Lane by lane the smaller of two, `b` if they are equal."""
    return select(a < b, a, b)


@kernel
def upper(a, b):
    """Lane by lane the larger of two, `b` if they are equal."""
    return select(a > b, a, b)


@kernel
def inverses(d):
    """Lanes of 1 / d, and 0 of 0."""
    zero = splat(np.float32(0))
    return select(d == zero, zero, splat(np.float32(1)) / d)


@kernel
def take(source, size, modulo, first, last, spare, target):
    """target[16 j + i] = element j of block min(first + i, last) of `source`, for 16 blocks i.

    Args:
        size: of a block; a multiple of 16.
        modulo: blocks in `source` where it is to be read again and again, as weights are, else 0.
        spare: (>= 16 * size,) float32.
        target: (>= 16 * size,) float32.
    """
    if modulo == 0 and first + WIDTH - 1 <= last:
        for j in range(0, size, WIDTH):
            transpose(source, first * size + j, size, target, WIDTH * j)
        return
    for i in range(WIDTH):
        block = min(first + i, last)
        start = (block % modulo if modulo > 0 else block) * size
        for j in range(0, size, WIDTH):
            store(spare, size * i + j, load(source, start + j))
    for j in range(0, size, WIDTH):
        transpose(spare, j, size, target, WIDTH * j)


@kernel
def put_word(out, at, word):
    """Writes four bytes, low one first."""
    for k in range(4):
        out[np.uintp(at + k)] = np.uint8(word >> 8 * k)


@kernel
def put_nibbles(quads, out, at, stride, count):
    """Packs the low four bits of 32 codes of 16 blocks; those of block i < count go to out[at + stride * i].

    Args:
        quads: (128,) int32, overwritten; four codes a number, the first in its low byte: codes 4 r .. 4 r + 3
            of block i are quads[16 r + i].
    """
    nibbles, shift = splat(np.int32(0x0F0F0F0F)), splat(np.int32(4))
    for r in range(4):
        low, high = load(quads, WIDTH * r), load(quads, WIDTH * (r + 4))
        store(quads, WIDTH * r, (low & nibbles) | (high & nibbles) << shift)
    for i in range(count):
        for r in range(4):
            put_word(out, at + stride * i + 4 * r, quads[np.uintp(WIDTH * r + i)])


@kernel
def put_fifth_bits(quads, spare, out, at, stride, count):
    """Writes bit 4 of the same 32 codes as one word a block, the first code's lowest; spare (16,) int32."""
    bits, row = splat(np.int32(0)), splat(np.int32(15))
    ones = splat(np.int32(0x01010101))
    for r in range(8):
        apart = load(quads, WIDTH * r) >> splat(np.int32(4)) & ones
        pairs = apart | apart >> splat(np.int32(7))
        four = (pairs | pairs >> splat(np.int32(14))) & row
        bits = bits | four << splat(np.int32(4 * r))
    store(spare, 0, bits)
    for i in range(count):
        put_word(out, at + stride * i, spare[np.uintp(i)])


@kernel
def mean_squares(values, out):
    """out[r] = (sum of the squares of row r, added one by one) / columns.

    Args:
        values: (n_rows, columns) float32, columns a multiple of 16.
        out: (n_rows,) float32.
    """
    n_rows, columns = values.shape
    x = values.reshape(values.size)
    spare, squares = np.empty(WIDTH * WIDTH, np.float32), np.empty(WIDTH * WIDTH, np.float32)
    sums = np.empty(WIDTH, np.float32)
    for first in range(0, n_rows, WIDTH):
        total = splat(np.float32(0))
        for column in range(0, columns, WIDTH):
            for i in range(WIDTH):
                row = min(first + i, n_rows - 1)
                store(spare, WIDTH * i, load(x, row * columns + column))
            transpose(spare, 0, WIDTH, squares, 0)
            for j in range(0, WIDTH * WIDTH, WIDTH):
                lane = load(squares, j)
                total = total + lane * lane
        store(sums, 0, total)
        for i in range(min(WIDTH, n_rows - first)):
            out[first + i] = sums[i] / np.float32(columns)


@kernel
def importance(weights, mean_square, x):
    """Lanes of weights * sqrt(mean_square + x^2), as ggml weighs errors with an importance matrix."""
    return weights * square_root(mean_square + x * x)
