"""Laws of products with 8-bit activations: one definition, stated in NumPy, on any CPU and in any batch."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from engine.ggml_types import by_name
from engine.kernels.int8 import multiplier, quantize_panel
from engine.kernels.tile import NR, STRIP
from engine.machine import cpu_features
from engine.quants import decoder
from engine.quants.strips8 import packer8
from tests.engine.test_bits import AVX2
from tests.engine.test_quants import EDGE_HALVES, assert_same_bits, oracle, random_blocks

NAMES = (
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"),
)
KINDS = [(32, 8), (32, 128), (32, 0), (16, 32), (16, 0)]  # columns of a scale, offset; 0 has minimums


def fma32(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """float32 a * b + c rounded once: a float64 sum rounded to odd keeps what the second rounding needs."""
    product = a.astype(np.float64) * b.astype(np.float64)  # exact
    addend = c.astype(np.float64)
    total = np.asarray(product + addend)
    part = total - product
    error = (product - (total - part)) + (addend - part)
    odd = total.view(np.int64) & 1
    return np.where((error != 0) & (odd == 0), np.nextafter(total, np.copysign(np.inf, error)), total).astype(
        np.float32
    )


def quantized(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x: (depth, tokens) float32; int64 quants alike and float32 scales (depth / 32, tokens)."""
    blocks = x.reshape(-1, 32, x.shape[1])
    amax = np.abs(blocks).max(1)
    alive = amax >= np.float32(1e-30)
    with np.errstate(divide="ignore"):
        inverse = np.where(alive, np.float32(127) / amax, np.float32(0))
    scales = np.where(alive, amax / np.float32(127), np.float32(0))
    return np.rint(blocks * inverse[:, None]).astype(np.int64).reshape(x.shape), scales


