"""Exact sums of squares of activations: the same for any order, batch, division among threads or shards.

The square of a float32 is exact in a float64. It is cut into three integers of 44 bits, limbs, by fixed
weights; integers add up without rounding:

    x^2 = l0 + l1 2^-44 + l2 2^-88        0 <= l1, l2 < 2^44; what lies below 2^-88 is dropped

An input's sums are (columns + 1, 3) int64: a row per column, and in the last one, first, the number of values
that do not fit, which are not added: |x| >= 2^22, infinite, or not a number.
"""

from __future__ import annotations

import numpy as np

from engine.kernels._jit import kernel
from engine.kernels.native import floats_at, integers_at
from engine.kernels.tile import NR

LIMBS = 3
LIMB_BITS = 44
LARGEST = 2.0**22
"""Values of this magnitude and above do not fit."""

_SCALE, _MASK = np.float64(2.0**LIMB_BITS), np.int64(2**LIMB_BITS - 1)
_BITS, _TOP = np.int64(LIMB_BITS), np.float64(LARGEST * LARGEST)


@kernel
def add_squares(panel, depth, n_tokens, sums):
    """Adds squares of a panel's first tokens; addresses of float32 (depth, NR), int64 (depth + 1, LIMBS)."""
    x, out = floats_at(panel, depth * NR), integers_at(sums, (depth + 1) * LIMBS)
    bad = np.int64(0)
    for k in range(depth):
        s0, s1, s2 = np.int64(0), np.int64(0), np.int64(0)
        for t in range(n_tokens):
            value = np.float64(x[k * NR + t])
            square = value * value
            fits = square < _TOP
            square = square if fits else np.float64(0.0)
            bad += np.int64(0) if fits else np.int64(1)
            l0 = np.int64(square)
            rest = (square - np.float64(l0)) * _SCALE
            l1 = np.int64(rest)
            s0 += l0
            s1 += l1
            s2 += np.int64((rest - np.float64(l1)) * _SCALE)
        at = k * LIMBS
        s2 += out[at + 2]
        s1 += out[at + 1] + (s2 >> _BITS)
        out[at] += s0 + (s1 >> _BITS)
        out[at + 1], out[at + 2] = s1 & _MASK, s2 & _MASK
    out[depth * LIMBS] += bad
