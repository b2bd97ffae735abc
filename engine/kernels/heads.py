"""What some architectures do to a projection: add a bias, or norm every head. An empty weight means neither.

Called for every model, so that compiling for one compiles for all.
"""

from __future__ import annotations

import numpy as np

from engine.kernels._jit import kernel
from engine.kernels.tile import NR


@kernel
def add_bias(x, bias, first, last):
    """x += bias for panels first <= p < last; x: (P, >= rows, NR) float32, bias: (rows,) float32 or empty."""
    for p in range(first, last):
        for row in range(bias.size):
            for t in range(NR):
                x[p, row, t] += bias[row]


@kernel
def norm_heads(x, n_heads, weight, eps, first, last, sums):
    """RMSNorm over each head's features, in place; x: (P, H * K, NR) float32, weight: (K,) float32 or empty.

    sums: (NR,) float64 scratch. The sum of squares is one float64 chain over K in rising order. Source:
    Dehghani et al. 2023, arXiv:2302.05442, section 2 (norms of queries and keys).
    """
    width = weight.size
    if width == 0:
        return
    for p in range(first, last):
        for h in range(n_heads):
            for t in range(NR):
                sums[t] = 0.0
            for d in range(h * width, (h + 1) * width):
                for t in range(NR):
                    sums[t] += np.float64(x[p, d, t]) * np.float64(x[p, d, t])
            for t in range(NR):
                sums[t] = 1.0 / np.sqrt(sums[t] / width + eps)
            for d in range(width):
                for t in range(NR):
                    x[p, h * width + d, t] = x[p, h * width + d, t] * np.float32(sums[t]) * weight[d]
