"""The rule that ends a comparison: how often it is wrong, what it sees, and that it is what it says it is."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.compare import sequence, student
from pipeline.compare.sequence import LEAST_WINDOWS, anytime_p, confidence_sequence, decided, visiting_order

WINDOWS, RUNS = 592, 2000
PAIRS = (("Q8_0", "base"), ("Q4_K_M", "base"))
POWER = {("Q8_0", "base"): (0.63, 39, 0.9), ("Q4_K_M", "base"): (1.0, 16, 1.0)}
"""Decided by 40 windows, windows until decided on average, t-test on 40 windows at 5 %."""


@pytest.fixture(scope="module")
def real():
    """float64 (G,) paired differences of real windows, by pair: sums over 255 targets each."""
    sums = np.load(Path(__file__).parents[1] / "golden" / "window_nll.npz")
    return {pair: sums[pair[0]] - sums[pair[1]] for pair in PAIRS}


def counts(n):
    return np.full(n, 255)


def stops(runs, alpha=0.05):
    """(R,) after how many windows each run of (R, G) differences is decided; G + 1 where it is not."""
    low, high = confidence_sequence(runs, counts(runs.shape[1]), alpha=alpha)
    out = (low > 0) | (high < 0)
    return np.where(out.any(axis=1), out.argmax(axis=1) + 1, runs.shape[1] + 1)


def drawn(values, rng):
    return rng.choice(values, (RUNS, WINDOWS))


def with_signs(values, rng):
    return rng.choice(values, (RUNS, WINDOWS)) * rng.choice((-1, 1), (RUNS, WINDOWS))


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("null", [drawn, with_signs])
def test_at_most_one_null_run_in_twenty_stops(real, pair, null):
    values = real[pair]
    runs = null(values if null is with_signs else values - values.mean(), np.random.default_rng(12))
    assert np.mean(stops(runs) <= WINDOWS) <= 0.05


def test_shards_of_a_text_in_visiting_order_stop_as_seldom(real):
    """Shards of four windows, all of the text's, none twice."""
    n = real[PAIRS[0]].size // 4
    orders = np.stack([visiting_order(n, seed) for seed in range(RUNS)])
    for values in real.values():
        shards = (values - values.mean()).reshape(n, 4)
        assert np.mean(stops(shards[orders].reshape(RUNS, -1)) <= 4 * n) <= 0.05


