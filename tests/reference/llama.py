"""The LLaMA forward pass in float64 NumPy, from the papers (arXiv:2302.13971, 2104.09864, 2305.13245,
2002.05202).

Token by token over whole matrices, no cache, no blocking: slow and plain, written without looking at the
engine. Weights come decoded by the `gguf` package, so that not even the file reader is shared with what is
tested.
"""

from __future__ import annotations

import gguf
import numpy as np
from gguf.quants import dequantize


class ReferenceLlama:
    """All weights of a GGUF file in float64."""

    def __init__(self, path) -> None:
        reader = gguf.GGUFReader(path)
        self.w = {t.name: dequantize(t.data, t.tensor_type).astype(np.float64) for t in reader.tensors}

        def meta(key, default=None):
            field = reader.fields.get(f"llama.{key}")
            return default if field is None else field.contents()

        self.n_layers, self.n_heads = meta("block_count"), meta("attention.head_count")
        self.n_kv_heads = meta("attention.head_count_kv", self.n_heads)
        self.head_width = meta("attention.key_length", meta("embedding_length") // self.n_heads)
        self.rope_width = meta("rope.dimension_count", self.head_width)
        self.base, self.eps = meta("rope.freq_base", 10000.0), meta("attention.layer_norm_rms_epsilon")

    def logits(self, tokens) -> np.ndarray:
        """float64 (T, V) logits of one sequence from position 0."""
        x = self.w["token_embd.weight"][np.asarray(tokens)]
        for i in range(self.n_layers):
            x = x + self._attention(self._norm(x, f"blk.{i}.attn_norm.weight"), i)
            n = self._norm(x, f"blk.{i}.ffn_norm.weight")
            gate, up = n @ self.w[f"blk.{i}.ffn_gate.weight"].T, n @ self.w[f"blk.{i}.ffn_up.weight"].T
            x = x + (gate / (1 + np.exp(-gate)) * up) @ self.w[f"blk.{i}.ffn_down.weight"].T
        head = self.w.get("output.weight", self.w["token_embd.weight"])
        return self._norm(x, "output_norm.weight") @ head.T

    def nll(self, tokens, targets) -> np.ndarray:
        """float64 (T,): -log softmax(logits[t])[targets[t]]."""
        logits = self.logits(tokens)
        top = logits.max(axis=1)
        log_sum = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
        return log_sum - logits[np.arange(len(tokens)), np.asarray(targets)]

    def _norm(self, x, name):
        return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + self.eps) * self.w[name]

    def _rotate(self, x):
        half = self.rope_width // 2
        angle = np.arange(len(x))[:, None] * self.base ** (-np.arange(half) / half)
        cos, sin = np.cos(angle)[:, None, :], np.sin(angle)[:, None, :]
        out = x.copy()
        even, odd = x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
        out[..., 0 : 2 * half : 2] = even * cos - odd * sin
        out[..., 1 : 2 * half : 2] = even * sin + odd * cos
        return out

    def _attention(self, n, i):
        length = len(n)

        def heads(name, count):
            return (n @ self.w[f"blk.{i}.{name}.weight"].T).reshape(length, count, self.head_width)

        q, k = self._rotate(heads("attn_q", self.n_heads)), self._rotate(heads("attn_k", self.n_kv_heads))
        v = heads("attn_v", self.n_kv_heads)
        out = np.empty_like(q)
        for h in range(self.n_heads):
            g = h // (self.n_heads // self.n_kv_heads)
            scores = q[:, h] @ k[:, g].T / np.sqrt(self.head_width)
            scores[np.triu_indices(length, 1)] = -np.inf
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            out[:, h] = weights / weights.sum(axis=1, keepdims=True) @ v[:, g]
        return out.reshape(length, -1) @ self.w[f"blk.{i}.attn_output.weight"].T
