"""Weights times activations: decoding into strips, and the loops around the register tiles.

Activations live in panels: (P, rows, NR) float32, NR tokens side by side, feature after feature. A panel is
exactly the B operand of `tile`, so nothing is packed on the activations' side, elementwise kernels vectorize
over tokens, and a product leaves its output where the next one reads it. Rows are padded to whole strips.

Weights stay as they lie in the file; STRIP rows at a time become a strip, (columns, STRIP) float32. A group
of strips (GROUP_FLOATS, about 400 KB) stays in the second-level cache while all panels pass; within a panel
the depth is cut into blocks of DEPTH so that a B block of DEPTH x NR stays close. Measured on Zen 4 (one
thread, 2026-11, share of the tile's ceiling in the same process, 512 and 2,048 tokens): DEPTH 96 0.87-0.97,
192 0.88-0.97, 288 0.91-0.98, whole depth 0.90-0.99; walking a group of panels under each A panel instead: no
better (0.88-0.98).

Batches of up to FEW tokens turn the sides round (`few_tile`): the same strips, the same chains, no empty
lanes.

A weight is a row of int64 fields, so that one compiled loop serves every type: see the names below. How the
threads of a model divide a product is a `Share`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from engine.kernels._jit import kernel
from engine.kernels.int8 import quantize_panel
from engine.kernels.maths import exp32
from engine.kernels.native import (
    address,
    bytes_at,
    call_decoder,
    call_dot,
    call_multiply8,
    call_packer,
    floats_at,
    integers_at,
    meet,
    ticks,
)
from engine.kernels.squares import add_squares
from engine.kernels.tile import FEW, LANES, MR, NR, STRIP, few_rows, few_tile, tile
from engine.quants.strips import pack_f32

# Fields of a weight: addresses of the packer (0: none) and the decoder, of the data and the bias (0: none);
# bytes of the data and of a row, blocks of a row, weights of a packer's unit; addresses of the kernels of
# engine.quants.dots (0: none), for 1, 2, 4 and 8 tokens.
PACK, DECODE, DATA, BIAS, N_BYTES, ROW_BYTES, ROW_BLOCKS, UNIT, ROWS, COLUMNS = range(10)
DOT_1, DOT_2, DOT_4, DOT_8 = range(10, 14)
# With 8-bit activations (engine.kernels.int8): addresses of packer (0: the weight stays float32) and product,
# weights and bytes of a strip in a packer's unit, what is taken from every unsigned weight.
PACK8, MULTIPLY8, UNIT8, UNIT_BYTES8, OFFSET8 = range(14, 19)
# Rank, from 1, of what it multiplies among the inputs whose squares are summed (0: they are not).
SUMMED, FIELDS = range(19, 21)

# Working memory of a thread, an int64 table of addresses (engine.weights.Work): rows of a weight that has no
# packer, decoded; two groups of strips; the product of a group with a panel; the operands of `few_tile`; sums
# (NR,) float64; what engine.kernels.attention says; the clock. So a kernel passes on one argument, whatever
# those that it calls need.
SPARE, PACKS, MORE_PACKS, PRODUCT, FEW_X, FEW_OUT, SUMS = range(7)
QUERY, BLOCK_KEYS, BLOCK_VALUES, SCORES, ACC, RUNNING, CLOCK = range(7, 14)
# The activations of a batch in 8 bits, of all threads, panel after panel as engine.kernels.int8 has them, for
# weights of up to WIDTH8 columns (no address; 0: they stay float32); and that product's scratch.
QUANTS8, SCALES8, SUMS8, WIDTH8, SHARES8 = range(14, 19)
# Where engine.kernels.squares adds up, and bytes of an input there.
SQUARES, SQUARES_BYTES, WORK_FIELDS = range(19, 22)

# What a thread's clock adds up, in ticks.
UNPACK, MULTIPLY, ACTIVATE, NORM, ROTATE, STORE, ATTEND, HEAD, EMBED, QUANTIZE, WAIT, CLOCKS = range(12)

DEPTH = 288
GROUP_FLOATS = 100_000  # floats of a group of strips
FEW_STRIPS = 4  # strips at a time where there are few tokens
_ZERO, _ONE = np.float32(0.0), np.float32(1.0)


class Share(NamedTuple):
    """What one of a model's threads does of a batch.

    Large batches are divided by panels. Where there are only few panels a thread (`by_rows`), products are
    divided by strips of weights and attention by heads, and all threads meet after each step.

    Attributes:
        thread, threads: which, of how many.
        first, last: panels of this thread in elementwise steps, and in products unless `by_rows`.
        n_panels, n_tokens: of the whole batch.
    """

    thread: int
    threads: int
    by_rows: bool
    first: int
    last: int
    n_panels: int
    n_tokens: int


def group_strips(depth: int) -> int:
    """Strips of weight rows that are decoded at a time."""
    return max(1, min(32, GROUP_FLOATS // (STRIP * depth)))


_group_strips = kernel(group_strips)


@kernel
def spend(work, item, since):
    """Adds the ticks since `since` to an item of the thread's clock; returns the time now."""
    now = ticks()
    clock = integers_at(work[CLOCK], CLOCKS)
    clock[item] += now - since
    return now


