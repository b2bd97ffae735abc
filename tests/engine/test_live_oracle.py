"""libllama (llama.cpp in cyllama) on tiny F32 files, one a feature; its keys and values are F32 too.

The largest difference of an NLL in nats; beside it, how far libllama's own answers lie apart when it takes
the same tokens in batches of 1, 16, 64 or 512. cyllama 0.2.18 (llama.cpp b9190), Zen 4, 2026-11-22; printed
by `python -m pytest tests/engine/test_live_oracle.py --log-cli-level=INFO`:

    tied                                 6.7e-06  4.7e-06
    untied                               7.9e-06  4.2e-06
    1 query head a kv head               6.6e-06  4.6e-06
    3 query heads a kv head, odd widths  8.5e-06  0.0e+00
    8 query heads a kv head              1.1e-05  5.9e-06
    linear                               1.3e-05  7.5e-06
    linear, no type                      1.3e-05  7.5e-06
    linear, old key                      8.8e-06  3.7e-06
    llama3                               6.9e-06  4.9e-06
    rope_freqs and linear                8.4e-06  3.8e-06
    yarn                                 9.9e-06  4.7e-06
    yarn, long original context          9.4e-06  5.8e-06
    yarn, trained context                9.5e-06  6.3e-06
    yarn, attention factor               6.2e-06  3.3e-06
    yarn, rope_freqs                     8.5e-06  4.7e-06
    yarn, its constants                  8.8e-06  3.6e-06
    biases                               7.8e-06  2.9e-06
    mistral3                             6.7e-06  4.7e-06
    mistral3, biases                     7.8e-06  2.9e-06
    internlm2                            1.1e-05  5.2e-06
    xverse                               1.1e-05  5.2e-06
    ernie4_5                             8.1e-06  3.5e-06
    exaone                               8.6e-06  4.1e-06
    qwen2                                1.1e-05  3.4e-06
    qwen2, yarn                          1.1e-05  4.4e-06
    qwen3                                5.4e-06  2.5e-06
    qwen3, odd heads                     5.2e-06  3.1e-06
    smollm3                              1.1e-05  6.5e-06
    granite                              1.8e-06  1.1e-06

Against float64 (tests/reference) both are off by as much, 2e-6 to 3e-6 in the root mean square: float32 sums
in another order. Other tokens reach 1.7e-5, and 3e-5 in heads four times as wide:
YaRN with heads of 32 and 64 is beyond the bound, and therefore tried here on heads of 16 only.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import numpy as np
import pytest

from tests.engine.conftest import Scorer
from tests.make_gguf import llama_extra, tiny_llama

log = logging.getLogger(__name__)

N_TOKENS, CONTEXT = 96, 32  # three times as many as the original context that each scaling stretches
TOLERANCE = 2e-5  # nats
QKV = ("attn_q", "attn_k", "attn_v")


class Case(NamedTuple):
    """A file: its shape, and the feature without which its scores would be others."""

    shape: dict[str, Any]
    feature: dict[str, Any]


def scaling(type_=None, factor=None, **keys):
    keys = {"type": type_, "factor": factor, "original_context_length": CONTEXT} | keys
    return {f"llama.rope.scaling.{key}": value for key, value in keys.items() if value is not None}


def llama3(base=10000.0, half=8, factor=8.0, low=1.0, high=4.0):
    """Llama 3.1's factors: wavelengths over context / low times `factor`, under context / high none."""
    wavelength = 2 * np.pi * base ** (np.arange(half) / half)
    smooth = np.clip((CONTEXT / wavelength - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


YARN = scaling("yarn", 4.0)
CASES = {
    # shapes
    "tied": Case({}, {}),
    "untied": Case({"tied": False}, {}),
    "1 query head a kv head": Case({"n_kv_heads": 4}, {}),
    "3 query heads a kv head, odd widths": Case(
        {"n_heads": 6, "n_kv_heads": 2, "width": 90, "head_width": 14, "ff": 101, "vocab": 333}, {}
    ),
    "8 query heads a kv head": Case({"n_heads": 8, "n_kv_heads": 1, "head_width": 20}, {}),
    # rotary scalings, past the original context
    "linear": Case({}, scaling("linear", 4.0)),
    "linear, no type": Case({}, scaling(None, 4.0)),
    "linear, old key": Case({}, {"llama.rope.scale_linear": 2.5}),
    "llama3": Case({}, {"extra": llama_extra(rope_freqs=llama3())}),
    "rope_freqs and linear": Case(
        {}, {"extra": llama_extra(rope_freqs=[1, 1, 1.5, 2, 3, 5, 8, 8])} | scaling("linear", 2.0)
    ),
    "yarn": Case({}, YARN),
    "yarn, long original context": Case({}, scaling("yarn", 4.0, original_context_length=1024)),
    "yarn, trained context": Case({}, scaling("yarn", 8.0, original_context_length=None)),
    "yarn, attention factor": Case({}, scaling("yarn", 4.0, attn_factor=0.8)),
    "yarn, rope_freqs": Case({}, {"extra": llama_extra(rope_freqs=llama3())} | YARN),
    "yarn, its constants": Case(
        {"architecture": "mistral3"},
        scaling("yarn", 4.0, yarn_beta_fast=1.5, yarn_beta_slow=0.25, yarn_log_multiplier=0.5),
    ),
    # relatives
    "biases": Case({}, {"extra": llama_extra((*QKV, "attn_output"))}),
    "mistral3": Case({"architecture": "mistral3"}, {}),
    "mistral3, biases": Case({"architecture": "mistral3"}, {"extra": llama_extra((*QKV, "attn_output"))}),
    "internlm2": Case({"architecture": "internlm2", "tied": False}, {"extra": llama_extra(QKV)}),
    "xverse": Case({"architecture": "xverse", "tied": False}, {"extra": llama_extra(QKV)}),
    "ernie4_5": Case({"architecture": "ernie4_5"}, {"extra": llama_extra(QKV)}),
    "exaone": Case({}, {"architecture": "exaone", "extra": llama_extra(rope_freqs=llama3())}),
    "qwen2": Case({}, {"architecture": "qwen2", "extra": llama_extra(QKV)}),
    "qwen2, yarn": Case({"architecture": "qwen2"}, {"extra": llama_extra(QKV)} | YARN),
    "qwen3": Case({}, {"architecture": "qwen3", "extra": llama_extra(head_norms=True)}),
    "qwen3, odd heads": Case(
        {"head_width": 20},
        {"architecture": "qwen3", "extra": llama_extra(QKV, head_norms=True, head_width=20)},
    ),
    "smollm3": Case({"n_layers": 4}, {"architecture": "smollm3"}),
    "granite": Case(
        {},
        {
            "architecture": "granite",
            "llama.embedding_scale": 3.0,
            "llama.residual_scale": 0.4,
            "llama.logit_scale": 2.0,
            "llama.attention.scale": 0.3,
            "extra": llama_extra((*QKV, "attn_output")),
        },
    ),
}


class LibLlama:
    """A file opened by libllama."""

    def __init__(self, path) -> None:
        from cyllama.llama import llama_cpp

        llama_cpp.disable_logging()
        llama_cpp.ggml_backend_load_all()

        class Model(llama_cpp.LlamaModel):
            @property
            def n_vocab(self):  # asked for by get_logits_ith
                return self.get_vocab().n_vocab

        self._cpp, self._model = llama_cpp, Model(str(path), llama_cpp.LlamaModelParams(), verbose=False)

    def score(self, tokens, n_ubatch) -> np.ndarray:
        """float64 (T - 1,): NLL of each token after the first, decoded `n_ubatch` at a time."""
        params = self._cpp.LlamaContextParams()
        params.n_ctx = params.n_batch = 512
        params.n_ubatch = n_ubatch
        params.type_k = params.type_v = params.flash_attn_type = 0  # F32, F32, none
        params.n_threads = params.n_threads_batch = 1
        context = self._cpp.LlamaContext(self._model, params, verbose=False)
        batch = self._cpp.LlamaBatch(n_tokens=len(tokens), embd=0, n_seq_max=1)
        for position, token in enumerate(tokens.tolist()):
            batch.add(token, position, [0], True)
        context.decode(batch)
        logits = np.array([context.get_logits_ith(i) for i in range(len(tokens) - 1)], np.float64)
        top = logits.max(axis=1)
        log_sum = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
        return log_sum - logits[np.arange(len(tokens) - 1), tokens[1:]]


@pytest.mark.parametrize("name", CASES)
def test_every_nll_equals_libllama(tmp_path, name):
    pytest.importorskip("cyllama", reason="cyllama (llama.cpp) is not installed")
    case = CASES[name]
    path = tiny_llama(tmp_path / "m.gguf", **{"context": CONTEXT} | case.shape | case.feature)
    tokens = np.random.default_rng(0).integers(0, 300, N_TOKENS).astype(np.int32)
    ours, library = Scorer(path).score(tokens), LibLlama(path)
    theirs = [library.score(tokens, n_ubatch) for n_ubatch in (512, 64, 16, 1)]
    difference = max(np.abs(ours - nll).max() for nll in theirs)
    spread = max(np.abs(theirs[0] - nll).max() for nll in theirs)
    log.info("%-36s %.1e  %.1e", name, difference, spread)
    assert difference < TOLERANCE, f"libllama's own spread over batch sizes is {spread:.1e}"
    if case.feature:
        without = tiny_llama(tmp_path / "without.gguf", context=CONTEXT, **case.shape)
        assert np.abs(Scorer(without).score(tokens) - ours).max() > 1e-2
