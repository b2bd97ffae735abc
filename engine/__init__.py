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
    UnsupportedModel,
    UnsupportedQuant,
    UnsupportedTokenizer,
)

if TYPE_CHECKING:
    from engine.batch import Batch
    from engine.gguf import GGUFFile, open
    from engine.kernel_cache import is_warm
    from engine.machine import cpu_features, fma_gflops
    from engine.model import Model, check_supported, load_model, warm_up
    from engine.state import KVCache
    from engine.tokenizer import Tokenizer

NUMERICS = 1
"""Raised by hand whenever the bits of a score change; part of every run key."""

_HOMES = {  # resolved on first use: importing Numba takes half a second that `--help` does not need
    "Batch": "batch",
    "GGUFFile": "gguf",
    "KVCache": "state",
    "Model": "model",
    "Tokenizer": "tokenizer",
    "check_supported": "model",
    "cpu_features": "machine",
    "fma_gflops": "machine",
    "is_warm": "kernel_cache",
    "load_model": "model",
    "open": "gguf",
    "warm_up": "model",
}

__all__ = [
    "NUMERICS",
    "Batch",
    "CapacityError",
    "EngineError",
    "GGUFFile",
    "GGUFFormatError",
    "KVCache",
    "Model",
    "Tokenizer",
    "UnsupportedModel",
    "UnsupportedQuant",
    "UnsupportedTokenizer",
    "check_supported",
    "cpu_features",
    "fma_gflops",
    "is_warm",
    "load_model",
    "open",
    "warm_up",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'engine' has no attribute {name!r}")
    value = getattr(import_module(f"engine.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
