"""What the tests of 16-bit logit files share: the format told once more, models, libllama's logits."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

import engine
from pipeline.compare.settings import CompareSettings, LogitsSettings
from pipeline.settings import (
    ClusterSettings,
    DataSettings,
    ModelSettings,
    PathsSettings,
    ProtocolSettings,
    TrackingSettings,
)
from tests.make_gguf import tiny_llama

TEXT = "The quick brown fox jumps over the lazy dog, and — as ever — nobody asks why. " * 2
WINDOW, VOCAB = 32, 300


class Foreign:
    """The format as protocol.md tells it; the clip is 24 nats in ik_llama.cpp."""

    def __init__(self, clip=16):
        self.clip = np.float32(clip)

    def record(self, logits):
        f = np.float32
        m = max(logits)
        lo = max(min(logits), m - self.clip)
        total = sum(math.exp(float(x) - float(m)) for x in logits)
        scale = f(m - lo) / f(65535)
        inverse = f(1) / scale if scale else f(0)
        steps = [round(float(f(inverse * f(x - lo)))) if x > lo else 0 for x in logits]
        pad = [0] * (len(logits) % 2)
        return struct.pack("<ff", scale, f(f(lo - m) - f(math.log(total)))) + struct.pack(
            f"<{len(steps + pad)}H", *steps, *pad
        )

    def file(self, n_ctx, tokens, rows):
        head = struct.pack("<8siii", b"_logits_", n_ctx, rows.shape[1], len(tokens) // n_ctx)
        return head + struct.pack(f"<{len(tokens)}i", *tokens) + b"".join(map(self.record, rows))

    def ln_p(self, record, n_vocab):
        scale, least = struct.unpack_from("<ff", record)
        return np.array(struct.unpack_from(f"<{n_vocab}H", record, 8), np.float64) * scale + least


def write_models(folder: Path) -> None:
    """A model of 300 tokens in three types, and a text."""
    (folder / "t.txt").write_text(TEXT)
    for name, type_name in (("base", "F32"), ("q8", "Q8_0"), ("q4", "Q4_0")):
        tiny_llama(folder / f"{name}.gguf", type_name=type_name)


def settings_in(folder: Path) -> Callable[..., CompareSettings]:
    """Makes settings of a comparison of these; `out` writes the base's logits."""

    def settings(*variants, base="base.gguf", out=None, overwrite=False, results="results", **groups):
        return CompareSettings(
            **{
                "base": ModelSettings(str(folder / base)),
                "variants": [str(folder / v) if "." in v else v for v in variants],
                "data": DataSettings(path=str(folder / "t.txt")),
                "protocol": ProtocolSettings(window=WINDOW),
                "cluster": ClusterSettings("inline", windows_per_shard=2),
                "tracking": TrackingSettings("none"),
                "paths": PathsSettings(str(folder / results), str(folder / "cache")),
                "logits": LogitsSettings(None if out is None else str(folder / out), overwrite),
                **groups,
            }
        )

    return settings


def logits_of(path):
    """Tokens of the text's whole windows, and the engine's logits of each scored token, window by window."""
    with engine.open(str(path)) as file:
        tokens = engine.Tokenizer(file).encode(TEXT)
        tokens = tokens[: tokens.size // WINDOW * WINDOW]
        model = engine.load_model(file, batch_tokens=WINDOW)
        scored = (np.arange(WINDOW) >= WINDOW // 2) & (np.arange(WINDOW) < WINDOW - 1)
        rows = [
            model.logits(
                engine.Batch(tokens[at : at + WINDOW], np.arange(WINDOW), outputs=scored),
                model.new_cache(1, WINDOW),
            )
            for at in range(0, tokens.size, WINDOW)
        ]
        del model
    targets = np.concatenate(
        [tokens[at + WINDOW // 2 + 1 : at + WINDOW] for at in range(0, tokens.size, WINDOW)]
    )
    return tokens, np.concatenate(rows), targets


def libllama_logits(path, tokens):
    from cyllama.llama import llama_cpp

    llama_cpp.disable_logging()
    llama_cpp.ggml_backend_load_all()

    class Model(llama_cpp.LlamaModel):
        @property
        def n_vocab(self):  # asked for by get_logits_ith
            return self.get_vocab().n_vocab

    model = Model(str(path), llama_cpp.LlamaModelParams(), verbose=False)
    rows = []
    for at in range(0, tokens.size, WINDOW):
        params = llama_cpp.LlamaContextParams()
        params.n_ctx = params.n_batch = params.n_ubatch = 64
        params.type_k = params.type_v = params.flash_attn_type = 0  # F32, F32, none
        params.n_threads = params.n_threads_batch = 1
        context = llama_cpp.LlamaContext(model, params, verbose=False)
        batch = llama_cpp.LlamaBatch(n_tokens=WINDOW, embd=0, n_seq_max=1)
        for position, token in enumerate(tokens[at : at + WINDOW].tolist()):
            batch.add(token, position, [0], True)
        context.decode(batch)
        rows += [np.array(context.get_logits_ith(i), np.float32) for i in range(WINDOW // 2, WINDOW - 1)]
    return np.array(rows)


def rows_of(summary):
    """Rows of the only variant."""
    (variant,) = summary["variants"]
    paths = sorted(Path(variant["table"]).glob("shard-*"))
    return [row for path in paths for row in pq.read_table(path, partitioning=None).to_pylist()]


def patched(path, at, raw, name="broken.logits"):
    data = bytearray(path.read_bytes())
    data[at : at + len(raw)] = raw
    (path.parent / name).write_bytes(data)
    return name
