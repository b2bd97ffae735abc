"""A measurement beside its baseline, window by window: how far a mean moved, and how sure that is.

Both scored the same tokens, so what is hard about a text cancels: with d_w = S_w - B_w the difference of a
window's sums and n_w its scored tokens,

    mean       m = sum d_w / sum n_w                                   nats a token
    stderr     sqrt(G / (G - 1) sum_g (d_g - m n_g)^2) / sum n_g       CR1, clusters g (pipeline.metrics)
    interval   m -+ t stderr, t Student's two-sided quantile for G - 1 degrees of freedom

Clusters are windows, or documents where there are `LEAST_DOCUMENTS` of them: windows of one article move
together, which makes an error by windows too small, up to a quarter on wiki.test.raw (compare/sequence.py).
With few documents the error by documents is itself hardly known, and windows are the better of two evils.

Of 2,000 runs without a difference (tests/pipeline/test_regression_paired.py) the interval at 0.99 leaves out
zero in 0.75 % with 8 windows, 0.75 % with 40, and 1.95 % with 24 documents of 1 to 6 windows that move
together (of 20,000 runs 1.0 % and 1.3 % with 8 and 24), where windows taken as independent give 18 %. A gate
looks at one side only: it is red in half of them, and in fewer yet where `effect` is not tiny.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.compare import student
from pipeline.compare.ladder import smallest_difference
from pipeline.metrics import clustered_stderr
from pipeline.regression.outcome import WindowSums

SUMS = {"ln_ppl": "nll_sum", "kld_mean": "kld_sum"}
"""Metrics that can be paired, and the sums that they are means of."""
LEAST_DOCUMENTS = 16
POWER = 0.8
_MOST_WINDOWS = 1_000_000


@dataclass(frozen=True)
class Paired:
    """Today's mean less the baseline's, nats a token.

    Attributes:
        value, baseline: the two means.
        stderr, low, high: None of a single cluster, which has no error.
        clusters: "windows" or "documents", of which there are `n_clusters`.
    """

    value: float
    baseline: float
    mean: float
    stderr: float | None
    low: float | None
    high: float | None
    confidence: float
    n_windows: int
    n_clusters: int
    clusters: str

    def is_worse(self, effect: float) -> bool:
        """Whether it rose for sure, and by `effect` at least."""
        return self.low is not None and self.low > 0 and self.mean >= effect

    def is_open(self, effect: float) -> bool:
        """Whether a rise by `effect` can be neither seen nor ruled out."""
        return not self.is_worse(effect) and (self.high is None or self.high >= effect)

    def windows_needed(self, effect: float) -> int | None:
        """Windows with which a true rise by `effect` would be seen in 80 % of texts like this one.

        None where a single cluster tells nothing of how texts vary, or a million would not do.
        """
        if self.stderr is None:
            return None
        of_one = self.stderr * math.sqrt(self.n_clusters)
        alpha, each = 1 - self.confidence, self.n_windows / self.n_clusters

        def sees(n: int) -> bool:
            return smallest_difference(of_one / math.sqrt(n), n, alpha=alpha, power=POWER) <= effect

        few, many = 1, 2
        while not sees(many):
            few, many = many, 2 * many
            if many * each > _MOST_WINDOWS:
                return None
        while many - few > 1:
            middle = (few + many) // 2
            few, many = (few, middle) if sees(middle) else (middle, many)
        return math.ceil(many * each)

    def __str__(self) -> str:
        moved = f"{self.mean:+.4g} nats a token"
        if self.low is None or self.high is None:
            return f"{moved} in one window, which has no interval"
        by = "" if self.clusters == "windows" else f" in {self.n_clusters} documents"
        return (
            f"{moved}, {self.confidence * 100:g} % interval {self.low:.4g} to {self.high:.4g} over "
            f"{self.n_windows} windows{by}"
        )


def paired(then: WindowSums, now: WindowSums, metric: str, confidence: float) -> Paired:
    """How far a metric of `SUMS` moved since the baseline.

    Args:
        then, now: of the same windows.
        confidence: of the two-sided interval.

    Raises:
        ValueError: the windows are not the same, or have no such sums.
    """
    before, after = getattr(then, SUMS[metric]), getattr(now, SUMS[metric])
    if before is None or after is None:
        raise ValueError(f"{metric}: the windows have no {SUMS[metric]}")
    if not (np.array_equal(then.window, now.window) and np.array_equal(then.n_scored, now.n_scored)):
        raise ValueError(
            f"{metric}: {then.window.size} windows and {now.window.size} others cannot be paired"
        )
    counts = np.asarray(now.n_scored, np.int64)
    differences, clusters = after - before, "windows"
    documents, of_document = np.unique(now.document, return_inverse=True)
    n_scored = int(counts.sum())
    mean = math.fsum(differences.tolist()) / n_scored
    if LEAST_DOCUMENTS <= documents.size < counts.size:
        differences, counts = by_cluster(of_document, differences, counts)
        clusters = "documents"
    stderr = low = high = None
    if counts.size > 1:
        stderr = clustered_stderr(differences, counts)
        reach = _reach(confidence, counts.size - 1) * stderr
        low, high = mean - reach, mean + reach
    return Paired(
        value=math.fsum(after.tolist()) / n_scored,
        baseline=math.fsum(before.tolist()) / n_scored,
        mean=mean,
        stderr=stderr,
        low=low,
        high=high,
        confidence=confidence,
        n_windows=now.window.size,
        n_clusters=counts.size,
        clusters=clusters,
    )


def by_cluster(
    cluster: npt.NDArray[np.intp], sums: npt.NDArray[np.float64], counts: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Sums and counts of clusters 0, 1, ..., added up over their windows."""
    return np.bincount(cluster, sums).astype(np.float64), np.bincount(cluster, counts).astype(np.int64)


@functools.lru_cache(maxsize=64)
def _reach(confidence: float, df: int) -> float:
    """Standard errors from the mean to an end of the interval."""
    return student.quantile((1 + confidence) / 2, df)
