"""What the K-quant encoders have in common: room, weights, halves, rounding, packing; sixteen lanes a row."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from engine.kernels._jit import kernel
from engine.kernels.simd import f32_to_half, half_to_f32
from engine.quants.encoders._lanes import load, select, splat, square_root, store, transpose
from engine.quants.encoders.k_search import clamped, low_byte, nearest

_ZERO = np.float32(0.0)


class Work(NamedTuple):
    """What a kernel works in: flat arrays, sixteen lanes a row, a lane a super-block."""

    x: np.ndarray  # float32, 256 rows: the numbers
    importance: np.ndarray  # float32, 256 rows, of the same columns; not used without weights
    weights: np.ndarray  # float32, 32 rows, of a sub-block
    levels: np.ndarray  # float32, 256 rows, for searches
    scales: np.ndarray  # float32, 16 rows, found for sub-blocks
    mins: np.ndarray  # float32, 16 rows, likewise
    sums: np.ndarray  # float32, 16 rows: sums of the weights of sub-blocks
    codes: np.ndarray  # int32, 64 rows: levels of all numbers, four a lane
    scale_codes: np.ndarray  # int32, 16 rows: whole numbers for the scales
    min_codes: np.ndarray  # int32, 16 rows, for the minimums
    words: np.ndarray  # int32, 64 rows: the blocks, of which a type uses as many words as it has
    rows: np.ndarray  # float32, (16, 256): numbers as they lie in the matrix


@kernel
def new_work():
    """Room for one thread, 80 KB. Rows on lines of the cache: no faster (Zen 4, 2026-11)."""
    f32, i32 = np.float32, np.int32
    return Work(
        np.empty(16 * 256, f32),
        np.empty(16 * 256, f32),
        np.empty(16 * 32, f32),
        np.empty(16 * 256, f32),
        np.empty(16 * 16, f32),
        np.empty(16 * 16, f32),
        np.empty(16 * 16, f32),
        np.empty(16 * 64, i32),
        np.empty(16 * 16, i32),
        np.empty(16 * 16, i32),
        np.empty(16 * 64, i32),
        np.empty(16 * 256, f32),
    )


@kernel
def gather(work, source, starts, count, target):
    """target, 256 rows: 256 numbers of `source` from starts[lane] on; zeros in lanes from `count` on."""
    for lane in range(16):
        for i in range(256):
            work.rows[256 * lane + i] = source[starts[lane] + i] if lane < count else _ZERO
    for i in range(0, 256, 16):
        transpose(work.rows, i, 256, target, 16 * i)


@kernel
def sum_of_squares(x, first, n):
    total = splat(_ZERO)
    for i in range(first, first + n):
        v = load(x, 16 * i)
        total = total + v * v
    return total


@kernel
def weigh(work, sub, n, spread):
    """Weights of a sub-block, importance * root(spread + x^2), and their sum."""
    total = splat(_ZERO)
    for i in range(n):
        v = load(work.x, 16 * (sub * n + i))
        w = load(work.importance, 16 * (sub * n + i)) * square_root(spread + v * v)
        total = total + w
        store(work.weights, 16 * i, w)
    store(work.sums, 16 * sub, total)


@kernel
def span_scales(found, n, top, codes):
    """Whole numbers for n scales, found / d, where d is the largest / top, or 0 if none is positive.

    Returns d. A negative scale gives a negative number.
    """
    zero, full, high = splat(_ZERO), splat(np.float32(top)), splat(_ZERO)
    for i in range(n):
        v = load(found, 16 * i)
        high = select(v > high, v, high)
    inverse = select(high > zero, full / high, zero)
    for i in range(n):
        store(codes, 16 * i, nearest(inverse * load(found, 16 * i)))
    return high / full


@kernel
def as_half(value, floats, ints):
    """Bits of the IEEE half nearest to each number, and its value; row 0 of both arrays is overwritten."""
    store(floats, 0, value)
    for lane in range(16):
        half = f32_to_half(floats[lane])
        ints[lane] = np.int32(half)
        floats[lane] = half_to_f32(half)
    return load(ints, 0), load(floats, 0)


@kernel
def four_bytes(rows, first):
    """The low bytes of four rows in one, the first lowest."""
    low = low_byte(load(rows, 16 * first)) | low_byte(load(rows, 16 * first + 16)) << splat(8)
    high = low_byte(load(rows, 16 * first + 32)) | low_byte(load(rows, 16 * first + 48)) << splat(8)
    return low | high << splat(16)


@kernel
def round_affine(work, sub, n, d, m, top):
    """Levels of a sub-block for w = d * level - m, where d is not 0."""
    kept = d == splat(_ZERO)
    for i in range(sub * n, sub * n + n, 4):
        four = splat(0)
        for j in range(4):
            four = four | clamped(nearest((load(work.x, 16 * (i + j)) + m) / d), 0, top) << splat(8 * j)
        store(work.codes, 4 * i, select(kept, load(work.codes, 4 * i), four))


@kernel
def round_symmetric(work, sub, d, top):
    """Levels of a sub-block of 16 for w = d * (level - top), where d is not 0."""
    kept = d == splat(_ZERO)
    for i in range(sub * 16, sub * 16 + 16, 4):
        four = splat(0)
        for j in range(4):
            code = clamped(nearest(load(work.x, 16 * (i + j)) / d), -top, top - 1) + splat(top)
            four = four | code << splat(8 * j)
        store(work.codes, 4 * i, select(kept, load(work.codes, 4 * i), four))


@kernel
def pack_pairs(codes, words, to):
    """The low two bits of all 256 levels, as the qs of Q2_K and Q3_K, to 16 words from `to` on."""
    mask = splat(0x03030303)
    for k in range(16):
        at = 16 * (k + 24 * (k >> 3))
        low = load(codes, at) & mask | (load(codes, at + 128) & mask) << splat(2)
        high = load(codes, at + 256) & mask | (load(codes, at + 384) & mask) << splat(2)
        store(words, 16 * (to + k), low | high << splat(4))


@kernel
def pack_nibbles(codes, words, to):
    """The low four bits of all 256 levels, as the qs of Q4_K and Q5_K, to 32 words from `to` on."""
    mask = splat(0x0F0F0F0F)
    for k in range(32):
        at = 16 * (k + 8 * (k >> 3))
        store(words, 16 * (to + k), load(codes, at) & mask | (load(codes, at + 128) & mask) << splat(4))
