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
(engine.kernels.product); each projection leaves its result in `normed`, and the next norm adds it to the
residual `x` on the way. The layers themselves are one kernel, engine.kernels.llama_layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from engine.errors import UnsupportedModel
from engine.hparams import LlamaParams, Rope, llama_params
from engine.kernels.llama_layers import Layers, Shape, Stream, run_layers
from engine.kernels.product import Share
from engine.kernels.rope import rope_frequencies, rope_magnitude, rope_table
from engine.kernels.tile import NR, STRIP
from engine.models.decoder import Decoder, LayerMatrices, Output, Sizes
from engine.state import KVCache, Rotation, kv_bytes
from engine.weights import Fields, matrix, optional_vector, tasks, vector

if TYPE_CHECKING:
    from engine.gguf import GGUFFile


def _layers(file: GGUFFile, p: LlamaParams, matrices: LayerMatrices) -> Layers:
    """What the kernel reads; owns the private copies of norms."""
    find, every = vector if p.variant.head_norms else optional_vector, p.variant.unrotated_every

    def stacked(name: str, size: int, read: Callable[..., NDArray[np.float32]]) -> NDArray[np.float32]:
        return np.stack([read(file, f"blk.{i}.{name}.weight", size) for i in range(p.n_layers)])

    attn_norm, ffn_norm = (stacked(name, p.width, vector) for name in ("attn_norm", "ffn_norm"))
    q_norm, k_norm = (stacked(f"attn_{name}_norm", p.head_width, find) for name in "qk")
    rotated = np.array([every == 0 or (i + 1) % every != 0 for i in range(p.n_layers)], np.uint8)
    output_norm = vector(file, "output_norm.weight", p.width) / np.float32(p.logit_scale)
    embedding = matrix(file, "token_embd.weight", p.n_vocab, p.width)
    return Layers(
        matrices.fields(), attn_norm, ffn_norm, q_norm, k_norm, rotated, output_norm, embedding.fields,
        np.float32(p.embedding_scale / p.residual_scale),
    )  # fmt: skip


class Llama(Decoder):
    """A LLaMA-architecture model on a mapped file; see `engine.model.Model` for the interface."""

    INPUTS = (("attn_q", "attn_k", "attn_v"), ("attn_output",), ("ffn_gate", "ffn_up"), ("ffn_down",))
    PER_LAYER = "rotated"

    def __init__(
        self,
        file: GGUFFile,
        threads: int,
        batch_tokens: int,
        activations: str,
        beside: Decoder | None = None,
    ) -> None:
        self.params = p = llama_params(file)
        q_width, kv_width = p.n_heads * p.head_width, p.n_kv_heads * p.head_width
        shapes = {
            "attn_q": (q_width, p.width), "attn_k": (kv_width, p.width), "attn_v": (kv_width, p.width),
            "attn_output": (p.width, q_width), "ffn_gate": (p.ff_width, p.width),
            "ffn_up": (p.ff_width, p.width), "ffn_down": (p.width, p.ff_width),
        }  # fmt: skip
        matrices = LayerMatrices(file, p.n_layers, shapes, activations)
        layers = _layers(file, p, matrices)
        self._frequencies, self._magnitude = _rotation(file, p.rope)
        _refuse_strangers(file, p)

        self._shape = Shape(
            p.n_heads, p.n_kv_heads, p.head_width, p.rope.halves, np.float32(p.attention_scale),
            p.norm_eps / p.residual_scale / p.residual_scale, p.norm_eps,
        )  # fmt: skip
        sizes = _sizes(p, threads, batch_tokens, activations)
        super().__init__(file, p.width, p.n_vocab, layers, matrices, sizes, beside)
        self.stream = Stream(*self.scratch.stream)
        self.normed, self.wide = self.stream.normed, self.stream.ff
        self.outputs = (  # q holds what attention made of it, x the residual, ff the gated product
            Output("attn_v", "v", 0, kv_width),
            Output("attn_k", "k", 0, kv_width),
            Output("attn_q", "q", 0, q_width),
            Output("attn_output", "x", 0, p.width),
            Output("ffn_up", "ff", 0, p.ff_width),
            Output("ffn_down", "normed", 0, p.width),
        )

    def new_cache(self, n_slots: int, capacity: int, kv: str = "f32", *, fleeting: bool = False) -> KVCache:
        """A cache of `n_slots` sequences of up to `capacity` positions; see KVCache."""
        p = self.params
        rotation = Rotation(self._frequencies, p.rope.halves, self.layers.rotated)
        return KVCache(n_slots, capacity, p.n_layers, p.n_kv_heads, p.head_width, kv, fleeting, rotation)

    def _run_layers(
        self,
        tokens: NDArray[np.int32],
        slots: NDArray[np.int32],
        positions: NDArray[np.int32],
        cells: NDArray[np.int32],
        cache: KVCache,
    ) -> None:
        shares = self._crew.shares(tokens.size)
        runs = [tasks(slots, share) for share in shares]
        s = self.stream
        rope_table(positions, self._frequencies, self._magnitude, s.cos, s.sin)

        def kernel(first: int, last: int, share: Share, work: Fields, gate: Fields) -> None:
            run_layers(
                first, last, self.layers, self._shape, s, tokens, slots, cells, cache.present,
                *runs[share.thread], cache.keys, cache.values, share, work, gate,
            )  # fmt: skip

        self._run(self.params.n_layers, shares, kernel)


def footprint(
    p: LlamaParams,
    threads: int,
    batch_tokens: int,
    n_slots: int,
    capacity: int,
    kv: str,
    fleeting: bool,
    activations: str,
) -> tuple[int, int]:
    """Bytes of a model and of a cache; see `engine.footprint`."""
    cache = kv_bytes(n_slots, capacity, p.n_layers, p.n_kv_heads, p.head_width, kv, fleeting)
    return _sizes(p, threads, batch_tokens, activations).nbytes, cache


def _sizes(p: LlamaParams, threads: int, batch_tokens: int, activations: str) -> Sizes:
    """Of what it computes in; the stream in the order of `Stream`."""
    n_panels, pairs = -(-batch_tokens // NR), p.rope.width // 2
    q, kv = p.n_heads * p.head_width, p.n_kv_heads * p.head_width
    rows = [-(-r // STRIP) * STRIP for r in (p.width, p.width, q, kv, kv, max(p.ff_width, p.width))]
    stream = tuple((n_panels, r, NR) for r in (*rows, pairs, pairs))
    return Sizes(threads, batch_tokens, activations, (p.width, q, p.ff_width), p.head_width, stream)


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
