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
    from engine.gguf import GGUFFile, open
    from engine.kernel_cache import is_warm
    from engine.machine import cpu_features, fma_gflops, gemm_gflops, read_gb_per_s
    from engine.model import Model, check_supported, footprint, load_model, max_positions, warm_up
    from engine.recurrent import RecurrentCache
    from engine.sequences import predict, score
    from engine.state import KVCache
    from engine.state_file import restore_state, save_state
    from engine.tokenizer import Tokenizer

NUMERICS = 1
"""Raised by hand whenever the bits of a score change; part of every run key."""

_HOMES = {  # resolved on first use: importing Numba takes half a second that `--help` does not need
    "Batch": "batch",
    "Cache": "cache",
    "GGUFFile": "gguf",
    "KVCache": "state",
    "Model": "model",
    "RecurrentCache": "recurrent",
    "Tokenizer": "tokenizer",
    "check_supported": "model",
    "cpu_features": "machine",
    "fma_gflops": "machine",
    "footprint": "model",
    "gemm_gflops": "machine",
    "is_warm": "kernel_cache",
    "load_model": "model",
    "max_positions": "model",
    "open": "gguf",
    "predict": "sequences",
    "read_gb_per_s": "machine",
    "restore_state": "state_file",
    "save_state": "state_file",
    "score": "sequences",
    "warm_up": "model",
}

__all__ = [
    "NUMERICS",
    "Batch",
    "Cache",
    "CapacityError",
    "EngineError",
    "GGUFFile",
    "GGUFFormatError",
    "KVCache",
    "Model",
    "RecurrentCache",
    "StateError",
    "Tokenizer",
    "UnsupportedModel",
    "UnsupportedQuant",
    "UnsupportedTokenizer",
    "check_supported",
    "cpu_features",
    "fma_gflops",
    "footprint",
    "gemm_gflops",
    "is_warm",
    "load_model",
    "max_positions",
    "open",
    "predict",
    "read_gb_per_s",
    "restore_state",
    "save_state",
    "score",
    "warm_up",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'engine' has no attribute {name!r}")
    value = getattr(import_module(f"engine.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
