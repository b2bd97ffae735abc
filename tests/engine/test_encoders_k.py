"""Laws of the K-quant encoders; the oracle is `libgguf`, ggml's reference compiled without contraction."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engine.ggml_types import by_name
from engine.quants import dequantize
from engine.quants.encoders import encoder

NAMES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
LARGEST, SMALLEST = float(np.finfo(np.float32).max), float(np.finfo(np.float32).smallest_subnormal)


def encoded(values: np.ndarray, name: str, weights: np.ndarray | None = None) -> np.ndarray:
    """What our kernel makes of rows, in the layout and writability that `engine.quantize` hands on."""
    rows, columns = values.shape
    out = np.full((rows, columns // 256 * by_name(name).block_bytes), 0xA5, np.uint8)
    weights = np.zeros(0, np.float32) if weights is None else weights.copy()
    values = np.ascontiguousarray(values, np.float32).copy()
    values.flags.writeable = weights.flags.writeable = False
    encoder(name)(values, weights, out)
    return out


def assert_reference(values: np.ndarray, name: str, weights: np.ndarray | None = None) -> None:
    libgguf = pytest.importorskip("libgguf", reason="the oracle of encoders is the libgguf package")
    with np.errstate(all="ignore"):
        expected = libgguf.quantize_rows(values, libgguf.GGMLQuantizationType[name], weights)
    got = encoded(values, name, weights)
    size = by_name(name).block_bytes
    unequal = (got != expected).reshape(len(values), -1, size).any(axis=2)
    assert not unequal.any(), f"{name}: {unequal.sum()} blocks differ, the first at {np.argwhere(unequal)[0]}"


def random_weights(rng: np.random.Generator, columns: int) -> list[np.ndarray | None]:
    """None, zeros, equal ones, and weights of several spreads, some of them zero."""
    many = [
        np.zeros(columns),
        np.ones(columns),
        rng.lognormal(0, 2, columns),
        rng.random(columns) < 0.3,
        10.0 ** rng.uniform(-30, 20, columns),
    ]
    return [None, *(weights.astype(np.float32) for weights in many)]


def _constant(rng, n):
    return np.full(n, rng.normal())


def _powers(low, high):
    return lambda rng, n: rng.normal(size=n) * 10.0 ** rng.uniform(low, high, n)


def _scaled(factor):
    return lambda rng, n: rng.normal(size=n) * factor


KINDS = {
    "normal": _scaled(1),
    "zeros": lambda rng, n: np.zeros(n),
    "negative zeros": lambda rng, n: -np.zeros(n),
    "constant": _constant,
    "positive": lambda rng, n: np.abs(rng.normal(size=n)) + rng.choice([0, 1, 10]),
    "negative": lambda rng, n: -np.abs(rng.normal(size=n)) - rng.choice([0, 1, 1000]),
    "whole": lambda rng, n: rng.integers(-3, 4, n),
    "one of them": lambda rng, n: (np.arange(n) == rng.integers(n)) * rng.normal(),
    "sparse": lambda rng, n: rng.normal(size=n) * (rng.random(n) < 0.1),
    "last bits": lambda rng, n: 1 + rng.integers(0, 3, n) * 2.0**-23,
    "beyond halves": _scaled(6e5),
    "large": _scaled(1e12),
    "huge": _scaled(1e30),
    "extreme": lambda rng, n: np.clip(rng.normal(size=n) * 2e38, -LARGEST, LARGEST),
    "small": _scaled(1e-8),
    "near the least that counts": _scaled(1e-15),
    "tiny": _scaled(1e-30),
    "denormal": _scaled(1e-41),
    "least": lambda rng, n: rng.integers(-2, 3, n) * SMALLEST,
    "mixed": _powers(-8, 4),
    "very mixed": _powers(-30, 30),
}


def drawn(kind: str, rng: np.random.Generator, n: int) -> np.ndarray:
    values: np.ndarray = KINDS[kind](rng, n).astype(np.float32)
    return values


@pytest.mark.parametrize("name", NAMES)
def test_kinds_of_blocks_give_the_reference_bytes(name):
    rng = np.random.default_rng(1)
    values = np.stack([drawn(kind, rng, 512) for kind in KINDS])
    for weights in random_weights(rng, 512):
        assert_reference(values, name, weights)


@pytest.mark.parametrize("name", NAMES)
@given(
    seed=st.integers(0, 2**32 - 1),
    kinds=st.lists(st.sampled_from(list(KINDS)), min_size=1, max_size=4),
    piece=st.sampled_from([1, 8, 16, 32, 256]),
    which=st.integers(0, 5),
)
@example(seed=0, kinds=["normal"], piece=256, which=0)
@settings(max_examples=40, deadline=None)
def test_mixed_blocks_give_the_reference_bytes(name, seed, kinds, piece, which):
    """Sub-blocks, or parts of them, of different kinds in one super-block."""
    rng = np.random.default_rng(seed)
    pieces = [drawn(kinds[k], rng, piece) for k in rng.integers(0, len(kinds), 3 * 768 // piece)]
    assert_reference(np.concatenate(pieces).reshape(3, 768), name, random_weights(rng, 768)[which])


@pytest.mark.parametrize("name", NAMES)
@given(
    numbers=st.lists(st.floats(-LARGEST, LARGEST, width=32), min_size=1, max_size=40),
    weights=st.lists(st.floats(0, 2.0**70, width=32), min_size=0, max_size=40),
)
@settings(max_examples=40, deadline=None)
def test_any_finite_numbers_give_the_reference_bytes(name, numbers, weights):
    values = np.resize(np.array(numbers, np.float32), (1, 256))
    assert_reference(values, name, np.resize(np.array(weights, np.float32), 256) if weights else None)


@pytest.mark.parametrize("name", NAMES)
def test_scales_of_the_wrong_sign_give_the_reference_bytes(name):
    """Far numbers whose weights are zero bend the least-squares fit of the others: scales below zero."""
    rng = np.random.default_rng(2)
    for _ in range(4):
        weights = (rng.random(768) < 0.15) * rng.lognormal(0, 2, 768)
        values = rng.integers(-3, 4, (16, 768)) * np.where(weights == 0, 300, 1)
        assert_reference(values.astype(np.float32), name, weights.astype(np.float32))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(1, 256), (3, 256), (1, 4096), (5, 1792), (16, 256), (17, 512), (33, 768)])
def test_any_number_of_rows_and_blocks(name, shape):
    """Sixteen super-blocks at a time lie across rows; none, one, and a rest of them."""
    rng = np.random.default_rng(3)
    values = rng.normal(size=shape).astype(np.float32)
    weights = rng.lognormal(0, 1, shape[1]).astype(np.float32)
    assert_reference(values, name)
    assert_reference(values, name, weights)
    alone = [encoded(row[None], name, weights) for row in values]
    np.testing.assert_array_equal(encoded(values, name, weights), np.concatenate(alone))


@pytest.mark.parametrize("name", NAMES)
def test_no_rows_write_nothing(name):
    assert encoded(np.zeros((0, 256), np.float32), name).size == 0


@pytest.mark.parametrize(
    ("name", "bound"), [("Q2_K", 0.32), ("Q3_K", 0.19), ("Q4_K", 0.085), ("Q5_K", 0.045), ("Q6_K", 0.022)]
)
def test_decoded_numbers_lie_near(name, bound):
    """Relative root-mean-square error of normal numbers: about that of their bits."""
    values = np.random.default_rng(4).normal(size=(8, 1024)).astype(np.float32)
    for weights in (None, np.ones(1024, np.float32)):
        back = dequantize(encoded(values, name, weights).ravel(), name, values.size).reshape(values.shape)
        error = np.sqrt(np.mean((back - values) ** 2) / np.mean(values**2))
        assert bound / 2 < error < bound


@pytest.mark.parametrize("name", NAMES)
def test_weights_move_the_error(name):
    """Columns that count a thousand times as much come back closer than without weights, on the whole."""
    rng = np.random.default_rng(5)
    values = rng.normal(size=(16, 512)).astype(np.float32)
    weights = np.where(np.arange(512) % 8 == 0, 1000, 1).astype(np.float32)

    def error(of: np.ndarray | None) -> float:
        back = dequantize(encoded(values, name, of).ravel(), name, values.size).reshape(values.shape)
        return float(np.mean(weights * (back - values) ** 2))

    assert error(weights) < error(None)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_many_blocks_give_the_reference_bytes(name):
    rng = np.random.default_rng(6)
    kinds = list(KINDS)
    for _ in range(40):
        pieces = [drawn(kinds[k], rng, 16) for k in rng.integers(0, len(kinds), 24 * 48)]
        values = np.concatenate(pieces).reshape(24, 768)
        for weights in random_weights(rng, 768):
            assert_reference(values, name, weights)
