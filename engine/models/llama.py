"""LLaMA and its near relatives: pre-norm attention with rotary positions and grouped queries, SwiGLU layers.

    x = embed(tokens)
    for each layer:  x = x + attn_output(attend(rope(Wq n), rope(Wk n), Wv n))     n = rms_norm(x) * attn_norm
                     x = x + ffn_down(silu(ffn_gate n) * ffn_up n)                 n = rms_norm(x) * ffn_norm
    logits = output (rms_norm(x) * output_norm)                                    output = token_embd when
    tied

Relatives differ by `engine.hparams.Variant`: biases of the attention's projections and other rotary pairs
(Qwen2, arXiv:2407.10671); in each head q = rms_norm(q) * attn_q_norm and k likewise, before rope (Qwen3,
arXiv:2505.09388); layers without rope (SmolLM3; Yang et al. 2025, arXiv:2501.18795); scales (Granite; Yang et
al. 2022, arXiv:2203.03466): x = embedding_scale embed(tokens), x = x + residual_scale (...), logits over
logit_scale. Scales cost no step: x is kept divided by residual_scale, so that its norms only see another
epsilon, and logit_scale is part of output_norm.

Sources: Touvron et al. 2023, arXiv:2302.13971; GGUF's tensor names. Activations are panels
(engine.kernels.matmul); each projection leaves its result in `normed`, and the next norm adds it to the
residual `x` on the way.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import CapacityError, UnsupportedModel
from engine.hparams import LlamaParams, Rope, llama_params
from engine.kernels.attention import attend, store_keys_values
from engine.kernels.heads import norm_heads
from engine.kernels.logprob import (
    HEAD_ROWS,
    gather_columns,
    logits_block,
    negative_log_likelihoods,
    score_block,
)
from engine.kernels.norm import add_rms_norm
from engine.kernels.panels import embed
from engine.kernels.rope import rope_frequencies, rope_magnitude, rope_table, rotate
from engine.kernels.tile import MR, NR
from engine.state import KVCache
from engine.weights import (
    Crew,
    Matrix,
    Part,
    Scratch,
    matrix,
    optional_vector,
    project,
    project_swiglu,
    vector,
)

if TYPE_CHECKING:
    from engine.batch import Batch
    from engine.gguf import GGUFFile


class _Layer:
    """Weights of one block."""

    def __init__(self, file: GGUFFile, index: int, p: LlamaParams) -> None:
        def named(name: str, rows: int, columns: int) -> Matrix:
            return matrix(file, f"blk.{index}.{name}.weight", rows, columns)

        every, find = p.variant.unrotated_every, vector if p.variant.head_norms else optional_vector
        self.is_rotated = every == 0 or (index + 1) % every != 0
        self.q_norm = find(file, f"blk.{index}.attn_q_norm.weight", p.head_width)
        self.k_norm = find(file, f"blk.{index}.attn_k_norm.weight", p.head_width)
        self.attn_norm = vector(file, f"blk.{index}.attn_norm.weight", p.width)
        self.ffn_norm = vector(file, f"blk.{index}.ffn_norm.weight", p.width)
        self.q = named("attn_q", p.n_heads * p.head_width, p.width)
        self.k = named("attn_k", p.n_kv_heads * p.head_width, p.width)
        self.v = named("attn_v", p.n_kv_heads * p.head_width, p.width)
        self.out = named("attn_output", p.width, p.n_heads * p.head_width)
        self.gate = named("ffn_gate", p.ff_width, p.width)
        self.up = named("ffn_up", p.ff_width, p.width)
        self.down = named("ffn_down", p.width, p.ff_width)


class Llama:
    """A LLaMA-architecture model on a mapped file; see `engine.model.Model` for the interface."""

    def __init__(self, file: GGUFFile, *, threads: int = 1, batch_tokens: int = 4096) -> None:
        self.params = p = llama_params(file)
        self.n_vocab, self.batch_tokens = p.n_vocab, batch_tokens
        self._file = file  # keeps the mapping open for as long as its views are used
        self._embedding = matrix(file, "token_embd.weight", p.n_vocab, p.width)
        tied = "output.weight" not in file.tensors
        self._head = self._embedding if tied else matrix(file, "output.weight", p.n_vocab, p.width)
        self._layers = [_Layer(file, i, p) for i in range(p.n_layers)]
        self._output_norm = vector(file, "output_norm.weight", p.width) / np.float32(p.logit_scale)
        self._embedding_scale = np.float32(p.embedding_scale / p.residual_scale)
        self._norm_eps = p.norm_eps / p.residual_scale / p.residual_scale
        self._frequencies, self._magnitude = _rotation(file, p.rope)
        _refuse_strangers(file, p)

        depths = (p.width, p.n_heads * p.head_width, p.ff_width)
        self._crew = Crew(threads, lambda: Scratch(depths, p.head_width))
        n_panels = -(-batch_tokens // NR)

        def panels(rows: int) -> NDArray[np.float32]:
            return np.zeros((n_panels, -(-rows // MR) * MR, NR), np.float32)

        self._x, self._normed = panels(p.width), panels(p.width)
        self._q = panels(p.n_heads * p.head_width)
        self._k, self._v = panels(p.n_kv_heads * p.head_width), panels(p.n_kv_heads * p.head_width)
        self._ff = panels(max(p.ff_width, p.width))
        self._cos, self._sin = (np.zeros((n_panels, p.rope.width // 2, NR), np.float32) for _ in range(2))
        self._state = np.zeros((3, n_panels, NR), np.float64)  # of log-sum-exp: maximum, sum, target's logit

    @property
    def nbytes(self) -> int:
        """Bytes of activations and scratch; the weights' pages belong to the mapping."""
        own = (self._x, self._normed, self._q, self._k, self._v, self._ff, self._cos, self._sin, self._state)
        return sum(a.nbytes for a in own) + sum(s.nbytes for s in self._crew.scratches)

    def new_cache(self, n_slots: int, capacity: int, kv: str = "f32", *, fleeting: bool = False) -> KVCache:
        """A cache of `n_slots` sequences of up to `capacity` positions; see KVCache."""
        p = self.params
        return KVCache(n_slots, capacity, p.n_layers, p.n_kv_heads, p.head_width, kv, fleeting)

    def nll(self, batch: Batch, cache: KVCache) -> NDArray[np.float64]:
        """-ln p(target) in nats of every token with a target, in batch order: float64 (n_scored,)."""
        rows = np.flatnonzero(batch.targets >= 0)
        targets = batch.targets[rows]
        if rows.size and targets.max() >= self.n_vocab:
            raise ValueError(f"target {targets.max()} of a vocabulary of {self.n_vocab}")
        self._forward(batch, cache)
        if rows.size == 0:
            return np.empty(0, np.float64)
        self._gather(batch, rows)
        top, total, hit = self._state
        for array, start in ((top, -3.0e38), (total, 0.0), (hit, 0.0)):
            array.fill(start)
        self._crew.run(self._score, self._crew.parts(rows.size), targets)
        out = np.empty(rows.size, np.float64)
        negative_log_likelihoods(top, total, hit, out)
        return out

    def logits(self, batch: Batch, cache: KVCache) -> NDArray[np.float32]:
        """Logits of every token marked in `batch.outputs`, in batch order: float32 (n_outputs, V)."""
        rows = np.flatnonzero(batch.outputs)
        self._forward(batch, cache)
        out = np.empty((rows.size, self.n_vocab), np.float32)
        if rows.size:
            self._gather(batch, rows)
            self._crew.run(self._write_logits, self._crew.parts(rows.size), out)
        return out

    def _forward(self, batch: Batch, cache: KVCache) -> None:
        """Runs the layers; then `normed` holds the final norm of the tokens in the order `batch.order`."""
        size = len(batch)
        if size > self.batch_tokens:
            raise CapacityError(f"a batch of {size} tokens; the model was loaded for {self.batch_tokens}")
        tokens = batch.tokens[batch.order]
        if tokens.min() < 0 or tokens.max() >= self.n_vocab:
            raise ValueError(
                f"token ids from {tokens.min()} to {tokens.max()}; expected 0 to {self.n_vocab - 1}"
            )
        slots, positions = batch.slots[batch.order], batch.positions[batch.order]
        cache.claim(slots, positions)
        parts = [replace(part, tasks=_tasks(slots, part)) for part in self._crew.parts(size)]
        rope_table(positions, self._frequencies, self._magnitude, self._cos, self._sin)
        self._crew.run(self._embed, parts, tokens)
        for index, layer in enumerate(self._layers):
            keys, values = cache.layer(index)
            self._crew.run(self._project_qkv, parts, layer, slots, positions, keys, values)
            self._crew.run(self._attend_and_feed, parts, layer, slots, positions, cache.present, keys, values)
        self._crew.run(self._norm, parts, self._output_norm)
        cache.release()

    def _embed(self, part: Part, tokens: NDArray[np.int32]) -> None:
        """x = 0 and normed = embedding: the first norm adds them."""
        self._x[part.first : part.last] = 0
        step = part.scratch.rows.size // self.params.width
        for start in range(part.first * NR, min(part.last * NR, part.n_tokens), step):
            stop = min(start + step, part.last * NR, part.n_tokens)
            for i, token in enumerate(tokens[start:stop].tolist()):
                self._embedding.decode(token, 1, part.scratch.rows[i * self.params.width :])
            if self._embedding_scale != 1:
                part.scratch.rows[: (stop - start) * self.params.width] *= self._embedding_scale
            embed(part.scratch.rows, self.params.width, start, stop, self._normed)

    def _norm(self, part: Part, weight: NDArray[np.float32]) -> None:
        """x += normed; normed = rms_norm(x) * weight."""
        eps, sums = self._norm_eps, part.scratch.sums
        add_rms_norm(self._x, self._normed, weight, eps, part.first, part.last, sums, self._normed)

    def _project_qkv(
        self,
        part: Part,
        layer: _Layer,
        slots: NDArray[np.int32],
        positions: NDArray[np.int32],
        keys: NDArray[Any],
        values: NDArray[Any],
    ) -> None:
        p = self.params
        self._norm(part, layer.attn_norm)
        project(layer.q, self._normed, self._q, part)
        project(layer.k, self._normed, self._k, part)
        project(layer.v, self._normed, self._v, part)
        for x, n_heads, norm in ((self._q, p.n_heads, layer.q_norm), (self._k, p.n_kv_heads, layer.k_norm)):
            norm_heads(x, n_heads, norm, p.norm_eps, part.first, part.last, part.scratch.sums)
            if layer.is_rotated:
                halves = p.rope.halves
                rotate(x, n_heads, p.head_width, halves, self._cos, self._sin, part.first, part.last)
        first, last = part.first * NR, min(part.last * NR, part.n_tokens)
        store_keys_values(self._k, self._v, slots, positions, first, last, keys, values)

    def _attend_and_feed(
        self,
        part: Part,
        layer: _Layer,
        slots: NDArray[np.int32],
        positions: NDArray[np.int32],
        present: NDArray[np.uint8],
        keys: NDArray[Any],
        values: NDArray[Any],
    ) -> None:
        p, s = self.params, part.scratch
        starts, counts = part.tasks
        scale = np.float32(p.attention_scale)
        attend(
            self._q, p.n_heads, scale, positions, slots, present, starts, counts, keys, values,
            s.query, s.block_keys, s.block_values, s.scores, s.acc, s.lanes, self._q,
        )  # fmt: skip
        project(layer.out, self._q, self._normed, part)
        self._norm(part, layer.ffn_norm)
        project_swiglu(layer.gate, layer.up, self._normed, self._ff, part)
        project(layer.down, self._ff, self._normed, part)

    def _gather(self, batch: Batch, rows: NDArray[np.int64]) -> None:
        """Puts the final norm of the batch's tokens `rows` side by side into the feed-forward's panels."""
        place = np.empty(len(batch), np.int64)
        place[batch.order] = np.arange(len(batch))
        gather_columns(self._normed, place[rows], self.params.width, self._ff)

    def _score(self, part: Part, targets: NDArray[np.int32]) -> None:
        top, total, hit = self._state
        s = part.scratch
        for row in range(0, self.n_vocab, HEAD_ROWS):
            count = min(HEAD_ROWS, self.n_vocab - row)
            packed = self._head.packed(row, count, s)
            score_block(
                packed, count, self._ff, row, part.first, part.last, part.n_tokens, targets,
                s.product, s.sums, top, total, hit,
            )  # fmt: skip

    def _write_logits(self, part: Part, out: NDArray[np.float32]) -> None:
        for row in range(0, self.n_vocab, HEAD_ROWS):
            count = min(HEAD_ROWS, self.n_vocab - row)
            packed = self._head.packed(row, count, part.scratch)
            logits_block(
                packed, count, self._ff, row, part.first, part.last, part.n_tokens, part.scratch.product, out
            )


