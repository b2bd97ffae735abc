"""Token rows into token panels."""

from __future__ import annotations

from engine.kernels._jit import kernel
from engine.kernels.tile import NR


@kernel
def embed(rows, width, first, last, out):
    """out[t // NR, d, t % NR] = rows[(t - first) * width + d] for first <= t < last; rows flat float32."""
    for t in range(first, last):
        for d in range(width):
            out[t // NR, d, t % NR] = rows[(t - first) * width + d]
