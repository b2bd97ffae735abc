"""Causal grouped-query attention of one layer over a ragged batch, and the key/value store it reads.

A task is up to NR queries of one sequence. Keys are walked by position in blocks of BLOCK anchored at
position 0, whatever the batch: scores of a block by the register tile (depth K in rising order), a running
maximum per query, our own exp, then the values by the tile again (one chain over positions in rising order).
A masked key has weight exactly 0 and adds nothing, so a query's bits do not depend on its neighbours in the
task. Never a full T x T matrix.

    keys of a slot and kv head:   (C / KEYS, K, KEYS)   packed as the tile's A operand
    values of the same:           (C, Kp)               Kp = K rounded up to MR; a row of K values is A's row

Source: Ainslie et al. 2023, arXiv:2305.13245 (grouped queries); Milakov and Gimelshein 2018, arXiv:1805.02867
(online softmax).
"""

from __future__ import annotations

import numpy as np

from engine.kernels._jit import kernel
from engine.kernels.maths import exp32
from engine.kernels.native import floats_at
from engine.kernels.product import (
    ACC,
    BLOCK_KEYS,
    BLOCK_VALUES,
    FEW_OUT,
    FEW_X,
    QUERY,
    RUNNING,
    SCORES,
)
from engine.kernels.simd import float32_run, fma, rounded_for
from engine.kernels.tile import FEW, LANES, MR, NR, STRIP, few_rows, few_tile, tile

KEYS = STRIP  # keys of a packed run
BLOCK = 64  # keys of a softmax block: part of the bits

_MASKED = np.float32(-np.inf)
_LOWEST = np.float32(-1e30)  # the running maximum's start: finite, so that a block without a key is harmless
_ZERO = np.float32(0.0)


