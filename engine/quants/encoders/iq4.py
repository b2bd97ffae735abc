"""Encoders of IQ4_NL and IQ4_XS: a nibble chooses one of 16 values. Layouts: `engine.quants.iq4`.

Both try 16 scales for each block of 32, the first with the largest weight on -127, and keep the best: that
with the largest (sum w x v)^2 / (sum w v^2), v the nearest values, w how much an error counts:

    without weights         w = x^2
    with weights u          w = u * sqrt(s + x^2)     s twice the mean x^2 of the block, in IQ4_XS of 256

IQ4_XS rounds the 8 scales of its blocks to 6 bits of the largest. The last step chooses the values anew.
Every sum is one chain of float32, so 16 blocks are searched side by side (`_lanes`). Bytes are libgguf's;
`gguf` has no encoder of either.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from engine.kernels._jit import kernel
from engine.quants.encoders._blocks import importance, inverses, put_half, put_nibbles, take
from engine.quants.encoders._lanes import (
    WIDTH,
    load,
    negative,
    select,
    splat,
    steps_of,
    store,
    to_floats,
)
from engine.quants.encoders.k_search import clamped, farthest, nearest
from engine.quants.iq4 import _VALUES

_MIDDLES = [(low + high) / 2 for low, high in pairwise(_VALUES)]
_value_near = steps_of(_MIDDLES, [float(value) for value in _VALUES])
_code_near = steps_of(_MIDDLES, list(range(16)))

_FIRST = np.float32(-127)
_TRIES = 7  # on either side of the first
_TOO_SMALL = np.float32(1e-15)


@kernel
def _sums(x, w, at, inverse):
    """Sums over 32 of w v x and w v v, v the values nearest to x * inverse."""
    with_x = with_v = splat(np.float32(0))
    for j in range(at, at + 32 * WIDTH, WIDTH):
        weight = load(x, j)
        v = _value_near(inverse * weight)
        part = load(w, j) * v
        with_x = with_x + part * weight
        with_v = with_v + part * v
    return with_x, with_v


@kernel
def _best_scale(x, w, at):
    """Lanes of the scale of 16 blocks of 32 that start at `at` of x and w."""
    zero = splat(np.float32(0))
    largest, size = farthest(x, at // WIDTH, 32)
    scale = negative(largest) / splat(_FIRST)
    with_x, with_v = _sums(x, w, at, splat(np.float32(1)) / scale)
    scale = select(with_v > zero, with_x / with_v, zero)
    best = scale * with_x
    for turn in range(-_TRIES, _TRIES + 1):
        with_x, with_v = _sums(x, w, at, splat(np.float32(turn) + _FIRST) / largest)
        is_better = (with_v > zero) & (with_x * with_x > best * with_v)
        scale = select(is_better, with_x / with_v, scale)
        best = select(is_better, scale * with_x, best)
    return select(size < splat(_TOO_SMALL), zero, scale)


@kernel
def _choose(x, at, inverse, quads):
    """Codes of the values nearest to x * inverse, four a number, as `put_nibbles` wants them."""
    for r in range(8):
        quad = splat(np.int32(0))
        for k in range(4):
            code = _code_near(inverse * load(x, at + WIDTH * (4 * r + k)))
            quad = quad | code << splat(np.int32(8 * k))
        store(quads, WIDTH * r, quad)


@kernel
def _weigh(x, weights, size, modulo, first, last, spare, out):
    """out = how much errors of 16 blocks x of `size` weights count; both (16 * size,) float32."""
    if weights.size == 0:
        for j in range(0, size * WIDTH, WIDTH):
            store(out, j, load(x, j) * load(x, j))
        return
    take(weights, size, modulo, first, last, spare, out)
    total = splat(np.float32(0))
    for j in range(0, size * WIDTH, WIDTH):
        total = total + load(x, j) * load(x, j)
    double_mean = total * splat(np.float32(2) / np.float32(size))
    for j in range(0, size * WIDTH, WIDTH):
        store(out, j, importance(load(out, j), double_mean, load(x, j)))


@kernel
def encode_iq4_nl(values, weights, out):
    """IQ4_NL."""
    flat, to = values.reshape(values.size), out.reshape(out.size)
    n_blocks, per_row = flat.size // 32, values.shape[1] // 32
    x, w, spare = np.empty((3, 32 * WIDTH), np.float32)
    quads, scales = np.empty(8 * WIDTH, np.int32), np.empty(WIDTH, np.float32)
    for first in range(0, n_blocks, WIDTH):
        last, count = n_blocks - 1, min(WIDTH, n_blocks - first)
        take(flat, 32, 0, first, last, spare, x)
        _weigh(x, weights, 32, per_row, first, last, spare, w)
        scale = _best_scale(x, w, 0)
        store(scales, 0, scale)
        _choose(x, 0, inverses(scale), quads)
        put_nibbles(quads, to, 18 * first + 2, 18, count)
        for i in range(count):
            put_half(to, 18 * (first + i), scales[i])


@kernel
def encode_iq4_xs(values, weights, out):
    """IQ4_XS."""
    flat, to = values.reshape(values.size), out.reshape(out.size)
    n_blocks, per_row = flat.size // 256, values.shape[1] // 256
    x, w, spare = np.empty((3, 256 * WIDTH), np.float32)
    quads, scales = np.empty(8 * WIDTH, np.int32), np.empty(8 * WIDTH, np.float32)
    d, steps = np.empty(WIDTH, np.float32), np.empty(8 * WIDTH, np.int32)
    for first in range(0, n_blocks, WIDTH):
        last, count = n_blocks - 1, min(WIDTH, n_blocks - first)
        take(flat, 256, 0, first, last, spare, x)
        _weigh(x, weights, 256, per_row, first, last, spare, w)
        for s in range(8):
            store(scales, WIDTH * s, _best_scale(x, w, 32 * WIDTH * s))
        largest, _ = farthest(scales, 0, 8)
        whole = negative(largest) / splat(np.float32(32))
        store(d, 0, whole)
        per_step = inverses(whole)
        for s in range(8):
            step = clamped(nearest(per_step * load(scales, WIDTH * s)), -32, 31)
            store(steps, WIDTH * s, step + splat(np.int32(32)))
            _choose(x, 32 * WIDTH * s, inverses(whole * to_floats(step)), quads)
            put_nibbles(quads, to, 136 * first + 8 + 16 * s, 136, count)
        for i in range(count):
            at, high = 136 * (first + i), 0
            put_half(to, at, d[i])
            for s in range(8):
                high |= (steps[WIDTH * s + i] >> 4) << 2 * s
            to[at + 2], to[at + 3] = np.uint8(high), np.uint8(high >> 8)
            for s in range(0, 8, 2):
                low = steps[WIDTH * s + i] & 15 | (steps[WIDTH * s + WIDTH + i] & 15) << 4
                to[at + 4 + s // 2] = np.uint8(low)
