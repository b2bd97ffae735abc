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
from engine.kernels.simd import float32_run, fma, rounded_for
from engine.kernels.tile import LANES, MR, NR, tile

KEYS = 16  # keys of a packed run; a multiple of MR at every vector width
BLOCK = 64  # keys of a softmax block: part of the bits

_MASKED = np.float32(-np.inf)
_LOWEST = np.float32(-1e30)  # the running maximum's start: finite, so that a block without a key is harmless
_ZERO = np.float32(0.0)


@kernel
def store_keys_values(k, v, slots, positions, first, last, keys, values):
    """Writes tokens first <= t < last of k, v (P, G * K, NR) to their slots and positions in one layer."""
    n_groups, width = keys.shape[1], keys.shape[3]
    for t in range(first, last):
        p, lane, slot, c = t // NR, t % NR, slots[t], positions[t]
        for g in range(n_groups):
            for d in range(width):
                keys[slot, g, c // KEYS, d, c % KEYS] = rounded_for(keys, k[p, g * width + d, lane])
                values[slot, g, c, d] = rounded_for(values, v[p, g * width + d, lane])


@kernel
def attend(
    q, n_heads, scale, positions, slots, present, starts, counts, keys, values,
    query, block_keys, block_values, scores, acc, lanes, out,
):  # fmt: skip
    """out = softmax(scale q k^T) v for every task (starts[i], counts[i]) of neighbouring tokens of one slot.

    Args:
        q, out: (P, H * K, NR) float32, q rotated; `out` may be `q`.
        positions, slots: (T,) int32; present: (S, C) uint8, 1 where the slot holds that position.
        keys: (S, G, C / KEYS, K, KEYS); values: (S, G, C, Kp); both float32, or uint16 bits of halves.
        query (K, NR), block_keys (BLOCK * K,), block_values (BLOCK * Kp,), scores (BLOCK, NR), acc (Kp, NR),
            lanes (4, NR): float32 scratch of this thread.
    """
    n_groups, width, padded, capacity = keys.shape[1], keys.shape[3], values.shape[3], values.shape[2]
    top, total, shrink, block_sum = lanes[0], lanes[1], lanes[2], lanes[3]
    for task in range(starts.size):
        start, count = starts[task], counts[task]
        slot = slots[start]
        n_vectors = (count + LANES - 1) // LANES
        n_lanes = n_vectors * LANES
        earliest, latest = positions[start], positions[start]
        for i in range(count):
            earliest, latest = min(earliest, positions[start + i]), max(latest, positions[start + i])
        for h in range(n_heads):
            group = slot * n_groups + h // (n_heads // n_groups)
            _gather_query(q, h * width, scale, start, count, n_lanes, query)
            for i in range(n_lanes):
                top[i], total[i] = _LOWEST, _ZERO
            acc[:, :n_lanes] = _ZERO
            for j0 in range(0, latest + 1, BLOCK):
                n_keys = min(BLOCK, latest + 1 - j0)
                run = (group * capacity + j0) * width
                base = float32_run(keys, run, BLOCK * width, block_keys)
                for j in range(0, n_keys, MR):
                    a = base + ((j // KEYS) * width * KEYS + j % KEYS) * 4
                    c = scores.ctypes.data + j * NR * 4
                    tile(a, KEYS, query.ctypes.data, NR, c, NR, width, 0, n_vectors)
                _mask(positions, start, count, earliest, present[slot, j0 : j0 + n_keys], j0, scores)
                _weigh(n_keys, n_lanes, scores, top, total, shrink, block_sum)
                for d in range(padded):
                    for i in range(n_lanes):
                        acc[d, i] *= shrink[i]
                base = float32_run(values, (group * capacity + j0) * padded, n_keys * padded, block_values)
                for d in range(0, padded, MR):
                    c = acc.ctypes.data + d * NR * 4
                    tile(base + d * 4, padded, scores.ctypes.data, NR, c, NR, n_keys, 1, n_vectors)
            for d in range(width):
                for i in range(count):
                    t = start + i
                    out[t // NR, h * width + d, t % NR] = acc[d, i] / total[i]


@kernel
def _gather_query(q, row, scale, start, count, n_lanes, query):
    """Queries of one head side by side, scaled; lanes past `count` become zeros."""
    for d in range(query.shape[0]):
        for i in range(count):
            t = start + i
            query[d, i] = q[t // NR, row + d, t % NR] * scale
        for i in range(count, n_lanes):
            query[d, i] = _ZERO


@kernel
def _mask(positions, start, count, earliest, held, j0, scores):
    """Scores of keys that a query may not see, or that the slot does not hold, become minus infinity."""
    for j in range(held.size):
        if held[j] == 0 or j0 + j > earliest:
            for i in range(count):
                if held[j] == 0 or j0 + j > positions[start + i]:
                    scores[j, i] = _MASKED


@kernel
def _weigh(n_keys, n_lanes, scores, top, total, shrink, block_sum):
    """Scores of a block become exp(score - running maximum); earlier sums shrink by `shrink`."""
    for i in range(n_lanes):
        shrink[i], block_sum[i] = top[i], _ZERO
    for j in range(n_keys):
        for i in range(n_lanes):
            top[i] = max(top[i], scores[j, i])
    for j in range(n_keys):
        for i in range(n_lanes):
            e = exp32(scores[j, i] - top[i])
            scores[j, i] = e
            block_sum[i] += e
    for i in range(n_lanes):
        shrink[i] = exp32(shrink[i] - top[i])
        total[i] = fma(total[i], shrink[i], block_sum[i])
