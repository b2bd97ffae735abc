"""The output head fused with log-sum-exp over vocabulary blocks: no row of logits is ever kept.

A block is HEAD_ROWS vocabulary rows anchored at row 0. Per token and block: the largest logit, then the sum
of exp(logit - maximum) in float64 in rising row order, folded into the running (maximum, sum) of the earlier
blocks.
"""

from __future__ import annotations

import numpy as np

from engine.kernels._jit import kernel
from engine.kernels.maths import exp64, log64
from engine.kernels.matmul import _panel_product, _vectors
from engine.kernels.tile import NR

HEAD_ROWS = 128  # part of the bits

_LOWEST = np.float32(-3.0e38)


@kernel
def gather_columns(x, tokens, width, out):
    """out[i // NR, d, i % NR] = x[t // NR, d, t % NR] for t = tokens[i]: float32 panels, (n,) int64."""
    for i in range(tokens.size):
        t = tokens[i]
        for d in range(width):
            out[i // NR, d, i % NR] = x[t // NR, d, t % NR]


@kernel
def score_block(packed, n_rows, x, row0, first, last, n_tokens, targets, logits, largest, top, total, hit):
    """Folds vocabulary rows [row0, row0 + n_rows) into the running log-sum-exp of panels first <= p < last.

    packed: (HEAD_ROWS / MR, D, MR); x: (P, >= D, NR) float32; targets: (T,) int32 token ids;
    logits: (HEAD_ROWS, NR) float32 and largest: (NR,) float64 scratch; top, total, hit: (P, NR) float64
    state: running maximum, sum of exp(logit - top), and the target's logit.
    """
    depth = packed.shape[1]
    for p in range(first, last):
        source = x.ctypes.data + p * x.shape[1] * NR * 4
        _panel_product(packed, n_rows, depth, source, logits.ctypes.data, _vectors(n_tokens, p))
        for t in range(NR):
            largest[t] = top[p, t]
        for r in range(n_rows):
            for t in range(NR):
                largest[t] = max(largest[t], np.float64(logits[r, t]))
        for t in range(NR):
            total[p, t] *= exp64(top[p, t] - largest[t])
            top[p, t] = largest[t]
            largest[t] = 0.0
        for r in range(n_rows):
            for t in range(NR):
                largest[t] += exp64(np.float64(logits[r, t]) - top[p, t])
        for t in range(NR):
            total[p, t] += largest[t]
        for i in range(p * NR, min(n_tokens, (p + 1) * NR)):
            r = targets[i] - row0
            if 0 <= r < n_rows:
                hit[p, i - p * NR] = logits[r, i - p * NR]


@kernel
def negative_log_likelihoods(top, total, hit, out):
    """out[i] = log(sum of exp(logits)) - target's logit, float64 (n,), from the state of `score_block`."""
    for i in range(out.size):
        p, t = i // NR, i % NR
        out[i] = log64(total[p, t]) + top[p, t] - hit[p, t]


@kernel
def logits_block(packed, n_rows, x, row0, first, last, n_tokens, logits, out):
    """out[i, row0 + r] = logit of vocabulary row row0 + r for token i; the same products as `score_block`."""
    depth = packed.shape[1]
    for p in range(first, last):
        source = x.ctypes.data + p * x.shape[1] * NR * 4
        _panel_product(packed, n_rows, depth, source, logits.ctypes.data, _vectors(n_tokens, p))
        for i in range(p * NR, min(n_tokens, (p + 1) * NR)):
            for r in range(n_rows):
                out[i, row0 + r] = logits[r, i - p * NR]
