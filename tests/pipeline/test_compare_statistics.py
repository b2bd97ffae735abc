"""Figures of comparisons: against the float64 oracle, llama.cpp's block, and formulas written out again."""

import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.perplexity import cluster_robust

from pipeline.compare import bootstrap, statistics, student
from pipeline.compare.kld_block import kld_block
from pipeline.compare.ladder import smallest_difference
from pipeline.compare.sketch import merged, sketch
from pipeline.compare.statistics import Targets, figures, figures_of_sums, window_sums

VARIANTS = {"Q8_0": "kld-q8_0-f32.txt", "Q4_K_M": "kld-q4_k_m-f32.txt"}


@pytest.fixture(scope="module")
def oracle(shared_data):
    """Targets of each variant in smollm2-kld.npz, and llama.cpp's block on the same windows."""
    base = np.load(shared_data / "oracle" / "smollm2-nll.npz")["nll_float32"][:8].ravel()
    found = np.load(shared_data / "oracle" / "smollm2-kld.npz")
    windows = np.repeat(np.arange(8), 255)
    return {
        name: (
            Targets(windows, base, *(found[f"{name}_{x}"].ravel() for x in ("nll", "kld", "same_top"))),
            found[f"{name}_dp"].ravel(),
            (shared_data / "oracle" / block).read_text(),
        )
        for name, block in VARIANTS.items()
    }


def made(sizes, seed=3, noise=0.1):
    """Targets whose windows differ from each other, so that they are correlated within."""
    rng = np.random.default_rng(seed)
    windows = np.repeat(np.arange(len(sizes)) * 2 + 1, sizes)
    shift = np.repeat(rng.normal(0, noise / 2, len(sizes)), sizes)
    base = rng.gamma(1.0, 3.0, windows.size)
    nll = np.abs(base + rng.normal(0.02, noise, windows.size) + shift)
    kld = rng.gamma(0.5, 0.1, windows.size) * np.exp(5 * shift)
    return Targets(windows, base, nll, kld, rng.random(windows.size) < 0.9)


def columns_of(targets):
    """The pair's table of targets, and its sketches."""
    parts = [targets.window == name for name in np.unique(targets.window)]
    rows = [
        window_sums(targets.nll_base[at], targets.nll[at], targets.kld[at], targets.same_top[at])
        for at in parts
    ]
    columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    return columns | {"window": np.unique(targets.window)}, {
        "kld": merged((s.keys, s.counts) for s in (sketch(targets.kld[at]) for at in parts)),
        "dp": merged((s.keys, s.counts) for s in (sketch(targets.dp[at]) for at in parts)),
    }


