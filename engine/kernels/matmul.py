"""Weights times activations: packing decoded rows, and the loops around the register tile.

Activations live in panels: (P, rows, NR) float32, NR tokens side by side, feature after feature. A panel is
exactly the B operand of the tile, so nothing is packed on the activations' side, elementwise kernels
vectorize over tokens, and the tile writes its output where the next product reads it.

Blocking: a group of weight rows, decoded and packed (GROUP_FLOATS, about 400 KB), stays in the second-level
cache while all panels pass; within a panel the depth is cut into blocks of DEPTH so that a B block of DEPTH x
NR stays close. Measured on Zen 4 (one thread, 2026-11, share of the tile's ceiling in the same process, 512
and 2,048 tokens): DEPTH 96 0.87-0.97, 192 0.88-0.97, 288 0.91-0.98, whole depth 0.90-0.99; walking a group of
panels under each A panel
instead: no better (0.88-0.98).
"""

from __future__ import annotations

import numpy as np

from engine.kernels._jit import kernel
from engine.kernels.maths import exp32
from engine.kernels.tile import LANES, MR, NR, tile

DEPTH = 288
GROUP_FLOATS = 100_000  # floats of one packed group of weight rows
_ONE = np.float32(1.0)


def group_rows(depth: int) -> int:
    """Weight rows that are decoded and packed at a time: a multiple of MR."""
    return max(MR, min(512, GROUP_FLOATS // depth) // MR * MR)


@kernel
def pack(rows, n_rows, packed):
    """packed[i, k, r] = rows[i * MR + r, k]; rows past `n_rows` become zeros.

    rows: (>= n_rows, depth) float32; packed: (>= n_rows / MR, depth, MR) float32, overwritten.
    """
    depth = rows.shape[1]
    for i in range((n_rows + MR - 1) // MR):
        full = min(MR, n_rows - i * MR)
        if full == MR:
            for k in range(depth):
                for r in range(MR):
                    packed[i, k, r] = rows[i * MR + r, k]
        else:
            for k in range(depth):
                for r in range(MR):
                    packed[i, k, r] = rows[i * MR + r, k] if r < full else np.float32(0.0)


@kernel
def _vectors(n_tokens, panel):
    """Vectors of the tile that hold tokens in this panel: 1 to NV."""
    return (min(NR, n_tokens - panel * NR) + LANES - 1) // LANES


@kernel
def _panel_product(packed, n_rows, depth, x, out, n_vectors):
    """One panel times a packed group; x and out are addresses of float32 (depth, NR) and (n_rows, NR)."""
    for k0 in range(0, depth, DEPTH):
        steps = min(DEPTH, depth - k0)
        for i in range((n_rows + MR - 1) // MR):
            a = packed.ctypes.data + (i * depth + k0) * MR * 4
            tile(a, MR, x + k0 * NR * 4, NR, out + i * MR * NR * 4, NR, steps, k0, n_vectors)


@kernel
def multiply(packed, n_rows, x, row0, first, last, n_tokens, out):
    """out[p, row0 + r, t] = sum_k weight[r, k] x[p, k, t] for panels first <= p < last.

    packed: (n_rows / MR, depth, MR) float32; x: (P, >= depth, NR); out: (P, rows, NR) where rows is a
    multiple of MR.
    """
    depth = packed.shape[1]
    for p in range(first, last):
        source = x.ctypes.data + p * x.shape[1] * NR * 4
        target = out.ctypes.data + (p * out.shape[1] + row0) * NR * 4
        _panel_product(packed, n_rows, depth, source, target, _vectors(n_tokens, p))


@kernel
def multiply_swiglu(gate, up, n_rows, x, row0, first, last, n_tokens, scratch, out):
    """out[p, row0 + r, t] = silu(gate x)[r, t] * (up x)[r, t], silu(z) = z / (1 + exp(-z)) (Shazeer 2020).

    gate, up: (n_rows / MR, depth, MR) packed; scratch: (rows of a group, NR) float32; out as in `multiply`.
    """
    depth = gate.shape[1]
    for p in range(first, last):
        source = x.ctypes.data + p * x.shape[1] * NR * 4
        target = out.ctypes.data + (p * out.shape[1] + row0) * NR * 4
        n_vectors = _vectors(n_tokens, p)
        _panel_product(gate, n_rows, depth, source, target, n_vectors)
        _panel_product(up, n_rows, depth, source, scratch.ctypes.data, n_vectors)
        for r in range(n_rows):
            for t in range(NR):
                z = out[p, row0 + r, t]
                out[p, row0 + r, t] = z / (_ONE + exp32(-z)) * scratch[r, t]
