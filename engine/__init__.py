"""GGUF file and token ids in, log-likelihoods and logits out.

The engine maps a GGUF file, keeps its weights quantized in the shared mapping, and decodes ragged batches of
many sequences. It knows nothing of data sets, clusters, tables or tracking.

Axis letters, the same everywhere: `S` sequences (cache slots), `T` tokens in the batch, `D` model width, `H`
heads, `G` key/value heads, `K` head width, `F` feed-forward width, `V` vocabulary, `C` cache capacity, `P`
panels of `NR` tokens.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from engine.errors import (
    CapacityError,
    EngineError,
    GGUFFormatError,
    StateError,
    UnsupportedModel,
    UnsupportedQuant,
    UnsupportedTokenizer,
)

if TYPE_CHECKING:
    from engine.batch import Batch
    from engine.cache import Cache
    from engine.comparison import Comparison
    from engine.diagnosis import first_broken
    from engine.ggml_types import GGML_TYPES, GGMLType
    from engine.gguf import GGUFFile, Tensor, open, with_tensors
    from engine.input_sums import InputSums, exact_sum, sum_inputs
    from engine.kernel_cache import is_warm
    from engine.machine import cpu_features, fma_gflops, gemm_gflops, read_gb_per_s
    from engine.model import Model, check_supported, footprint, load_model, max_positions, warm_up
    from engine.quants import dequantize
    from engine.quants.encoding import ENCODABLE, quantize
    from engine.recurrent import RecurrentCache
    from engine.sequences import predict, score
    from engine.state import KVCache
    from engine.state_file import restore_state, save_state
    from engine.tokenizer import Tokenizer
    from engine.traces import tensor_digests, trace

NUMERICS = 1
"""Raised by hand whenever the bits of a score change; part of every run key."""

_HOMES = {  # resolved on first use: importing Numba takes half a second that `--help` does not need
    "Batch": "batch",
    "Cache": "cache",
    "ENCODABLE": "quants.encoding",
    "GGMLType": "ggml_types",
    "GGML_TYPES": "ggml_types",
    "GGUFFile": "gguf",
    "Comparison": "comparison",
    "InputSums": "input_sums",
    "KVCache": "state",
    "Model": "model",
    "RecurrentCache": "recurrent",
    "Tensor": "gguf",
    "Tokenizer": "tokenizer",
    "check_supported": "model",
    "cpu_features": "machine",
    "dequantize": "quants",
    "first_broken": "diagnosis",
    "fma_gflops": "machine",
    "exact_sum": "input_sums",
    "with_tensors": "gguf",
    "sum_inputs": "input_sums",
    "footprint": "model",
    "gemm_gflops": "machine",
    "is_warm": "kernel_cache",
    "load_model": "model",
    "max_positions": "model",
    "open": "gguf",
    "predict": "sequences",
    "quantize": "quants.encoding",
    "read_gb_per_s": "machine",
    "restore_state": "state_file",
    "save_state": "state_file",
    "score": "sequences",
    "tensor_digests": "traces",
    "trace": "traces",
    "warm_up": "model",
}

__all__ = [
    "ENCODABLE",
    "GGML_TYPES",
    "NUMERICS",
    "Batch",
    "Cache",
    "CapacityError",
    "Comparison",
    "EngineError",
    "GGMLType",
    "GGUFFile",
    "GGUFFormatError",
    "InputSums",
    "KVCache",
    "Model",
    "RecurrentCache",
    "StateError",
    "Tensor",
    "Tokenizer",
    "UnsupportedModel",
    "UnsupportedQuant",
    "UnsupportedTokenizer",
    "check_supported",
    "cpu_features",
    "dequantize",
    "exact_sum",
    "first_broken",
    "fma_gflops",
    "footprint",
    "gemm_gflops",
    "is_warm",
    "load_model",
    "max_positions",
    "open",
    "predict",
    "quantize",
    "read_gb_per_s",
    "restore_state",
    "save_state",
    "score",
    "sum_inputs",
    "tensor_digests",
    "trace",
    "warm_up",
    "with_tensors",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'engine' has no attribute {name!r}")
    value = getattr(import_module(f"engine.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
