"""What the tests of `convert` share: a conversion, the file read back, libllama's answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import engine
from pipeline.convert import convert
from pipeline.settings import ConvertChoices, ConvertSettings, SourceSettings

TOKENS = np.random.default_rng(7).integers(0, 280, 40).astype(np.int32)


def converted(folder: Path, out: Path, type_: str = "f32", **choices: Any) -> dict[str, Any]:
    """Converts a folder; the job's keys."""
    chosen = ConvertChoices(type=type_, out=str(out), **choices)
    return convert(ConvertSettings(source=SourceSettings(str(folder)), convert=chosen))


def tensors_of(path: Path) -> dict[str, NDArray[Any]]:
    """Tensors of a GGUF file as the gguf package decodes them, shapes in NumPy's order."""
    from gguf import GGUFReader, quants

    return {
        tensor.name: quants.dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1].tolist())
        for tensor in GGUFReader(path).tensors
    }


def types_of(path: Path) -> dict[str, str]:
    """Types of a file's tensors."""
    with engine.open(path) as file:
        return {name: tensor.type.name for name, tensor in file.tensors.items()}


def libllama_logits(path: Path) -> NDArray[np.float64]:
    """(T, V): what libllama makes of TOKENS."""
    from cyllama.llama import llama_cpp

    llama_cpp.disable_logging()
    llama_cpp.ggml_backend_load_all()

    class Model(llama_cpp.LlamaModel):
        @property
        def n_vocab(self):  # asked for by get_logits_ith
            return self.get_vocab().n_vocab

    model = Model(str(path), llama_cpp.LlamaModelParams(), verbose=False)
    params = llama_cpp.LlamaContextParams()
    params.n_ctx = params.n_batch = params.n_ubatch = 64
    params.type_k = params.type_v = params.flash_attn_type = 0  # F32, F32, none
    params.n_threads = params.n_threads_batch = 1
    context = llama_cpp.LlamaContext(model, params, verbose=False)
    batch = llama_cpp.LlamaBatch(n_tokens=TOKENS.size, embd=0, n_seq_max=1)
    for position, token in enumerate(TOKENS.tolist()):
        batch.add(token, position, [0], True)
    context.decode(batch)
    return np.array([context.get_logits_ith(i) for i in range(TOKENS.size)], np.float64)


def engine_logits(path: Path) -> NDArray[np.float32]:
    """(T, V): what the engine makes of TOKENS."""
    with engine.open(path) as file:
        model = engine.load_model(file, batch_tokens=64)
        cache = model.new_cache(1, TOKENS.size)
        positions, slots = np.arange(TOKENS.size), np.zeros(TOKENS.size, np.int32)
        return model.logits(engine.Batch(TOKENS, positions, slots, outputs=np.ones(TOKENS.size, bool)), cache)