def _tasks(slots: NDArray[np.int32], part: Part) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Runs of at most NR neighbouring tokens of one slot among the tokens of `part`: (starts, counts)."""
    first, last = part.first * NR, min(part.last * NR, part.n_tokens)
    borders = np.flatnonzero(np.diff(slots[first:last])) + first + 1
    starts, counts = [], []
    for begin, end in zip([first, *borders.tolist()], [*borders.tolist(), last], strict=True):
        for start in range(begin, end, NR):
            starts.append(start)
            counts.append(min(NR, end - start))
    return np.array(starts, np.int64), np.array(counts, np.int64)


def _rotation(file: GGUFFile, rope: Rope) -> tuple[NDArray[np.float64], float]:
    """Radians per position of each pair, and what cosine and sine are multiplied with."""
    half = rope.width // 2
    factors = optional_vector(file, "rope_freqs.weight", half).astype(np.float64)
    if not ((factors > 0) & (factors < np.inf)).all():
        raise UnsupportedModel(f"{file.path}: tensor 'rope_freqs.weight' has factors that are not positive")
    frequencies = np.empty(half, np.float64)
    rope_frequencies(
        rope.base, factors if factors.size else np.ones(half), 1.0 / rope.factor, rope.yarn,
        float(rope.original_context), rope.beta_fast, rope.beta_slow, frequencies,
    )  # fmt: skip
    yarn = rope_magnitude(rope.factor, rope.log_multiplier) if rope.yarn else 1.0
    return frequencies, rope.attention_factor * yarn


def _refuse_strangers(file: GGUFFile, p: LlamaParams) -> None:
    """Raises UnsupportedModel for tensors that the forward pass would silently ignore."""
    block = "attn_norm attn_q attn_k attn_v attn_output ffn_norm ffn_gate ffn_up ffn_down".split()
    block += ["attn_q_norm", "attn_k_norm"] if p.variant.head_norms else []
    names = [f"{name}.weight" for name in block]
    names += [f"{name}.bias" for name in block[1 : 5 if p.variant.output_bias else 4]]
    known = {f"blk.{i}.{name}" for i in range(p.n_layers) for name in names}
    known |= {"token_embd.weight", "output.weight", "output_norm.weight", "rope_freqs.weight"}
    strangers = sorted(file.tensors.keys() - known)
    if strangers:
        raise UnsupportedModel(
            f"{file.path}: tensor {strangers[0]!r} ({len(strangers)} such) has no place in the "
            f"{p.architecture} architecture as computed here (no experts, and biases only of attention)"
        )
