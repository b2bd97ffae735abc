"""Our own exp, log, sin and cos against NumPy's long doubles."""

from __future__ import annotations

import numpy as np
import pytest

from engine.kernels._jit import kernel
from engine.kernels.maths import exp32, exp64, log64, sincos64


@kernel
def _exp32_all(x, out):
    for i in range(x.size):
        out[i] = exp32(x[i])


@kernel
def _exp64_all(x, out):
    for i in range(x.size):
        out[i] = exp64(x[i])


@kernel
def _log64_all(x, out):
    for i in range(x.size):
        out[i] = log64(x[i])


@kernel
def _sincos64_all(x, sin, cos):
    for i in range(x.size):
        sin[i], cos[i] = sincos64(x[i])


def _applied(function, x):
    out = np.empty_like(x)
    function(x, out)
    return out


def test_exp32_is_within_two_ulp():
    x = np.linspace(-86.9, 87.9, 1_000_003, dtype=np.float32)
    relative = np.abs(_applied(_exp32_all, x) / np.exp(x.astype(np.float64)) - 1)
    assert relative.max() < 1.3e-7


def test_exp64_is_within_two_ulp():
    x = np.linspace(-707.9, 700.0, 1_000_003)
    relative = np.abs(_applied(_exp64_all, x) / np.exp(x.astype(np.longdouble)) - 1)
    assert relative.max() < 3.5e-16


@pytest.mark.parametrize(("apply", "dtype"), [(_exp32_all, np.float32), (_exp64_all, np.float64)])
def test_exp_of_zero_is_one_of_masked_is_zero_of_nan_is_nan(apply, dtype):
    out = _applied(apply, np.array([0.0, -0.0, -np.inf, -1e30, np.nan], dtype))
    np.testing.assert_array_equal(out, np.array([1, 1, 0, 0, np.nan], dtype))


def test_log64_is_within_two_ulp():
    x = np.concatenate([np.geomspace(1e-300, 1e300, 500_001), np.linspace(0.5, 2.0, 500_001)])
    exact = np.log(x.astype(np.longdouble))
    error = np.abs(_applied(_log64_all, x) - exact)
    assert (error <= np.maximum(4e-16 * np.abs(exact), 1e-17)).all()


def test_sincos64_is_exact_to_rounding_up_to_long_contexts():
    x = np.concatenate(
        [np.linspace(-10, 10, 300_001), np.linspace(0, 1e6, 300_001), np.arange(0.0, 131072.0)]
    )
    sin, cos = np.empty_like(x), np.empty_like(x)
    _sincos64_all(x, sin, cos)
    assert np.abs(sin - np.sin(x.astype(np.longdouble))).max() < 4e-16
    assert np.abs(cos - np.cos(x.astype(np.longdouble))).max() < 4e-16
