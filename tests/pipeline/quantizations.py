"""What the tests of `quantize` share: a run, libllama's own, files to start from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import engine
from pipeline.quantize import quantize
from pipeline.quantize.mixtures import MIXTURES
from pipeline.quantize.settings import EncodingSettings, QuantizeChoices, QuantizeSettings
from pipeline.settings import ModelSettings
from tests.make_gguf import Typed, tiny_llama, write_gguf

METADATA = {  # of every kind, and keys that are dropped or written anew
    "a.u8": Typed("u8", 3),
    "a.i64": Typed("i64", -(1 << 40)),
    "a.f64": Typed("f64", 0.1),
    "a.bools": [True, False],
    "a.halves": Typed("i16", [1, 2]),
    "a.nothing": Typed("str", []),
    "general.file_type": 0,
    "split.count": Typed("u16", 0),
    "z.last": "ä",
}


def quantized(
    source: Path, out: Path, type_: str = "Q8_0", *, threads: int = 1, dry_run: bool = False, **choices: Any
) -> dict[str, Any]:
    """Quantizes a file; the job's keys."""
    return quantize(
        QuantizeSettings(
            ModelSettings(str(source)),
            QuantizeChoices(type_, str(out), **choices),
            EncodingSettings(threads),
            dry_run=dry_run,
        )
    )


def by_libllama(source: Path, out: Path, type_: str, *, allow_requantize: bool = False) -> bytes:
    """The file that libllama makes of another."""
    llama_cpp = pytest.importorskip("cyllama", reason="cyllama (llama.cpp) is not installed").llama.llama_cpp
    llama_cpp.disable_logging()
    params = llama_cpp.LlamaModelQuantizeParams()
    params.ftype, params.nthread, params.allow_requantize = MIXTURES[type_].file_type, 1, allow_requantize
    llama_cpp.model_quantize(str(source), str(out), params)
    return out.read_bytes()


def wide_llama(path: Path, **changes: Any) -> Path:
    """A LLaMA whose rows divide by 256, with metadata of every kind."""
    sizes = {"width": 256, "ff": 512, "n_layers": 2, "tied": False}
    return tiny_llama(path, **sizes | METADATA | changes)


def experts(path: Path, n_experts: int = 3, **metadata: Any) -> Path:
    """Stacks of experts: one tensor of three axes in each of two layers, and one that chooses."""
    rng = np.random.default_rng(3)
    keys = {
        "general.architecture": "llama",
        "llama.block_count": 2,
        "llama.embedding_length": 256,
        "llama.context_length": 64,
        "llama.feed_forward_length": 64,
        "llama.attention.head_count": 4,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.expert_count": n_experts,
        "llama.expert_used_count": 2,
    }
    shapes = {"token_embd.weight": (64, 256)}
    for layer in range(2):
        shapes[f"blk.{layer}.ffn_gate_inp.weight"] = (n_experts, 256)
        shapes[f"blk.{layer}.ffn_up_exps.weight"] = (n_experts, 64, 256)
    tensors = {
        name: ("F32", shape, rng.normal(0, 1, shape).astype("<f4").tobytes())
        for name, shape in shapes.items()
    }
    return write_gguf(path, keys | metadata, tensors)


def raw_of(path: Path) -> dict[str, bytes]:
    """Bytes of a file's tensors."""
    with engine.open(path) as file:
        return {name: tensor.data.tobytes() for name, tensor in file.tensors.items()}