def test_in_the_order_of_the_text_windows_are_alike_and_the_rule_would_be_wrong(real):
    """Why there is a visiting order: runs of 16 neighbouring windows, as articles are that long."""
    values = real["Q8_0", "base"] - real["Q8_0", "base"].mean()
    first = np.random.default_rng(12).integers(0, values.size, (RUNS, WINDOWS // 16))
    runs = values[(first[..., None] + np.arange(16)) % values.size].reshape(RUNS, -1)
    assert np.mean(stops(runs) <= WINDOWS) > 0.1


def test_visiting_order_is_a_fixed_permutation():
    assert visiting_order(8).tolist() == [1, 2, 3, 0, 6, 7, 4, 5]
    assert sorted(visiting_order(592, 3).tolist()) == list(range(592))
    assert visiting_order(592, 3).tolist() != visiting_order(592, 4).tolist()
    assert visiting_order(1).tolist() == [0]
    assert visiting_order(0).size == 0
    places = np.stack([visiting_order(6, seed) for seed in range(3000)])
    for place in range(6):
        assert np.bincount(places[:, place], minlength=6) == pytest.approx(500, abs=90)


@pytest.mark.parametrize("name", ["Q8_0", "Q4_K_M"])
def test_null_runs_of_the_oracles_windows(shared_data, name):
    base = np.load(shared_data / "oracle" / "smollm2-nll.npz")["nll_float32"][:8]
    found = np.load(shared_data / "oracle" / "smollm2-kld.npz")
    values = (found[f"{name}_nll"] - base).sum(axis=1)
    assert np.mean(stops(with_signs(values, np.random.default_rng(13))) <= WINDOWS) <= 0.05


def test_the_stored_windows_are_those_of_the_oracle(shared_data, real):
    base = np.load(shared_data / "oracle" / "smollm2-nll.npz")["nll_float32"][:8]
    found = np.load(shared_data / "oracle" / "smollm2-kld.npz")
    for name in ("Q8_0", "Q4_K_M"):
        assert real[name, "base"][:8] == pytest.approx((found[f"{name}_nll"] - base).sum(axis=1), abs=2e-2)


@pytest.mark.parametrize(
    "draw",
    [
        lambda rng, shape: rng.standard_t(3, shape),
        lambda rng, shape: rng.laplace(size=shape),
        lambda rng, shape: rng.normal(size=shape) * rng.choice((0.2, 1, 3), shape),
        lambda rng, shape: rng.normal(size=shape) * np.linspace(0.5, 2, shape[1]),
    ],
    ids=["t3", "laplace", "mixed spreads", "growing spread"],
)
def test_heavy_tails_and_uneven_windows_do_not_stop_more_often(draw):
    assert np.mean(stops(draw(np.random.default_rng(14), (RUNS, WINDOWS))) <= WINDOWS) <= 0.05


def test_the_sequence_covers_a_mean_that_is_not_zero(real):
    values = real["Q4_K_M", "base"]
    low, high = confidence_sequence(drawn(values, np.random.default_rng(15)), counts(WINDOWS))
    mean = values.mean() / 255
    assert np.mean(((low < mean) & (mean < high)).all(axis=1)) >= 0.95


def test_power_beside_a_test_on_forty_windows(real):
    """The figures of sequence.py's docstring."""
    rng = np.random.default_rng(16)
    t = student.quantile(0.975, 39)
    for pair, (share, mean, fixed) in POWER.items():
        runs = drawn(real[pair], rng)
        when = stops(runs)
        forty = runs[:, :40]
        rejected = np.abs(forty.mean(axis=1)) > t * forty.std(axis=1, ddof=1) / np.sqrt(40)
        assert np.mean(when <= 40) == pytest.approx(share, abs=0.03), pair
        assert np.minimum(when, WINDOWS).mean() == pytest.approx(mean, rel=0.07), pair
        assert rejected.mean() == pytest.approx(fixed, abs=0.03), pair


def test_e_is_the_bayes_factor_by_quadrature():
    """Integrals over sigma (d sigma / sigma) and effect (normal) of normal likelihoods, on a grid."""
    sample = np.random.default_rng(17).normal(0.4, 2.0, LEAST_WINDOWS)
    log_sigma = np.linspace(-3, 5, 801)[:, None]
    effect = np.linspace(-4, 4, 801)[None, :]
    sigma, s, q = np.exp(log_sigma), sample.sum(), (sample**2).sum()
    n = LEAST_WINDOWS
    squares = (q - 2 * effect * sigma * s + n * (effect * sigma) ** 2) / sigma**2
    likelihood = np.exp(-squares / 2 - n * log_sigma)
    prior = np.exp(-(effect**2) / 2 / sequence.EFFECT_VARIANCE)
    with_effect = (likelihood * prior).sum() / prior.sum()
    without = np.exp(-q / sigma**2 / 2 - n * log_sigma).sum()
    assert anytime_p(sample * 255, counts(n)) == pytest.approx(min(1, without / with_effect), rel=1e-6)


def test_nothing_is_decided_on_few_windows():
    clear = np.full(LEAST_WINDOWS - 1, 5.0) + np.arange(LEAST_WINDOWS - 1) / 100
    assert decided(clear, counts(clear.size)) is None
    assert anytime_p(clear, counts(clear.size)) is None
    more = np.append(clear, 5.0)
    assert decided(more, counts(more.size)) == LEAST_WINDOWS
    assert anytime_p(more, counts(more.size)) < 1e-4


def test_an_effect_of_no_interest_ends_the_search():
    rng = np.random.default_rng(18)
    small = rng.normal(0, 0.5, 300)
    assert decided(small, counts(300)) is None
    when = decided(small, counts(300), effect=0.002)
    low, high = confidence_sequence(small, counts(300))
    assert high[when - 1] - low[when - 1] < 0.002 <= high[when - 2] - low[when - 2]
    assert LEAST_WINDOWS < when < 300


def test_windows_that_do_not_differ():
    same, shifted = np.zeros(40), np.full(40, 2.0)
    assert decided(same, counts(40)) is None
    assert decided(same, counts(40), effect=1e-9) == LEAST_WINDOWS
    assert anytime_p(same, counts(40)) == 1
    assert decided(shifted, counts(40)) == LEAST_WINDOWS


def test_windows_count_by_their_targets():
    rng = np.random.default_rng(19)
    sizes = rng.integers(1, 255, 60)
    differences = rng.normal(0.05, 0.3, 60) * sizes
    low, high = confidence_sequence(differences, sizes)
    assert (low[-1] + high[-1]) / 2 == pytest.approx(differences.sum() / sizes.sum(), rel=1e-12)
    t = student.quantile(0.975, 59)
    mean, residuals = differences.sum() / sizes.sum(), differences - differences.sum() / sizes.sum() * sizes
    fixed = t * np.sqrt(60 / 59 * (residuals**2).sum()) / sizes.sum()
    assert 1.2 < (high[-1] - mean) / fixed < 1.7, "wider than for a number fixed beforehand, not by much"


@settings(max_examples=60)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(LEAST_WINDOWS, 80),
    st.floats(0, 1.5),
    st.sampled_from([0.05, 0.01, 0.2]),
    st.sampled_from([2.0**-20, 1.0, 2.0**12]),
)
def test_a_decision_holds_for_any_unit_and_is_that_of_its_p(seed, n, shift, alpha, unit):
    differences = np.random.default_rng(seed).normal(shift, 1, n)
    when = decided(differences, counts(n), alpha=alpha)
    assert decided(differences * unit, counts(n), alpha=alpha) == when
    assert decided(-differences, counts(n), alpha=alpha) == when
    assert (anytime_p(differences, counts(n)) <= alpha) == (when is not None)
    for end in (n // 2, n - 1) if when else ():
        assert decided(differences[:end], counts(end), alpha=alpha) == (when if when <= end else None)
