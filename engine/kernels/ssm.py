"""The convolution and the scan of Mamba and Mamba-2 over token panels, and their order of operations.

Of a channel e and a token t, float32, every step rounded as written; fma rounds once:

    conv:  c = 0; c = fma(weight[w], x[t - (W-1) + w], c) for w = 0 ... W-1;  x' = silu(c + bias)
    scan:  delta = softplus(dt + dt_bias);  u = delta * x'
           y = 0; for n = 0 ... N-1:  h[n] = fma(exp(delta * A[n]), h[n], u * B[n]);  y = fma(h[n], C[n], y)
           out = silu(z) * fma(D, x', y)

A is a number for each n, or one for all (Mamba-2: the same in all channels of a head, as are dt and D; B and
C are those of the channel's group). softplus(v) = max(v, 0) + log(1 + exp(-|v|)), v above 20;
silu(v) = v / (1 + exp(-v)); exp is maths.exp32. Sources: Gu and Dao 2023, arXiv:2312.00752, section 3; Dao
and Gu 2024, arXiv:2405.21060; B is discretized as delta B, as their code has it.

Lanes run over channels, STRIP at a time, and tokens follow one another: no number of tokens, sequences, calls
or threads, and no width of registers, can change a bit. A sequence's state is read before its first token in
a panel and written after its last one there; between tokens it stays in the first-level cache.

    runs     tokens of one sequence that lie side by side in one panel
    states   (cells, L, strips, W - 1, STRIP) the last inputs of the convolution, oldest first
             (cells, L, strips, N, STRIP)     h; lanes beyond the channels are zero

Panels have tokens side by side: STRIP of their rows are turned into rows of channels and back on the way.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.kernels._jit import kernel
from engine.kernels.native import address, doubles_at, floats_at
from engine.kernels.product import SUMS, lanes_used
from engine.kernels.ssm_steps import conv_steps, scan_steps, scan_steps_shared
from engine.kernels.tile import NR, STRIP
from engine.quants.strips import pack_f32

_ROW = STRIP * 4  # bytes of a row of channels
_TURNED = -(-NR // STRIP) * STRIP * STRIP  # floats of a panel's tokens in STRIP channels
_ZERO = np.float32(0.0)


class Runs(NamedTuple):
    """Where sequences lie in a batch.

    Attributes:
        starts: (n + 1,) int64, the first token of each run, then the number of tokens.
        cells: (n,) int32, whose state it goes on from.
    """

    starts: NDArray[np.int64]
    cells: NDArray[np.int32]


def runs_of(cells: NDArray[np.int32]) -> Runs:
    """The runs of tokens with these cells; tokens of a cell lie side by side."""
    is_first = np.arange(cells.size) % NR == 0
    is_first[1:] |= cells[1:] != cells[:-1]
    starts = np.flatnonzero(is_first)
    return Runs(np.append(starts, cells.size).astype(np.int64), np.ascontiguousarray(cells[starts]))


def strips_of(values: NDArray[np.float32], n_groups: int = 1) -> NDArray[np.float32]:
    """(strips, n, STRIP) of (channels, n): channels in lanes, zeros where a group does not fill a strip."""
    grouped = values.reshape(n_groups, len(values) // n_groups, -1)
    n_strips = -(-grouped.shape[1] // STRIP)
    padded = np.pad(grouped, ((0, 0), (0, n_strips * STRIP - grouped.shape[1]), (0, 0)))
    strips = padded.reshape(n_groups * n_strips, STRIP, -1)
    return np.ascontiguousarray(strips.transpose(0, 2, 1))


def scratch_floats(conv_width: int) -> int:
    """Floats that a thread needs to turn panels."""
    return 4 * _TURNED + NR * STRIP + (conv_width - 1) * STRIP


@kernel
def _turn(panel, row, held, n_tokens, out):
    """Rows of STRIP channels of a panel's first tokens; those past `held` are zero.

    panel, out: addresses of (rows, NR) and (tokens, STRIP) float32.
    """
    pack_f32(panel + row * NR * 4, NR * 4, (n_tokens + 3) // 4, out)
    if held < STRIP:
        rows = floats_at(out, n_tokens * STRIP)
        for t in range(n_tokens):
            for lane in range(held, STRIP):
                rows[t * STRIP + lane] = _ZERO


@kernel
def _turn_heads(panel, row, channel, head_width, held, n_tokens, spare, out):
    """The same of rows that belong to `head_width` channels each: row `row` to channels 0 ... head_width - 1.

    spare: address of (STRIP, NR) float32.
    """
    lanes = floats_at(spare, STRIP * NR)
    for lane in range(held):
        source = floats_at(panel + (row + (channel + lane) // head_width) * NR * 4, NR)
        for t in range(n_tokens):
            lanes[lane * NR + t] = source[t]
    _turn(spare, 0, held, n_tokens, out)


@kernel
def _turn_back(rows, panel, row, held, n_tokens, spare):
    """Puts rows of channels back into a panel, as many as are `held`; spare: (STRIP, STRIP) float32."""
    block = floats_at(spare, STRIP * STRIP)
    for t0 in range(0, n_tokens, STRIP):
        pack_f32(rows + t0 * _ROW, _ROW, STRIP // 4, spare)
        count = min(STRIP, n_tokens - t0)
        for lane in range(held):
            target = floats_at(panel + ((row + lane) * NR + t0) * 4, count)
            for t in range(count):
                target[t] = block[lane * STRIP + t]


@kernel
def _move(source, target, n_rows):
    """Copies rows of STRIP floats, first row first."""
    a, b = floats_at(source, n_rows * STRIP), floats_at(target, n_rows * STRIP)
    for i in range(n_rows * STRIP):
        b[i] = a[i]


@kernel
def _part(n_strips, share):
    """This thread's strips; channels are divided always, for a sequence may lie in panels of all threads."""
    return n_strips * share.thread // share.threads, n_strips * (share.thread + 1) // share.threads


