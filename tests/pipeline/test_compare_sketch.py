"""Laws of sketches: merged in any order, quantiles within a bin."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.compare import statistics
from pipeline.compare.sketch import Sketch, merged, quantiles, sketch

FINITE = st.floats(-1e30, 1e30, allow_subnormal=False)


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
