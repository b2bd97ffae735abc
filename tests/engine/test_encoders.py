"""Laws of the encoders in `engine.quants.encoders`; the oracle is libgguf, compared byte by byte."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import engine
from engine.ggml_types import GGML_TYPES, by_name
from engine.quants import SUPPORTED
from engine.quants.encoders import encoder

FLOATS = ("F32", "F16", "BF16")
SEARCHING = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "IQ4_XS")  # with weights
NAMES = (*FLOATS, "Q8_0", *SEARCHING, "MXFP4", "TQ1_0", "TQ2_0")
IN_GGUF = tuple(name for name in NAMES if not name.startswith("IQ4"))
LARGEST = float(np.finfo(np.float32).max)

Matrix = np.ndarray[Any, np.dtype[np.float32]]


def oracle(values: Matrix, name: str, weights: Matrix | None = None) -> np.ndarray:
    libgguf = pytest.importorskip("libgguf")
    given_weights = None if name in FLOATS else weights
    encoded = libgguf.quantize_rows(values, libgguf.GGMLQuantizationType[name], given_weights)
    return np.asarray(encoded.view(np.uint8).reshape(len(values), -1))


def step_of(name: str) -> int:
    """Numbers that are drawn together: a block, or as many of a type without blocks."""
    return max(32, by_name(name).block_size)


def assert_equal(got: np.ndarray, expected: np.ndarray, values: Matrix, name: str) -> None:
    assert got.dtype == np.uint8
    assert got.shape == expected.shape
    unequal = np.argwhere(got != expected)
    if len(unequal):
        row, at = unequal[0]
        block = at // by_name(name).block_bytes * by_name(name).block_size
        first = values[row, block : block + by_name(name).block_size]
        raise AssertionError(
            f"{len(unequal)} bytes differ, first {got[row, at]} for {expected[row, at]} "
            f"in row {row}, byte {at}, of {first!r}"
        )


def block_of(kind: str, size: int, rng: np.random.Generator) -> Matrix:
    """One block of the kinds that encoders could stumble over."""
    normal = rng.standard_normal(size)
    whole = rng.integers(-8, 9, size)
    make: dict[str, Callable[[], Any]] = {
        "normal": lambda: normal * 0.02,
        "positive": lambda: np.abs(normal),
        "negative": lambda: -np.abs(normal),
        "any scale": lambda: np.ldexp(normal, rng.integers(-160, 120)),
        "any scales": lambda: np.ldexp(normal, rng.integers(-160, 120, size)),
        "ties": lambda: np.ldexp(whole * 0.5, rng.integers(-140, 120)),
        "constant": lambda: np.full(size, normal[0]),
        "zeros": lambda: np.where(rng.random(size) < rng.random(), -0.0, 0.0),
        "outlier": lambda: np.where(np.arange(size) == rng.integers(size), 1e4, normal * 1e-4),
        "sparse": lambda: np.where(rng.random(size) < 0.9, 0.0, normal),
        "near 1e-15": lambda: normal * 1e-15,
        "denormal": lambda: np.ldexp(rng.integers(-64, 65, size), -149),
        "largest": lambda: whole / 8 * LARGEST,
        "below a power": lambda: np.ldexp(1 - rng.integers(0, 100, size) * 2.0**-24, rng.integers(-149, 129)),
    }
    return np.clip(make[kind](), -LARGEST, LARGEST).astype(np.float32)


KINDS = (
    *("normal", "positive", "negative", "any scale", "any scales", "ties", "constant", "zeros", "outlier"),
    *("sparse", "near 1e-15", "denormal", "largest", "below a power"),
)
WEIGHTS = ("none", "ones", "zeros", "uniform", "sparse", "any scale")


def weights_of(kind: str, columns: int, rng: np.random.Generator) -> Matrix | None:
    uniform = rng.random(columns, np.float32)
    return {
        "none": None,
        "ones": np.ones(columns, np.float32),
        "zeros": np.zeros(columns, np.float32),
        "uniform": uniform,
        "sparse": np.where(rng.random(columns) < 0.5, 0, uniform).astype(np.float32),
        "any scale": np.ldexp(uniform, rng.integers(-140, 60)).astype(np.float32),
    }[kind]


def matrix_of(kinds: list[str], n_rows: int, size: int, rng: np.random.Generator) -> Matrix:
    """Rows of as many blocks as there are kinds, shuffled in each row."""
    rows = [
        np.concatenate([block_of(kind, size, rng) for kind in rng.permutation(kinds)]) for _ in range(n_rows)
    ]
    return np.stack(rows)


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, derandomize=True, max_examples=30)
@given(
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=7),
    n_rows=st.integers(1, 6),
    weights=st.sampled_from(WEIGHTS),
    seed=st.integers(0, 2**32 - 1),
)
def test_bytes_equal_libgguf(name: str, kinds: list[str], n_rows: int, weights: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = matrix_of(kinds, n_rows, step_of(name), rng)
    counts = weights_of(weights, values.shape[1], rng)
    before = values.copy()
    got = engine.quantize(values, name, counts)
    assert_equal(got, oracle(values, name, counts), values, name)
    assert np.array_equal(values.view(np.uint32), before.view(np.uint32))


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_block_equals_libgguf(name: str, weights: str) -> None:
    rng = np.random.default_rng(5)
    values = matrix_of(list(KINDS), 2 if step_of(name) == 256 else 9, step_of(name), rng)
    counts = weights_of(weights, values.shape[1], rng)
    assert_equal(engine.quantize(values, name, counts), oracle(values, name, counts), values, name)


@pytest.mark.slow
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", NAMES)
def test_many_blocks_equal_libgguf(name: str, weights: str) -> None:
    rng = np.random.default_rng(6)
    values = matrix_of(list(KINDS) * 3, 200 * 32 // step_of(name), step_of(name), rng)
    counts = weights_of(weights, values.shape[1], rng)
    assert_equal(engine.quantize(values, name, counts, threads=2), oracle(values, name, counts), values, name)


@pytest.mark.parametrize("name", IN_GGUF)
def test_bytes_equal_gguf_but_for_the_sign_of_zero(name: str) -> None:
    """Of blocks of zeros alone, left out, `gguf` gives Q4_* and Q5_* a scale or minimum of the other sign."""
    rng = np.random.default_rng(7)
    kinds = [
        kind for kind in KINDS if kind not in ("zeros", "denormal", "any scale", "ties", "below a power")
    ]
    values = matrix_of(kinds, 20, step_of(name), rng)
    with np.errstate(all="ignore"):
        expected = gguf.quants.quantize(values.copy(), gguf.GGMLQuantizationType[name])
    assert_equal(engine.quantize(values, name), expected.view(np.uint8).reshape(20, -1), values, name)


@pytest.mark.parametrize("name", ["F16", "BF16"])
def test_floats_round_to_the_nearest_even(name: str) -> None:
    """Every float32 halfway between two of the type, and its neighbours."""
    if name == "F16":
        halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float64)
        middles = ((halves[1:] + halves[:-1]) / 2).astype(np.float32)
    else:
        middles = ((np.arange(0x7F7F, dtype=np.uint32) << 16) + 0x8000).view(np.float32)
    around = [middles, np.nextafter(middles, np.float32(0)), np.nextafter(middles, np.float32(np.inf))]
    values = np.concatenate([*around, *(-part for part in around)])[None]
    if name == "F16":
        expected = values.astype(np.float16).view(np.uint16)
    else:  # the sum in 64 bits, an even one where it ends in a half
        bits = values.view(np.uint32).astype(np.uint64)
        expected = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    assert np.array_equal(engine.quantize(values, name).view(np.uint16), expected)
    assert_equal(engine.quantize(values, name), oracle(values, name), values, name)


def test_mxfp4_exponents_next_to_powers_of_two_equal_libgguf() -> None:
    """float32's log2 rounds up to 88 numbers below a power of two to that power."""
    powers = np.concatenate([np.ldexp(np.float32(1), np.arange(-149, 128)), [np.float32(np.inf)]])
    bits = powers.astype(np.float32).view(np.uint32)[:, None] - np.arange(-1, 110, dtype=np.int64)
    largest = np.clip(bits, 0, 0x7F7FFFFF).astype(np.uint32).view(np.float32).ravel()
    values = largest[:, None] * np.linspace(-1, 1, 32, dtype=np.float32)
    assert_equal(engine.quantize(values, "MXFP4"), oracle(values, "MXFP4"), values, "MXFP4")


