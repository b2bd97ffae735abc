"""Records of regression runs, made up, small: what storing and finding them takes."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import store
from pipeline.regression import record
from pipeline.regression.outcome import Gate, Measured, Outcome, WindowSums

KEY = "0123456789abcdef"
WHEN = datetime.datetime(2026, 1, 2, 3, 4, 5, 678901, datetime.UTC)


def windows(values: list[float], kld: list[float] | None = None) -> WindowSums:
    n = len(values)
    whole = [np.arange(n, dtype=np.int64) * step for step in (1, 0, 512)]
    sums = np.array(values), None if kld is None else np.array(kld)
    return WindowSums(*whole, np.full(n, 255, np.int64), *sums)


def measured(check: str = "pydoc", **changed: Any) -> Measured:
    told: dict[str, Any] = {
        "job": "perplexity",
        "variant": "small",
        "data": "pydoc",
        "measure": {"data_sha256": "d" * 64, "protocol": {"window": 512, "limit": None}},
        "subject": {"model_sha256": "a" * 64, "numerics": 1},
        "metrics": {"ppl": 20.0, "n_windows": 2},
        "bits": {"nll_sha256": "b" * 64},
        "windows": windows([700.1, 699.3]),
        "layers": {0: {"token_embd": "1" * 64, "blk.0": "2" * 64}},
        "tensors": {"token_embd.weight": "c" * 64},
    }
    return Measured(check, **(told | changed))


def speed(test: str, share: float) -> Measured:
    return measured(
        "speed", job="throughput", data=test, metrics={"fma_share": share, "ratio/llama_cpp": 1.1},
        bits={}, windows=None, layers={}, tensors={}, samples={"fma_share": [share, 0.1 + 0.2]},
    )  # fmt: skip


def outcome(suite: str = "smoke", verdict: str = "passed", minute: int = 4, **changed: Any) -> Outcome:
    provenance = {
        "finished_at": WHEN.replace(minute=minute),
        "version": "1.0",
        "numerics": 1,
        "engine_digest": "e" * 64,
        "git_sha": None,
        "host": "here",
        "cpu": "a processor",
        "features": ["avx2", "fma"],
        "versions": {"numpy": "2"},
        "settings": {"pydoc": {"model": "small", "protocol.limit": 2}},
        "limits": {"pydoc": {"ppl": {"rise": 0.01}}},
    }
    told: dict[str, Any] = {
        "suite": suite,
        "run_key": KEY,
        "verdict": verdict,
        "checks": {"pydoc": "perplexity of small", "speed": "speed of small"},
        "measured": [measured(), speed("ppl512", 0.8), speed("tg64@8", 0.5)],
        "gates": [
            Gate("pydoc", "small", "pydoc", "ppl", 20.0, 19.0, "<= 1.01 x baseline", False),
            Gate("pydoc", "small", "pydoc", "nll_sha256", None, None, "equal", None),
        ],
        "culprits": [],
        "baseline": None,
        "provenance": provenance,
        "warnings": ["a warning"],
    }
    return Outcome(**(told | changed))


def recorded(results: Path, run: Outcome | None = None) -> Path:
    """The record of a run in a results folder."""
    run = run or outcome()
    return record.write(store.regressions_folder(results, run.run_key), run)
