"""Writes Mamba models with random weights as GGUF files, which llama.cpp runs too (see make_gguf.py).

    tiny_mamba(path)                                  # Mamba; falcon=True: FalconMamba
    tiny_mamba2(path, n_groups=2, type_name="Q8_0")
    mamba_130m_shape(path, "F16")                     # 128 M parameters, to measure speed with

Metadata are what llama.cpp's converter writes (for Mamba `attention.head_count` 0 among them). Tensors as
there: norms, biases, convolutions, A and D are F32; a matrix whose rows are no whole blocks is F16.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.ggml_types import by_name
from tests.make_gguf import Typed, byte_level_vocabulary, encode, write_gguf

Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]


def tiny_mamba(
    path: str | Path,
    *,
    seed: int = 0,
    n_layers: int = 2,
    width: int = 64,
    inner: int | None = None,
    n_state: int = 16,
    conv: int = 4,
    dt_rank: int | None = None,
    vocab: int = 301,
    padding: int = 0,
    tied: bool = True,
    falcon: bool = False,
    conv_bias: bool = True,
    type_name: str = "F32",
    embedding_type: str | None = None,
    extra: Mapping[str, NDArray[np.float32]] | None = None,
    **overrides: Any,
) -> Path:
    """Writes a Mamba model; llama.cpp runs it with `inner` 2 * width (None) and `conv_bias`.

    The steps lie in 0.001 to 0.1, but that of the last channel before softplus is about 90, where exp
    overflows float32, and the last but one's crosses softplus' threshold of 20. A is -1 to -N, times 0.7 to
    1.4.

    Args:
        padding: so many of the `vocab` tokens are what pads a vocabulary, of type 5 (unused).
        falcon: dt, B and C are normed.
        extra: tensors to add or to put in others' place, F32.
        overrides: metadata, e.g. **{"mamba.ssm.conv_kernel": 3}; None leaves one out.
    """
    rng = np.random.default_rng(seed)
    inner, rank = inner or 2 * width, dt_rank or -(-width // 16)
    metadata = _metadata("mamba", seed, n_layers, width, inner, n_state, conv, rank)
    metadata["mamba.ssm.dt_b_c_rms"] = falcon
    tensors: Tensors = {}

    def layer(name: str) -> None:
        _matrix(tensors, rng, f"{name}ssm_in", (2 * inner, width), 1.0, type_name)
        _convolution(tensors, rng, name, inner, conv, conv_bias, slice(inner - 2, inner))
        _matrix(tensors, rng, f"{name}ssm_x", (rank + 2 * n_state, inner), 1.0, type_name)
        _matrix(tensors, rng, f"{name}ssm_dt", (inner, rank), 0.5, type_name)
        _put(tensors, f"{name}ssm_dt.bias", _step_bias(rng, inner))
        decay = np.arange(1, n_state + 1) * rng.uniform(0.7, 1.4, (inner, n_state))
        _put(tensors, f"{name}ssm_a", -decay)
        _put(tensors, f"{name}ssm_d", rng.normal(1.0, 0.2, inner))
        _matrix(tensors, rng, f"{name}ssm_out", (width, inner), 1.0, type_name)

    _model(tensors, rng, layer, n_layers, width, vocab, tied, embedding_type or type_name)
    return _write(path, "mamba", metadata, overrides, tensors, extra, vocab, padding, seed)


def tiny_mamba2(
    path: str | Path,
    *,
    seed: int = 0,
    n_layers: int = 2,
    width: int = 64,
    inner: int | None = None,
    n_state: int = 16,
    conv: int = 4,
    n_heads: int = 8,
    n_groups: int = 1,
    vocab: int = 301,
    padding: int = 0,
    tied: bool = True,
    conv_bias: bool = True,
    type_name: str = "F32",
    embedding_type: str | None = None,
    extra: Mapping[str, NDArray[np.float32]] | None = None,
    **overrides: Any,
) -> Path:
    """Writes a Mamba-2 model; llama.cpp runs it with `inner` 2 * width (None) and `conv_bias`.

    Arguments as for `tiny_mamba`, and steps: those of the last two heads are the large ones. `head_count` is
    `n_heads`, not 0 as llama.cpp's converter writes it: b9190 takes it for `ssm.time_step_rank` in shapes.
    """
    rng = np.random.default_rng(seed)
    inner = inner or 2 * width
    wide = inner + 2 * n_groups * n_state
    metadata = _metadata("mamba2", seed, n_layers, width, inner, n_state, conv, n_heads)
    metadata |= {"mamba2.ssm.group_count": n_groups, "mamba2.attention.head_count": n_heads}
    tensors: Tensors = {}

    def layer(name: str) -> None:
        _matrix(tensors, rng, f"{name}ssm_in", (inner + wide + n_heads, width), 1.0, type_name)
        large = slice(inner - 2 * (inner // n_heads), inner)
        _convolution(tensors, rng, name, wide, conv, conv_bias, large)
        _put(tensors, f"{name}ssm_dt.bias", _step_bias(rng, n_heads))
        _put(tensors, f"{name}ssm_a", -rng.uniform(1.0, 16.0, (n_heads, 1)))
        _put(tensors, f"{name}ssm_d", rng.normal(1.0, 0.2, (n_heads, 1)))
        _put(tensors, f"{name}ssm_norm.weight", rng.normal(1.0, 0.1, (n_groups, inner // n_groups)))
        _matrix(tensors, rng, f"{name}ssm_out", (width, inner), 0.5, type_name)

    _model(tensors, rng, layer, n_layers, width, vocab, tied, embedding_type or type_name)
    return _write(path, "mamba2", metadata, overrides, tensors, extra, vocab, padding, seed)


def mamba_130m_shape(path: str | Path, type_name: str = "F16", *, seed: int = 0) -> Path:
    """Writes a model of mamba-130m's shape: 128 M random weights in a few seconds, tied.

    d 768, 24 layers, inner 1536, state 16, convolution 4, dt's rank 48, vocabulary 50,280 of which 3 pad.
    `ssm_dt` is F16 in block types, as llama.cpp has it: 48 is no whole block.
    """
    name: dict[str, Any] = {"general.name": f"mamba-130m's shape, random weights, seed {seed}"}
    shape: dict[str, Any] = {"n_layers": 24, "width": 768, "vocab": 50280, "padding": 3}
    return tiny_mamba(path, seed=seed, type_name=type_name, **shape, **name)


def _metadata(
    name: str, seed: int, n_layers: int, width: int, inner: int, n_state: int, conv: int, rank: int
) -> dict[str, Any]:
    """What llama.cpp's converter writes for both architectures."""
    return {
        "general.architecture": name,
        "general.name": f"tiny {name}, seed {seed}",
        f"{name}.context_length": 2**20,
        f"{name}.embedding_length": width,
        f"{name}.feed_forward_length": 0,
        f"{name}.attention.head_count": 0,
        f"{name}.block_count": n_layers,
        f"{name}.ssm.conv_kernel": conv,
        f"{name}.ssm.inner_size": inner,
        f"{name}.ssm.state_size": n_state,
        f"{name}.ssm.time_step_rank": rank,
        f"{name}.attention.layer_norm_rms_epsilon": 1e-5,
    }