@kernel
def meet_all(gate, share, work):
    """All threads have come this far."""
    began = ticks()
    meet(gate, share.threads)
    spend(work, WAIT, began)


@kernel
def lanes_used(n_tokens, panel):
    """Lanes of this panel that hold tokens, in whole vectors: LANES to NR."""
    return (min(NR, n_tokens - panel * NR) + LANES - 1) // LANES * LANES


@kernel
def own_part(count, share):
    """This thread's part [first, last) of `count` things, all of them unless `by_rows`."""
    if share.by_rows:
        return count * share.thread // share.threads, count * (share.thread + 1) // share.threads
    return 0, count


@kernel
def own_panels(share):
    """The panels [first, last) that this thread's products pass over."""
    if share.by_rows:
        return 0, share.n_panels
    return share.first, share.last


@kernel
def unpack(m, first, count, work, packs):
    """Strips [first, first + count) of a weight at address `packs`; rows past the weight's last become zeros.

    m: (FIELDS,) int64; each strip is (columns, STRIP) float32.
    """
    began = ticks()
    columns = m[COLUMNS]
    for s in range(count):
        row = (first + s) * STRIP
        held = min(STRIP, m[ROWS] - row)
        strip = packs + s * columns * STRIP * 4
        if m[PACK8] != 0:
            n_units, rows8 = columns // m[UNIT8], m[DATA] + row * m[ROW_BYTES]
            if held < STRIP:  # bytes of zeros are weights of zero in every type
                data = bytes_at(rows8, held * m[ROW_BYTES])
                spare = bytes_at(work[SPARE], STRIP * m[ROW_BYTES])
                for i in range(spare.size):
                    spare[i] = data[i] if i < data.size else np.uint8(0)
                rows8 = work[SPARE]
            call_packer(m[PACK8], rows8, m[ROW_BYTES], n_units, packs + s * n_units * m[UNIT_BYTES8])
        elif m[PACK] != 0 and held == STRIP:
            call_packer(m[PACK], m[DATA] + row * m[ROW_BYTES], m[ROW_BYTES], columns // m[UNIT], strip)
        else:
            data, rows = bytes_at(m[DATA], m[N_BYTES]), floats_at(work[SPARE], STRIP * columns)
            call_decoder(m[DECODE], data, row * m[ROW_BLOCKS], held * m[ROW_BLOCKS], rows)
            for k in range(held * columns, rows.size):
                rows[k] = _ZERO
            quads = columns // 4
            if quads > 0:
                pack_f32(work[SPARE], columns * 4, quads, strip)
            turned = floats_at(strip, columns * STRIP)
            for k in range(quads * 4, columns):
                for r in range(STRIP):
                    turned[k * STRIP + r] = rows[r * columns + k]
    spend(work, UNPACK, began)


@kernel
def panel_product(packed, n_strips, depth, x, out, n_vectors):
    """One panel times strips; addresses: x of float32 (depth, NR), out of (n_strips * STRIP, NR)."""
    for k0 in range(0, depth, DEPTH):
        steps = min(DEPTH, depth - k0)
        for row in range(0, n_strips * STRIP, MR):
            a = packed + ((row // STRIP * depth + k0) * STRIP + row % STRIP) * 4
            tile(a, STRIP, x + k0 * NR * 4, NR, out + row * NR * 4, NR, steps, k0, n_vectors)


@kernel
def strips_product(m, packs, n_strips, x, p, n_tokens, out, work):
    """Unpacked strips times panel p of x: (n_strips * STRIP, NR) at address `out`."""
    depth = m[COLUMNS]
    if m[PACK8] != 0:
        at = p * work[WIDTH8] * NR
        call_multiply8(
            m[MULTIPLY8], packs, n_strips, work[QUANTS8] + at, work[SCALES8] + at // 8, work[SUMS8] + at // 4,
            depth, m[OFFSET8], min(NR, n_tokens - p * NR), out, work[SHARES8],
        )  # fmt: skip
    else:
        source = address(x) + p * x.shape[1] * NR * 4
        panel_product(packs, n_strips, depth, source, out, lanes_used(n_tokens, p) // LANES)


@kernel
def enter(x, m, share, work):
    """This thread's panels of what a weight is about to multiply; x: (P, >= columns, NR).

    Their squares are summed where somebody asked, and they are rounded to 8 bits where activations are.
    """
    depth, in_8_bits = m[COLUMNS], work[WIDTH8] != 0 and m[COLUMNS] % 32 == 0
    if m[SUMMED] == 0 and not in_8_bits:
        return
    began = ticks()
    for p in range(share.first, share.last):
        at, tokens = p * work[WIDTH8] * NR, min(NR, share.n_tokens - p * NR)
        source = address(x) + p * x.shape[1] * NR * 4
        if m[SUMMED] != 0:
            add_squares(source, depth, tokens, work[SQUARES] + (m[SUMMED] - 1) * work[SQUARES_BYTES])
        if in_8_bits:
            quantize_panel(
                source, depth, tokens, work[QUANTS8] + at, work[SCALES8] + at // 8, work[SUMS8] + at // 4
            )
    spend(work, QUANTIZE, began)


@kernel
def enter_and_meet(x, m, share, work, gate):
    """`enter`, and the other threads where they read what it leaves."""
    enter(x, m, share, work)
    if share.by_rows and work[WIDTH8] != 0:
        meet_all(gate, share, work)


@kernel
def takes_few(m, n_tokens):
    """Whether `gather_few` and `few_product` multiply this weight with so many tokens."""
    return n_tokens <= FEW and m[PACK8] == 0


@kernel
def gather_few(x, depth, n_tokens, work):
    """The A operand of `few_tile` at work[FEW_X]: (depth, few_rows) of x[0], zeros past `n_tokens`."""
    n = few_rows(n_tokens)
    few_x = floats_at(work[FEW_X], depth * n)
    for k in range(depth):
        for i in range(n):
            few_x[k * n + i] = x[0, k, i] if i < n_tokens else _ZERO


@kernel
def few_product(m, first, n_strips, n_tokens, work, packs):
    """Strips [first, first + n_strips) of a weight times what `gather_few` left, decoded at address `packs`.

    Returns (few_rows, n_strips * STRIP) float32, flat, at work[FEW_OUT]. Strips that the kernels of
    engine.quants.dots take are not stored.
    """
    began = ticks()
    depth, n, width = m[COLUMNS], few_rows(n_tokens), n_strips * STRIP
    by_dots = m[DOT_1 if n == 1 else DOT_2 if n == 2 else DOT_4 if n == 4 else DOT_8]
    out, row = floats_at(work[FEW_OUT], n * width), first * STRIP
    if by_dots != 0 and row + width <= m[ROWS]:
        n_units, part = depth // m[UNIT], floats_at(packs, n * STRIP)
        for s in range(n_strips):
            at, to = m[DATA] + (row + s * STRIP) * m[ROW_BYTES], work[FEW_OUT] + s * STRIP * 4
            call_dot(by_dots, at, m[ROW_BYTES], n_units, work[FEW_X], to if n == 1 else packs)
            if n > 1:
                for i in range(n):
                    for r in range(STRIP):
                        out[i * width + s * STRIP + r] = part[i * STRIP + r]
    else:
        unpack(m, first, n_strips, work, packs)
        began = ticks()
        few_tile(n, work[FEW_X], n, packs, STRIP, depth * STRIP, work[FEW_OUT], width, depth, 0, n_strips)
    spend(work, MULTIPLY, began)
    return out


@kernel
def project(m, x, out, share, work):
    """out = weight x + bias, for this thread's share.

    m: (FIELDS,) int64; x: (P, >= columns, NR); out: (P, rows padded to whole strips, NR) float32.
    """
    depth, n_tokens = m[COLUMNS], share.n_tokens
    first, last = own_part((m[ROWS] + STRIP - 1) // STRIP, share)
    p0, p1 = own_panels(share)
    is_few = takes_few(m, n_tokens)
    if is_few:
        gather_few(x, depth, n_tokens, work)
    step = FEW_STRIPS if is_few else _group_strips(depth)
    for s in range(first, last, step):
        n_strips, row0 = min(step, last - s), s * STRIP
        if is_few:
            few = few_product(m, s, n_strips, n_tokens, work, work[PACKS])
            for i in range(n_tokens):
                for row in range(n_strips * STRIP):
                    out[0, row0 + row, i] = few[i * n_strips * STRIP + row]
        else:
            unpack(m, s, n_strips, work, work[PACKS])
            began = ticks()
            for p in range(p0, p1):
                target = address(out) + (p * out.shape[1] + row0) * NR * 4
                strips_product(m, work[PACKS], n_strips, x, p, n_tokens, target, work)
            spend(work, MULTIPLY, began)
    if m[BIAS] != 0:
        add_bias(out, floats_at(m[BIAS], m[ROWS]), first * STRIP, min(last * STRIP, m[ROWS]), p0, p1)


@kernel
def add_bias(x, bias, row0, row1, first, last):
    """x += bias for rows row0 <= r < row1 of panels first <= p < last; x: (P, >= rows, NR), bias: (rows,)."""
    for p in range(first, last):
        for row in range(row0, row1):
            for t in range(NR):
                x[p, row, t] += bias[row]


@kernel
def _silu_times(gate, up):
    """silu(gate) * up, silu(z) = z / (1 + exp(-z)) (Shazeer 2020)."""
    return gate / (_ONE + exp32(-gate)) * up


@kernel
def project_swiglu(gate, up, x, out, share, work):
    """out = silu(gate x) * (up x), for this thread's share; shapes as `project`, both weights alike."""
    depth, n_tokens = gate[COLUMNS], share.n_tokens
    first, last = own_part((gate[ROWS] + STRIP - 1) // STRIP, share)
    p0, p1 = own_panels(share)
    is_few = takes_few(gate, n_tokens) and takes_few(up, n_tokens)
    if is_few:
        gather_few(x, depth, n_tokens, work)
    step = FEW_STRIPS if is_few else _group_strips(depth)
    for s in range(first, last, step):
        n_strips, row0 = min(step, last - s), s * STRIP
        n_rows = n_strips * STRIP
        product = floats_at(work[PRODUCT], n_rows * NR)
        if is_few:
            few = few_product(gate, s, n_strips, n_tokens, work, work[PACKS])
            for i in range(n_tokens * n_rows):
                product[i] = few[i]
            few = few_product(up, s, n_strips, n_tokens, work, work[PACKS])
            began = ticks()
            for i in range(n_tokens * n_rows):
                product[i] = _silu_times(product[i], few[i])
            for i in range(n_tokens):
                for row in range(n_rows):
                    out[0, row0 + row, i] = product[i * n_rows + row]
            spend(work, ACTIVATE, began)
        else:
            unpack(gate, s, n_strips, work, work[PACKS])
            unpack(up, s, n_strips, work, work[MORE_PACKS])
            began = ticks()
            for p in range(p0, p1):
                target = address(out) + (p * out.shape[1] + row0) * NR * 4
                lanes = lanes_used(n_tokens, p)
                strips_product(gate, work[PACKS], n_strips, x, p, n_tokens, target, work)
                strips_product(up, work[MORE_PACKS], n_strips, x, p, n_tokens, work[PRODUCT], work)
                began = spend(work, MULTIPLY, began)
                for row in range(n_rows):
                    for t in range(lanes):
                        up_of = product[row * NR + t]
                        out[p, row0 + row, t] = _silu_times(out[p, row0 + row, t], up_of)
                began = spend(work, ACTIVATE, began)
