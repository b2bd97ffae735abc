"""Metrics: equal to token-level formulas in NumPy, merged from sums, never a mean of means."""

import hashlib
import math
import struct

import numpy as np
import pytest
from reference import perplexity as reference

from pipeline.metrics import nll_sha256, perplexity, window_sums


def rows_of(values, windows):
    """Window table columns of token-level values."""
    parts = [values[windows == name] for name in np.unique(windows)]
    sums = np.array([window_sums(part) for part in parts])
    counts = np.array([part.size for part in parts])
    return {
        "nll_sum_nats": sums[:, 0],
        "nll_sq_sum": sums[:, 1],
        "n_scored": counts,
        "n_bytes": counts * 4,
        "n_words": counts // 2,
    }


@pytest.mark.parametrize("sizes", [[255] * 8, [3, 40, 7, 255, 1], [2, 2]])
def test_errors_equal_the_cluster_robust_regression(sizes):
    rng = np.random.default_rng(5)
    windows = np.repeat(np.arange(len(sizes)), sizes)
    values = rng.gamma(2.0, 1.6, windows.size) + rng.normal(0, 0.4, len(sizes))[windows] + 2
    ppl, stderr, clustered = reference.perplexity(values, windows)
    ours = perplexity(rows_of(values, windows))
    assert ours["ppl"] == pytest.approx(ppl, rel=1e-13)
    assert ours["ppl_stderr"] == pytest.approx(stderr, rel=1e-9)
    assert ours["ppl_stderr_clustered"] == pytest.approx(clustered, rel=1e-11)
    assert ours["n_scored"] == values.size
    assert ours["n_windows"] == len(sizes)


def test_perplexity_is_of_tokens_not_of_windows():
    values, windows = np.array([1.0, 1.0, 1.0, 5.0]), np.array([0, 0, 0, 1])
    assert perplexity(rows_of(values, windows))["nll_mean_nats"] == 2.0


def test_per_byte_and_per_word_figures_are_the_same_total():
    values, windows = np.full(64, 2.0), np.repeat(np.arange(2), 32)
    ours = perplexity(rows_of(values, windows))
    assert ours["bits_per_byte"] == pytest.approx(128 / math.log(2) / 256, rel=1e-15)
    assert ours["byte_ppl"] == pytest.approx(2 ** ours["bits_per_byte"], rel=1e-14)
    assert ours["word_ppl"] == pytest.approx(math.exp(128 / 32), rel=1e-14)


def test_what_is_not_defined_is_null():
    one = perplexity(rows_of(np.full(4, 2.0), np.zeros(4, np.int64)) | {"n_words": np.array([0])})
    assert one["ppl_stderr_clustered"] is None
    assert one["word_ppl"] is None
    assert one["ppl_stderr"] is None, "all tokens alike: llama.cpp prints none either"
    awful = perplexity(rows_of(np.full(400, 20.0), np.repeat([0, 1], 200)) | {"n_words": np.array([1, 1])})
    assert awful["word_ppl"] is None
    assert awful["ppl"] == pytest.approx(math.exp(20))


def test_window_sums_do_not_depend_on_order():
    values = np.random.default_rng(1).gamma(2, 3, 255) * np.logspace(-9, 9, 255)
    assert window_sums(values) == window_sums(values[::-1]) == window_sums(np.sort(values))


def test_digest_is_of_little_endian_doubles_in_window_order():
    sums = np.array([1.5, 2.25, 1e300])
    assert nll_sha256(sums) == hashlib.sha256(struct.pack("<3d", *sums)).hexdigest()
    assert nll_sha256(sums[::-1]) != nll_sha256(sums) == nll_sha256(np.array([0, *sums])[1:])


@pytest.mark.parametrize("sizes", [[255] * 8, [3, 40, 7, 255, 1], [2, 2]])
def test_weighted_errors_equal_the_weighted_regression(sizes):
    rng = np.random.default_rng(6)
    windows = np.repeat(np.arange(len(sizes)), sizes)
    values = rng.gamma(2.0, 1.6, windows.size) + rng.normal(0, 0.4, len(sizes))[windows] + 2
    weights = rng.uniform(0.1, 7, len(sizes))
    ppl, stderr, clustered = reference.weighted(values, windows, weights[windows])
    ours = perplexity(rows_of(values, windows) | {"weight": weights})
    assert ours["ppl"] == pytest.approx(ppl, rel=1e-13)
    assert ours["ppl_stderr"] == pytest.approx(stderr, rel=1e-9)
    assert ours["ppl_stderr_clustered"] == pytest.approx(clustered, rel=1e-9)
    assert ours["n_scored"] == values.size, "a weight is no count"


def test_equal_weights_are_none():
    rng = np.random.default_rng(7)
    values, windows = rng.gamma(2.0, 1.6, 500), np.repeat(np.arange(10), 50)
    rows = rows_of(values, windows)
    plain, missing = perplexity(rows), perplexity(rows | {"weight": np.full(10, np.nan)})
    assert plain == missing, "a table without weights, to the bit"
    for name, value in perplexity(rows | {"weight": np.full(10, 3.0)}).items():
        assert value == (plain[name] if isinstance(value, str) else pytest.approx(plain[name], rel=1e-12)), (
            name
        )


def test_a_weight_counts_as_so_many_copies():
    rng = np.random.default_rng(8)
    values, windows = rng.gamma(2.0, 1.6, 60), np.repeat(np.arange(3), 20)
    twice = perplexity(rows_of(np.append(values, values[40:]), np.append(windows, np.full(20, 3))))
    weighted = perplexity(rows_of(values, windows) | {"weight": np.array([1.0, 1.0, 2.0])})
    for name in ("ppl", "bits_per_byte", "byte_ppl", "word_ppl"):
        assert weighted[name] == pytest.approx(twice[name], rel=1e-13)