def _vocabulary(size: int, padding: int, seed: int) -> dict[str, Any]:
    """`tokenizer.ggml.*` like GPT-NeoX's: byte-level, token 0 begins and ends texts, padding at the end."""
    vocabulary = byte_level_vocabulary(size - padding, seed)
    tokens = vocabulary["tokenizer.ggml.tokens"] + [f"[PAD{i}]" for i in range(size - padding, size)]
    ids = {f"tokenizer.ggml.{key}_token_id": 0 for key in ("bos", "eos", "unknown", "padding")}
    return vocabulary | {
        "tokenizer.ggml.pre": "olmo",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": Typed("i32", vocabulary["tokenizer.ggml.token_type"] + [5] * padding),
        **ids,
    }


def _put(tensors: Tensors, name: str, values: NDArray[Any]) -> None:
    tensors[name] = ("F32", values.shape, values.astype("<f4").tobytes())


def _matrix(
    tensors: Tensors,
    rng: np.random.Generator,
    name: str,
    shape: tuple[int, int],
    gain: float,
    type_name: str,
) -> None:
    """A weight matrix that makes of inputs of size 1 outputs of about `gain`."""
    type_name = type_name if shape[1] % by_name(type_name).block_size == 0 else "F16"
    values = rng.standard_normal(shape, np.float32)
    values *= np.float32(gain / shape[1] ** 0.5)
    tensors[f"{name}.weight"] = (type_name, shape, encode(values, type_name, rng))


def _convolution(
    tensors: Tensors,
    rng: np.random.Generator,
    name: str,
    wide: int,
    conv: int,
    bias: bool,
    large: slice,
) -> None:
    """Channels of large steps get small inputs, or else rounding errors of theirs would drown the rest."""
    values = rng.normal(0.0, 1.2 / conv**0.5, (wide, conv + 1)) * ([1.0] * conv + [0.3])
    values[large] /= 32
    _put(tensors, f"{name}ssm_conv1d.weight", values[:, :conv])
    if bias:
        _put(tensors, f"{name}ssm_conv1d.bias", values[:, conv])


def _step_bias(rng: np.random.Generator, size: int) -> NDArray[np.float64]:
    """Whose softplus is 0.001 to 0.1, evenly on a logarithmic scale; the last two large ones."""
    steps = 0.001 * 100.0 ** rng.random(size)
    bias = np.log(np.expm1(steps))
    if size >= 4:
        bias[-2:] = 20.0, 90.0
    return bias


def _model(
    tensors: Tensors,
    rng: np.random.Generator,
    layer: Callable[[str], None],
    n_layers: int,
    width: int,
    vocab: int,
    tied: bool,
    embedding_type: str,
) -> None:
    """Embedding, layers with their norms, final norm, head."""
    _matrix(tensors, rng, "token_embd", (vocab, width), 2.0, embedding_type)
    for i in range(n_layers):
        _put(tensors, f"blk.{i}.attn_norm.weight", rng.normal(1.0, 0.1, width))
        layer(f"blk.{i}.")
    _put(tensors, "output_norm.weight", rng.normal(1.0, 0.1, width))
    if not tied:
        _matrix(tensors, rng, "output", (vocab, width), 2.0, embedding_type)


def _write(
    path: str | Path,
    name: str,
    metadata: dict[str, Any],
    overrides: dict[str, Any],
    tensors: Tensors,
    extra: Mapping[str, NDArray[np.float32]] | None,
    vocab: int,
    padding: int,
    seed: int,
) -> Path:
    metadata |= _vocabulary(vocab, padding, seed) | overrides
    for key, values in (extra or {}).items():
        _put(tensors, key, values)
    return write_gguf(path, {key: value for key, value in metadata.items() if value is not None}, tensors)