STATED = {
    "Q8_0": (24.526423, 0.00111637, 0.00082044, 0.0355671, 0.689155, 97.3039),
    "Q4_K_M": (25.526543, 0.0493585, 0.0345828, 0.618348, 5.23537, 85.5882),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_figures_of_the_oracle_are_those_that_its_readme_states(oracle, name):
    targets, dp, _ = oracle[name]
    ours = figures(targets)
    ppl, mean, median, largest, rms, same = STATED[name]
    assert ours["ppl"] == pytest.approx(ppl, abs=6e-7)
    assert ours["kld_mean"] == pytest.approx(mean, rel=3e-6)
    assert ours["kld_p50"] == pytest.approx(median, rel=1e-5)
    assert ours["kld_max"] == pytest.approx(largest, rel=2e-6)
    assert 100 * ours["dp_rms"] == pytest.approx(rms, rel=1e-6)
    assert 100 * ours["same_top"] == pytest.approx(same, abs=5e-5)
    assert np.abs(targets.dp - dp).max() < 1e-15


def read_block(text):
    """Figures by our names from a block, of its value and of its error."""
    names = ["ppl", "ppl_base", "corr", "ln_ratio", "ratio", "ppl_diff", "kld_mean"]
    percentiles = ["max", *statistics.KLD_PERCENTILES, "min"]
    names += [f"kld_{name}" for name in percentiles] + ["dp_mean"]
    percentiles[percentiles.index("p50") :: 1] = ["p75", "p50", "p25", "p10", "p05", "p01", "p001", "min"]
    names += [f"dp_{name}" for name in percentiles] + ["dp_rms", "same_top"]
    lines = [line for line in text.splitlines() if line and not line.startswith("=")]
    found = {}
    for name, line in zip(names, lines, strict=True):
        value, *error = (float(x) for x in re.findall(r"-?\d+\.\d+", line.rpartition(":")[2]))
        scale = 100 if "%" in line.rpartition(":")[2] else 1
        found[name] = value / scale
        stderr = f"{name.removesuffix('_mean') if name in ('kld_mean', 'dp_mean') else name}_stderr"
        if error:
            found[stderr] = error[0] / scale
    return found


@pytest.mark.parametrize("name", VARIANTS)
def test_figures_are_llama_cpps_within_what_its_base_file_allows(oracle, name):
    targets, _, block = oracle[name]
    ours, theirs = figures(targets), read_block(block)
    assert theirs.keys() <= ours.keys()
    assert ours["kld_mean"] == pytest.approx(theirs["kld_mean"], rel=0.03)
    for percentile in ("p50", "p90", "p95", "p99", "p999", "max"):
        assert ours[f"kld_{percentile}"] == pytest.approx(theirs[f"kld_{percentile}"], rel=0.05)
    assert ours["ppl"] == pytest.approx(theirs["ppl"], abs=2e-3)
    assert ours["ppl_stderr"] == pytest.approx(theirs["ppl_stderr"], rel=3e-4)
    assert ours["kld_stderr"] == pytest.approx(theirs["kld_stderr"], abs=1.5e-6)
    assert ours["corr"] == pytest.approx(theirs["corr"], abs=3e-4)
    assert ours["ln_ratio"] == pytest.approx(theirs["ln_ratio"], abs=2e-3)
    for figure in ("dp_mean", "dp_stderr", "dp_rms", "dp_rms_stderr"):
        assert ours[figure] == pytest.approx(theirs[figure], abs=2e-5)
    assert ours["same_top"] == pytest.approx(theirs["same_top"], abs=2.1 / 2040)
    assert ours["same_top_stderr"] == pytest.approx(theirs["same_top_stderr"], rel=0.01)


@pytest.mark.parametrize("file", [*VARIANTS.values(), "kld-q8_0-int8-activations.txt"])
def test_the_block_of_llama_cpps_figures_is_its_own_text(shared_data, file):
    text = (shared_data / "oracle" / file).read_text()
    assert kld_block(read_block(text)) == text


def test_the_block_has_zero_for_unknown_errors_as_llama_cpp_does():
    one = figures(made([1]))
    assert one["corr"] is None
    assert one["kld_stderr"] is None
    block = kld_block(one)
    assert re.search(r"^Cor\(.*:    nan%$", block, re.MULTILINE)
    assert re.search(r"^Mean    KLD: .* ±   0\.000000$", block, re.MULTILINE)


@pytest.mark.parametrize("sizes", [[255] * 8, [40, 3, 90, 1, 255], [2, 2]])
def test_figures_equal_the_formulas_written_out_again(sizes):
    targets = made(sizes)
    q, b, k, d, n = targets.nll, targets.nll_base, targets.kld, targets.dp, targets.nll.size
    ours = figures(targets)

    def clustered(values):
        return cluster_robust(values, np.ones((n, 1)), targets.window)[1][0, 0] ** 0.5

    def err(x):
        return np.std(x) / np.sqrt(n - 1)

    ppl, ppl_base, ratio = np.exp(q.mean()), np.exp(b.mean()), np.exp((q - b).mean())
    expected = {
        "n_scored": n,
        "n_windows": len(sizes),
        "ppl": ppl,
        "ppl_stderr": ppl * err(q),
        "ppl_stderr_clustered": ppl * clustered(q),
        "ppl_base": ppl_base,
        "ppl_base_stderr": ppl_base * err(b),
        "ppl_base_stderr_clustered": ppl_base * clustered(b),
        "corr": np.corrcoef(q, b)[0, 1],
        "ln_ratio": (q - b).mean(),
        "ln_ratio_stderr": err(q - b),  # what the covariance formula comes to
        "ln_ratio_stderr_clustered": clustered(q - b),
        "ratio": ratio,
        "ratio_stderr": ratio * err(q - b),
        "ppl_diff": ppl - ppl_base,
        "ppl_diff_stderr": err(ppl * q - ppl_base * b),
        "kld_mean": k.mean(),
        "kld_stderr": err(k),
        "kld_stderr_clustered": clustered(k),
        "dp_mean": d.mean(),
        "dp_stderr": err(d),
        "dp_stderr_clustered": clustered(d),
        "dp_rms": np.sqrt((d**2).mean()),
        "dp_rms_stderr": err(d**2) / 2 / np.sqrt((d**2).mean()),
        "same_top": targets.same_top.mean(),
        "same_top_stderr": err(targets.same_top.astype(float)),
        "same_top_stderr_clustered": clustered(targets.same_top.astype(float)),
        "smallest_ln_ratio": smallest_difference(clustered(q - b), len(sizes)),
        **{f"kld_{name}": np.quantile(k, at) for name, at in statistics.KLD_PERCENTILES.items()},
        **{f"dp_{name}": np.quantile(d, at) for name, at in statistics.DP_PERCENTILES.items()},
        "kld_max": k.max(),
        "kld_min": k.min(),
        "dp_max": d.max(),
        "dp_min": d.min(),
    }
    intervals = {"ln_ratio_low", "ln_ratio_high", "kld_mean_low", "kld_mean_high"}
    assert ours.keys() == expected.keys() | intervals
    for name, value in expected.items():
        assert ours[name] == pytest.approx(value, rel=1e-9, abs=1e-15), name


def test_sums_and_targets_give_the_same_bits_in_any_order_of_windows():
    targets = made([255, 3, 40, 255, 255, 1, 90])
    whole = figures(targets)
    columns, sketches = columns_of(targets)
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(7)
        ours = figures_of_sums({name: column[order] for name, column in columns.items()}, sketches)
        assert ours.keys() == whole.keys()
        for name, value in whole.items():
            if re.fullmatch(r"(kld|dp)_p\d+", name):
                assert ours[name] == pytest.approx(value, rel=2**-7, abs=1e-4)
            else:
                assert ours[name] == value, name


@settings(max_examples=25)
@given(st.lists(st.integers(1, 40), min_size=2, max_size=9), st.integers(0, 999), st.floats(0.001, 3))
def test_figures_keep_their_order_for_any_windows(sizes, seed, noise):
    ours = figures(made(sizes, seed, noise))
    for of, names in (("kld", statistics.KLD_PERCENTILES), ("dp", statistics.DP_PERCENTILES)):
        falling = sorted(names, key=lambda name: -names[name])
        values = [ours[f"{of}_{name}"] for name in ("max", *falling, "min")]
        assert values == sorted(values, reverse=True)
    assert -1 <= ours["corr"] <= 1
    assert ours["ln_ratio_low"] <= ours["ln_ratio"] <= ours["ln_ratio_high"]
    assert ours["kld_mean_low"] <= ours["kld_mean"] <= ours["kld_mean_high"]
    assert ours["smallest_ln_ratio"] >= 2.8 * ours["ln_ratio_stderr_clustered"]


def test_a_variant_that_is_its_base_differs_by_nothing():
    one = made([255, 255, 40])
    same = Targets(one.window, one.nll, one.nll, np.zeros(one.nll.size), np.ones(one.nll.size, bool))
    columns, sketches = columns_of(same)
    for ours in (figures(same), figures_of_sums(columns, sketches)):
        for name, value in ours.items():
            if re.match(r"kld|dp|ln_ratio|smallest|ppl_diff", name):
                assert value == 0, name
        assert ours["corr"] == pytest.approx(1, abs=1e-15)
        assert ours["ratio"] == ours["same_top"] == 1
        assert ours["same_top_stderr"] == 0


def test_what_one_window_or_one_target_cannot_say_is_null():
    window, target = figures(made([255])), figures(made([1]))
    clustered = {name for name in window if "clustered" in name or name.endswith(("_low", "_high"))}
    assert {name for name, value in window.items() if value is None} == clustered | {"smallest_ln_ratio"}
    assert {name for name, value in target.items() if value is None} == {
        *clustered,
        "smallest_ln_ratio",
        "corr",
        *(name for name in target if name.endswith("_stderr")),
    }


def test_a_perplexity_beyond_float64_is_null():
    awful = made([4, 4])
    ours = figures(Targets(awful.window, awful.nll_base, awful.nll + 800, awful.kld, awful.same_top))
    assert ours["ppl"] is ours["ppl_stderr"] is ours["ppl_diff"] is ours["ratio"] is None
    assert ours["ln_ratio"] > 700


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": np.array([1, 0])}, "window order"),
        ({"kld": np.array([0.0, np.nan])}, "kld holds values that are not finite"),
        ({"nll": np.array([np.inf, 1.0])}, "nll holds values that are not finite"),
        ({"nll_base": np.array([1.0])}, "expected one length"),
        (dict.fromkeys(("window", "nll_base", "nll", "kld", "same_top"), np.array([])), "at least 1"),
    ],
)
def test_targets_that_cannot_be_summed_are_refused(change, message):
    columns = {"window": np.array([0, 0]), "nll_base": np.ones(2), "nll": np.ones(2), "kld": np.ones(2)}
    with pytest.raises(ValueError, match=message):
        Targets(**(columns | {"same_top": np.ones(2, bool)} | change))


