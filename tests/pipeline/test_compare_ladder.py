"""Student's t, paired tests and neighbours on the size ladder: tables, closed forms, simulations."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.compare import student
from pipeline.compare.ladder import Rung, holm, neighbours, paired_test, smallest_difference


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
