"""Rotary position embeddings in GGUF's `llama` layout: neighbouring features (2i, 2i + 1) form a pair."""

from __future__ import annotations

from engine.kernels._jit import kernel
from engine.kernels.maths import exp64, log64, sincos64
from engine.kernels.simd import fma
from engine.kernels.tile import NR


@kernel
def rope_table(positions, base, cos, sin):
    """cos, sin of position * base^(-i / half) for each pair i, in float64, rounded once to float32.

    positions: (T,) int32; cos, sin: (P, half, NR) float32, overwritten for the T tokens.
    Source: Su et al. 2021, arXiv:2104.09864, section 3.2.2.
    """
    half = cos.shape[1]
    for i in range(half):
        frequency = exp64(-log64(base) * i / half)
        for t in range(positions.size):
            s, c = sincos64(positions[t] * frequency)
            cos[t // NR, i, t % NR] = c
            sin[t // NR, i, t % NR] = s


@kernel
def rotate(x, n_heads, head_width, cos, sin, first, last):
    """Rotates the first 2 * half features of every head in place; x: (P, H * head_width, NR) float32."""
    half = cos.shape[1]
    for p in range(first, last):
        for h in range(n_heads):
            for i in range(half):
                row = h * head_width + 2 * i
                for t in range(NR):
                    a, b, c, s = x[p, row, t], x[p, row + 1, t], cos[p, i, t], sin[p, i, t]
                    x[p, row, t] = fma(a, c, -(b * s))
                    x[p, row + 1, t] = fma(a, s, b * c)
