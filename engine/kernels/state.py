"""Keys that were rotated for one position, turned on to another."""

from __future__ import annotations

from engine.kernels._jit import kernel
from engine.kernels.maths import sincos64


@kernel
def turn_keys(x, turns, frequencies, halves):
    """Rotates the first 2 * half features of each head by `turns` positions more, in place.

    Rotations add up: R(p + d) k = R(d) R(p) k, whatever factor k carries. Computed in float64 and rounded
    once. A key that is turned holds other bits than one that was rotated at once; the scores' bits after
    `shift` and `divide` are therefore not those of a sequence that was decoded in place.

    Args:
        x: (n, G, K) float32.
        turns: (n,) int64 positions.
        frequencies: (half,) float64 radians per position.
        halves: pairs are (i, i + half), else (2i, 2i + 1).
    """
    half = frequencies.size
    step, apart = (1, half) if halves else (2, 1)
    for t in range(x.shape[0]):
        if turns[t] == 0:
            continue
        for i in range(half):
            s, c = sincos64(turns[t] * frequencies[i])
            for g in range(x.shape[1]):
                a, b = x[t, g, step * i], x[t, g, step * i + apart]
                x[t, g, step * i] = a * c - b * s
                x[t, g, step * i + apart] = a * s + b * c
