"""Block bootstrap of means over windows: a window is a block, so what depends within one stays together.

A resample draws as many windows as there are, with replacement. Only how often each was drawn matters, so a
resample is a row of counts and its mean a ratio of two weighted sums. Sums run over windows in their order,
one elementwise addition after the other: the same bits on every machine (a BLAS would choose its own order)
and for every NumPy (draws are PCG64's raw stream, which NumPy promises to keep; its `Generator` may change).

Intervals are expanded percentiles: quantiles of the resampled means at the normal probabilities of
-+ t sqrt(G / (G - 1)), with t Student's 97.5 % quantile for G - 1 degrees of freedom, in place of 2.5 % and
97.5 %. A plain percentile interval of few windows is too narrow, by that factor and by t over z; this one
keeps the shape that skewed windows give it. Source: Hesterberg 2015, section 4,
https://doi.org/10.1080/00031305.2015.1089789. Coverage of a nominal 95 % (1,000 samples of window means that
are normal, gamma(4), t(4), exponential):

    8 windows     this 0.93 0.94 0.92 0.89    percentile 0.88 0.88 0.87 0.84    BCa 0.88 0.89 0.85 0.85
    40 windows    this 0.95 0.95 0.95 0.94    percentile 0.94 0.93 0.94 0.93    BCa 0.94 0.93 0.92 0.94
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from pipeline.compare import student

Floats = npt.NDArray[np.float64]

RESAMPLES = 2000
SEED = 20_260_801
CONFIDENCE = 0.95


def intervals(sums: Mapping[str, Floats], counts: npt.NDArray[np.int64]) -> dict[str, tuple[float, float]]:
    """95 % intervals of sum(values) / sum(counts) for each entry of `sums`; the same resamples for all.

    Args:
        sums: float64 (G,) each, in window order, G at least 2.
        counts: (G,) scored targets of each window.
    """
    n_windows = counts.size
    drawn = _counts(n_windows)
    names = list(sums)
    rows = np.array([np.asarray(sums[name], np.float64) for name in names] + [counts.astype(np.float64)])
    totals = np.zeros((len(rows), RESAMPLES))
    for window in range(n_windows):
        totals += rows[:, window, None] * drawn[window]
    means = np.sort(totals[:-1] / totals[-1], axis=1)
    reach = student.quantile((1 + CONFIDENCE) / 2, n_windows - 1) * math.sqrt(n_windows / (n_windows - 1))
    tail = statistics.NormalDist().cdf(-reach)
    return {
        name: (percentile(values, tail), percentile(values, 1 - tail))
        for name, values in zip(names, means, strict=True)
    }


def percentile(ordered: Floats, fraction: float) -> float:
    """Between the two order statistics around place fraction * (n - 1), from 0; `ordered` (n,) rises."""
    place = fraction * (ordered.size - 1)
    below = int(place)
    share = place - below
    low, high = float(ordered[below]), float(ordered[min(below + 1, ordered.size - 1)])
    return (1 - share) * low + share * high


@functools.lru_cache(maxsize=4)
def _counts(n_windows: int) -> Floats:
    """float64 (G, RESAMPLES): how often each window is in each resample."""
    raw = np.random.PCG64(SEED).random_raw(RESAMPLES * n_windows)
    chosen = ((raw >> np.uint64(32)) * np.uint64(n_windows)) >> np.uint64(32)
    place = chosen.astype(np.int64).reshape(RESAMPLES, n_windows) + (
        np.arange(RESAMPLES, dtype=np.int64)[:, None] * n_windows
    )
    counts = np.bincount(place.ravel(), minlength=RESAMPLES * n_windows)
    return np.ascontiguousarray(counts.reshape(RESAMPLES, n_windows).T, dtype=np.float64)