def product(
    q: np.ndarray, scales: np.ndarray, least: np.ndarray | None, offset: int, a: np.ndarray, s_a: np.ndarray
) -> np.ndarray:
    """The definition. q: (rows, depth); scales, least: (rows, groups); a: (depth, tokens) int64."""
    groups = scales.shape[1]
    width = q.shape[1] // groups
    out = np.zeros((q.shape[0], a.shape[1]), np.float32)
    for g in range(groups):
        columns = slice(g * width, (g + 1) * width)
        token_scale = s_a[g * width // 32]
        total = (q[:, columns].astype(np.int64) - offset) @ a[columns]
        out = fma32(scales[:, g, None] * token_scale, total.astype(np.float32), out)
        if least is not None:
            shared = token_scale * a[columns].sum(0).astype(np.float32)
            out = fma32(least[:, g, None], shared[None], out)
    return out


def as_strips(q: np.ndarray, scales: np.ndarray, least: np.ndarray | None) -> np.ndarray:
    """The layout of engine.quants.strips8, written down once more."""
    rows, depth = q.shape
    groups = scales.shape[1]
    width = depth // groups
    words = q.astype(np.uint8).reshape(rows // STRIP, STRIP, groups, width // 4, 4).transpose(0, 2, 3, 1, 4)
    parts = [words.reshape(rows // STRIP, groups, width * STRIP)]
    for values in (scales,) if least is None else (scales, least):
        turned = values.astype(np.float32).reshape(rows // STRIP, STRIP, groups).transpose(0, 2, 1)
        parts.append(np.ascontiguousarray(turned).view(np.uint8))
    return np.concatenate(parts, axis=2)


def in_panel(x: np.ndarray, n_tokens: int):
    """quants, scales, sums of the first tokens of x (depth, NR) float32, what lies beyond set to nonsense."""
    depth = x.shape[0]
    quants = np.full((depth // 4, NR, 4), 99, np.int8)
    scales, sums = np.full((depth // 32, NR), np.nan, np.float32), np.full((depth // 16, NR), 12345, np.int32)
    quantize_panel(x.ctypes.data, depth, n_tokens, quants.ctypes.data, scales.ctypes.data, sums.ctypes.data)
    return quants, scales, sums


def multiplied(strips, group, offset, x, n_tokens):
    """(rows, n_tokens) float32 by the kernels."""
    depth, n_strips = x.shape[0], strips.shape[0]
    quants, scales, sums = in_panel(x, n_tokens)
    shares = np.full((depth // group, NR), 0x7FC0BEEF, np.int32)
    out = np.full((n_strips * STRIP + 1, NR), 7.0, np.float32)
    multiplier(group, offset)(
        strips.ctypes.data, n_strips, quants.ctypes.data, scales.ctypes.data, sums.ctypes.data,
        depth, offset, n_tokens, out.ctypes.data, shares.ctypes.data,
    )  # fmt: skip
    assert (out[-1] == 7.0).all()
    return out[:-1, :n_tokens]


def operands(rng: np.random.Generator, rows: int, depth: int, group: int, offset: int):
    q = rng.integers(0, 256 if offset == 128 else 129, (rows, depth))
    scales = (rng.standard_normal((rows, depth // group)) * 10.0 ** rng.integers(-4, 1)).astype(np.float32)
    return q, scales, None if offset else rng.standard_normal(scales.shape).astype(np.float32)


def activations(rng: np.random.Generator, depth: int) -> np.ndarray:
    """(depth, NR) float32 of many sizes, one block of zeros and one of numbers too small to count."""
    x = rng.standard_normal((depth // 32, 32, NR)) * 10.0 ** rng.integers(-6, 6, (depth // 32, 1, NR))
    x = x.astype(np.float32)
    x[0, :, 1], x[0, :, 2] = 0.0, 1e-31
    return x.reshape(depth, NR)


def test_activations_are_rounded_half_to_even_by_the_definition() -> None:
    rng = np.random.default_rng(1)
    x = activations(rng, 320)
    x[:32, 0] = np.arange(-16, 16) + 0.5  # with 127 the scale is 1, so that all of these are ties
    x[0, 0] = 127.0
    q, s = quantized(x)
    quants, scales, sums = in_panel(x, NR)
    assert_same_bits(scales, s)
    assert np.array_equal(quants.transpose(0, 2, 1).reshape(x.shape), q)
    assert np.array_equal(sums, q.reshape(-1, 16, NR).sum(1))
    assert quants[:4, 0].ravel()[:4].tolist() == [127, -14, -14, -12]
    largest = np.abs(q.reshape(-1, 32, NR)).max(1)
    assert ((largest == 127) | (s == 0)).all()
    assert (s[0, 1:3] == 0).all()


def test_extreme_activations_stay_within_their_token() -> None:
    x = activations(np.random.default_rng(2), 64)
    x[3, 4], x[40, 5], x[2, 6] = np.inf, np.nan, 1e30
    strips = as_strips(*operands(np.random.default_rng(3), STRIP, 64, 32, 128))
    out = multiplied(strips, 32, 128, x, 8)
    assert not np.isfinite(out[:, 4:6]).any()
    assert np.isfinite(out[:, [0, 1, 2, 3, 6, 7]]).all()


@pytest.mark.parametrize(("group", "offset"), KINDS)
@pytest.mark.parametrize(("depth", "n_strips"), [(32, 1), (96, 2), (256, 3), (576, 5), (512, 9)])
def test_product_is_the_definition_for_any_number_of_tokens(group, offset, depth, n_strips) -> None:
    rng = np.random.default_rng(depth + group)
    q, scales, least = operands(rng, n_strips * STRIP, depth, group, offset)
    x = activations(rng, depth)
    expected = product(q, scales, least, offset, *quantized(x))
    strips = as_strips(q, scales, least)
    for n_tokens in sorted({*range(1, 11), 13, NR - 11, NR - 1, NR}):
        got = multiplied(strips, group, offset, x, n_tokens)
        assert_same_bits(np.ascontiguousarray(got), expected[:, :n_tokens].copy())


@pytest.mark.parametrize(("group", "offset"), KINDS)
def test_largest_sums_are_exact(group: int, offset: int) -> None:
    x = np.full((64, NR), -1.0, np.float32)
    x[32:] = 1.0
    for largest in (0, 255 if offset == 128 else 128):
        q, ones = np.full((STRIP, 64), largest), np.ones((STRIP, 64 // group), np.float32)
        least = None if offset else ones
        got = multiplied(as_strips(q, ones, least), group, offset, x, NR)
        expected = product(q, ones, least, offset, *quantized(x))
        assert_same_bits(np.ascontiguousarray(got), expected)


def unpacked(name: str, data: np.ndarray, columns: int):
    """q, scales, least of sixteen rows of bytes as `strips8` packs them; what follows stays as it was."""
    p, width = packer8(name), packer8(name).group
    n_bytes = columns // p.unit * p.unit_bytes
    strip = np.full(n_bytes + 64, 0xA5, np.uint8)
    p.kernel(data.ctypes.data, data.size // STRIP, columns // p.unit, strip.ctypes.data)
    assert (strip[n_bytes:] == 0xA5).all()
    record = strip[:n_bytes].reshape(columns // width, -1, 64)
    assert record.shape[1] == width // 4 + 1 + p.has_minimum
    words = record[:, : width // 4].reshape(columns // width, width // 4, STRIP, 4)
    q = words.transpose(2, 0, 1, 3).reshape(STRIP, columns)
    floats = record[:, width // 4 :].copy().view(np.float32)
    return q, floats[:, 0].T, floats[:, 1].T if p.has_minimum else None


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("halves", [None, EDGE_HALVES[:10]])
def test_strips_hold_the_weights_of_the_decoder_and_of_gguf(name: str, halves) -> None:
    kind, p = by_name(name), packer8(name)
    columns = 5 * p.unit
    data = random_blocks(name, STRIP * columns // kind.block_size, np.random.default_rng(4), halves)
    q, scales, least = unpacked(name, data, columns)
    assert scales.shape == (STRIP, columns // p.group)
    wide = np.repeat(scales, p.group, 1).astype(np.float64) * (q.astype(np.int64) - p.offset)
    weights = (wide if least is None else wide + np.repeat(least, p.group, 1)).astype(np.float32)
    decoded = np.empty(weights.size, np.float32)
    decoder(name)(data, 0, decoded.size // kind.block_size, decoded)
    assert np.array_equal(weights.ravel(), decoded)
    assert_same_bits(decoded, oracle(data, name))


@pytest.mark.parametrize("name", NAMES)
def test_product_from_the_bytes_of_a_file_is_near_that_of_its_weights(name: str) -> None:
    """A step of activations is some 0.02 here, and errors of 0.006 each add up as their squares do."""
    kind, p, columns = by_name(name), packer8(name), 512
    rng = np.random.default_rng(6)
    data = random_blocks(name, STRIP * columns // kind.block_size, rng, [0x2C00])
    weights = oracle(data, name).reshape(STRIP, columns).astype(np.float64)
    strip = np.zeros((1, columns // p.unit * p.unit_bytes), np.uint8)
    p.kernel(data.ctypes.data, data.size // STRIP, columns // p.unit, strip.ctypes.data)
    x = rng.standard_normal((columns, NR)).astype(np.float32)
    got = multiplied(strip, p.group, p.offset, x, NR)
    assert (np.abs(got - weights @ x) < 0.04 * np.linalg.norm(weights, axis=1, keepdims=True)).all()
    q, scales, least = unpacked(name, data, columns)
    assert_same_bits(np.ascontiguousarray(got), product(q, scales, least, p.offset, *quantized(x)))


def digest_of_all_kinds() -> str:
    """SHA-256 of outputs for all kinds of strips and some numbers of tokens, the same on every CPU."""
    digest = hashlib.sha256()
    for group, offset in KINDS:
        rng = np.random.default_rng(group)
        strips = as_strips(*operands(rng, 6 * STRIP, 192, group, offset))
        x = np.zeros((192, NR), np.float32)
        x[:, :24] = rng.standard_normal((192, 24))
        for n_tokens in (1, 3, 7, 24):
            got = multiplied(strips, group, offset, x, n_tokens)
            digest.update(np.ascontiguousarray(got).tobytes())
    return digest.hexdigest()


CHILD = """
import json
from engine.kernels.int8 import multiply_32
from tests.engine.test_int8 import digest_of_all_kinds
digest = digest_of_all_kinds()
text = "".join(multiply_32.inspect_asm().values())
print(json.dumps([digest, *("yes" if word in text else "no" for word in ("vpdpbusd", "pmaddwd", "zmm"))]))
"""
NO_VNNI = {
    "NUMBA_CPU_FEATURES": ",".join(f"+{name}" for name in sorted(cpu_features()) if "vnni" not in name)
}
OLD = {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": "+sse2"}


@pytest.mark.parametrize(
    ("environment", "instructions"),
    [
        pytest.param(AVX2, ["no", "yes", "no"], id="AVX2"),
        pytest.param(
            NO_VNNI,
            ["no", "yes", "yes"],
            id="AVX-512 without VNNI",
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif("avx512bw" not in cpu_features(), reason="this CPU has no AVX-512BW"),
            ],
        ),
        pytest.param(OLD, ["no", "yes", "no"], id="SSE2", marks=pytest.mark.slow),
    ],
)
def test_any_cpu_gives_the_same_bits(environment, instructions, tmp_path) -> None:
    child = subprocess.run(
        [sys.executable, "-c", CHILD],
        env=os.environ
        | environment
        | {"PYTHONPATH": os.pathsep.join(sys.path), "NUMBA_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    digest, *seen = json.loads(child.stdout.splitlines()[-1])
    assert seen == instructions
    assert digest == digest_of_all_kinds()


def test_other_types_have_no_strips_of_bytes() -> None:
    assert all(packer8(name) for name in NAMES)
    for name in ("F32", "F16", "BF16", "IQ2_XXS", "TQ2_0", "Q9_Z"):
        assert packer8(name) is None


@pytest.mark.parametrize(("group", "offset"), KINDS)
def test_kernels_have_one_signature(group: int, offset: int) -> None:
    strips = as_strips(*operands(np.random.default_rng(1), STRIP, 32, group, offset))
    multiplied(strips, group, offset, np.ones((32, NR), np.float32), 2)
    assert len(multiplier(group, offset).signatures) == len(quantize_panel.signatures) == 1


@pytest.mark.parametrize("name", NAMES)
def test_offset_says_which_kernel_multiplies(name: str) -> None:
    p = packer8(name)
    assert p.has_minimum == (p.offset == 0)
    assert (p.group, p.offset) in [(32, 8), (32, 16), *KINDS, (16, 4)]