@kernel
def store_keys_values(k, v, slots, positions, first, last, group0, group1, keys, values):
    """Writes tokens first <= t < last of k, v (P, G * K, NR) to their slots and positions in one layer.

    Of kv heads group0 <= g < group1 only; keys, values: as in `attend`.
    """
    width = keys.shape[3]
    for t in range(first, last):
        p, lane, slot, c = t // NR, t % NR, slots[t], positions[t]
        for g in range(group0, group1):
            for d in range(width):
                keys[slot, g, c // KEYS, d, c % KEYS] = rounded_for(keys, k[p, g * width + d, lane])
                values[slot, g, c, d] = rounded_for(values, v[p, g * width + d, lane])


@kernel
def attend(
    q, n_heads, head0, head1, scale, positions, slots, present, starts, counts, keys, values, work, out
):
    """out = softmax(scale q k^T) v for heads head0 <= h < head1 of every task.

    A task, (starts[i], counts[i]), is a run of at most NR neighbouring tokens of one slot.

    Args:
        q, out: (P, H * K, NR) float32, q rotated; `out` may be `q`.
        positions, slots: (T,) int32; present: (S, C) uint8, 1 where the slot holds that position.
        keys: (S, G, C / KEYS, K, KEYS); values: (S, G, C, Kp); both float32, or uint16 bits of halves.
        work: of this thread: QUERY (K, NR), BLOCK_KEYS (BLOCK * K,), BLOCK_VALUES (BLOCK * Kp,), SCORES
            (BLOCK, NR), ACC (Kp, NR), RUNNING (4, NR), FEW_X and FEW_OUT, all float32.
    """
    width, repeat = keys.shape[3], n_heads // keys.shape[1]
    for task in range(starts.size):
        t, count = starts[task], counts[task]
        slot = slots[t]
        held, k, v = present[slot], keys[slot], values[slot]
        if count > 1 or width % STRIP != 0:
            for h in range(head0, head1):
                g = h // repeat
                _attend_lanes(q, h, scale, positions, t, count, held, k[g], v[g], work, out)
            continue
        for g in range(head0 // repeat, (head1 + repeat - 1) // repeat):
            end = min(head1, (g + 1) * repeat)
            for h in range(max(head0, g * repeat), end, FEW):
                _attend_one(q, h, min(FEW, end - h), scale, positions[t], t, held, k[g], v[g], work, out)


@kernel
def _attend_lanes(q, h, scale, positions, start, count, held, keys, values, work, out):
    """One head of a task, its tokens in the lanes.

    held: (C,) uint8; keys: (C / KEYS, K, KEYS) and values: (C, Kp) of one slot and kv head.
    """
    width, padded = keys.shape[1], values.shape[1]
    query, scores, acc = work[QUERY], work[SCORES], floats_at(work[ACC], padded * NR)
    wide_keys = floats_at(work[BLOCK_KEYS], BLOCK * width)
    wide_values = floats_at(work[BLOCK_VALUES], BLOCK * padded)
    top, total = floats_at(work[RUNNING], NR), floats_at(work[RUNNING] + 4 * NR, NR)
    shrink, block_sum = floats_at(work[RUNNING] + 8 * NR, NR), floats_at(work[RUNNING] + 12 * NR, NR)
    n_vectors = (count + LANES - 1) // LANES
    n_lanes = n_vectors * LANES
    earliest, latest = positions[start], positions[start]
    for i in range(count):
        earliest, latest = min(earliest, positions[start + i]), max(latest, positions[start + i])
    _gather_query(q, h * width, width, scale, start, count, n_lanes, floats_at(query, width * NR))
    for i in range(n_lanes):
        top[i], total[i] = _LOWEST, _ZERO
    for i in range(acc.size):
        acc[i] = _ZERO
    for j0 in range(0, latest + 1, BLOCK):
        n_keys = min(BLOCK, latest + 1 - j0)
        base = float32_run(keys, j0 * width, BLOCK * width, wide_keys)
        for j in range(0, n_keys, MR):
            a = base + ((j // KEYS) * width * KEYS + j % KEYS) * 4
            tile(a, KEYS, query, NR, scores + j * NR * 4, NR, width, 0, n_vectors)
        weights = floats_at(scores, BLOCK * NR)
        _mask(positions, start, count, earliest, held[j0 : j0 + n_keys], j0, weights)
        _weigh(n_keys, n_lanes, weights, top, total, shrink, block_sum)
        for d in range(padded):
            for i in range(n_lanes):
                acc[d * NR + i] *= shrink[i]
        base = float32_run(values, j0 * padded, n_keys * padded, wide_values)
        for d in range(0, padded, MR):
            tile(base + d * 4, padded, scores, NR, work[ACC] + d * NR * 4, NR, n_keys, 1, n_vectors)
    for d in range(width):
        for i in range(count):
            t = start + i
            out[t // NR, h * width + d, t % NR] = acc[d * NR + i] / total[i]


@kernel
def _attend_one(q, h, n_heads, scale, position, t, held, keys, values, work, out):
    """Heads h <= i < h + n_heads of one kv head for one token: the lanes run over keys, then over features.

    The same chains as `_attend_lanes`, so the same bits. keys: (C / KEYS, K, KEYS); values: (C, Kp).
    """
    width, padded = keys.shape[1], values.shape[1]
    p, lane, rows = t // NR, t % NR, few_rows(n_heads)
    queries, weights = floats_at(work[QUERY], width * rows), floats_at(work[FEW_X], BLOCK * rows)
    scores, acc = floats_at(work[SCORES], rows * BLOCK), floats_at(work[FEW_OUT], rows * padded)
    wide_keys = floats_at(work[BLOCK_KEYS], BLOCK * width)
    wide_values = floats_at(work[BLOCK_VALUES], BLOCK * padded)
    tops, totals = floats_at(work[RUNNING], FEW), floats_at(work[RUNNING] + 4 * FEW, FEW)
    for d in range(width):
        for i in range(rows):
            queries[d * rows + i] = q[p, (h + i) * width + d, lane] * scale if i < n_heads else _ZERO
    for i in range(rows):
        tops[i], totals[i] = _LOWEST, _ZERO
    for i in range(acc.size):
        acc[i] = _ZERO
    for j0 in range(0, position + 1, BLOCK):
        n_keys = min(BLOCK, position + 1 - j0)
        runs = (n_keys + KEYS - 1) // KEYS
        base = float32_run(keys, j0 * width, BLOCK * width, wide_keys)
        few_tile(rows, work[QUERY], rows, base, KEYS, width * KEYS, work[SCORES], BLOCK, width, 0, runs)
        for i in range(rows):
            at, top = i * BLOCK, tops[i]
            for j in range(n_keys):
                if held[j0 + j] == 0:
                    scores[at + j] = _MASKED
            for j in range(n_keys):
                top = max(top, scores[at + j])
            for j in range(n_keys):
                scores[at + j] = exp32(scores[at + j] - top)
            block_sum = _ZERO
            for j in range(n_keys):
                block_sum += scores[at + j]
                weights[j * rows + i] = scores[at + j]
            shrink = exp32(tops[i] - top)
            tops[i], totals[i] = top, fma(totals[i], shrink, block_sum)
            for d in range(padded):
                acc[i * padded + d] *= shrink
        base = float32_run(values, j0 * padded, n_keys * padded, wide_values)
        strips = padded // STRIP
        few_tile(rows, work[FEW_X], rows, base, padded, STRIP, work[FEW_OUT], padded, n_keys, 1, strips)
    for i in range(n_heads):
        for d in range(width):
            out[p, (h + i) * width + d, lane] = acc[i * padded + d] / totals[i]


@kernel
def _gather_query(q, row, width, scale, start, count, n_lanes, query):
    """Queries of one head side by side, scaled; lanes past `count` become zeros."""
    for d in range(width):
        for i in range(count):
            t = start + i
            query[d * NR + i] = q[t // NR, row + d, t % NR] * scale
        for i in range(count, n_lanes):
            query[d * NR + i] = _ZERO


@kernel
def _mask(positions, start, count, earliest, held, j0, scores):
    """Scores of keys that a query may not see, or that the slot does not hold, become minus infinity."""
    for j in range(held.size):
        if held[j] == 0 or j0 + j > earliest:
            for i in range(count):
                if held[j] == 0 or j0 + j > positions[start + i]:
                    scores[j * NR + i] = _MASKED


@kernel
def _weigh(n_keys, n_lanes, scores, top, total, shrink, block_sum):
    """Scores of a block become exp(score - running maximum); earlier sums shrink by `shrink`."""
    for i in range(n_lanes):
        shrink[i], block_sum[i] = top[i], _ZERO
    for j in range(n_keys):
        for i in range(n_lanes):
            top[i] = max(top[i], scores[j * NR + i])
    for j in range(n_keys):
        for i in range(n_lanes):
            e = exp32(scores[j * NR + i] - top[i])
            scores[j * NR + i] = e
            block_sum[i] += e
    for i in range(n_lanes):
        shrink[i] = exp32(shrink[i] - top[i])
        total[i] = fma(total[i], shrink[i], block_sum[i])
