"""Mamba and FalconMamba in float64 NumPy, from the papers (arXiv:2312.00752, section 3; 2410.05355).

Token by token, the plain recurrence, no blocking: written before the kernels. Weights come decoded by the
`gguf` package. Axes: T tokens, D model width, E inner width, N state size, W convolution width, R dt's rank,
L layers, V vocabulary. Shapes are NumPy's; a GGUF file lists the same ones backwards. A layer is

    u = x / rms(x) * attn_norm                                                               (T, D)
    x', z = halves of  ssm_in u                                                              (T, E) each
    x' = silu(conv(x') + conv_bias)     depthwise: out[t] = sum_w weight[w] x'[t - (W-1) + w]
    dt, B, C = parts of  ssm_x x'                                                            R, N and N wide
    dt, B, C each / its rms, without weights                                                 FalconMamba only
    dt = softplus(ssm_dt dt + dt_bias)                                                       (T, E)
    h = exp(dt A) h + dt x' B           y = h C + D x'                                       h (E, N)
    x = x + ssm_out (y * silu(z))

and the logits are `output` (or the embedding, where tied) times the normed x. Papers, transformers and
libllama agree but for these; sources: transformers 5.23.0, models/{mamba,falcon_mamba}/modeling_*.py;
llama.cpp b9190, src/models/mamba*.cpp, ggml/src/ggml-cpu/ops.cpp, its Hugging Face converter.

- B is discretized as dt B. The paper's equation 4 says (dt A)^-1 (exp(dt A) - 1) dt B; its authors' code, and
  so everyone's, leaves the first order of that.
- softplus: PyTorch returns x itself above 20, and so does libllama. float32 log1p(exp(x)) differs by under
  half an ulp there; the threshold matters where exp overflows (x > 88.7). PyTorch computes log1p(exp(x)).
- dt_bias belongs to dt_proj, in files as `ssm_dt.bias`; all add it once, before softplus. transformers
  multiplies by dt_proj.weight alone for that reason (its fused kernel adds the bias itself).
- A: checkpoints hold A_log, files A = -exp(A_log), always float32.
- Convolution: checkpoints hold (E, 1, W), files (E, W), the last column for the newest token. A state keeps
  W - 1 inputs (libllama; as (E, W - 1)); transformers keeps W, of which the oldest is never used again.
- transformers' `use_conv_bias=False` and `use_bias=True` have no counterpart: libllama demands the first and
  has no tensor for the second's. libllama refuses E != 2 D, and its converter with it.
- Norms' epsilon: transformers has `mixer_rms_eps` (1e-6) for dt, B and C of FalconMamba and
  `layer_norm_epsilon` (1e-5) for the rest. A file has one, which libllama takes for all.
- `residual_in_fp32` and transformers' many `.float()`: precision only, nothing in float64.
- `time_step_min`, `_max`, `_floor` initialize dt_bias and mean nothing afterwards.
- transformers starts a Mamba-1 scan of several tokens from a zero state even with a cache, so that a text is
  continued rightly only token by token there. A file's state here goes on wherever it was cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import gguf
import numpy as np
from gguf.quants import dequantize
from numpy.typing import NDArray

Floats = NDArray[np.float64]


class State(NamedTuple):
    """What a sequence leaves behind; all zero before its first token.

    conv: (L, W - 1, E), the convolution's last inputs, oldest first; mamba2: (L, W - 1, E + 2 G N).
    ssm: (L, E, N); mamba2: (L, H, P, N).
    """

    conv: Floats
    ssm: Floats


def softplus(x: Floats) -> Floats:
    """log(1 + exp(x)), and x above 20."""
    return np.where(x > 20.0, x, np.log1p(np.exp(np.minimum(x, 20.0))))


def silu(x: Floats) -> Floats:
    """x times its logistic function; no overflow for |x| < 700."""
    return x / (1.0 + np.exp(-x))


def rms_norm(x: Floats, eps: float) -> Floats:
    """x over the root of its mean square along the last axis."""
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps)


def causal_conv(x: Floats, weight: Floats, bias: Floats | float, state: Floats) -> tuple[Floats, Floats]:
    """Depthwise convolution over the past, its bias and SiLU.

    Args:
        x: (T, E). T may be 0 or less than W - 1.
        weight: (E, W); column W - 1 belongs to the token itself.
        bias: (E,), or 0.
        state: (W - 1, E), the inputs before x, oldest first.

    Returns:
        (T, E) and the state after x.
    """
    width = weight.shape[1]
    padded = np.concatenate([state, x])
    out = np.zeros_like(x)
    for w in range(width):
        out += padded[w : w + len(x)] * weight[:, w]
    return silu(out + bias), padded[len(x) :].copy()


def selective_scan(
    x: Floats, dt: Floats, a: Floats, b: Floats, c: Floats, d: Floats, z: Floats, state: Floats
) -> tuple[Floats, Floats]:
    """softplus, discretization, recurrence, output by C, the D skip and the gate of one sequence.

    Args:
        x: (T, E), after the convolution.
        dt: (T, E), with its bias, before softplus.
        a: (E, N), negative.
        b, c: (T, N).
        d: (E,).
        z: (T, E), before SiLU.
        state: (E, N) before x.

    Returns:
        (T, E) and the state after x.
    """
    state, y, delta = state.copy(), np.empty_like(x), softplus(dt)
    for t in range(len(x)):
        state = np.exp(delta[t][:, None] * a) * state + (delta[t] * x[t])[:, None] * b[t]
        y[t] = state @ c[t] + d * x[t]
    return y * silu(z), state


class ReferenceMamba:
    """A whole model: a file's tensors by name, decoded, and its metadata by key."""

    def __init__(
        self, weights: Mapping[str, NDArray[Any]], metadata: Mapping[str, Any], mixer_eps: float | None = None
    ) -> None:
        """`mixer_eps`: epsilon of FalconMamba's norms of dt, B and C, where not the file's one for all."""
        self.w = {name: np.asarray(values, np.float64) for name, values in weights.items()}
        name = metadata["general.architecture"]
        self.n_layers = metadata[f"{name}.block_count"]
        self.inner, self.n_state, self.conv_width, self.dt_rank = (
            metadata[f"{name}.ssm.{key}"]
            for key in ("inner_size", "state_size", "conv_kernel", "time_step_rank")
        )
        self.n_groups = metadata.get(f"{name}.ssm.group_count", 1)
        self.normed = metadata.get(f"{name}.ssm.dt_b_c_rms", False)
        self.eps = metadata[f"{name}.attention.layer_norm_rms_epsilon"]
        self.mixer_eps = self.eps if mixer_eps is None else mixer_eps

    @classmethod
    def open(cls, path: Any, mixer_eps: float | None = None) -> ReferenceMamba:
        """The model in a GGUF file, read by the `gguf` package."""
        reader = gguf.GGUFReader(path)
        weights = {t.name: dequantize(t.data, t.tensor_type) for t in reader.tensors}
        metadata = {key: field.contents() for key, field in reader.fields.items() if "tokenizer" not in key}
        return cls(weights, metadata, mixer_eps)

    def start(self) -> State:
        """The state before a sequence's first token."""
        return State(
            np.zeros((self.n_layers, self.conv_width - 1, self.inner)),
            np.zeros((self.n_layers, self.inner, self.n_state)),
        )

    def forward(self, tokens: Any, state: State | None = None) -> tuple[Floats, State]:
        """float64 (T, V) logits of tokens after a state (none: a sequence's start), and the new state."""
        state = state or self.start()
        new = State(np.empty_like(state.conv), np.empty_like(state.ssm))
        x = self.w["token_embd.weight"][np.asarray(tokens, np.int64)]
        for i in range(self.n_layers):
            u = self._norm(x, f"blk.{i}.attn_norm.weight")
            mixed, new.conv[i], new.ssm[i] = self._mix(u, i, state.conv[i], state.ssm[i])
            x = x + mixed
        head = self.w.get("output.weight", self.w["token_embd.weight"])
        return self._norm(x, "output_norm.weight") @ head.T, new

    def logits(self, tokens: Any) -> Floats:
        """float64 (T, V) logits of one sequence from its start."""
        return self.forward(tokens)[0]

    def nll(self, tokens: Any, targets: Any, state: State | None = None) -> Floats:
        """float64 (T,): -log softmax(logits[t])[targets[t]]."""
        logits, _ = self.forward(tokens, state)
        top = logits.max(axis=1)
        log_sum = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
        return log_sum - logits[np.arange(len(tokens)), np.asarray(targets)]

    def _norm(self, x: Floats, name: str) -> Floats:
        return rms_norm(x, self.eps) * self.w[name]

    def _conv(self, x: Floats, i: int, state: Floats) -> tuple[Floats, Floats]:
        bias = self.w.get(f"blk.{i}.ssm_conv1d.bias", 0.0)
        return causal_conv(x, self.w[f"blk.{i}.ssm_conv1d.weight"], bias, state)

    def _mix(self, u: Floats, i: int, conv: Floats, ssm: Floats) -> tuple[Floats, Floats, Floats]:
        """A layer's mixer: (T, D) and both states after it."""
        w = {key: self.w.get(f"blk.{i}.ssm_{key}") for key in ("a", "d")}
        in_, x_, dt_, out_ = (self.w[f"blk.{i}.ssm_{key}.weight"] for key in ("in", "x", "dt", "out"))
        x, z = np.split(u @ in_.T, [self.inner], axis=1)
        x, conv = self._conv(x, i, conv)
        parts = np.split(x @ x_.T, [self.dt_rank, self.dt_rank + self.n_state], axis=1)
        if self.normed:
            parts = [rms_norm(part, self.mixer_eps) for part in parts]
        dt, b, c = parts
        dt = dt @ dt_.T + self.w[f"blk.{i}.ssm_dt.bias"]
        y, ssm = selective_scan(x, dt, w["a"], b, c, w["d"], z, ssm)
        return y @ out_.T, conv, ssm
