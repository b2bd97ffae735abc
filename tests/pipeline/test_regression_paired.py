"""Paired differences by window: the figures, their error rates, and how many windows an effect takes."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pipeline.regression.outcome import WindowSums
from pipeline.regression.paired import LEAST_DOCUMENTS, paired

RUNS = 2000


def sums(nll, *, counts=255, document=None, kld=None):
    """Windows with those sums, of one document each where none is given."""
    n = len(nll)
    return WindowSums(
        window=np.arange(n),
        document=np.arange(n) if document is None else np.asarray(document),
        first_token=np.arange(n) * 512,
        n_scored=np.broadcast_to(np.asarray(counts, np.int64), n).copy(),
        nll_sum=np.asarray(nll, np.float64),
        kld_sum=None if kld is None else np.asarray(kld, np.float64),
    )


def text(n, seed=0):
    return np.random.default_rng(seed).normal(700, 90, n)


def test_interval_is_scipys_paired_t_interval():
    stats = pytest.importorskip("scipy.stats", reason="SciPy is the oracle")
    then, now = text(12), text(12) + np.random.default_rng(1).normal(2, 1, 12)
    found = paired(sums(then), sums(now), "ln_ppl", 0.99)
    want = stats.ttest_rel(now / 255, then / 255).confidence_interval(0.99)
    assert (found.low, found.high) == pytest.approx((want.low, want.high), rel=1e-10)
    assert found.mean == pytest.approx(np.mean(now - then) / 255, rel=1e-12)
    assert (found.value, found.baseline) == pytest.approx((now.sum() / 255 / 12, then.sum() / 255 / 12))
    assert (found.n_windows, found.n_clusters, found.clusters) == (12, 12, "windows")


def test_windows_of_unlike_lengths_weigh_by_their_tokens():
    counts = np.array([100, 255, 40, 200])
    change = np.array([1.0, -0.5, 2.0, 0.25])
    found = paired(sums(np.zeros(4), counts=counts), sums(change, counts=counts), "ln_ppl", 0.9)
    mean = change.sum() / counts.sum()
    residuals = change - mean * counts
    stderr = math.sqrt(4 / 3 * (residuals**2).sum()) / counts.sum()
    assert found.mean == pytest.approx(mean, rel=1e-12)
    assert found.stderr == pytest.approx(stderr, rel=1e-12)


def test_enough_documents_are_the_clusters():
    document = np.repeat(np.arange(LEAST_DOCUMENTS), 3)
    change = np.random.default_rng(2).normal(0, 1, document.size)
    by_document = change.reshape(-1, 3).sum(axis=1)
    found = paired(sums(0 * change, document=document), sums(change, document=document), "ln_ppl", 0.95)
    want = paired(sums(0 * by_document, counts=765), sums(by_document, counts=765), "ln_ppl", 0.95)
    assert (found.low, found.high) == (want.low, want.high)
    assert (found.n_windows, found.n_clusters, found.clusters) == (
        document.size,
        LEAST_DOCUMENTS,
        "documents",
    )
    assert "over 48 windows in 16 documents" in str(found)
    few = paired(*(sums(each[3:], document=document[3:]) for each in (0 * change, change)), "ln_ppl", 0.95)
    assert few.clusters == "windows"


def test_kl_divergence_pairs_its_own_sums():
    then, now = sums(text(9), kld=np.full(9, 2.0)), sums(text(9), kld=np.full(9, 3.0))
    assert paired(then, now, "kld_mean", 0.95).mean == pytest.approx(1 / 255)
    assert paired(then, now, "ln_ppl", 0.95).mean == 0
    with pytest.raises(ValueError, match="no kld_sum"):
        paired(sums(text(9)), now, "kld_mean", 0.95)


def test_other_windows_cannot_be_paired():
    with pytest.raises(ValueError, match="9 windows and 8 others"):
        paired(sums(text(9)), sums(text(8)), "ln_ppl", 0.95)


@pytest.mark.parametrize(
    ("n", "by_document", "share"),
    [(8, False, 0.0075), (40, False, 0.0075), (24, True, 0.0195)],
)
def test_false_alarms_at_confidence_99(n, by_document, share):
    """Share of 2,000 runs without a difference whose interval at 0.99 leaves out zero, as the module says.

    Windows differ by gamma-skewed noise of either sign; those of a document by a part that is common to it.
    """
    rng = np.random.default_rng(99)
    n_wrong = n_reds = 0
    document = np.repeat(np.arange(n), rng.integers(1, 7, n)) if by_document else np.arange(n)
    for _ in range(RUNS):
        size = document.size
        change = (rng.gamma(4, 1, size) - 4) * rng.choice([-1.0, 1.0], size)
        if by_document:
            change += rng.normal(0, 3, n)[document]
        then = sums(np.zeros(size), document=document)
        found = paired(then, sums(change, document=document), "ln_ppl", 0.99)
        n_wrong += found.low > 0 or found.high < 0
        n_reds += found.is_worse(1e-12)
    assert n_wrong / RUNS == share
    assert n_reds <= 0.01 * RUNS  # a gate looks to one side only


def test_windows_of_one_document_taken_as_independent_raise_false_alarms():
    rng = np.random.default_rng(7)
    document = np.repeat(np.arange(12), 4)  # too few documents to be clusters
    wrong = 0
    for _ in range(RUNS // 4):
        change = rng.normal(0, 1, 48) + rng.normal(0, 1, 12)[document]
        found = paired(sums(0 * change, document=document), sums(change, document=document), "ln_ppl", 0.99)
        wrong += found.low > 0 or found.high < 0
    assert wrong / (RUNS // 4) > 0.05


def test_a_difference_is_worse_only_when_sure_and_large_enough():
    then = text(20)
    sure = paired(sums(then), sums(then + 255 * 0.01 + np.linspace(-0.5, 0.5, 20)), "ln_ppl", 0.99)
    assert sure.is_worse(0.005)
    assert not sure.is_open(0.005)
    assert not sure.is_worse(0.02)
    assert not sure.is_open(0.02)  # all of the interval lies below it
    unsure = paired(sums(then), sums(then + np.random.default_rng(3).normal(2, 40, 20)), "ln_ppl", 0.99)
    assert not unsure.is_worse(0.005)
    assert unsure.is_open(0.005)
    better = paired(sums(then), sums(then - 3 + np.linspace(-0.5, 0.5, 20)), "ln_ppl", 0.99)
    assert not better.is_worse(0.005)
    assert not better.is_open(0.005)


def test_equal_windows_are_no_difference_at_all():
    found = paired(sums(text(5)), sums(text(5)), "ln_ppl", 0.99)
    assert (found.mean, found.low, found.high) == (0.0, 0.0, 0.0)
    assert not found.is_open(1e-6)


def test_windows_needed_see_the_effect_in_four_texts_of_five():
    rng = np.random.default_rng(11)
    spread, effect = 0.02 * 255, 0.01
    change = rng.normal(0, spread, 12)
    found = paired(sums(np.zeros(12)), sums(change), "ln_ppl", 0.95)
    needed = found.windows_needed(effect)
    assert needed is not None
    real = needed * (spread / change.std(ddof=1)) ** 2  # had the spread been known
    seen = 0
    for _ in range(400):
        sample = rng.normal(effect * 255, spread, round(real))
        seen += paired(sums(np.zeros(sample.size)), sums(sample), "ln_ppl", 0.95).low > 0
    assert seen / 400 == pytest.approx(0.8, abs=0.06)
    assert found.windows_needed(effect / 2) == pytest.approx(4 * needed, rel=0.15)
    assert found.windows_needed(1e-9) is None


def test_one_window_tells_nothing_of_how_texts_vary():
    found = paired(sums([700.0]), sums([710.0]), "ln_ppl", 0.99)
    assert (found.stderr, found.low, found.high) == (None, None, None)
    assert not found.is_worse(0.005)
    assert found.is_open(0.005)
    assert found.windows_needed(0.005) is None
    assert str(found).endswith("in one window, which has no interval")