@kernel
def ssm_conv(x, row, n_channels, weight, bias, runs, state, layer, share, scratch):
    """Depthwise convolution over the past, its bias and SiLU, in place, for this thread's channels.

    Args:
        x: (P, >= row + n_channels padded to whole strips, NR) float32, channels from `row` on.
        weight, bias: (strips, W, STRIP) and (strips, 1, STRIP) float32, of one layer.
        state: of the convolution, all layers; overwritten where runs end.
        scratch: address of `scratch_floats` float32.
    """
    n_strips, width = weight.shape[0], weight.shape[1]
    first, last = _part(n_strips, share)
    done = scratch + _TURNED * 4
    spare = done + _TURNED * 4
    line = spare + STRIP * STRIP * 4
    r0 = 0
    for p in range(share.n_panels):
        panel, n_tokens = address(x) + p * x.shape[1] * NR * 4, min(NR, share.n_tokens - p * NR)
        r1 = r0
        while r1 < runs.cells.size and runs.starts[r1] < p * NR + n_tokens:
            r1 += 1
        for s in range(first, last):
            held = min(STRIP, n_channels - s * STRIP)
            _turn(panel, row + s * STRIP, held, n_tokens, scratch)
            weights, biases = address(weight) + s * width * _ROW, address(bias) + s * _ROW
            for r in range(r0, r1):
                start, count = runs.starts[r] - p * NR, runs.starts[r + 1] - runs.starts[r]
                cell = np.int64(runs.cells[r]) * state.shape[1] + layer
                past = address(state) + (cell * n_strips + s) * (width - 1) * _ROW
                _move(past, line, width - 1)
                _move(scratch + start * _ROW, line + (width - 1) * _ROW, count)
                conv_steps(line, count, weights, width, biases, done + start * _ROW)
                _move(line + count * _ROW, past, width - 1)
            _turn_back(done, panel, row + s * STRIP, held, n_tokens, spare)
        r0 = r1


class ScanRows(NamedTuple):
    """Where the operands of a scan begin among the rows of their panels; all but `dt` in the same array.

    `y` is the output and may be `x` or `z`. A row of dt serves `head_width` channels.
    """

    x: int
    z: int
    y: int
    dt: int
    b: int
    c: int
    head_width: int


