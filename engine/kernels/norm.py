"""Residual addition and RMSNorm over token panels."""

from __future__ import annotations

import numpy as np

from engine.kernels._jit import kernel
from engine.kernels.tile import NR


@kernel
def add_rms_norm(x, delta, weight, eps, first, last, sums, out):
    """x += delta; out = x / sqrt(mean over D of x^2 + eps) * weight, for panels first <= p < last.

    x, delta, out: (P, >= D, NR) float32, `out` may be `delta`; weight: (D,) float32; sums: (NR,) float64
    scratch. The sum of squares is one float64 chain over D in rising order. Source: Zhang and Sennrich 2019,
    arXiv:1910.07467.
    """
    width = weight.size
    for p in range(first, last):
        for t in range(NR):
            sums[t] = 0.0
        for d in range(width):
            for t in range(NR):
                value = x[p, d, t] + delta[p, d, t]
                x[p, d, t] = value
                sums[t] += np.float64(value) * np.float64(value)
        for t in range(NR):
            sums[t] = 1.0 / np.sqrt(sums[t] / width + eps)
        for d in range(width):
            for t in range(NR):
                out[p, d, t] = x[p, d, t] * np.float32(sums[t]) * weight[d]
