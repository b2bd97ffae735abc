"""Q4_0, Q4_1, Q5_0 and Q5_1 under importance weights: searches of 16 blocks side by side.

The square of an error in column c of a row x counts u[c] * sqrt(mean of the row's x^2 + x[c]^2), u the
weights. The searches are those of the K-quants (`k_search`): symmetric for the types with a scale alone,
affine, with 37 guesses after the first, for those with a minimum.
"""

from __future__ import annotations

import numpy as np

from engine.kernels._jit import kernel
from engine.quants.encoders._blocks import (
    importance,
    mean_squares,
    put_fifth_bits,
    put_half,
    put_nibbles,
    take,
)
from engine.quants.encoders._lanes import WIDTH, load, negative, store
from engine.quants.encoders.k_search import search_affine, search_symmetric

_SIZE = 32 * WIDTH
_START, _STEP, _N_STEPS = np.float32(-0.9), np.float32(0.05), 36


@kernel
def encode_weighted(values, weights, has_minimum, has_fifths, out):
    """Blocks of 32: scale, minimum if asked for, fifth bits if asked for, nibbles.

    Args:
        values, weights, out: as `engine.quants.encoders` describes them, with weights.
    """
    flat, to = values.reshape(values.size), out.reshape(out.size)
    n_blocks, per_row = flat.size // 32, values.shape[1] // 32
    buffers, rows = np.empty((4, _SIZE), np.float32), np.empty((3, WIDTH), np.float32)
    x, w, spare, levels = buffers[0], buffers[1], buffers[2], buffers[3]
    scales, minimums, means = rows[0], rows[1], rows[2]
    quads, word = np.empty(8 * WIDTH, np.int32), np.empty(WIDTH, np.int32)
    squares = np.empty(values.shape[0], np.float32)
    mean_squares(values, squares)
    bits_at = 4 if has_minimum else 2
    nibbles_at = bits_at + (4 if has_fifths else 0)
    size, top = nibbles_at + 16, 31 if has_fifths else 15
    for first in range(0, n_blocks, WIDTH):
        last, count = n_blocks - 1, min(WIDTH, n_blocks - first)
        take(flat, 32, 0, first, last, spare, x)
        take(weights, 32, per_row, first, last, spare, w)
        for i in range(WIDTH):
            means[i] = squares[min(first + i, last) // per_row]
        mean = load(means, 0)
        for j in range(0, _SIZE, WIDTH):
            store(w, j, importance(load(w, j), mean, load(x, j)))
        if has_minimum:
            scale, minimum = search_affine(x, w, 0, 32, top, _START, _STEP, _N_STEPS, levels, quads)
            store(minimums, 0, negative(minimum))
        else:
            scale = search_symmetric(x, w, 0, 32, top // 2 + 1, quads)
        store(scales, 0, scale)
        at = size * first
        if has_fifths:
            put_fifth_bits(quads, word, to, at + bits_at, size, count)
        put_nibbles(quads, to, at + nibbles_at, size, count)
        for i in range(count):
            put_half(to, at + size * i, scales[i])
            if has_minimum:
                put_half(to, at + size * i + 2, minimums[i])