@kernel
def ssm_scan(v, low, steps, rows, n_channels, n_groups, a, bias, d, runs, state, layer, share, scratch):
    """softplus, discretization, recurrence, output by C, the D skip and the gate, for this thread's channels.

    Args:
        v, low, steps: panels (P, rows, NR) float32 of x, z and y; of B and C; of dt. They may be one array.
        rows: where in them; B and C are (n_groups, N) rows. Rows up to a whole strip more must be there.
        n_channels: E, each of n_groups has as many.
        a, bias, d: (strips, N or 1, STRIP), (strips, 1, STRIP) twice; float32, of one layer. A <= 0.
        state: h of all layers; overwritten where runs end.
        scratch: address of `scratch_floats` float32.
    """
    n_strips, n_rates, n_states = a.shape[0], a.shape[1], state.shape[3]
    first, last = _part(n_strips, share)
    per_group, of_group = n_strips // n_groups, n_channels // n_groups
    dts = scratch + _TURNED * 4
    zs = dts + _TURNED * 4
    done = zs + _TURNED * 4
    spare = done + _TURNED * 4
    r0 = 0
    for p in range(share.n_panels):
        n_tokens = min(NR, share.n_tokens - p * NR)
        panel = address(v) + p * v.shape[1] * NR * 4
        panel_low = address(low) + p * low.shape[1] * NR * 4
        panel_dt = address(steps) + p * steps.shape[1] * NR * 4
        r1 = r0
        while r1 < runs.cells.size and runs.starts[r1] < p * NR + n_tokens:
            r1 += 1
        for s in range(first, last):
            group, in_group = s // per_group, s % per_group * STRIP
            held, channel = min(STRIP, of_group - in_group), group * of_group + in_group
            _turn(panel, rows.x + channel, held, n_tokens, scratch)
            _turn(panel, rows.z + channel, held, n_tokens, zs)
            if rows.head_width == 1:
                _turn(panel_dt, rows.dt + channel, held, n_tokens, dts)
            else:
                _turn_heads(panel_dt, rows.dt, channel, rows.head_width, held, n_tokens, spare, dts)
            b = panel_low + (rows.b + group * n_states) * NR * 4
            c = panel_low + (rows.c + group * n_states) * NR * 4
            rates = address(a) + s * n_rates * _ROW
            biases, skips = address(bias) + s * _ROW, address(d) + s * _ROW
            for r in range(r0, r1):
                start, count = runs.starts[r] - p * NR, runs.starts[r + 1] - runs.starts[r]
                cell = np.int64(runs.cells[r]) * state.shape[1] + layer
                h = address(state) + (cell * n_strips + s) * n_states * _ROW
                at, token = start * _ROW, start * 4
                if n_rates == 1:
                    scan_steps_shared(
                        scratch + at, dts + at, zs + at, count, b + token, c + token, rates, n_states, biases,
                        skips, h, done + at,
                    )  # fmt: skip
                else:
                    scan_steps(
                        scratch + at, dts + at, zs + at, count, b + token, c + token, rates, n_states, biases,
                        skips, h, done + at,
                    )  # fmt: skip
            _turn_back(done, panel, rows.y + channel, held, n_tokens, spare)
        r0 = r1


@kernel
def norm_rows(x, row, weight, eps, first, last, n_tokens, work):
    """RMSNorm of weight.size rows from `row` on, in place, for panels first <= p < last.

    x: (P, rows, NR) float32. The sum of squares is one float64 chain in rising order of rows, as in
    engine.kernels.norm.
    """
    width, sums = weight.size, doubles_at(work[SUMS], NR)
    for p in range(first, last):
        lanes = lanes_used(n_tokens, p)
        for t in range(lanes):
            sums[t] = 0.0
        for d in range(width):
            for t in range(lanes):
                value = np.float64(x[p, row + d, t])
                sums[t] += value * value
        for t in range(lanes):
            sums[t] = 1.0 / np.sqrt(sums[t] / width + eps)
        for d in range(width):
            for t in range(lanes):
                x[p, row + d, t] = x[p, row + d, t] * np.float32(sums[t]) * weight[d]