def test_sums_that_are_none_are_refused():
    columns, sketches = columns_of(made([9, 9]))
    with pytest.raises(ValueError, match="no windows"):
        figures_of_sums({name: column[:0] for name, column in columns.items()}, sketches)
    columns["kld_sum"][1] = np.inf
    with pytest.raises(ValueError, match="kld_sum holds values that are not finite"):
        figures_of_sums(columns, sketches)


def test_resamples_draw_every_window_alike_and_always_the_same():
    counts = bootstrap._counts(8)
    assert counts.shape == (8, bootstrap.RESAMPLES)
    assert (counts.sum(axis=0) == 8).all()
    assert counts.sum(axis=1) == pytest.approx(bootstrap.RESAMPLES, rel=0.05)
    assert counts.var() == pytest.approx(7 / 8, rel=0.05)
    assert counts[:, 0].astype(int).tolist() == [1, 1, 0, 1, 0, 2, 2, 1]


def test_intervals_are_quantiles_of_resampled_ratios():
    rng = np.random.default_rng(2)
    sums, sizes = rng.gamma(2, 3, 12), rng.integers(1, 255, 12)
    low, high = bootstrap.intervals({"x": sums}, sizes)["x"]
    counts = bootstrap._counts(12)
    means = (counts * sums[:, None]).sum(0) / (counts * sizes[:, None]).sum(0)
    inside = np.mean((means > low) & (means < high))
    # Normal probability of -+ 2.200985 (t of 11) * sqrt(12 / 11), which is 2.2988.
    assert inside == pytest.approx(math.erf(2.2988 / math.sqrt(2)), abs=1e-3)


def test_coverage_of_errors_on_text_that_is_correlated_within_windows():
    rng = np.random.default_rng(11)
    runs, n_windows, n = 300, 16, 30
    hits = dict.fromkeys(("independent", "clustered", "bootstrap"), 0)
    sizes = np.full(n_windows, n)
    t = student.quantile(0.975, n_windows - 1)
    for _ in range(runs):
        values = rng.gamma(2.0, 1.0, (n_windows, n)) - 2 + rng.normal(0, 0.7, (n_windows, 1))
        sums = values.sum(axis=1)
        clustered = statistics.clustered_stderr(sums, sizes)
        low, high = bootstrap.intervals({"x": sums}, sizes)["x"]
        hits["independent"] += abs(values.mean()) < 1.96 * values.std() / math.sqrt(values.size - 1)
        hits["clustered"] += abs(values.mean()) < t * clustered
        hits["bootstrap"] += low < 0 < high
    coverage = {name: hit / runs for name, hit in hits.items()}
    assert coverage["independent"] < 0.75, "the reason for the others"
    assert 0.92 < coverage["clustered"] < 0.98
    assert 0.92 < coverage["bootstrap"] < 0.98
