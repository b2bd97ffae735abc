"""Regression runs made by hand: a perplexity, a variant beside its base, and two speeds, with a past."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np

from pipeline.regression.history import Row, rows_of
from pipeline.regression.outcome import Baseline, Culprit, Gate, Measured, Outcome, WindowSums

TODAY = datetime(2026, 11, 22, 3, 0, 7, tzinfo=UTC)
N_WINDOWS = 24
OUTPUTS = ("token_embd", *(f"blk.{at}" for at in range(6)), "output_norm", "output")
CHECKS = {"pydoc": "perplexity of tiny on pydoc, 24 windows", "speed": "throughput of tiny", "q4": "compare"}


def provenance(at: datetime, **more: Any) -> dict[str, Any]:
    """Of a run that ended then."""
    return {
        "finished_at": at,
        "version": "0.1.0",
        "numerics": 1,
        "git_sha": "1a2b3c4d5e" * 4,
        "engine_digest": "ab" * 32,
        "host": "builder",
        "cpu": "Some CPU @ 3.0 GHz",
        "features": ["avx2", "avx512f"],
        **more,
    }


def windows(seed: int = 0, moved: Mapping[int, float] | None = None) -> WindowSums:
    """Sums of windows of 100 tokens, three documents; `moved` are nats a token of some of them."""
    place = np.arange(N_WINDOWS)
    nll = 300 + 20 * np.random.default_rng(seed).normal(size=N_WINDOWS)
    for window, by in (moved or {}).items():
        nll[window] += 100 * by
    return WindowSums(place, place // 8, place * 200, np.full(N_WINDOWS, 100), nll)


def measured(slower: float = 1.0, moved: Mapping[int, float] | None = None) -> list[Measured]:
    """A run of the suite; slower by a factor, and worse on some windows."""
    sums = windows(0, moved)
    ppl = float(np.exp(sums.nll_sum.sum() / sums.n_scored.sum()))
    model = {"model_sha256": "cd" * 32, "numerics": 1}
    pydoc = Measured(
        "pydoc",
        "perplexity",
        "tiny",
        "pydoc",
        {"data_sha256": "00" * 32, "protocol": "windows"},
        model,
        {"ppl": ppl, "ppl_stderr": 0.1, "wall_s": 12.25},
        {"nll_sha256": f"{'e' if moved else 'd'}1" * 32, "model_sha256": "cd" * 32},
        windows=sums,
        layers={0: {name: f"{name}{'!' if moved and at > 2 else ''}" for at, name in enumerate(OUTPUTS)}},
    )
    figures = {"ppl": 21.5, "kld_mean": 0.05}
    q4 = replace(pydoc, check="q4", job="compare", variant="tiny.Q4_0", metrics=figures)
    rounds = np.array([0.98, 1.0, 1.01, 0.99, 1.02])
    speeds = [
        Measured(
            "speed",
            "throughput",
            "tiny",
            test,
            {"test": test},
            model,
            {"fma_share": share * slower, "ratio/llama_cpp": 2 * share * slower, "tok_per_s": 900.0},
            samples={"fma_share": (share * slower * rounds).tolist(), "tok_per_s": [900.0] * 5},
        )
        for test, share in (("ppl512", 0.8), ("tg64", 0.3))
    ]
    return [pydoc, q4, *speeds]


def gates(now: Sequence[Measured], then: Sequence[Measured]) -> list[Gate]:
    """What limits of bits, of a rise and of a fall say."""
    bits = now[0].bits["nll_sha256"], then[0].bits["nll_sha256"]
    ppl, was = now[0].metrics["ppl"], then[0].metrics["ppl"]
    found = [
        Gate("pydoc", "tiny", "pydoc", "nll_sha256", *bits, "the baseline's bits", bits[0] == bits[1]),
        Gate("pydoc", "tiny", "pydoc", "ppl", ppl, was, "<= 1.002 x baseline", ppl <= 1.002 * was),
        Gate("q4", "tiny.Q4_0", "pydoc", "kld_mean", 0.05, None, "<= 0.1", True),
        Gate(
            "speed",
            "tiny",
            "ppl512",
            "ratio/ik_llama_cpp",
            None,
            None,
            ">= 1",
            None,
            "ik_llama_cpp did not run: it is not installed here",
        ),
    ]
    for a, b in zip(now[2:], then[2:], strict=True):
        share, kept = a.metrics["fma_share"], b.metrics["fma_share"]
        is_kept = share >= 0.85 * kept
        found.append(Gate("speed", "tiny", a.data, "fma_share", share, kept, ">= 0.85 x baseline", is_kept))
    return found


def passed() -> Outcome:
    """All as it was a day before."""
    before = Baseline("smoke", "MLflow", "0" * 32, provenance(TODAY - timedelta(days=1)), measured())
    found = gates(measured(), measured())
    return Outcome(
        "smoke", "00aa11bb22cc33dd", "passed", CHECKS, measured(), found, (), before, provenance(TODAY)
    )


def regression() -> Outcome:
    """Six windows of one document are worse, from the fourth layer on, and the engine is 30 % slower."""
    moved = {at: 0.02 * (at - 7) for at in range(8, 14)}
    now, then = measured(0.7, moved), measured()
    sha = "5d6e7f8091" * 4
    differs = {"git_sha": ("1a2b3c4d5e" * 4, sha), "engine_digest": ("ab" * 32, "ef" * 32)}
    diffs = [
        {"window": at, "document": 1, "first_token": 200 * at, "n_scored": 100, "nll_diff": by}
        for at, by in sorted(moved.items(), reverse=True)
    ]
    culprits = [
        Culprit(
            "pydoc",
            "tiny",
            "pydoc",
            ("nll_sha256", "ppl"),
            differs,
            diffs[:5],
            [{"document": 1, "n_windows": 8, "nll_diff": 0.0525}],
            window=0,
            layer="blk.2",
            tensors=["blk.2.ffn_down.weight"],
            sentence="tiny on pydoc: bits differ from blk.2 on, in a tensor of /home/me/models/tiny.gguf; "
            "document 1 moved most (+0.0525 nats a token).",
        ),
        Culprit(
            "speed",
            "tiny",
            "ppl512",
            ("fma_share",),
            differs,
            sentence="ppl512 is 30 % slower, the ceiling is the same.",
        ),
    ]
    return replace(
        passed(),
        verdict="regression",
        measured=now,
        gates=gates(now, then),
        culprits=culprits,
        provenance=provenance(TODAY, git_sha=sha, engine_digest="ef" * 32, wall_s=61.5),
        warnings=["the peer ik_llama_cpp is not installed"],
    )


def past(n: int = 60, seed: int = 0) -> list[Row]:
    """Rows of n runs before today: the perplexity changed once, the speed twice, the last time upwards."""
    rng = np.random.default_rng(seed)
    rows = []
    for at in range(n):
        level = 0.8 if at < n // 3 else 0.6 if at < 2 * n // 3 else 1.0
        run = measured(level * float(np.exp(rng.normal(0, 0.04))))
        if at < n // 2:
            run[0] = replace(run[0], metrics={"ppl": run[0].metrics["ppl"] * 1.004})
        when = TODAY - timedelta(days=n - at)
        version = "0.1.0" if at >= n // 2 else "0.0.9"
        rows += rows_of(run, provenance(when, version=version, git_sha=f"{at:02x}" * 20))
    return rows
