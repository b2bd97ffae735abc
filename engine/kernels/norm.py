"""Residual addition and RMSNorm over token panels, and over the heads of a projection."""

from __future__ import annotations

import numpy as np

from engine.kernels._jit import kernel
from engine.kernels.native import doubles_at
from engine.kernels.product import SUMS, lanes_used
from engine.kernels.tile import LANES, NR


@kernel
def add_rms_norm(x, delta, weight, eps, first, last, n_tokens, work, out):
    """x += delta; out = x / sqrt(mean over D of x^2 + eps) * weight, for panels first <= p < last.

    x, delta, out: (P, >= D, NR) float32, `out` may be `delta`; weight: (D,) float32. The sum of squares is
    one float64 chain over D in rising order. Source: Zhang and Sennrich 2019, arXiv:1910.07467.
    """
    width, sums = weight.size, doubles_at(work[SUMS], NR)
    for p in range(first, last):
        lanes = lanes_used(n_tokens, p)
        for t in range(lanes):
            sums[t] = 0.0
        for d in range(width):
            for v in range(0, lanes, LANES):
                for t in range(v, v + LANES):
                    value = x[p, d, t] + delta[p, d, t]
                    x[p, d, t] = value
                    sums[t] += np.float64(value) * np.float64(value)
        for t in range(lanes):
            sums[t] = 1.0 / np.sqrt(sums[t] / width + eps)
        for d in range(width):
            for v in range(0, lanes, LANES):
                for t in range(v, v + LANES):
                    out[p, d, t] = x[p, d, t] * np.float32(sums[t]) * weight[d]


@kernel
def norm_heads(x, head0, head1, weight, eps, first, last, n_tokens, work):
    """RMSNorm over each head's features, in place, for heads head0 <= h < head1 of panels first <= p < last.

    x: (P, H * K, NR) float32; weight: (K,) float32, or empty where nothing is normed. The sum of squares is
    one float64 chain over K in rising order. Source: Dehghani et al. 2023, arXiv:2302.05442,
    section 2 (norms of queries and keys).
    """
    width = weight.size
    if width == 0:
        return
    sums = doubles_at(work[SUMS], NR)
    for p in range(first, last):
        lanes = lanes_used(n_tokens, p)
        for h in range(head0, head1):
            for t in range(lanes):
                sums[t] = 0.0
            for d in range(h * width, (h + 1) * width):
                for t in range(lanes):
                    sums[t] += np.float64(x[p, d, t]) * np.float64(x[p, d, t])
            for t in range(lanes):
                sums[t] = 1.0 / np.sqrt(sums[t] / width + eps)
            for d in range(width):
                for t in range(lanes):
                    x[p, h * width + d, t] = x[p, h * width + d, t] * np.float32(sums[t]) * weight[d]
