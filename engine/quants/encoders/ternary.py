"""Encoders of TQ1_0 and TQ2_0: 256 weights of -1, 0 or 1 times one scale. Layouts: `engine.quants.ternary`.

The scale is the largest |x|, and a weight becomes the nearest of the three, halves away from zero; where the
scale's reciprocal overflows, all become 0. Importance weights count for nothing. Bytes are libgguf's and
`gguf`'s.
"""

from __future__ import annotations

import numpy as np

from engine.kernels._jit import kernel
from engine.quants.encoders._blocks import inverse_of, put_half, put_word, upper
from engine.quants.encoders._lanes import largest_of, load, magnitude, splat, store
from engine.quants.encoders.legacy import rounded


@kernel
def _scale(x, at):
    """The largest size of 256 numbers."""
    size = magnitude(load(x, at))
    for j in range(16, 256, 16):
        size = upper(magnitude(load(x, at + j)), size)
    return largest_of(size)


@kernel
def _trits(x, at, inverse):
    """0, 1 or 2 for 16 numbers, in the low byte."""
    return rounded(load(x, at) * inverse) + splat(np.int32(1))


@kernel
def _fraction(number):
    """ceil(256 / 243 * number) of numbers of five digits in base 3: digits then come off the top."""
    raised = (number << splat(np.int32(8))) + splat(np.int32(242))
    return raised * splat(np.int32(69043)) >> splat(np.int32(24))  # raised / 243, right for all 243 numbers


@kernel
def encode_tq1_0(values, weights, out):
    """TQ1_0."""
    x, to = values.reshape(values.size), out.reshape(out.size)
    digits = np.empty(16, np.int32)
    three, byte = splat(np.int32(3)), splat(np.int32(255))
    for block in range(x.size // 256):
        first, at = 256 * block, 54 * block
        d = _scale(x, first)
        inverse = splat(inverse_of(d))
        for row in range(3):  # bytes 0..15, 16..31 and 32..47
            start, step = (first + 16 * row, 32) if row < 2 else (first + 160, 16)
            number = _trits(x, start, inverse) & byte
            for k in range(1, 5):
                number = number * three + (_trits(x, start + k * step, inverse) & byte)
            store(to, at + 16 * row, _fraction(number))
        store(digits, 0, _trits(x, first + 240, inverse) & byte)
        word = np.uint32(0)
        for i in range(4):
            number = ((digits[i] * 3 + digits[4 + i]) * 3 + digits[8 + i]) * 3 + digits[12 + i]
            word |= np.uint32((number * 3 * 256 + 242) // 243) << 8 * i
        put_word(to, at + 48, word)
        put_half(to, at + 52, d)


@kernel
def encode_tq2_0(values, weights, out):
    """TQ2_0."""
    x, to = values.reshape(values.size), out.reshape(out.size)
    three = splat(np.int32(3))
    for block in range(x.size // 256):
        first, at = 256 * block, 66 * block
        d = _scale(x, first)
        inverse = splat(inverse_of(d))
        for row in range(4):
            start = first + 128 * (row // 2) + 16 * (row % 2)
            packed = _trits(x, start, inverse) & three
            for k in range(1, 4):
                packed = packed | (_trits(x, start + 32 * k, inverse) & three) << splat(np.int32(2 * k))
            store(to, at + 16 * row, packed)
        put_half(to, at + 64, d)
