"""The LLaMA forward pass in float64 NumPy, from the papers (arXiv:2302.13971, 2104.09864, 2305.13245,
2002.05202), and its relatives' (Qwen 2 and 3, SmolLM3, Granite; positions interpolated, 2306.15595; YaRN,
2309.00071).

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

        self.name = name = reader.fields["general.architecture"].contents()

        def meta(key, default=None):
            field = reader.fields.get(f"{name}.{key}")
            return default if field is None else field.contents()

        self.n_layers, self.n_heads = meta("block_count"), meta("attention.head_count")
        self.n_kv_heads = meta("attention.head_count_kv", self.n_heads)
        self.head_width = meta("attention.key_length", meta("embedding_length") // self.n_heads)
        self.eps = meta("attention.layer_norm_rms_epsilon")
        self.scale = meta("attention.scale", 1 / np.sqrt(self.head_width))
        self.embedding_scale, self.residual_scale, self.logit_scale = (
            meta(f"{key}_scale", 1.0) for key in ("embedding", "residual", "logit")
        )
        self.halves = name in ("qwen2", "qwen3", "exaone")

        half = meta("rope.dimension_count", self.head_width) // 2
        base, factor = meta("rope.freq_base", 10000.0), meta("rope.scaling.factor", 1.0)
        self.frequencies = base ** (-np.arange(half) / half) / self.w.get("rope_freqs.weight", 1.0)
        self.magnitude = meta("rope.scaling.attn_factor", 1.0)
        if meta("rope.scaling.type", "linear") == "linear":
            self.frequencies /= factor
        elif meta("rope.scaling.type") == "yarn":
            context = meta("rope.scaling.original_context_length", meta("context_length"))
            fast, slow = meta("rope.scaling.yarn_beta_fast", 32.0), meta("rope.scaling.yarn_beta_slow", 1.0)
            # Pair i turns context * base^(-i / half) / (2 pi) times in the context; solved for i.
            last_fast, first_slow = (
                half * np.log(context / (2 * np.pi * turns)) / np.log(base) for turns in (fast, slow)
            )
            begin, end = max(0.0, np.floor(last_fast)), min(2 * half - 1, np.ceil(first_slow))
            slowed = np.clip((np.arange(half) - begin) / max(end - begin, 0.001), 0, 1)
            self.frequencies *= slowed / factor + (1 - slowed)
            share = meta("rope.scaling.yarn_log_multiplier", 0.0)
            self.magnitude *= (1 + 0.1 * np.log(factor)) / (1 + 0.1 * share * np.log(factor))

    def logits(self, tokens) -> np.ndarray:
        """float64 (T, V) logits of one sequence from position 0."""
        x = self.w["token_embd.weight"][np.asarray(tokens)] * self.embedding_scale
        for i in range(self.n_layers):
            x = x + self.residual_scale * self._attention(self._norm(x, f"blk.{i}.attn_norm.weight"), i)
            n = self._norm(x, f"blk.{i}.ffn_norm.weight")
            gate, up = n @ self.w[f"blk.{i}.ffn_gate.weight"].T, n @ self.w[f"blk.{i}.ffn_up.weight"].T
            ff = (gate / (1 + np.exp(-gate)) * up) @ self.w[f"blk.{i}.ffn_down.weight"].T
            x = x + self.residual_scale * ff
        head = self.w.get("output.weight", self.w["token_embd.weight"])
        return self._norm(x, "output_norm.weight") @ head.T / self.logit_scale

    def nll(self, tokens, targets) -> np.ndarray:
        """float64 (T,): -log softmax(logits[t])[targets[t]]."""
        logits = self.logits(tokens)
        top = logits.max(axis=1)
        log_sum = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
        return log_sum - logits[np.arange(len(tokens)), np.asarray(targets)]

    def _norm(self, x, name):
        return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + self.eps) * self.w[name]

    def _rotate(self, x):
        half = len(self.frequencies)
        turn = self.magnitude * np.exp(1j * np.arange(len(x))[:, None] * self.frequencies)[:, None, :]
        real = slice(0, half) if self.halves else slice(0, 2 * half, 2)
        imaginary = slice(half, 2 * half) if self.halves else slice(1, 2 * half, 2)
        turned = (x[..., real] + 1j * x[..., imaginary]) * turn
        out = x.copy()
        out[..., real], out[..., imaginary] = turned.real, turned.imag
        return out

    def _attention(self, n, i):
        length = len(n)

        def affine(x, name):
            return x @ self.w[f"blk.{i}.{name}.weight"].T + self.w.get(f"blk.{i}.{name}.bias", 0.0)

        def heads(name, count):
            return affine(n, name).reshape(length, count, self.head_width)

        q, k, v = (
            heads(f"attn_{x}", c) for x, c in zip("qkv", (self.n_heads, *2 * [self.n_kv_heads]), strict=True)
        )
        if self.name == "qwen3":
            q, k = self._norm(q, f"blk.{i}.attn_q_norm.weight"), self._norm(k, f"blk.{i}.attn_k_norm.weight")
        if self.name != "smollm3" or i % 4 != 3:
            q, k = self._rotate(q), self._rotate(k)
        out = np.empty_like(q)
        for h in range(self.n_heads):
            g = h // (self.n_heads // self.n_kv_heads)
            scores = q[:, h] @ k[:, g].T * self.scale
            scores[np.triu_indices(length, 1)] = -np.inf
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            out[:, h] = weights / weights.sum(axis=1, keepdims=True) @ v[:, g]
        return affine(out.reshape(length, -1), "attn_output")
