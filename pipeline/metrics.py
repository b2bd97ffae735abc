"""Sums over windows -> perplexity, its errors, bits per byte; the units are decided here.

Let window g hold n_g scored tokens with negative log-likelihoods v (nats), S_g = sum of v, Q_g = sum of v*v,
and let N, S, Q be the sums over the G windows. Everything is float64; sums are `math.fsum`, which is
correctly rounded, so there is no order to fix.

    nll_mean_nats         m = S / N
    ppl                   exp(m)
    ppl_stderr            exp(m) * sqrt((Q / N - m*m) / (N - 1))    llama.cpp's "+-": tokens as if independent
    ppl_stderr_clustered  exp(m) * sqrt(G / (G - 1) * sum_g (S_g - m * n_g)^2) / N
    bits_per_byte         S / ln 2 / bytes of the scored tokens
    byte_ppl, word_ppl    exp(S / bytes), exp(S / words begun in the scored tokens)

The clustered error lets the tokens of one window depend on each other in any way: it is the cluster-robust
(CR1) standard error of the intercept in a regression of v on a constant, clusters = windows, and the delta
method for exp. CR1's factor is G / (G - 1) * (N - 1) / (N - K) with K = 1 regressor, hence G / (G - 1).
Source: Liang & Zeger 1986, https://doi.org/10.1093/biomet/73.1.13; tests/reference/perplexity.py has the
matrix form. Both are one standard error, not a 95 % interval.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def window_sums(nll: Floats) -> tuple[float, float]:
    """Sum and sum of squares of a window's (n,) float64 negative log-likelihoods, correctly rounded."""
    values = nll.tolist()
    return math.fsum(values), math.fsum(value * value for value in values)


def nll_sha256(nll_sum_nats: Floats) -> str:
    """SHA-256 of the windows' sums in window order, float64 little-endian: equal digests are equal bits."""
    return hashlib.sha256(np.ascontiguousarray(nll_sum_nats, "<f8").data).hexdigest()


def perplexity(windows: Mapping[str, npt.NDArray[Any]]) -> dict[str, Any]:
    """The headline numbers of a finished run.

    Args:
        windows: columns of the window table, (G,) each and in window order: `nll_sum_nats`, `nll_sq_sum`
        float64,
            `n_scored`, `n_bytes`, `n_words` integers.

    Returns:
        the names above with `n_windows`, `n_scored` and `nll_sha256`; None where a figure is not defined (one
        window has no clustered error, a text without words no word perplexity, a perplexity can be beyond
        float64).
    """
    sums = np.asarray(windows["nll_sum_nats"], np.float64)
    counts = np.asarray(windows["n_scored"], np.int64)
    n_windows, n_scored = int(sums.size), int(counts.sum())
    total, squares = math.fsum(sums.tolist()), math.fsum(windows["nll_sq_sum"].tolist())
    mean = total / n_scored
    ppl = _exp(mean)
    n_bytes, n_words = int(windows["n_bytes"].sum()), int(windows["n_words"].sum())
    variance = squares / n_scored - mean * mean
    stderr = math.sqrt(variance / (n_scored - 1)) if variance > 0 and n_scored > 1 else None
    clustered = clustered_stderr(sums, counts) if n_windows > 1 else None
    return {
        "ppl": ppl,
        "ppl_stderr": None if ppl is None or stderr is None else ppl * stderr,
        "ppl_stderr_clustered": None if ppl is None or clustered is None else ppl * clustered,
        "nll_mean_nats": mean,
        "bits_per_byte": total / math.log(2) / n_bytes if n_bytes else None,
        "byte_ppl": _exp(total / n_bytes) if n_bytes else None,
        "word_ppl": _exp(total / n_words) if n_words else None,
        "n_windows": n_windows,
        "n_scored": n_scored,
        "nll_sha256": nll_sha256(sums),
    }


def clustered_stderr(sums: Floats, counts: npt.NDArray[np.int64]) -> float:
    """Standard error of the mean sum(sums) / sum(counts), clusters = entries, at least two; CR1."""
    n_clusters, n = sums.size, int(counts.sum())
    mean = math.fsum(sums.tolist()) / n
    residuals = sums - mean * counts
    return math.sqrt(n_clusters / (n_clusters - 1) * math.fsum((residuals * residuals).tolist())) / n


def _exp(value: float) -> float | None:
    """exp; None where a double ends, which a bad model reaches on long words."""
    return math.exp(value) if value < 709.0 else None
