"""Figures of comparisons: against the float64 oracle, llama.cpp's block, and formulas written out again."""

import itertools
import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.perplexity import cluster_robust

from pipeline.compare import bootstrap, statistics, student
from pipeline.compare.kld_block import kld_block
from pipeline.compare.ladder import Rung, holm, neighbours, paired_test, smallest_difference
from pipeline.compare.sketch import Sketch, merged, quantiles, sketch
from pipeline.compare.statistics import Targets, figures, figures_of_sums, window_sums

VARIANTS = {"Q8_0": "kld-q8_0-f32.txt", "Q4_K_M": "kld-q4_k_m-f32.txt"}
FINITE = st.floats(-1e30, 1e30, allow_subnormal=False)


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


# Bootstrap


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


# Student's t, paired tests, the ladder


@pytest.mark.parametrize(
    ("df", "t", "p"),
    [
        # Closed forms for 1, 2 and 3 degrees of freedom, far into the tail.
        *((1, t, 2 / math.pi * math.atan(1 / t)) for t in (1e-3, 0.5, 3.0, 1e3, 1e9)),
        *((2, t, 2 / (math.sqrt(2 + t * t) * (math.sqrt(2 + t * t) + t))) for t in (0.0, 0.5, 3.0, 1e3, 1e9)),
        *(
            (3, t, 1 - 2 / math.pi * (math.atan(t / 3**0.5) + t * 3**0.5 / (3 + t * t)))
            for t in (0.1, 1.0, 3.0)
        ),
    ],
)
def test_students_tail(df, t, p):
    assert student.two_sided_p(t, df) == pytest.approx(p, rel=1e-12)
    assert student.two_sided_p(-t, df) == student.two_sided_p(t, df)


@pytest.mark.parametrize(
    ("df", "probability", "t"),
    [
        (1, 0.975, 12.70620474),
        (7, 0.975, 2.36462425),
        (7, 0.8, 0.89602964),
        (39, 0.975, 2.02269092),
        (39, 0.5, 0.0),
        (120, 0.975, 1.97993041),
    ],
)
def test_students_quantiles_are_those_of_the_tables(df, probability, t):
    assert student.quantile(probability, df) == pytest.approx(t, abs=1e-8)


def test_students_tail_of_infinity_and_of_many_degrees_of_freedom():
    assert student.two_sided_p(math.inf, 7) == 0
    assert student.two_sided_p(1.959963985, 1e7) == pytest.approx(0.05, rel=1e-6)


@given(st.integers(1, 600), st.floats(0.5, 0.9999))
def test_students_quantile_inverts_the_tail(df, probability):
    assert student.two_sided_p(student.quantile(probability, df), df) == pytest.approx(
        2 * (1 - probability), rel=1e-9, abs=1e-12
    )


def test_paired_test_is_the_t_test_of_window_means():
    differences = np.random.default_rng(4).normal(0.5, 1.0, 12)
    t = differences.mean() / (differences.std(ddof=1) / math.sqrt(12))
    assert paired_test(differences * 255, np.full(12, 255)) == pytest.approx(
        student.two_sided_p(t, 11), rel=1e-12
    )


def test_paired_test_is_wrong_as_often_as_it_says_and_agrees_with_sign_flips():
    rng = np.random.default_rng(5)
    p = np.array([paired_test(rng.normal(size=8), np.full(8, 255)) for _ in range(3000)])
    assert np.mean(p < 0.05) == pytest.approx(0.05, abs=0.012)
    flips = np.array(list(itertools.product((-1, 1), repeat=8)))
    for shift in (0.3, 0.6, 1.0):
        sample = rng.normal(shift, 1, 8)
        exact = np.mean(np.abs(flips @ sample) >= abs(sample.sum()) - 1e-12)
        assert paired_test(sample, np.full(8, 255)) == pytest.approx(exact, abs=0.03)


def test_paired_test_without_anything_to_test():
    assert paired_test(np.ones(1), np.ones(1, np.int64)) is None
    assert paired_test(np.zeros(5), np.full(5, 9)) == 1
    assert paired_test(np.full(5, 2.0), np.full(5, 4)) == 0, "no spread, and not zero"


def test_the_smallest_difference_is_seen_in_four_of_five_samples():
    rng = np.random.default_rng(6)
    n, runs = 12, 4000
    samples = rng.normal(smallest_difference(1 / math.sqrt(n), n), 1.0, (runs, n))
    t = samples.mean(axis=1) / samples.std(axis=1, ddof=1) * math.sqrt(n)
    assert np.mean(np.abs(t) > student.quantile(0.975, n - 1)) == pytest.approx(0.8, abs=0.03)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.01, None, 0.6, 0.7]) == pytest.approx([0.03, None, 1.0, 1.0])
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_keeps_the_order_and_lies_between_none_and_bonferroni(p_values):
    adjusted = holm(p_values)
    for p, q in zip(p_values, adjusted, strict=True):
        assert p <= q <= min(1, len(p_values) * p)
    ranks = sorted(zip(p_values, adjusted, strict=True))
    assert [q for _, q in ranks] == sorted(adjusted)


