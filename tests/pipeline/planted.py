"""Measurements made up for tests of verdicts and culprits, and what is planted in them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from pipeline.regression.outcome import Baseline, Measured, WindowSums

N_TARGETS = 255
PROVENANCE = {
    "finished_at": "2026-11-20T02:00:00Z",
    "version": "0.9.0",
    "numerics": 1,
    "git_sha": "a" * 40,
    "engine_digest": "1" * 16,
    "host": "one",
    "cpu": "EPYC 9004",
    "features": ["avx2", "fma"],
}
OUTPUTS = ["token_embd", *(f"blk.{i}.{name}" for i in range(9) for name in ("attn_q", "ffn_down")), "nll"]


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def windows(nll: Any, documents: Any = None, kld: Any = None) -> WindowSums:
    nll = np.asarray(nll, np.float64)
    rank = np.arange(nll.size)
    return WindowSums(
        window=rank,
        document=np.zeros(nll.size, np.int64) if documents is None else np.asarray(documents),
        first_token=rank * 512,
        n_scored=np.full(nll.size, N_TARGETS),
        nll_sum=nll,
        kld_sum=None if kld is None else np.asarray(kld, np.float64),
    )


def nll_of(measured: Measured) -> Any:
    """The sums of its windows."""
    assert measured.windows is not None
    return measured.windows.nll_sum


def kld_of(measured: Measured) -> Any:
    assert measured.windows is not None
    return measured.windows.kld_sum


def scored(nll: Any = None, **changes: Any) -> Measured:
    """A perplexity check, `pydoc` on eight windows; its figures and its digest follow from `nll`."""
    sums = windows(np.random.default_rng(0).normal(700, 60, 8) if nll is None else nll)
    mean = float(sums.nll_sum.sum() / sums.n_scored.sum())
    measured = Measured(
        check="pydoc",
        job="perplexity",
        variant="smollm2",
        data="pydoc",
        measure={
            "data_sha256": sha("text"),
            "tokens_sha256": sha("tokens"),
            "protocol": "windows",
            "protocol_window": 512,
            "protocol_limit": sums.window.size,
        },
        subject={"model_sha256": sha("model"), "adapters": "", "kv_type": "f32", "numerics": 1},
        metrics={"ppl": float(np.exp(mean)), "nll_mean_nats": mean},
        bits={"nll_sha256": hashlib.sha256(sums.nll_sum.tobytes()).hexdigest(), "model_sha256": sha("model")},
        windows=sums,
        layers={window: {name: sha(f"{window} {name}") for name in OUTPUTS} for window in (0, 4)},
        tensors={f"blk.{i}.ffn_down.weight": sha(f"weight {i}") for i in range(272)},
    )
    return replace(measured, **changes)


def compared(variant: str = "q4_k_m", nll: Any = None, kld: Any = None, **changes: Any) -> Measured:
    """A variant beside its base, on twelve windows of four documents."""
    rng = np.random.default_rng(1)
    usual = rng.normal(720, 60, 12), rng.uniform(4, 8, 12)
    nll, kld = (usual[0] if nll is None else nll), (usual[1] if kld is None else kld)
    sums = windows(nll, np.repeat(np.arange(4), 3), kld)
    measured = Measured(
        check="ladder",
        job="compare",
        variant=variant,
        data="wikitext2",
        measure={"data_sha256": sha("wiki"), "tokens_sha256": sha("wiki tokens")},
        subject={"model_sha256": sha(variant), "base_model_sha256": sha("base"), "numerics": 1},
        metrics={"kld_mean": float(np.sum(kld) / 12 / N_TARGETS), "same_top": 0.95},
        bits={"kld_sha256": sha(f"{variant} kld"), "model_sha256": sha(variant)},
        windows=sums,
    )
    return replace(measured, **changes)


def timed(test: str = "ppl512", speed: float = 1000.0, ceiling: float = 1.0, **changes: Any) -> Measured:
    """A test of a throughput check, five rounds; 1000 tokens a second are 0.8 of a ceiling of 1."""
    rounds = [speed * factor for factor in (0.98, 1.0, 1.01, 0.97, 1.02)]
    shares = [each * 0.8e-3 / ceiling for each in rounds]
    measured = Measured(
        check="speed",
        job="throughput",
        variant="smollm2",
        data=test,
        measure={"test": test},
        subject={"model_sha256": sha("model"), "kv_type": "f32", "activation_type": "f32", "numerics": 1},
        metrics={"tok_per_s": speed, "fma_share": shares[1]},
        bits={"model_sha256": sha("model")},
        samples={"tok_per_s": rounds, "fma_share": shares},
    )
    return replace(measured, **changes)


def baseline(*measured: Measured, **provenance: Any) -> Baseline:
    return Baseline("smoke", "a test", None, PROVENANCE | provenance, measured)


def one_bit_off(then: Measured, window: int = 3) -> Measured:
    """The same of a model whose `blk.7.ffn_down.weight` differs; scores move by little, one window most."""
    nll = nll_of(then) + 1e-4
    nll[window] += 1e-2
    now = scored(nll, tensors=dict(then.tensors) | {"blk.7.ffn_down.weight": sha("another weight")})
    return of_another_model(replace(now, layers=parted(then, "blk.7.ffn_down")))


def parted(then: Measured, output: str) -> dict[int, dict[str, str]]:
    """Its layers, other from an output on."""
    after = OUTPUTS[OUTPUTS.index(output) :]
    return {
        w: dict(digests) | {name: sha(f"{w} {name}'") for name in after} for w, digests in then.layers.items()
    }


def of_another_model(now: Measured, name: str = "another model") -> Measured:
    digest = {"model_sha256": sha(name)}
    return replace(now, subject=dict(now.subject) | digest, bits=dict(now.bits) | digest)


def with_measure(now: Measured, changes: Mapping[str, Any]) -> Measured:
    return replace(now, measure=dict(now.measure) | changes)
