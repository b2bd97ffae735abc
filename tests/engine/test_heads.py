"""Biases, norms and the other rotation of heads against float64; an empty weight does nothing."""

from __future__ import annotations

import numpy as np
import pytest

from engine.kernels.heads import add_bias, norm_heads
from engine.kernels.rope import rotate
from engine.kernels.tile import NR
from tests.engine.test_kernels import columns, panels

NOTHING = np.empty(0, np.float32)


@pytest.mark.parametrize("n", [1, 48, 50])
def test_bias_is_added_to_its_rows_of_every_token(n):
    rng = np.random.default_rng(0)
    x, bias = (rng.normal(size=size).astype(np.float32) for size in ((n, 13), 13))
    out = panels(x)
    add_bias(out, bias, 0, len(out))
    np.testing.assert_array_equal(columns(out, n, 13), x + bias)
    add_bias(out, NOTHING, 0, len(out))
    np.testing.assert_array_equal(columns(out, n, 13), x + bias)


@pytest.mark.parametrize("n", [1, 48, 50])
def test_each_head_is_normed_alone(n):
    rng = np.random.default_rng(1)
    x, weight = (rng.normal(size=size).astype(np.float32) for size in ((n, 3, 7), 7))
    out = panels(x.reshape(n, 21))
    norm_heads(out, 3, NOTHING, 1e-5, 0, len(out), np.zeros(NR))
    np.testing.assert_array_equal(columns(out, n, 21), x.reshape(n, 21))
    norm_heads(out, 3, weight, 1e-5, 0, len(out), np.zeros(NR))
    wide = x.astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean(axis=2, keepdims=True) + 1e-5) * weight
    np.testing.assert_allclose(columns(out, n, 21), expected.reshape(n, 21), rtol=1e-6, atol=1e-7)


def test_rotation_by_halves_is_the_other_one_with_features_reordered():
    rng = np.random.default_rng(2)
    x = rng.normal(size=(50, 3, 10)).astype(np.float32)
    angle = rng.uniform(0, 9, (2, 3, NR))
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    order = [0, 2, 4, 1, 3, 5, 6, 7, 8, 9]  # neighbours (0, 1), (2, 3), (4, 5) to (i, i + 3)
    neighbours, halves = panels(x.reshape(50, 30)), panels(x[:, :, order].reshape(50, 30))
    rotate(neighbours, 3, 10, False, cos, sin, 0, 2)
    rotate(halves, 3, 10, True, cos, sin, 0, 2)
    expected = columns(neighbours, 50, 30).reshape(50, 3, 10)[:, :, order]
    np.testing.assert_array_equal(columns(halves, 50, 30).reshape(50, 3, 10), expected)
    assert (expected != x[:, :, order]).any()