def ladder(n_windows=20):
    rng = np.random.default_rng(7)
    base = rng.normal(800, 100, n_windows)
    rungs = [("Q4_K_M", 105, 10.0), ("Q8_0", 145, 0.3), ("Q2_K", 88, 90.0), ("Q6_K", 138, 0.35)]
    return [
        Rung(
            name,
            size,
            np.arange(n_windows),
            base + shift + rng.normal(0, 3, n_windows),
            np.full(n_windows, 255),
        )
        for name, size, shift in rungs
    ]


def test_neighbours_are_by_size_and_corrected_together():
    rungs = ladder()
    q4, q8, q2, q6 = rungs
    raw = [paired_test(a.nll_sum - b.nll_sum, a.n_scored) for a, b in ((q4, q2), (q8, q6), (q6, q4))]
    adjusted = holm(raw)
    assert neighbours(rungs) == [adjusted[0], adjusted[1], None, adjusted[2]]
    assert neighbours(rungs)[0] < 0.01
    assert neighbours(rungs)[1] > 0.05
    assert neighbours(rungs[::-1]) == neighbours(rungs)[::-1]
    assert neighbours(rungs[:1]) == [None]
    assert neighbours([]) == []


def test_neighbours_are_compared_on_the_windows_that_both_have():
    rungs = ladder()
    early = Rung("Q6_K", 138, np.arange(12), rungs[3].nll_sum[:12], rungs[3].n_scored[:12])
    found = neighbours([rungs[1], early])
    assert found == [paired_test((rungs[1].nll_sum - rungs[3].nll_sum)[:12], np.full(12, 255)), None]
    apart = Rung("Q6_K", 138, np.arange(20, 40), rungs[3].nll_sum, rungs[3].n_scored)
    assert neighbours([rungs[1], apart]) == [None, None]


def test_neighbours_of_a_run_that_watched_its_scores_have_p_values_that_allow_it():
    rungs = ladder(40)
    plain, anytime = neighbours(rungs), neighbours(rungs, anytime=True)
    assert all(a >= p for a, p in zip(anytime, plain, strict=True) if p is not None)
    assert anytime[0] < 0.01


# Sketches


def spread(values):
    """Values of a list and of a logarithmic range of either sign."""
    return np.concatenate([np.asarray(values, np.float64), np.array([0.0, -0.0, 1e-9, -1e-9, 3.5])])


@settings(max_examples=40)
@given(st.lists(st.lists(FINITE, max_size=30), min_size=1, max_size=5), st.randoms(use_true_random=False))
def test_sketches_merge_in_any_order_to_the_same_counts(lists, random):
    whole = sketch([x for part in lists for x in part])
    parts = [sketch(part) for part in lists]
    random.shuffle(parts)
    while len(parts) > 1:
        one, other = parts.pop(), parts.pop(random.randrange(len(parts)))
        parts.append(merged([(one.keys, one.counts), (other.keys.tolist(), other.counts.tolist())]))
    assert parts[0].keys.tolist() == whole.keys.tolist()
    assert parts[0].counts.tolist() == whole.counts.tolist()
    assert whole.n == sum(map(len, lists))


@settings(max_examples=50)
@given(st.lists(FINITE, max_size=60), st.lists(st.floats(0, 1), min_size=1, max_size=5))
def test_quantiles_are_within_a_bin_of_the_exact_ones(values, fractions):
    values = np.sort(spread(values))
    found = quantiles(sketch(values), fractions)
    for fraction, ours in zip(fractions, found, strict=True):
        place = fraction * (values.size - 1)
        ends = values[[math.floor(place), math.ceil(place)]]
        bin_ = max(1.001 * 2**-7 * np.abs(ends).max(), 2**-126)
        assert ours == pytest.approx(np.interp(place, np.arange(values.size), values), abs=bin_)


def test_quantiles_of_many_values_are_far_better_than_a_bin():
    values = np.random.default_rng(8).gamma(0.5, 0.1, 50_000)
    fractions = list(statistics.KLD_PERCENTILES.values())
    assert quantiles(sketch(values), fractions) == pytest.approx(np.quantile(values, fractions), rel=4e-3)


def test_a_sketch_is_the_first_sixteen_bits():
    found = sketch([1.0, 1.0078124, 1.0078125, -2.0, -0.0, 0.0, 1e-45])
    assert dict(zip(found.keys.tolist(), found.counts.tolist(), strict=True)) == {
        0x3F80: 2,
        0x3F81: 1,
        0xC000: 1,
        0: 3,
    }
    assert quantiles(found, [0.0, 0.25]) == pytest.approx([-2.0078125, 0.0])
    assert quantiles(sketch(np.full(5, 3.4e38)), [1.0]) == pytest.approx([3.4e38], rel=2**-7)


def test_sketches_refuse_what_has_no_bin_or_no_value():
    for value in (np.inf, -np.inf, np.nan, 1e39):
        with pytest.raises(ValueError, match="finite values within float32"):
            sketch([1.0, value])
    assert merged([]).n == 0
    with pytest.raises(ValueError, match="empty"):
        quantiles(Sketch(np.empty(0, np.int32), np.empty(0, np.int64)), [0.5])