@pytest.mark.parametrize("name", NAMES)
def test_threads_do_not_change_bytes(name: str) -> None:
    rng = np.random.default_rng(8)
    for n_rows in (1, 2, 7, 33):
        values = rng.standard_normal((n_rows, 3 * step_of(name)), np.float32)
        for counts in (None, weights_of("uniform", values.shape[1], rng)):
            alone = engine.quantize(values, name, counts)
            for threads in (2, 5):
                assert np.array_equal(engine.quantize(values, name, counts, threads=threads), alone)


@pytest.mark.parametrize("name", NAMES)
def test_row_is_encoded_as_if_it_were_alone(name: str) -> None:
    rng = np.random.default_rng(9)
    values = rng.standard_normal((21, 2 * step_of(name)), np.float32) * rng.random((21, 1), np.float32)
    for counts in (None, weights_of("uniform", values.shape[1], rng)):
        whole = engine.quantize(values, name, counts)
        for row in (0, 13, 20):
            assert np.array_equal(engine.quantize(values[row : row + 1], name, counts)[0], whole[row])


@pytest.mark.parametrize("name", NAMES)
def test_other_rows_and_bytes_stay_as_they_are(name: str) -> None:
    """The kernel called as the table's contract has it, into the middle of a larger array."""
    size, kind = step_of(name), by_name(name)
    values = np.random.default_rng(10).standard_normal((5, size), np.float32)
    counts = np.empty(0, np.float32)
    for array in (values, counts):
        array.flags.writeable = False
    around = np.full((9, size // kind.block_size * kind.block_bytes), 0xA5, np.uint8)
    encoder(name)(values, counts, around[2:7])
    assert np.array_equal(around[2:7], engine.quantize(values, name))
    assert (around[:2] == 0xA5).all()
    assert (around[7:] == 0xA5).all()


@pytest.mark.parametrize("name", NAMES)
def test_no_rows_give_no_bytes(name: str) -> None:
    kind, size = by_name(name), step_of(name)
    encoded = engine.quantize(np.empty((0, size), np.float32), name, np.ones(size, np.float32), threads=2)
    assert encoded.shape == (0, size // kind.block_size * kind.block_bytes)


@pytest.mark.parametrize("name", NAMES)
def test_kernel_has_one_signature(name: str) -> None:
    values = np.ones((3, step_of(name)), np.float32)
    engine.quantize(values, name)
    engine.quantize(values, name, values[0].copy(), threads=2)
    values.flags.writeable = False
    engine.quantize(values[:1], name)
    assert len(encoder(name).signatures) == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "name", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "TQ1_0", "TQ2_0"]
)
def test_encoding_what_was_decoded_gives_nearly_the_same(name: str) -> None:
    """Types of even steps: only the scale's rounding to a half can move."""
    values = np.random.default_rng(11).standard_normal((4, 2 * step_of(name)), np.float32)
    first = engine.dequantize(engine.quantize(values, name).ravel(), name, values.size)
    again = engine.quantize(first.reshape(values.shape), name)
    second = engine.dequantize(again.ravel(), name, values.size)
    assert np.abs(first - second).max() <= 2e-3 * np.abs(first).max()


def test_encodable_are_the_types_that_issue_six_names() -> None:
    k_quants = {"Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"}
    assert {*NAMES, *k_quants} == engine.ENCODABLE
    assert engine.ENCODABLE < SUPPORTED


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        *(("IQ1_S", "Q2_K"), ("IQ1_M", "Q2_K"), ("IQ2_XXS", "Q2_K"), ("IQ2_XS", "Q2_K"), ("IQ2_S", "Q2_K")),
        *(("IQ3_XXS", "Q3_K"), ("IQ3_S", "Q3_K"), ("NVFP4", "IQ4_NL")),
    ],
)
def test_type_that_only_decodes_is_refused_with_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(engine.UnsupportedQuant, match=f"'{name}' can be decoded but not .* is {nearest} "):
        engine.quantize(np.zeros((1, 256), np.float32), name)


