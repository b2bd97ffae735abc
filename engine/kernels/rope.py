"""Rotary position embeddings and their scalings.

A pair of features of a head turns by an angle that grows with the position. Which features pair up is the
architecture's choice: neighbours (2i, 2i + 1) as in the paper and GGUF's `llama`, or (i, i + half) as in
GPT-NeoX.
"""

from __future__ import annotations

import numpy as np

from engine.kernels._jit import kernel
from engine.kernels.maths import exp64, log64, sincos64
from engine.kernels.product import lanes_used
from engine.kernels.simd import fma
from engine.kernels.tile import NR

_TURN = 2.0 * np.pi


@kernel
def rope_frequencies(base, factors, scale, yarn, context, beta_fast, beta_slow, out):
    """Radians per position of each pair i, float64 (half,): base^(-i / half) / factors[i], then scaled.

    Linear: times `scale`, so that 1 / scale times the trained positions fit (Chen et al. 2023,
    arXiv:2306.15595); 1 where nothing is scaled. With `yarn`, pairs that turn more than `beta_fast` times
    within the original `context` stay as they are, those that turn less than `beta_slow` times are scaled, a
    ramp lies between (Peng et al. 2023, arXiv:2309.00071, section 3.2; linear in i between whole pairs, as in
    the authors' code). Llama 3.1's scaling (arXiv:2407.21783) comes as `factors`; elsewhere they are ones.
    """
    half = out.size
    log_base = log64(base)
    low = max(np.floor(half * log64(context / (_TURN * beta_fast)) / log_base), 0.0)
    high = min(np.ceil(half * log64(context / (_TURN * beta_slow)) / log_base), 2.0 * half - 1.0)
    for i in range(half):
        frequency = exp64(-log_base * i / half) / factors[i]
        kept = 0.0
        if yarn:
            kept = 1.0 - min(max((i - low) / max(high - low, 0.001), 0.0), 1.0)
        out[i] = frequency * scale * (1.0 - kept) + frequency * kept


def rope_magnitude(factor, log_multiplier):
    """YaRN's attention factor, on cosine and sine: 0.1 ln(factor) + 1 (arXiv:2309.00071, section 3.4).

    `log_multiplier` takes a share of it back, all of it if 1: Mistral's newer files say so.
    """
    log = log64(float(factor))
    return (0.1 * log + 1.0) / (0.1 * log_multiplier * log + 1.0)


@kernel
def rope_table(positions, frequencies, magnitude, cos, sin):
    """magnitude * cos, sin of position * frequency for each pair, in float64, rounded once to float32.

    positions: (T,) int32; frequencies: (half,) float64; cos, sin: (P, half, NR) float32, overwritten for the
    T tokens. Source: Su et al. 2021, arXiv:2104.09864, section 3.2.2.
    """
    for i in range(frequencies.size):
        for t in range(positions.size):
            s, c = sincos64(positions[t] * frequencies[i])
            cos[t // NR, i, t % NR] = c * magnitude
            sin[t // NR, i, t % NR] = s * magnitude


@kernel
def rotate(x, head0, head1, head_width, halves, cos, sin, first, last, n_tokens):
    """Rotates the first 2 * half features of heads head0 <= h < head1 in place, for panels first <= p < last.

    x: (P, H * head_width, NR) float32; cos, sin: (P, half, NR). Pairs are (i, i + half)
    where `halves`, else (2i, 2i + 1).
    """
    half = cos.shape[1]
    step, apart = (1, half) if halves else (2, 1)
    for p in range(first, last):
        lanes = lanes_used(n_tokens, p)
        for h in range(head0, head1):
            for i in range(half):
                row = h * head_width + step * i
                other = row + apart
                for t in range(lanes):
                    a, b, c, s = x[p, row, t], x[p, other, t], cos[p, i, t], sin[p, i, t]
                    x[p, row, t] = fma(a, c, -(b * s))
                    x[p, other, t] = fma(a, s, b * c)
