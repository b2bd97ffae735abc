"""Several models' output heads at once: likelihoods, Kullback-Leibler divergence and most likely tokens.

As in engine.kernels.logprob, vocabulary blocks of HEAD_ROWS rows go by and no row of logits is kept. With b
the base's logits and v a variant's, in float64 throughout:

    KL(base || variant) = sum of p_b (b - v)  +  lse_v - lse_b,      p_b = exp(b - lse_b)

The sum runs over blocks with exp(b - m), m the largest logit of the base so far, and is divided by the base's
total at the end. A variant with the base's logits has a divergence of exactly 0. The likelihoods have the
bits of `logprob.score`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.kernels._jit import kernel
from engine.kernels.logprob import HEAD_ROWS, LOWEST, fold
from engine.kernels.maths import exp64, log64
from engine.kernels.native import doubles_at, floats_at, ticks
from engine.kernels.product import (
    HEAD,
    MULTIPLY,
    PACKS,
    PRODUCT,
    ROWS,
    SUMS,
    WIDTH8,
    enter,
    lanes_used,
    spend,
    strips_product,
    unpack,
)
from engine.kernels.tile import NR, STRIP


class Running(NamedTuple):
    """Of M models, the base first, and P panels of tokens; scratch.

    Attributes:
        top, total: (M, P, NR) float64, the largest logit so far and the sum of exp(logit - top).
        best, best_id: (M, P, NR) float32 and int32, the largest logit so far and its first row.
        gap: (M, P, NR) float64, the sum of exp(b - top of the base) * (b - v).
        shrink: (P, NR) float64, what this block makes of earlier blocks' sums.
        logits: (P, HEAD_ROWS * NR) float32, the base's of this block; mass: float64, exp(logits - top).
    """

    top: NDArray[np.float64]
    total: NDArray[np.float64]
    best: NDArray[np.float32]
    best_id: NDArray[np.int32]
    gap: NDArray[np.float64]
    shrink: NDArray[np.float64]
    logits: NDArray[np.float32]
    mass: NDArray[np.float64]


@kernel
def compare(heads, hidden, share, targets, work, running, out):
    """Compares the models' predictions of `targets`, for this thread's panels.

    Args:
        heads: (M, FIELDS) int64; hidden: (M, P, >= D, NR) float32; targets: (T,) int32.
        out: (3 M - 1, T) float64: M rows of -ln p(target) in nats, M - 1 of the divergence in nats, M of the
            most likely token's id.
    """
    n_models, n_tokens, r = heads.shape[0], share.n_tokens, running
    logits, largest = floats_at(work[PRODUCT], HEAD_ROWS * NR), doubles_at(work[SUMS], NR)
    for p in range(share.first, share.last):
        for j in range(n_models):
            for t in range(NR):
                r.top[j, p, t], r.total[j, p, t], r.gap[j, p, t] = LOWEST, 0.0, 0.0
                r.best[j, p, t], r.best_id[j, p, t] = np.float32(LOWEST), np.int32(0)
    for row0 in range(0, heads[0, ROWS], HEAD_ROWS):
        n_rows = min(HEAD_ROWS, heads[0, ROWS] - row0)
        n_strips = (n_rows + STRIP - 1) // STRIP
        for j in range(n_models):
            m, x = heads[j], hidden[j]
            if work[WIDTH8] != 0:
                enter(x, m, share, work)
            unpack(m, row0 // STRIP, n_strips, work, work[PACKS])
            for p in range(share.first, share.last):
                began = ticks()
                lanes = lanes_used(n_tokens, p)
                strips_product(m, work[PACKS], n_strips, x, p, n_tokens, work[PRODUCT], work)
                began = spend(work, MULTIPLY, began)
                if j == 0:
                    _keep(logits, n_rows, lanes, largest, r, p)
                else:
                    fold(logits, n_rows, lanes, largest, r.top[j, p], r.total[j, p])
                    _add_gap(logits, n_rows, lanes, r.logits[p], r.mass[p], r.shrink[p], r.gap[j, p])
                _find_best(logits, n_rows, row0, lanes, r.best[j, p], r.best_id[j, p])
                for i in range(p * NR, min(n_tokens, (p + 1) * NR)):
                    row = targets[i] - row0
                    if 0 <= row < n_rows:
                        out[j, i] = logits[row * NR + i - p * NR]
                spend(work, HEAD, began)
    for i in range(share.first * NR, min(n_tokens, share.last * NR)):
        p, t = i // NR, i % NR
        base = log64(r.total[0, p, t]) + r.top[0, p, t]
        for j in range(n_models):
            lse = log64(r.total[j, p, t]) + r.top[j, p, t]
            out[j, i] = lse - out[j, i]
            if j > 0:
                out[n_models - 1 + j, i] = r.gap[j, p, t] / r.total[0, p, t] + (lse - base)
            out[2 * n_models - 1 + j, i] = r.best_id[j, p, t]


@kernel
def _keep(logits, n_rows, lanes, largest, r, p):
    """Folds a block of the base's logits, and keeps them and their mass for the variants."""
    top, shrink, kept, mass = r.top[0, p], r.shrink[p], r.logits[p], r.mass[p]
    for t in range(lanes):
        shrink[t] = top[t]
    fold(logits, n_rows, lanes, largest, top, r.total[0, p])
    for t in range(lanes):
        shrink[t] = exp64(shrink[t] - top[t])
    for i in range(n_rows):
        for t in range(lanes):
            kept[i * NR + t] = logits[i * NR + t]
            mass[i * NR + t] = exp64(np.float64(logits[i * NR + t]) - top[t])


@kernel
def _add_gap(logits, n_rows, lanes, base, mass, shrink, gap):
    """gap += sum over a block of mass (b - v), earlier blocks shrunk to the base's new maximum."""
    for t in range(lanes):
        gap[t] *= shrink[t]
    for i in range(n_rows):
        for t in range(lanes):
            at = i * NR + t
            gap[t] += mass[at] * (np.float64(base[at]) - np.float64(logits[at]))


@kernel
def _find_best(logits, n_rows, row0, lanes, best, best_id):
    """The largest logit and its first row."""
    for i in range(n_rows):
        row = np.int32(row0 + i)
        for t in range(lanes):
            value = logits[i * NR + t]
            more = value > best[t]
            best[t] = value if more else best[t]
            best_id[t] = row if more else best_id[t]
