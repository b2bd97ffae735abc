"""Kernels against NumPy in float64, at odd shapes; and what holds for all of them."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from engine.ggml_types import by_name
from engine.kernels.norm import add_rms_norm, norm_heads
from engine.kernels.product import DEPTH, add_bias, group_strips, meet_all, project, project_swiglu
from engine.kernels.rope import rope_table, rotate
from engine.kernels.tile import FEW, NR, STRIP
from engine.weights import Crew, Matrix, Work

NOTHING = np.empty(0, np.float32)


def panels(columns: np.ndarray) -> np.ndarray:
    """(T, rows) -> (P, rows up to whole strips, NR), zeros around."""
    n, rows = columns.shape
    out = np.zeros((-(-n // NR), -(-rows // STRIP) * STRIP, NR), np.float32)
    for t in range(n):
        out[t // NR, :rows, t % NR] = columns[t]
    return out


def columns(panel: np.ndarray, n: int, rows: int) -> np.ndarray:
    """The inverse of `panels`."""
    return np.stack([panel[t // NR, :rows, t % NR] for t in range(n)])


def matrix(weight: np.ndarray, bias: np.ndarray | None = None) -> Matrix:
    """An F32 weight as the engine has it."""
    data = np.ascontiguousarray(weight).view(np.uint8).reshape(-1)
    return Matrix(SimpleNamespace(shape=weight.shape, data=data, type=by_name("F32")), bias)


def run(kernel, weights: list[Matrix], x: np.ndarray, threads: int = 1) -> np.ndarray:
    """kernel(weights..., panels of x, out) by a crew, its output as columns."""
    rows, depth = weights[0].rows, weights[0].columns
    out = panels(np.full((len(x), rows), np.nan, np.float32))
    source, crew = panels(x), Crew(threads, lambda: Work([depth], 16))
    fields = [weight.fields for weight in weights]
    crew.run(lambda share, work, gate: kernel(*fields, source, out, share, work), crew.shares(len(x)))
    return columns(out, len(x), rows)


@pytest.mark.parametrize("n", [1, 2, 3, 5, FEW, FEW + 1, 16, 17, NR - 1, NR, NR + 1, 130])
@pytest.mark.parametrize(("rows", "depth"), [(1, 1), (STRIP, 7), (13, 288), (40, 289), (64, 600), (90, 1200)])
def test_product_equals_float64(n, rows, depth):
    rng = np.random.default_rng(n * rows + depth)
    weight, x, bias = (rng.normal(size=size).astype(np.float32) for size in ((rows, depth), (n, depth), rows))
    before = (weight.copy(), x.copy())
    found = run(project, [matrix(weight, bias)], x)
    product = x.astype(np.float64) @ weight.T.astype(np.float64)
    size = np.abs(x).astype(np.float64) @ np.abs(weight.T).astype(np.float64)
    # a chain of `depth` roundings: at most depth * 2^-24 of the sum of magnitudes; one more for the bias
    bound = depth * 2.0**-24 * size + 2.0**-24 * np.abs(product + bias) + 1e-30
    assert (np.abs(found - (product + bias)) <= bound).all()
    np.testing.assert_array_equal(weight, before[0])
    np.testing.assert_array_equal(x, before[1])


@pytest.mark.parametrize("n", [FEW, NR])
def test_product_is_one_fma_chain_in_rising_order(n):
    rng = np.random.default_rng(5)
    weight, x = (rng.normal(size=(size, 300)).astype(np.float32) for size in (STRIP, n))
    chain = np.zeros((n, STRIP), np.float32)
    for k in range(
        300
    ):  # the exact product fits 48 bits: float64 rounds once more, which is nearly always fma
        product = x[:, k : k + 1].astype(np.float64) * weight[:, k].astype(np.float64)
        chain = (product + chain).astype(np.float32)
    found = run(project, [matrix(weight)], x)
    np.testing.assert_allclose(found, chain, rtol=0, atol=2e-6)
    assert (found == chain).mean() > 0.9


@pytest.mark.parametrize("threads", [1, 3])
def test_product_bits_do_not_depend_on_tokens_beside_or_threads(threads):
    """Through the few-token tile and the panels, by rows and by panels, strips whole and not."""
    rng = np.random.default_rng(6)
    depth = 2 * DEPTH + 1
    weight = matrix(rng.normal(size=(72, depth)).astype(np.float32))
    x = rng.normal(size=(14 * NR, depth)).astype(np.float32)
    whole = run(project, [weight], x)
    for first, count in [(0, 1), (47, 2), (48, 4), (99, 3), (5, FEW), (7, FEW + 1), (100, 60), (0, len(x))]:
        part = run(project, [weight], x[first : first + count], threads)
        np.testing.assert_array_equal(part, whole[first : first + count])


@pytest.mark.parametrize("n", [1, 5, 50])
def test_swiglu_equals_float64(n):
    rng = np.random.default_rng(7)
    gate, up = (rng.normal(size=(20, 33)).astype(np.float32) for _ in range(2))
    x = rng.normal(size=(n, 33)).astype(np.float32)
    found = run(project_swiglu, [matrix(gate), matrix(up)], x)
    g, u = x.astype(np.float64) @ gate.T, x.astype(np.float64) @ up.T
    np.testing.assert_allclose(found, g / (1 + np.exp(-g)) * u, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("n", [1, 48, 50])
def test_norm_adds_the_residual_first(n):
    rng = np.random.default_rng(8)
    x, delta = (rng.normal(size=(n, 37)).astype(np.float32) for _ in range(2))
    weight = rng.normal(size=37).astype(np.float32)
    residual, out = panels(x), panels(delta)
    add_rms_norm(residual, out, weight, 1e-5, 0, len(out), n, Work([37], 16).fields, out)
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
    rotate(turned, 0, heads, width, False, cos, sin, 0, 2, n)
    angle = positions[:, None].astype(np.float64) * 10000.0 ** (-np.arange(half) / half)
    pairs = x.reshape(n, heads, width).astype(np.float64)
    z = (pairs[:, :, 0:6:2] + 1j * pairs[:, :, 1:6:2]) * np.exp(1j * angle)[:, None, :]
    pairs[:, :, 0:6:2], pairs[:, :, 1:6:2] = z.real, z.imag
    np.testing.assert_allclose(columns(turned, n, heads * width), pairs.reshape(n, -1), rtol=0, atol=1e-6)


def test_rotation_by_halves_is_the_other_one_with_features_reordered():
    rng = np.random.default_rng(2)
    x = rng.normal(size=(50, 3, 10)).astype(np.float32)
    angle = rng.uniform(0, 9, (3, 3, NR))
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    order = [0, 2, 4, 1, 3, 5, 6, 7, 8, 9]  # neighbours (0, 1), (2, 3), (4, 5) to (i, i + 3)
    neighbours, halves = panels(x.reshape(50, 30)), panels(x[:, :, order].reshape(50, 30))
    rotate(neighbours, 0, 3, 10, False, cos, sin, 0, len(neighbours), 50)
    rotate(halves, 0, 3, 10, True, cos, sin, 0, len(halves), 50)
    expected = columns(neighbours, 50, 30).reshape(50, 3, 10)[:, :, order]
    np.testing.assert_array_equal(columns(halves, 50, 30).reshape(50, 3, 10), expected)
    assert (expected != x[:, :, order]).any()


@pytest.mark.parametrize("n", [1, 48, 50])
def test_each_head_is_normed_alone(n):
    rng = np.random.default_rng(1)
    x, weight = (rng.normal(size=size).astype(np.float32) for size in ((n, 3, 7), 7))
    out, work = panels(x.reshape(n, 21)), Work([21], 16).fields
    norm_heads(out, 0, 3, NOTHING, 1e-5, 0, len(out), n, work)
    np.testing.assert_array_equal(columns(out, n, 21), x.reshape(n, 21))
    norm_heads(out, 0, 2, weight, 1e-5, 0, len(out), n, work)
    norm_heads(out, 2, 3, weight, 1e-5, 0, len(out), n, work)
    wide = x.astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean(axis=2, keepdims=True) + 1e-5) * weight
    np.testing.assert_allclose(columns(out, n, 21), expected.reshape(n, 21), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("n", [1, 48, 50])
def test_bias_is_added_to_its_rows_of_every_token(n):
    rng = np.random.default_rng(0)
    x, bias = (rng.normal(size=size).astype(np.float32) for size in ((n, 13), 13))
    out = panels(x)
    add_bias(out, bias, 3, 13, 0, len(out))
    np.testing.assert_array_equal(columns(out, n, 13), x + np.where(np.arange(13) >= 3, bias, 0))


def test_threads_do_not_wait_for_one_that_failed():
    """At a gate that one of them never reaches the others would wait for ever."""
    crew = Crew(3, lambda: Work([16], 16))

    def call(share, work, gate):
        if share.thread == 1:
            raise KeyError("one thread's own")
        for _ in range(2):
            meet_all(gate, share, work)

    for _ in range(3):
        with pytest.raises(KeyError, match="one thread's own"):
            crew.run(call, crew.shares(7))
    crew.run(lambda share, work, gate: meet_all(gate, share, work), crew.shares(7))


def test_groups_of_strips_are_bounded():
    for depth in (1, 576, 1536, 8192, 200_000):
        assert 1 <= group_strips(depth) <= 32


ONE_SIGNATURE = """
import json, sys
import engine.models.decoder, engine.models.llama
from engine.quants import decoder
from tests.engine.conftest import Scorer
scorer = Scorer(sys.argv[1])
scorer.score([5, 6, 7, 8])
scorer.model.logits(engine.Batch([5, 6], [0, 1], outputs=[True, False]), scorer.model.new_cache(1, 2))
modules = (engine.models.llama, engine.models.decoder)
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
    assert {"run_layers", "score", "write_logits", "gather_columns", "decode_f32"} <= signatures.keys()
    assert signatures == dict.fromkeys(signatures, 1)