def test_every_type_is_encoded_or_refused() -> None:
    for name in {kind.name for kind in GGML_TYPES.values()} - engine.ENCODABLE:
        with pytest.raises(engine.UnsupportedQuant, match=f"'{name}' can.*Q4_0"):
            engine.quantize(np.zeros((1, 256), np.float32), name)
    with pytest.raises(engine.UnsupportedQuant, match="'Q9_Z' cannot be encoded"):
        engine.quantize(np.zeros((1, 256), np.float32), "Q9_Z")


ONES = np.ones((2, 64), np.float32)


@pytest.mark.parametrize(
    ("values", "weights", "threads", "error", "words"),
    [
        (ONES.astype(np.float64), None, 1, TypeError, "values must be float32, not float64"),
        (ONES, np.ones(64), 1, TypeError, "weights must be float32, not float64"),
        (ONES[0], None, 1, ValueError, "C-contiguous matrix"),
        (ONES[:, ::2], None, 1, ValueError, "C-contiguous matrix"),
        (np.ones((64, 2), np.float32).T, None, 1, ValueError, "C-contiguous matrix"),
        (ONES[:, :33].copy(), None, 1, ValueError, "33 columns are not whole blocks of Q4_0, of 32"),
        (ONES[:, :0].copy(), None, 1, ValueError, "0 columns are not whole blocks"),
        (ONES, np.ones(63, np.float32), 1, ValueError, "run of 64 numbers"),
        (ONES, np.ones((1, 64), np.float32), 1, ValueError, "run of 64 numbers"),
        (ONES, np.ones(128, np.float32)[::2], 1, ValueError, "run of 64 numbers"),
        (ONES, None, 0, ValueError, "at least 1, not 0"),
    ],
)
def test_wrong_call_says_what_is_wrong(
    values: Any, weights: Any, threads: int, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        engine.quantize(values, "Q4_0", weights, threads=threads)


def test_import_leaves_numba_alone_and_encoder_loads_one_family() -> None:
    code = (
        "import sys, engine; engine.quantize, engine.ENCODABLE; assert 'numba' not in sys.modules\n"
        "from engine.quants.encoders import encoder; encoder('F16')\n"
        "assert 'numba' in sys.modules and 'engine.quants.encoders.k_quants' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
