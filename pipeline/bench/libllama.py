"""llama.cpp and its relative ik_llama.cpp as players, by the C interface that both Python packages bind.

The packages' own structures are used, because the layouts change from build to build; functions are taken
from the library itself. The two differ in age: what a setting is called, and which function empties the
cache, is decided by what is there.

Nothing but `llama_decode` and `llama_synchronize` is timed: batches are laid out before, logits are computed
but not fetched, the soft-max of a perplexity is not charged.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.bench.calls import READY_TOKENS, Call, Group, Vocabulary, Workload

MODULES = {"llama_cpp": "llama_cpp.llama_cpp", "ik_llama_cpp": "ik_llama_cpp._ctypes_api"}
DISTRIBUTIONS = {"llama_cpp": "llama-cpp-python", "ik_llama_cpp": "ik-llama-cpp-python"}
KV_TYPES = {"f32": 0, "f16": 1}  # enum ggml_type
OPTIONS: dict[str, Any] = {
    "batch": 2048,
    "ubatch": 512,
    "flash_attention": True,
    "kv": "f16",
    "repack": None,
}
"""What can be set, with llama.cpp's own defaults; `repack` None is the library's own."""

_CELLS = 256  # llama.cpp pads a sequence's cells to a multiple of it
_POINTER, _INT, _BOOL = ctypes.c_void_p, ctypes.c_int32, ctypes.c_bool


class LibLlama:
    """A model open in one of the two libraries, decoding on the processor.

    Args:
        engine: `llama_cpp` or `ik_llama_cpp`.
        threads: for prompts and for single tokens alike.
        options: keys of `OPTIONS`; what is left out has its value there.

    Raises:
        RuntimeError: the library opens neither the model nor a context; it says why on standard error.
    """

    def __init__(
        self, engine: str, model_path: str, threads: int, options: Mapping[str, Any], vocabulary: Vocabulary
    ) -> None:
        self._module = importlib.import_module(MODULES[engine])
        self._threads, self._vocabulary = threads, vocabulary
        self._options = OPTIONS | dict(options)
        lib = self._module._lib
        self._decode = _function(lib, "llama_decode", _INT, _POINTER, self._module.llama_batch)
        self._synchronize = _function(lib, "llama_synchronize", None, _POINTER)
        self._free = _function(lib, "llama_free", None, _POINTER)
        self._new_context = _function(
            lib, "llama_init_from_model", _POINTER, _POINTER, self._module.llama_context_params
        )
        self._clear = _clearing(lib)
        self._context: int | None = None
        self._shape = (0, 0)
        self.info = {
            "engine": engine,
            "version": importlib.metadata.version(DISTRIBUTIONS[engine]),
            "threads": threads,
            **{key: value for key, value in self._options.items() if value is not None},
            "features": _function(lib, "llama_print_system_info", ctypes.c_char_p)().decode().strip(" |"),
        }
        started = time.perf_counter()
        _function(lib, "llama_backend_init", None)()
        self._model = self._load(lib, model_path)
        loaded = time.perf_counter()
        self._run(Workload("perplexity", READY_TOKENS, 0, 1), warm=False)
        ready = time.perf_counter()
        self.info |= {
            "load_s": loaded - started,
            "ready_s": ready - started,
            "stages": {"model_s": loaded - started, "first_window_s": ready - loaded},
        }

    def measure(self, workload: Workload) -> float:
        """Seconds of the timed calls of one repetition; each group of calls begins with an empty cache."""
        return self._run(workload, warm=True)

    def _run(self, workload: Workload, *, warm: bool) -> float:
        seconds = 0.0
        for group in workload.groups(self._vocabulary, self._options["batch"]):
            batches = [(_Batch(self._module.llama_batch, call), call.timed) for call in group.calls]
            if self._make_context(group) and warm:
                self._call(batches[0][0])
            self._clear(self._context)
            for batch, timed in batches:
                started = time.perf_counter()
                self._call(batch)
                if timed:
                    seconds += time.perf_counter() - started
        return seconds

    def _call(self, batch: _Batch) -> None:
        status = self._decode(self._context, batch.struct)
        self._synchronize(self._context)
        if status != 0:
            raise RuntimeError(
                f"llama_decode returned {status} for a batch of {batch.struct.n_tokens} tokens"
            )

    def _make_context(self, group: Group) -> bool:
        """A context of exactly the group's sequences; whether it is a new one."""
        shape = group.n_slots, -(-group.capacity // _CELLS) * _CELLS
        if self._context is not None and shape == self._shape:
            return False
        if self._context is not None:
            self._free(self._context)
            self._context = None
        n_ctx, options = shape[0] * shape[1], self._options
        params = self._module.llama_context_default_params()
        wanted = {
            "n_ctx": n_ctx,
            "n_batch": min(options["batch"], n_ctx),
            "n_ubatch": min(options["ubatch"], options["batch"], n_ctx),
            "n_seq_max": shape[0],
            "n_threads": self._threads,
            "n_threads_batch": self._threads,
            "type_k": KV_TYPES[options["kv"]],
            "type_v": KV_TYPES[options["kv"]],
            "flash_attn_type": int(options["flash_attention"]),
            "flash_attn": options["flash_attention"],
        }
        _assign(params, wanted)
        context = self._new_context(self._model, params)
        if not context:
            raise RuntimeError(f"llama_init_from_model made no context of {n_ctx} cells")
        self._context, self._shape = context, shape
        return True

    def _load(self, lib: ctypes.CDLL, path: str) -> int:
        params = self._module.llama_model_default_params()
        repack = self._options["repack"]
        _assign(params, {"n_gpu_layers": 0})
        if repack is not None:
            _assign(params, {"use_extra_bufts": repack, "repack_tensors": repack})
        load = _function(lib, "llama_model_load_from_file", _POINTER, ctypes.c_char_p, type(params))
        model = load(path.encode(), params)
        if not model:
            raise RuntimeError(f"{path}: llama_model_load_from_file opened no model")
        return int(model)


class _Batch:
    """A `llama_batch` over arrays that live as long as it."""

    def __init__(self, kind: Any, call: Call) -> None:
        size = call.tokens.size
        self._arrays: list[npt.NDArray[Any]] = [
            np.ascontiguousarray(call.tokens),
            np.ascontiguousarray(call.positions),
            np.ones(size, np.int32),
            np.ascontiguousarray(call.slots),
            call.outputs.astype(np.int8),
        ]
        tokens, positions, counts, slots, outputs = self._arrays
        of_each = slots.ctypes.data + slots.itemsize * np.arange(size, dtype=np.uint64)
        self._arrays.append(of_each)
        self.struct = kind()
        self.struct.n_tokens = size
        fields = {"token": tokens, "pos": positions, "n_seq_id": counts, "seq_id": of_each, "logits": outputs}
        types = dict(kind._fields_)
        for name, array in fields.items():
            setattr(self.struct, name, ctypes.cast(array.ctypes.data, types[name]))


def _function(lib: ctypes.CDLL, name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
    """A function of the library, typed; an object of its own, so the package's stays as it is."""
    function = lib[name]
    function.restype, function.argtypes = result, arguments
    return function


def _clearing(lib: ctypes.CDLL) -> Callable[[int | None], None]:
    """What forgets all sequences of a context."""
    if not hasattr(lib, "llama_memory_clear"):
        return _function(lib, "llama_kv_cache_clear", None, _POINTER)
    memory = _function(lib, "llama_get_memory", _POINTER, _POINTER)
    clear = _function(lib, "llama_memory_clear", None, _POINTER, _BOOL)
    return lambda context: clear(memory(context), False)


def _assign(params: Any, values: Mapping[str, Any]) -> None:
    """Sets those of the values that the structure has a field for."""
    known = {name for name, *_ in params._fields_}
    for name in known & values.keys():
        setattr(params, name, values[name])
