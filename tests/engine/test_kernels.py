"""Kernels against NumPy in float64, at odd shapes; and what holds for all of them."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from engine.kernels.matmul import group_rows, multiply, multiply_swiglu, pack
from engine.kernels.norm import add_rms_norm
from engine.kernels.rope import rope_table, rotate
from engine.kernels.tile import MR, NR


def panels(columns: np.ndarray) -> np.ndarray:
    """(T, rows) -> (P, rows up to a multiple of MR, NR), zeros around."""
    n, rows = columns.shape
    out = np.zeros((-(-n // NR), -(-rows // MR) * MR, NR), np.float32)
    for t in range(n):
        out[t // NR, :rows, t % NR] = columns[t]
    return out


def columns(panel: np.ndarray, n: int, rows: int) -> np.ndarray:
    """The inverse of `panels`."""
    return np.stack([panel[t // NR, :rows, t % NR] for t in range(n)])


def packed(weight: np.ndarray) -> np.ndarray:
    rows, depth = weight.shape
    out = np.full((-(-rows // MR), depth, MR), np.nan, np.float32)
    pack(weight, rows, out)
    return out


@pytest.mark.parametrize("n", [1, 15, 16, 17, NR - 1, NR, NR + 1, 130])
@pytest.mark.parametrize(("rows", "depth"), [(1, 1), (MR, 7), (13, 288), (40, 289), (64, 600)])
def test_product_equals_float64(n, rows, depth):
    rng = np.random.default_rng(n * rows + depth)
    weight = rng.normal(size=(rows, depth)).astype(np.float32)
    x = rng.normal(size=(n, depth)).astype(np.float32)
    out = panels(np.full((n, rows), np.nan, np.float32))
    before = (weight.copy(), x.copy())
    multiply(packed(weight), rows, panels(x), 0, 0, len(out), n, out)
    expected = x.astype(np.float64) @ weight.T.astype(np.float64)
    size = np.abs(x).astype(np.float64) @ np.abs(weight.T).astype(np.float64)
    # a chain of `depth` roundings: at most depth * 2^-24 of the sum of magnitudes
    assert (np.abs(columns(out, n, rows) - expected) <= depth * 2.0**-24 * size + 1e-30).all()
    np.testing.assert_array_equal(weight, before[0])
    np.testing.assert_array_equal(x, before[1])


def test_product_is_one_fma_chain_in_rising_order():
    rng = np.random.default_rng(5)
    weight, x = (rng.normal(size=(MR, 300)).astype(np.float32) for _ in range(2))
    out = panels(np.zeros((MR, MR), np.float32))
    multiply(packed(weight), MR, panels(x), 0, 0, 1, MR, out)
    chain = np.zeros((MR, MR), np.float32)
    for k in range(
        300
    ):  # the exact product fits 48 bits, so float64 holds it and rounds once more: nearly always fma
        chain = (x[:, k : k + 1].astype(np.float64) * weight[:, k].astype(np.float64) + chain).astype(
            np.float32
        )
    np.testing.assert_allclose(columns(out, MR, MR), chain, rtol=0, atol=2e-6)
    assert (columns(out, MR, MR) == chain).mean() > 0.9


def test_product_bits_do_not_depend_on_the_number_of_tokens():
    rng = np.random.default_rng(6)
    weight, x = rng.normal(size=(24, 577)).astype(np.float32), rng.normal(size=(100, 577)).astype(np.float32)
    whole = panels(np.zeros((100, 24), np.float32))
    multiply(packed(weight), 24, panels(x), 0, 0, len(whole), 100, whole)
    for t in (0, 47, 48, 99):
        alone = panels(np.zeros((1, 24), np.float32))
        multiply(packed(weight), 24, panels(x[t : t + 1]), 0, 0, 1, 1, alone)
        np.testing.assert_array_equal(columns(alone, 1, 24)[0], columns(whole, 100, 24)[t])


@pytest.mark.parametrize("n", [1, 50])
def test_swiglu_equals_float64(n):
    rng = np.random.default_rng(7)
    gate, up = (rng.normal(size=(20, 33)).astype(np.float32) for _ in range(2))
    x = rng.normal(size=(n, 33)).astype(np.float32)
    out = panels(np.zeros((n, 20), np.float32))
    multiply_swiglu(
        packed(gate), packed(up), 20, panels(x), 0, 0, len(out), n, np.zeros((512, NR), np.float32), out
    )
    g, u = x.astype(np.float64) @ gate.T, x.astype(np.float64) @ up.T
    np.testing.assert_allclose(columns(out, n, 20), g / (1 + np.exp(-g)) * u, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("n", [1, 48, 50])
def test_norm_adds_the_residual_first(n):
    rng = np.random.default_rng(8)
    x, delta = (rng.normal(size=(n, 37)).astype(np.float32) for _ in range(2))
    weight = rng.normal(size=37).astype(np.float32)
    residual, out = panels(x), panels(delta)
    add_rms_norm(residual, out, weight, 1e-5, 0, len(out), np.zeros(NR), out)
    total = (x + delta).astype(np.float64)
    expected = total / np.sqrt((total**2).mean(axis=1, keepdims=True) + 1e-5) * weight
    np.testing.assert_allclose(columns(out, n, 37), expected, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(columns(residual, n, 37), x + delta)


def test_rotation_turns_neighbouring_pairs_and_leaves_the_rest():
    n, heads, width, half = 50, 3, 10, 3
    rng = np.random.default_rng(9)
    x = rng.normal(size=(n, heads * width)).astype(np.float32)
    positions = rng.permutation(4000)[:n].astype(np.int32)
    cos, sin = (np.zeros((2, half, NR), np.float32) for _ in range(2))
    rope_table(positions, 10000.0 ** (-np.arange(half) / half), 1.0, cos, sin)
    turned = panels(x)
    rotate(turned, heads, width, False, cos, sin, 0, 2)
    angle = positions[:, None].astype(np.float64) * 10000.0 ** (-np.arange(half) / half)
    pairs = x.reshape(n, heads, width).astype(np.float64)
    z = (pairs[:, :, 0:6:2] + 1j * pairs[:, :, 1:6:2]) * np.exp(1j * angle)[:, None, :]
    pairs[:, :, 0:6:2], pairs[:, :, 1:6:2] = z.real, z.imag
    np.testing.assert_allclose(columns(turned, n, heads * width), pairs.reshape(n, -1), rtol=0, atol=1e-6)


def test_group_rows_fill_whole_tiles():
    for depth in (1, 576, 1536, 8192, 200_000):
        assert group_rows(depth) % MR == 0
        assert group_rows(depth) > 0


ONE_SIGNATURE = """
import json, sys
import engine.models.llama, engine.weights
from engine.quants import decoder
from tests.engine.conftest import Scorer
scorer = Scorer(sys.argv[1])
scorer.score([5, 6, 7, 8])
scorer.model.logits(engine.Batch([5, 6], [0, 1], outputs=[True, False]), scorer.model.new_cache(1, 2))
modules = (engine.models.llama, engine.weights)
called = {n: v for m in modules for n, v in vars(m).items() if hasattr(v, "py_func")}
called["decode_f32"] = decoder("F32")
print(json.dumps({name: len(kernel.signatures) for name, kernel in called.items()}))
"""


def test_each_kernel_has_one_signature_after_a_model_run(tiny_path):
    """Two would mean that a caller passes another dtype or layout, and a second compilation."""
    child = subprocess.run(
        [sys.executable, "-c", ONE_SIGNATURE, str(tiny_path)], capture_output=True, text=True, check=True
    )
    signatures = json.loads(child.stdout)
    assert len(signatures) > 10
    assert signatures == dict.fromkeys(signatures, 1)
