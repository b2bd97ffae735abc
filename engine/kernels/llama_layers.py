"""The layers of LLaMA and its relatives (engine.models.llama) in one kernel, run by all threads at once.

A call a batch instead of one a product: a generated token passes thirty layers in a few milliseconds, in
which Python could dispatch no more than some hundred calls.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.kernels._jit import kernel
from engine.kernels.attention import attend, store_keys_values
from engine.kernels.native import ticks
from engine.kernels.norm import add_rms_norm, norm_heads
from engine.kernels.panels import embed
from engine.kernels.product import (
    ATTEND,
    EMBED,
    NORM,
    ROTATE,
    STORE,
    enter,
    enter_and_meet,
    meet_all,
    own_panels,
    own_part,
    project,
    project_swiglu,
    spend,
)
from engine.kernels.rope import rotate
from engine.kernels.tile import NR

Q, K, V, OUT, GATE, UP, DOWN = range(7)


class Layers(NamedTuple):
    """Weights of L layers.

    Attributes:
        matrices: (L, 7, FIELDS) int64, in the order Q K V OUT GATE UP DOWN.
        attn_norm, ffn_norm: (L, D) float32.
        output_norm: (D,) float32, after the last layer.
        embedding: (FIELDS,) int64; `embedding_scale` multiplies it.
        q_norm, k_norm: (L, K) float32, or (L, 0) where heads are not normed.
        rotated: (L,) uint8, 1 where queries and keys turn with their positions.
    """

    matrices: NDArray[np.int64]
    attn_norm: NDArray[np.float32]
    ffn_norm: NDArray[np.float32]
    q_norm: NDArray[np.float32]
    k_norm: NDArray[np.float32]
    rotated: NDArray[np.uint8]
    output_norm: NDArray[np.float32]
    embedding: NDArray[np.int64]
    embedding_scale: np.float32


class Shape(NamedTuple):
    """Numbers of the architecture; `norm_eps` is of the residual's norms, `head_eps` of the heads'."""

    n_heads: int
    n_kv_heads: int
    head_width: int
    rope_halves: bool
    scale: np.float32
    norm_eps: float
    head_eps: float


class Stream(NamedTuple):
    """Activations of a batch: panels (P, rows, NR) float32; cos and sin are (P, pairs, NR)."""

    x: NDArray[np.float32]
    normed: NDArray[np.float32]
    q: NDArray[np.float32]
    k: NDArray[np.float32]
    v: NDArray[np.float32]
    ff: NDArray[np.float32]
    cos: NDArray[np.float32]
    sin: NDArray[np.float32]


@kernel
def _norm(stream, weight, eps, share, work):
    """x += normed; normed = rms_norm(x) * weight."""
    began = ticks()
    x, normed = stream.x, stream.normed
    add_rms_norm(x, normed, weight, eps, share.first, share.last, share.n_tokens, work, normed)
    spend(work, NORM, began)


@kernel
def run_layers(
    first, last, layers, shape, stream, tokens, slots, cells, present, starts, counts, keys, values, share,
    work, gate,
):  # fmt: skip
    """Layers first <= l < last for this thread's share.

    The first one begins with the embeddings of `tokens`. What a layer adds to `stream.x` is left in
    `stream.normed`, after the last one the final norm.

    Args:
        tokens, slots, cells: (T,) int32, where each token's keys go; present: (S, C) uint8.
        starts, counts: (n,) int64, the runs of tokens of one slot that this thread's attention takes.
        keys, values: of all layers, or of one that serves them all; see engine.state.KVCache.
        gate: (2,) int64 zeros, the same for all threads of this call (engine.kernels.native.meet).
    """
    s, n_tokens = shape, share.n_tokens
    normed, q, k, v, ff = stream.normed, stream.q, stream.k, stream.v, stream.ff
    head0, head1 = own_part(s.n_heads, share)
    group0, group1 = own_part(s.n_kv_heads, share)
    p0, p1 = own_panels(share)
    if first == 0:
        began = ticks()
        stream.x[share.first : share.last] = np.float32(0.0)  # the first norm adds the embedding
        embed(layers.embedding, tokens, layers.embedding_scale, share.first, share.last, work, normed)
        spend(work, EMBED, began)
    for index in range(first, last):
        m = layers.matrices[index]
        kept = index if keys.shape[0] > 1 else 0
        _norm(stream, layers.attn_norm[index], s.norm_eps, share, work)
        enter(normed, m[Q], share, work)
        if share.by_rows:
            meet_all(gate, share, work)
        project(m[Q], normed, q, share, work)
        project(m[K], normed, k, share, work)
        project(m[V], normed, v, share, work)
        if share.by_rows:
            meet_all(gate, share, work)
        began = ticks()
        norm_heads(q, head0, head1, layers.q_norm[index], s.head_eps, p0, p1, n_tokens, work)
        norm_heads(k, group0, group1, layers.k_norm[index], s.head_eps, p0, p1, n_tokens, work)
        began = spend(work, NORM, began)
        if layers.rotated[index]:
            rotate(q, head0, head1, s.head_width, s.rope_halves, stream.cos, stream.sin, p0, p1, n_tokens)
            rotate(k, group0, group1, s.head_width, s.rope_halves, stream.cos, stream.sin, p0, p1, n_tokens)
        began = spend(work, ROTATE, began)
        t0, t1 = p0 * NR, min(p1 * NR, n_tokens)
        store_keys_values(k, v, slots, cells, t0, t1, group0, group1, keys[kept], values[kept])
        spend(work, STORE, began)
        meet_all(gate, share, work)
        began = ticks()
        attend(
            q, s.n_heads, head0, head1, s.scale, cells, slots, present, starts, counts, keys[kept],
            values[kept], work, q,
        )  # fmt: skip
        spend(work, ATTEND, began)
        if share.by_rows:
            meet_all(gate, share, work)
        enter_and_meet(q, m[OUT], share, work, gate)
        project(m[OUT], q, normed, share, work)
        if share.by_rows:
            meet_all(gate, share, work)
        _norm(stream, layers.ffn_norm[index], s.norm_eps, share, work)
        enter(normed, m[GATE], share, work)
        if share.by_rows:
            meet_all(gate, share, work)
        project_swiglu(m[GATE], m[UP], normed, ff, share, work)
        if share.by_rows:
            meet_all(gate, share, work)
        enter_and_meet(ff, m[DOWN], share, work, gate)
        project(m[DOWN], ff, normed, share, work)
        if share.by_rows or keys.shape[0] == 1:
            meet_all(gate, share, work)  # before the next layer's keys replace those that others still read
    if last == layers.rotated.size:
        _norm(stream, layers.output_norm, s.norm_eps, share, work)
