"""The output head fused with log-sum-exp over vocabulary blocks: no row of logits is ever kept.

A block is HEAD_ROWS vocabulary rows anchored at row 0. Per token and block: the largest logit, then the sum
of exp(logit - maximum) in float64 in rising row order, folded into the running (maximum, sum) of the earlier
blocks.
"""

from __future__ import annotations

import numpy as np

from engine.kernels._jit import kernel
from engine.kernels.maths import exp64, log64
from engine.kernels.native import doubles_at, floats_at, ticks
from engine.kernels.product import (
    COLUMNS,
    FEW_STRIPS,
    HEAD,
    MULTIPLY,
    PACKS,
    PRODUCT,
    ROWS,
    SUMS,
    WIDTH8,
    enter,
    few_product,
    gather_few,
    lanes_used,
    meet_all,
    own_panels,
    own_part,
    spend,
    strips_product,
    takes_few,
    unpack,
)
from engine.kernels.tile import NR, STRIP

HEAD_ROWS = 128  # part of the bits; whole strips

LOWEST = np.float64(-3.0e38)  # below every logit


@kernel
def score(m, x, share, targets, work, top, total, out):
    """out[i] = log(sum over the vocabulary of exp(logits)) - logit of targets[i], for this thread's panels.

    m: (FIELDS,) int64, the head; x: (P, >= D, NR) float32; targets: (T,) int32; top, total: (P, NR) float64
    scratch; out: (T,) float64, nats.
    """
    n_tokens = share.n_tokens
    enter(x, m, share, work)
    logits, largest = floats_at(work[PRODUCT], HEAD_ROWS * NR), doubles_at(work[SUMS], NR)
    for p in range(share.first, share.last):
        for t in range(NR):
            top[p, t], total[p, t] = LOWEST, 0.0
    for row0 in range(0, m[ROWS], HEAD_ROWS):
        n_rows = min(HEAD_ROWS, m[ROWS] - row0)
        n_strips = (n_rows + STRIP - 1) // STRIP
        unpack(m, row0 // STRIP, n_strips, work, work[PACKS])
        for p in range(share.first, share.last):
            began = ticks()
            lanes = lanes_used(n_tokens, p)
            strips_product(m, work[PACKS], n_strips, x, p, n_tokens, work[PRODUCT], work)
            began = spend(work, MULTIPLY, began)
            fold(logits, n_rows, lanes, largest, top[p], total[p])
            for i in range(p * NR, min(n_tokens, (p + 1) * NR)):
                r = targets[i] - row0
                if 0 <= r < n_rows:
                    out[i] = logits[r * NR + i - p * NR]
            spend(work, HEAD, began)
    for i in range(share.first * NR, min(n_tokens, share.last * NR)):
        out[i] = log64(total[i // NR, i % NR]) + top[i // NR, i % NR] - out[i]


@kernel
def fold(logits, n_rows, lanes, largest, top, total):
    """Folds a block of logits (n_rows * NR,) into the running maximum and sum of exp(logit - maximum)."""
    for t in range(lanes):
        largest[t] = top[t]
    for r in range(n_rows):
        for t in range(lanes):
            largest[t] = max(largest[t], np.float64(logits[r * NR + t]))
    for t in range(lanes):
        total[t] *= exp64(top[t] - largest[t])
        top[t] = largest[t]
        largest[t] = 0.0
    for r in range(n_rows):
        for t in range(lanes):
            largest[t] += exp64(np.float64(logits[r * NR + t]) - top[t])
    for t in range(lanes):
        total[t] += largest[t]


@kernel
def write_logits(m, x, share, work, gate, out):
    """out[i, row] = logit of vocabulary row `row` for token i, for this thread's share: float32 (T, V)."""
    depth, n_tokens = m[COLUMNS], share.n_tokens
    first, last = own_part((m[ROWS] + STRIP - 1) // STRIP, share)
    p0, p1 = own_panels(share)
    enter(x, m, share, work)
    if share.by_rows and work[WIDTH8] != 0:
        meet_all(gate, share, work)
    is_few = takes_few(m, n_tokens)
    if is_few:
        gather_few(x, depth, n_tokens, work)
    step = FEW_STRIPS if is_few else HEAD_ROWS // STRIP
    product = floats_at(work[PRODUCT], HEAD_ROWS * NR)
    for s in range(first, last, step):
        n_strips, row0 = min(step, last - s), s * STRIP
        n_rows = min(n_strips * STRIP, m[ROWS] - row0)
        if is_few:
            few = few_product(m, s, n_strips, n_tokens, work, work[PACKS])
            for i in range(n_tokens):
                for r in range(n_rows):
                    out[i, row0 + r] = few[i * n_strips * STRIP + r]
        else:
            unpack(m, s, n_strips, work, work[PACKS])
            began = ticks()
            for p in range(p0, p1):
                strips_product(m, work[PACKS], n_strips, x, p, n_tokens, work[PRODUCT], work)
                for i in range(p * NR, min(n_tokens, (p + 1) * NR)):
                    for r in range(n_rows):
                        out[i, row0 + r] = product[r * NR + i - p * NR]
            spend(work, MULTIPLY, began)
