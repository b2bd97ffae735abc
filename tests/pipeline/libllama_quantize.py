"""The process in which test_mixtures.py calls libllama's quantize: it may abort, and says much on stdout.

    python libllama_quantize.py cyllama|llama_cpp

Reads a job a line, {"source", "out", "file_type", "imatrix": null or {tensor: columns * matrices}, "chosen":
[[regex, number of the type], ...]}, and answers a line: what libllama said last if it failed, else "".
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np


class ImatrixEntry(ctypes.Structure):
    """llama.h: struct llama_model_imatrix_data; arrays of them end with a nameless one."""

    _fields_ = (("name", ctypes.c_char_p), ("data", ctypes.c_void_p), ("size", ctypes.c_size_t))


class TypeOverride(ctypes.Structure):
    """llama.h: struct llama_model_tensor_override; arrays of them end with a nameless one."""

    _fields_ = (("pattern", ctypes.c_char_p), ("type", ctypes.c_int))


class Params(ctypes.Structure):
    """The head of llama.h's struct llama_model_quantize_params, which both builds have in common."""

    _fields_ = (
        ("nthread", ctypes.c_int),
        ("ftype", ctypes.c_int),
        ("output_tensor_type", ctypes.c_int),
        ("token_embedding_type", ctypes.c_int),
        ("flags", ctypes.c_bool * 6),
        ("imatrix", ctypes.c_void_p),
        ("kv_overrides", ctypes.c_void_p),
        ("tt_overrides", ctypes.c_void_p),
    )


def main() -> None:
    """Serves jobs until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    said: list[str] = []
    quantize = {"cyllama": _cyllama, "llama_cpp": _llama_cpp}[sys.argv[1]](said)
    for line in sys.stdin:
        job, kept = json.loads(line), []

        def fill(params: Params, job: dict[str, Any] = job, kept: list[Any] = kept) -> None:
            params.nthread, params.ftype = 1, job["file_type"]
            if job["imatrix"] is not None:
                weights = {name: np.ones(n, np.float32) for name, n in job["imatrix"].items()}
                rows = [(name.encode(), w.ctypes.data, w.size) for name, w in weights.items()]
                entries = (ImatrixEntry * (len(rows) + 1))(*rows)
                params.imatrix = ctypes.addressof(entries)
                kept += [weights, entries]
            if job["chosen"]:
                rules = [(pattern.encode(), type_) for pattern, type_ in job["chosen"]]
                overrides = (TypeOverride * (len(rules) + 1))(*rules)
                params.tt_overrides = ctypes.addressof(overrides)
                kept.append(overrides)

        said.clear()
        is_done = quantize(job["source"], job["out"], fill)
        lines = [line for line in "".join(said).splitlines() if line.strip()]
        answers.write(json.dumps("" if is_done else lines[-1]) + "\n")
        answers.flush()


Quantize = Callable[[str, str, Callable[[Params], None]], bool]


def _cyllama(said: list[str]) -> Quantize:
    from cyllama.llama import llama_cpp

    llama_cpp.set_log_callback(lambda level, text: said.append(text))

    def quantize(source: str, out: str, fill: Callable[[Params], None]) -> bool:
        wrapper = llama_cpp.LlamaModelQuantizeParams()
        wrapper.nthread, wrapper.ftype = 0x5EA7, 7  # sought in the object: it has no setter for pointers
        size = type(wrapper).__basicsize__ - ctypes.sizeof(Params)
        found = [
            params
            for at in range(16, size + 1, 8)
            for params in [Params.from_address(id(wrapper) + at)]
            if (params.nthread, params.ftype) == (0x5EA7, 7)
        ]
        (params,) = found
        assert params.output_tensor_type == params.token_embedding_type == wrapper.output_tensor_type
        fill(params)
        try:
            llama_cpp.model_quantize(source, out, wrapper)
        except RuntimeError:
            return False
        return True

    return quantize


def _llama_cpp(said: list[str]) -> Quantize:
    import llama_cpp

    callback = llama_cpp.llama_log_callback(lambda level, text, _: said.append(text.decode(errors="replace")))
    llama_cpp.llama_log_set(callback, None)

    def quantize(source: str, out: str, fill: Callable[[Params], None], callback: Any = callback) -> bool:
        params = llama_cpp.llama_model_quantize_default_params()
        fill(Params.from_address(ctypes.addressof(params)))
        return llama_cpp.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(params)) == 0

    return quantize


if __name__ == "__main__":
    main()
