"""The layers of Mamba and of Mamba-2 (engine.models.mamba) in one kernel each, run by all threads at once.

Steps that go through tokens alone are divided as a `Share` says; the convolution and the scan by channels
always, for a sequence may lie in the panels of several threads. Where the division changes all threads meet.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.kernels._jit import kernel
from engine.kernels.native import address, ticks
from engine.kernels.norm import add_rms_norm
from engine.kernels.panels import embed
from engine.kernels.product import (
    ATTEND,
    EMBED,
    NORM,
    ROTATE,
    enter,
    enter_and_meet,
    meet_all,
    project,
    spend,
)
from engine.kernels.ssm import ScanRows, norm_rows, ssm_conv, ssm_scan

IN, OUT, X, DT = range(4)  # matrices of a layer; Mamba-2 has the first two
CONV, SCAN = ROTATE, ATTEND  # of a thread's clock: what attention's items stand for here


class Layers(NamedTuple):
    """Weights of L layers; strips as `engine.kernels.ssm.strips_of` makes them.

    Attributes:
        matrices: (L, 4 or 2, FIELDS) int64, in the order IN OUT X DT.
        norm: (L, D) float32.
        conv_weight, conv_bias: (L, strips, W or 1, STRIP) float32.
        a, dt_bias, d: (L, strips, N or 1, STRIP) float32.
        inner_norm: Mamba: (L, R + N) of ones where dt, B and C are normed, else (L, 0); Mamba-2: (L, E).
        output_norm: (D,) float32, of the residual after the last layer.
        embedding: (FIELDS,) int64.
    """

    matrices: NDArray[np.int64]
    norm: NDArray[np.float32]
    conv_weight: NDArray[np.float32]
    conv_bias: NDArray[np.float32]
    a: NDArray[np.float32]
    dt_bias: NDArray[np.float32]
    d: NDArray[np.float32]
    inner_norm: NDArray[np.float32]
    output_norm: NDArray[np.float32]
    embedding: NDArray[np.int64]


class Shape(NamedTuple):
    """Numbers of the architecture; Mamba has one group, and heads of one channel."""

    inner: int
    n_states: int
    dt_rank: int
    n_groups: int
    head_width: int
    eps: float


class Stream(NamedTuple):
    """Activations of a batch: panels (P, rows, NR) float32, and what threads turn panels with.

    Attributes:
        x, normed: D rows.
        inner: what IN gives, 2 E rows (Mamba-2: 2 E + 2 G N + H) and a strip more.
        low: what X gives: dt of R rows, B and C of N rows; Mamba-2: none.
        dt: what DT gives, E rows; Mamba-2: none.
        scratch: (threads, scratch_floats) float32.
    """

    x: NDArray[np.float32]
    normed: NDArray[np.float32]
    inner: NDArray[np.float32]
    low: NDArray[np.float32]
    dt: NDArray[np.float32]
    scratch: NDArray[np.float32]


@kernel
def _meet_by_rows(gate, share, work):
    """The same where threads divide products by rows."""
    if share.by_rows:
        meet_all(gate, share, work)


@kernel
def _norm(stream, weight, eps, share, work):
    """x += normed; normed = rms_norm(x) * weight."""
    began = ticks()
    x, normed = stream.x, stream.normed
    add_rms_norm(x, normed, weight, eps, share.first, share.last, share.n_tokens, work, normed)
    spend(work, NORM, began)


@kernel
def _begin(layers, stream, tokens, share, work):
    """The embeddings of `tokens` to add to a residual of zero."""
    began = ticks()
    stream.x[share.first : share.last] = np.float32(0.0)
    embed(layers.embedding, tokens, np.float32(1.0), share.first, share.last, work, stream.normed)
    spend(work, EMBED, began)


@kernel
def _norm_and_enter(stream, weight, eps, m, share, work, gate):
    """`_norm` of what all threads multiply with weight `m` next."""
    _norm(stream, weight, eps, share, work)
    enter(stream.normed, m, share, work)
    _meet_by_rows(gate, share, work)


@kernel
def run_mamba_layers(first, last, layers, shape, stream, tokens, runs, conv_state, state, share, work, gate):
    """Layers first <= l < last of Mamba or FalconMamba for this thread's share.

    The first one begins with the embeddings of `tokens`. What a layer adds to `stream.x` is left in
    `stream.normed`, after the last one the final norm.

    Args:
        tokens: (T,) int32.
        runs: engine.kernels.ssm.Runs; conv_state, state: see there.
        gate: (2,) int64 zeros, the same for all threads of this call (engine.kernels.native.meet).
    """
    s, inner, low = shape, stream.inner, stream.low
    scratch = address(stream.scratch) + share.thread * stream.scratch.shape[1] * 4
    rows = ScanRows(0, s.inner, 0, 0, s.dt_rank, s.dt_rank + s.n_states, 1)
    if first == 0:
        _begin(layers, stream, tokens, share, work)
    for index in range(first, last):
        m = layers.matrices[index]
        _norm_and_enter(stream, layers.norm[index], s.eps, m[IN], share, work, gate)
        project(m[IN], stream.normed, inner, share, work)
        meet_all(gate, share, work)
        began = ticks()
        weight, bias = layers.conv_weight[index], layers.conv_bias[index]
        ssm_conv(inner, 0, s.inner, weight, bias, runs, conv_state, index, share, scratch)
        spend(work, CONV, began)
        meet_all(gate, share, work)
        enter_and_meet(inner, m[X], share, work, gate)
        project(m[X], inner, low, share, work)
        _meet_by_rows(gate, share, work)
        ones = layers.inner_norm[index]
        if ones.size > 0:
            of_dt, of_state = ones[: s.dt_rank], ones[s.dt_rank :]
            p0, p1 = share.first, share.last
            norm_rows(low, 0, of_dt, s.eps, p0, p1, share.n_tokens, work)
            norm_rows(low, rows.b, of_state, s.eps, p0, p1, share.n_tokens, work)
            norm_rows(low, rows.c, of_state, s.eps, p0, p1, share.n_tokens, work)
            _meet_by_rows(gate, share, work)
        enter_and_meet(low, m[DT], share, work, gate)
        project(m[DT], low, stream.dt, share, work)
        meet_all(gate, share, work)
        began = ticks()
        a, dt_bias, d = layers.a[index], layers.dt_bias[index], layers.d[index]
        ssm_scan(
            inner, low, stream.dt, rows, s.inner, 1, a, dt_bias, d, runs, state, index, share, scratch,
        )  # fmt: skip
        spend(work, SCAN, began)
        meet_all(gate, share, work)
        enter_and_meet(inner, m[OUT], share, work, gate)
        project(m[OUT], inner, stream.normed, share, work)
        _meet_by_rows(gate, share, work)
    if last == layers.norm.shape[0]:
        _norm(stream, layers.output_norm, s.eps, share, work)


@kernel
def run_mamba2_layers(first, last, layers, shape, stream, tokens, runs, conv_state, state, share, work, gate):
    """The same of Mamba-2; rows of `stream.inner` are z, x, B, C and dt, and y takes the place of z."""
    s, inner = shape, stream.inner
    shared = s.n_groups * s.n_states
    scratch = address(stream.scratch) + share.thread * stream.scratch.shape[1] * 4
    x_row, n_conv = s.inner, s.inner + 2 * shared
    rows = ScanRows(x_row, 0, 0, x_row + n_conv, x_row + s.inner, x_row + s.inner + shared, s.head_width)
    width = s.inner // s.n_groups
    if first == 0:
        _begin(layers, stream, tokens, share, work)
    for index in range(first, last):
        m = layers.matrices[index]
        _norm_and_enter(stream, layers.norm[index], s.eps, m[IN], share, work, gate)
        project(m[IN], stream.normed, inner, share, work)
        meet_all(gate, share, work)
        began = ticks()
        weight, bias = layers.conv_weight[index], layers.conv_bias[index]
        ssm_conv(inner, x_row, n_conv, weight, bias, runs, conv_state, index, share, scratch)
        began = spend(work, CONV, began)
        meet_all(gate, share, work)  # a thread's channels need the B and C of others
        began = ticks()
        a, dt_bias, d = layers.a[index], layers.dt_bias[index], layers.d[index]
        ssm_scan(
            inner, inner, inner, rows, s.inner, s.n_groups, a, dt_bias, d, runs, state, index, share, scratch,
        )  # fmt: skip
        spend(work, SCAN, began)
        meet_all(gate, share, work)
        began = ticks()
        for group in range(s.n_groups):
            of_group = layers.inner_norm[index][group * width : (group + 1) * width]
            p0, p1 = share.first, share.last
            norm_rows(inner, group * width, of_group, s.eps, p0, p1, share.n_tokens, work)
        spend(work, NORM, began)
        _meet_by_rows(gate, share, work)
        enter_and_meet(inner, m[OUT], share, work, gate)
        project(m[OUT], inner, stream.normed, share, work)
        _meet_by_rows(gate, share, work)
    if last == layers.norm.shape[0]:
        _norm(stream, layers.output_norm, s.eps, share, work)
