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

Documents may have weights (`data.weight`); a window's is w_g, of its document. They are importance weights:
a document of weight 2 counts as if its score stood there twice, and all weights alike are none at all.

    nll_mean_nats         m = sum_g w_g S_g / sum_g w_g n_g          words and bytes likewise: sum_g w_g b_g
    ppl_stderr            exp(m) * sqrt(N / (N - 1) * sum_g w_g^2 (Q_g - 2 m S_g + m^2 n_g)) / sum_g w_g n_g
    ppl_stderr_clustered  exp(m) * sqrt(G / (G - 1) * sum_g (w_g (S_g - m * n_g))^2) / sum_g w_g n_g

that is, the errors of a weighted mean whose weights are known numbers; a weight is no count of observations.
`n_scored`, `n_windows` and `nll_sha256` are of the windows as they are, and so are the rows of the table.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

HALVES = (
    "half_ppl",
    "half_ppl_stderr",
    "half_ppl_stderr_clustered",
    "half_nll_mean_nats",
    "half_n_scored",
)
"""Figures of the second halves of windows alone; all null but for protocol `carry`."""


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
            float64, `n_scored`, `n_bytes`, `n_words` integers; `weight` float64, NaN or left out where all
            weigh alike.

    Returns:
        the names above with `n_windows`, `n_scored` and `nll_sha256`; None where a figure is not defined (one
        window has no clustered error, a text without words no word perplexity, a perplexity can be beyond
        float64).
    """
    sums = np.asarray(windows["nll_sum_nats"], np.float64)
    counts = np.asarray(windows["n_scored"], np.int64)
    weights = _weights(windows, sums.size)
    n_windows, n_scored = int(sums.size), int(counts.sum())
    if weights is None:
        total, squares = math.fsum(sums.tolist()), math.fsum(windows["nll_sq_sum"].tolist())
        n_tokens: float = n_scored
        n_bytes, n_words = float(windows["n_bytes"].sum()), float(windows["n_words"].sum())
        mean = total / n_scored
        variance = squares / n_scored - mean * mean
        stderr = math.sqrt(variance / (n_scored - 1)) if variance > 0 and n_scored > 1 else None
    else:
        total, n_tokens = _dot(weights, sums), _dot(weights, counts)
        n_bytes, n_words = _dot(weights, windows["n_bytes"]), _dot(weights, windows["n_words"])
        mean = total / n_tokens
        squares = _dot(weights**2, windows["nll_sq_sum"] - 2 * mean * sums + mean * mean * counts)
        factor = n_scored / (n_scored - 1) if n_scored > 1 else 0.0
        stderr = math.sqrt(factor * squares) / n_tokens if factor * squares > 0 else None
    ppl = _exp(mean)
    clustered = clustered_stderr(sums, counts, weights) if n_windows > 1 else None
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


def second_halves(windows: Mapping[str, npt.NDArray[Any]]) -> dict[str, Any]:
    """The figures of `HALVES` over windows that have tokens which protocol `windows` scores (carry.py).

    Args:
        windows: columns of the window table, (G,) each: `half_n_scored`, `half_nll_sum_nats`,
            `half_nll_sq_sum`, NaN where a window has none; `weight` as above.

    Returns:
        None for each where no window has any.
    """
    counts = np.asarray(windows["half_n_scored"], np.float64)
    has = ~np.isnan(counts)
    if not has.any():
        return dict.fromkeys(HALVES)
    found = perplexity(
        {
            "n_scored": counts[has].astype(np.int64),
            "nll_sum_nats": np.asarray(windows["half_nll_sum_nats"], np.float64)[has],
            "nll_sq_sum": np.asarray(windows["half_nll_sq_sum"], np.float64)[has],
            "n_bytes": np.zeros(int(has.sum())),
            "n_words": np.zeros(int(has.sum())),
            "weight": np.asarray(windows["weight"], np.float64)[has],
        }
    )
    return {name: found[name.removeprefix("half_")] for name in HALVES}


def clustered_stderr(sums: Floats, counts: npt.NDArray[np.int64], weights: Floats | None = None) -> float:
    """Standard error of the mean sum(w * sums) / sum(w * counts), clusters = entries, at least two; CR1."""
    if weights is not None:
        sums, scale = weights * sums, weights * counts
    else:
        scale = counts.astype(np.float64)
    n_clusters, n = sums.size, math.fsum(scale.tolist())
    mean = math.fsum(sums.tolist()) / n
    residuals = sums - mean * scale
    return math.sqrt(n_clusters / (n_clusters - 1) * math.fsum((residuals * residuals).tolist())) / n


def _weights(windows: Mapping[str, npt.NDArray[Any]], n: int) -> Floats | None:
    """(G,) weights, None where the table has none."""
    weights = np.asarray(windows.get("weight", np.full(n, np.nan)), np.float64)
    return None if np.isnan(weights).all() else weights


def _dot(weights: Floats, values: npt.NDArray[Any]) -> float:
    return math.fsum((weights * values).tolist())


def _exp(value: float) -> float | None:
    """exp; None where a double ends, which a bad model reaches on long words."""
    return math.exp(value) if value < 709.0 else None
