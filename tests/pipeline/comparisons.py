"""Comparisons made up for tests of what people see of one: two variants of a base, and their tables."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.compare.report import Pair, Pairs
from pipeline.compare.sketch import sketch

N_WINDOWS, N_SCORED, WINDOW = 6, 20, 32
PLACES = np.arange(N_WINDOWS)[:, None] * WINDOW + (WINDOW - N_SCORED) + np.arange(N_SCORED)


class Letters:
    """Token 7 is markup, 8 a line end, 9 nothing; the others are a space and a letter."""

    def decode(self, ids: Iterable[int]) -> bytes:
        special = {7: b"</script><b onclick=x>&amp;", 8: b"\n", 9: b""}
        return b"".join(special.get(int(i), b" " + bytes([97 + int(i) % 26])) for i in ids)


def variant(name: str, n_bytes: int, kld: float, ln_ratio: float, **more: Any) -> dict[str, Any]:
    """A variant with the figures that everybody sees."""
    return {
        "name": name,
        "type": name.rpartition(".")[2],
        "bytes": n_bytes,
        "bpw": n_bytes / 2**24,
        "ppl": 20.0 * float(np.exp(ln_ratio)),
        "ppl_base": 20.0,
        "ln_ratio": ln_ratio,
        "ln_ratio_stderr_clustered": 0.002,
        "kld_mean": kld,
        "kld_stderr_clustered": kld / 20,
        "kld_p99": 9 * kld,
        "dp_rms": kld**0.5 / 4,
        "same_top": 1 - kld,
        "p_vs_next": 0.0123,
        "n_windows": N_WINDOWS,
        "n_scored": N_WINDOWS * N_SCORED,
        **more,
    }


def windows(seed: int, kld: float, *, tokens: bool = True, documents: int = 1) -> pa.Table:
    """A pair's table, with tokens or with the sketch in their place."""
    rng = np.random.default_rng(seed)
    shape = (N_WINDOWS, N_SCORED)
    base = rng.exponential(3.0, shape)
    nll = np.maximum(base + rng.normal(0, kld**0.5, shape), 0)
    divergence = rng.exponential(kld, shape)
    lists = {"nll_base": base, "nll": nll, "kld": divergence}
    lists |= {name: rng.integers(0, 26, shape) for name in ("top_base", "top")}
    kinds = {"kld": pa.float32(), "top_base": pa.int32(), "top": pa.int32()}
    sketches = [sketch(np.exp(-q) - np.exp(-b)) for q, b in zip(nll, base, strict=True)]
    return pa.table(
        {
            "window": np.arange(N_WINDOWS),
            "document": np.arange(N_WINDOWS) * documents // N_WINDOWS,
            "first_token": np.arange(N_WINDOWS) * WINDOW,
            "first_scored": PLACES[:, 0],
            "distance": pa.nulls(N_WINDOWS, pa.int64()),
            "n_scored": np.full(N_WINDOWS, N_SCORED),
            "kld_sum": divergence.sum(axis=1),
            **{
                name: pa.array(
                    values.tolist() if tokens else [None] * N_WINDOWS, pa.list_(kinds.get(name, pa.float64()))
                )
                for name, values in lists.items()
            },
            "dp_keys": pa.array(
                [None if tokens else s.keys.tolist() for s in sketches], pa.list_(pa.int32())
            ),
            "dp_counts": pa.array(
                [None if tokens else s.counts.tolist() for s in sketches], pa.list_(pa.int32())
            ),
        }
    )


VARIANTS = (("tiny.Q8_0", 2**24, 0.001, 0.0012), ("tiny.Q4_0", 2**23, 0.05, 0.04))
PROVENANCE = {"data": {"name": "a|b.txt", "SHA-256": "ab" * 32}, "numerics": 1, "command": None}


def example(*, tokens: bool = True, documents: int = 1) -> tuple[dict[str, Any], Pairs]:
    """Two variants of a base: the summary, and what is behind it."""
    summary = {
        "base": {"name": "tiny.F32", "type": "F32", "bytes": 2**26, "bpw": 32.0},
        "variants": [variant(*told) for told in VARIANTS],
        "warnings": [],
    }
    pairs = [
        Pair(name, windows(at, kld, tokens=tokens, documents=documents))
        for at, (name, _, kld, _) in enumerate(VARIANTS)
    ]
    stream = np.arange(N_WINDOWS * WINDOW, dtype=np.int32) % 26
    return summary, Pairs("tiny.F32", pairs, stream, PROVENANCE)
