"""Token rows into token panels, and columns from panel to panel."""

from __future__ import annotations

import numpy as np

from engine.kernels._jit import kernel
from engine.kernels.native import bytes_at, call_decoder, floats_at
from engine.kernels.product import COLUMNS, DATA, DECODE, N_BYTES, ROW_BLOCKS, SPARE
from engine.kernels.tile import NR, STRIP


@kernel
def embed(m, tokens, scale, first, last, work, out):
    """out[t // NR, d, t % NR] = scale * row tokens[t] of a weight, for panels first <= p < last.

    m: (FIELDS,) int64, the weight; tokens: (T,) int32.
    """
    width, data = m[COLUMNS], bytes_at(m[DATA], m[N_BYTES])
    rows = floats_at(work[SPARE], STRIP * width)
    for p in range(first, last):
        for lane in range(0, min(NR, tokens.size - p * NR), STRIP):
            count = min(STRIP, NR - lane, tokens.size - p * NR - lane)
            for i in range(count):
                row = np.int64(tokens[p * NR + lane + i]) * m[ROW_BLOCKS]
                call_decoder(m[DECODE], data, row, m[ROW_BLOCKS], rows[i * width : (i + 1) * width])
            for d in range(width):
                for i in range(count):
                    out[p, d, lane + i] = rows[i * width + d] * scale


@kernel
def gather_columns(x, tokens, width, out):
    """out[i // NR, d, i % NR] = x[t // NR, d, t % NR] for t = tokens[i]: float32 panels, (n,) int64."""
    for i in range(tokens.size):
        t = tokens[i]
        for d in range(width):
            out[i // NR, d, i % NR] = x[t // NR, d, t % NR]
