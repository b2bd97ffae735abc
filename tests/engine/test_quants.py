"""Laws of the decoders in `engine.quants`; the oracle is `gguf.quants.dequantize`, compared bit by bit."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import gguf
import numpy as np
import pytest
from golden import make_grids
from hypothesis import given, settings
from hypothesis import strategies as st

import engine
from engine.ggml_types import GGML_TYPES, by_name
from engine.quants import SUPPORTED, decoder, dequantize

NAMES = (
    *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"),
    *("TQ1_0", "TQ2_0", "MXFP4", "NVFP4"),
)

HALVES_AT = {  # byte offsets of the IEEE halves of a block
    "F16": (0,), "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,),
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
    "IQ1_S": (0,), "IQ1_M": (48,), "IQ2_XXS": (0,), "IQ2_XS": (0,), "IQ2_S": (0,), "IQ3_XXS": (0,),
    "IQ3_S": (0,), "IQ4_NL": (0,), "IQ4_XS": (0,), "TQ1_0": (52,), "TQ2_0": (64,),
}  # fmt: skip

EDGE_HALVES = (
    *(0x0000, 0x8000),  # zeros
    *(0x0001, 0x8001, 0x03FF, 0x83FF),  # smallest and largest subnormal
    *(0x0400, 0x3C00, 0x7BFF, 0xFBFF),  # smallest normal, 1, largest
    *(0x7C00, 0xFC00, 0x7E00, 0x7C01),  # infinities, quiet and signalling NaN
)


def oracle(data: np.ndarray, name: str) -> np.ndarray:
    with np.errstate(all="ignore"):  # infinite scales times zero
        weights: np.ndarray = gguf.quants.dequantize(data.copy(), gguf.GGMLQuantizationType[name])
    return weights.ravel()


def assert_same_bits(got: np.ndarray, expected: np.ndarray) -> None:
    """Equal float32 bits; a NaN equals any NaN, since the CPU and NumPy choose its payload."""
    assert got.dtype == expected.dtype == np.float32
    assert got.shape == expected.shape
    unequal = got.view(np.uint32) != expected.view(np.uint32)
    unequal &= ~(np.isnan(got) & np.isnan(expected))
    assert not unequal.any(), f"first at {unequal.argmax()}: {got[unequal][:4]} for {expected[unequal][:4]}"


def read_only(data: np.ndarray) -> np.ndarray:
    data.flags.writeable = False
    return data


def put_half(block: np.ndarray, name: str, at: int, bits: Any) -> None:
    """Writes IEEE halves, given as integers, into blocks at an offset; one of IQ1_M lies in four nibbles."""
    if name == "IQ1_M":  # nibble k of the half is the upper one of byte at + 2 * k + 1, whose lower one stays
        nibbles = np.asarray(bits).reshape(-1, 1) >> np.arange(0, 16, 4) & 15
        block[:, at + 1 : at + 8 : 2] = block[:, at + 1 : at + 8 : 2] & 15 | nibbles << 4
    else:
        block[:, at : at + 2] = np.asarray(bits).astype("<u2").reshape(-1, 1).view(np.uint8)


def random_blocks(name: str, n_blocks: int, rng: np.random.Generator, halves: Any = None) -> np.ndarray:
    """Random bytes; the halves are those given, in turn, or random finite ones of every exponent."""
    block = rng.integers(0, 256, (n_blocks, by_name(name).block_bytes), dtype=np.uint8)
    for k, at in enumerate(HALVES_AT.get(name, ())):
        drawn = rng.integers(0, 0x7C00, n_blocks) | rng.integers(0, 2, n_blocks) << 15
        bits = drawn if halves is None else np.roll(np.resize(halves, n_blocks), k)
        put_half(block, name, at, bits)
    return read_only(block.ravel())


def sparse_bytes(size: int, parts: dict[int, str]) -> np.ndarray:
    data = np.zeros(size, np.uint8)
    for at, text in parts.items():
        piece = bytes.fromhex(text)
        data[at : at + len(piece)] = list(piece)
    return read_only(data)


def sparse_weights(size: int, fill: float, parts: list[tuple[int, int, float]]) -> np.ndarray:
    weights = np.full(size, fill, np.float32)
    for start, stop, value in parts:
        weights[start:stop] = value
    return weights


K4_SCALES = "038000000240000000150000"  # sc[0] = 3, mn[0] = 2, sc[5] = 37, mn[5] = 17, the others 0

# Worked out on paper from the layouts of ggml's `block_*` structs: bytes by offset (others 0), the weight of
# most, and (start, stop, weight) of the others, later ones over earlier ones.
BY_HAND: dict[str, tuple[dict[int, str], float, list[tuple[int, int, float]]]] = {
    "F32": ({0: "0000803f"}, 1.0, []),
    "F16": ({0: "0184"}, -(2.0**-14 + 2.0**-24), []),
    "BF16": ({0: "49c0"}, -3.140625, []),
    # d 0.5; weights 0, 1 are nibbles 0, 9; 16, 17 are 15, 1
    "Q4_0": ({0: "0038", 2: "f019"}, -4.0, [(1, 2, 0.5), (16, 17, 3.5), (17, 18, -3.5)]),
    # d 2, m -1; weight 1 is nibble 1; 16, 17 are 15, 2
    "Q4_1": ({0: "0040", 2: "00bc", 4: "f021"}, -1.0, [(1, 2, 1.0), (16, 17, 29.0), (17, 18, 3.0)]),
    # high bits of weights 0 and 31; nibbles 3 and 15
    "Q5_0": ({0: "003c", 2: "01000080", 6: "03", 21: "f0"}, -16.0, [(0, 1, 3.0), (31, 32, 15.0)]),
    "Q5_1": ({0: "003c0034", 4: "01000080", 8: "03", 23: "f0"}, 0.25, [(0, 1, 19.25), (31, 32, 31.25)]),
    # d -0.5; -128, 127, -1, 1, 0 ...: a negative scale makes zero negative
    "Q8_0": ({0: "00b8", 2: "807fff01"}, -0.0, [(0, 1, 64.0), (1, 2, -63.5), (2, 3, 0.5), (3, 4, -0.5)]),
    # d 1, dmin 0.5; sub-block 0: sc 1 mn 2; 2: sc 3; 15: sc 15 mn 1; weights 0, 32, 255 are 2, 3, 3
    "Q2_K": (
        {0: "21", 2: "03", 15: "1f", 16: "0e", 79: "c0", 80: "003c", 82: "0038"},
        0.0,
        [(0, 16, -1.0), (0, 1, 1.0), (32, 33, 9.0), (240, 256, -0.5), (255, 256, 44.5)],
    ),
    # d 0.5; scale 1 in sub-block 0, -2 in 9, 0 elsewhere; weights 0 and 144 are 3 and 2, their high bits set
    "Q3_K": (
        {0: "01", 16: "10", 32: "03", 80: "02", 96: "01e0000000000000aa9aaaaa", 108: "0038"},
        -0.0,
        [(0, 16, -2.0), (0, 1, 1.5), (144, 160, 4.0), (144, 145, -2.0)],
    ),
    # d 1, dmin 0.5; weights 0 and 191 are 7 and 15
    "Q4_K": (
        {0: "003c", 2: "0038", 4: K4_SCALES, 16: "07", 111: "f0"},
        0.0,
        [(0, 32, -1.0), (0, 1, 20.0), (160, 192, -8.5), (191, 192, 546.5)],
    ),
    # the same with the fifth bit set: 23 and 31
    "Q5_K": (
        {0: "003c", 2: "0038", 4: K4_SCALES, 16: "01", 47: "20", 48: "07", 143: "f0"},
        0.0,
        [(0, 32, -1.0), (0, 1, 68.0), (160, 192, -8.5), (191, 192, 1138.5)],
    ),
    # d 0.25; scale -2 in sub-block 0, 4 in 13; weights 0 and 208 are 47 and 33
    "Q6_K": (
        {0: "0f", 80: "10", 128: "02", 176: "20", 192: "fe", 205: "04", 208: "0034"},
        -0.0,
        [(0, 16, 16.0), (0, 1, -7.5), (208, 224, -32.0), (208, 209, 1.0)],
    ),
    # d 1; rows 0 are eight times -1, 2047 eight times 1; sub-block 7: scale 15, the eighth negative
    "IQ1_S": ({0: "003c", 33: "ff", 48: "00fe"}, -0.875, [(224, 248, -16.875), (248, 256, 13.125)]),
    # d 1, C and 3 of its four nibbles not 0; sub-block 15: scale 11; group 31: row 2047, the eighth negative
    "IQ1_M": (
        {31: "ff", 47: "f0", 53: "c0", 55: "3a"},
        -0.875,
        [(240, 248, -9.625), (248, 256, 9.625)],
    ),
    # d 1; rows 0 are eight times 8, 1 begins with 43; sub-block 7: 15.5 / 4; signs 0 and so 7 of group 31
    "IQ2_XXS": (
        {0: "003c", 61: "01", 62: "000020f0"},
        1.0,
        [(224, 256, 31.0), (248, 249, -166.625), (255, 256, -31.0)],
    ),
    # d 2; row 511 is eight times 43; sub-block 15: 4.5 / 4; signs 0 and 1 of group 31, an even number
    "IQ2_XS": (
        {0: "0040", 64: "ff07", 73: "40"},
        2.0,
        [(240, 248, 18.0), (248, 256, 96.75), (248, 250, -96.75)],
    ),
    # d 0.5; row 1023 is eight times 43; sub-block 15: 3.5 / 4; signs 0 and 7 of group 31
    "IQ2_S": (
        {0: "0038", 33: "ff", 65: "81", 73: "c0", 81: "30"},
        0.5,
        [(240, 248, 3.5), (248, 256, -18.8125), (249, 255, 18.8125)],
    ),
    # d 1; rows 0 are four times 4, 1 begins with 20; sub-block 7: 1.5 / 2; signs 6 and so 7 of group 31
    "IQ3_XXS": (
        {0: "003c", 65: "01", 94: "00000018"},
        1.0,
        [(224, 256, 3.0), (252, 253, 15.0), (254, 256, -3.0)],
    ),
    # d 1; row 511 is 1, 1, 15, 15; sub-block 7: scale 5; signs 0 and 6 of group 31
    "IQ3_S": (
        {0: "003c", 65: "ff", 73: "80", 105: "41", 109: "20"},
        1.0,
        [(224, 256, 5.0), (248, 249, -5.0), (254, 255, -75.0), (255, 256, 75.0)],
    ),
    # d 0.5; codes 0, 8, 15 are -127, 1, 113
    "IQ4_NL": ({0: "0038", 3: "8f"}, -63.5, [(1, 2, 56.5), (17, 18, 0.5)]),
    # d 0.5; scales -32, but 1 in sub-block 7; weight 255 is code 12, which is 53
    "IQ4_XS": ({0: "0038", 3: "80", 7: "10", 135: "c0"}, 2032.0, [(224, 256, -63.5), (255, 256, 26.5)]),
    # d 0.5; bytes 128, 255 and 171 are 0.11111, 0.22222 and 0.2000 in base 3
    "TQ1_0": (
        {0: "80", 47: "ff", 51: "ab", 52: "0038"},
        -0.5,
        [
            *((at, at + 1, 0.0) for at in (0, 32, 64, 96, 128)),
            *((at, at + 1, 0.5) for at in (175, 191, 207, 223, 239, 243)),
        ],
    ),
    # d 0.5; weights 0, 32, 64, 96 are 0 to 3, 255 is 1
    "TQ2_0": (
        {0: "e4", 63: "40", 64: "0038"},
        -0.5,
        [(32, 33, 0.0), (64, 65, 0.5), (96, 97, 1.0), (255, 256, 0.0)],
    ),
    # scale 1 of twice the values; codes 1, 15, 4, and 8, which is no negative zero
    "MXFP4": ({0: "80", 2: "f1", 16: "84"}, 0.0, [(1, 2, 1.0), (17, 18, -12.0), (15, 16, 4.0)]),
    # sub-blocks 0 and 3: scales 1 and 2.25 of half the values; 1: scale 0 times -12, 2: 127, which is 0
    "NVFP4": (
        {0: "38007f41", 4: "71", 12: "0f", 20: "07", 35: "9f"},
        0.0,
        [(0, 1, 0.5), (8, 9, 6.0), (16, 17, -0.0), (55, 56, -13.5), (63, 64, -1.125)],
    ),
}


def test_supported_are_the_types_tested_here() -> None:
    assert frozenset(NAMES) == SUPPORTED == BY_HAND.keys()


@pytest.mark.parametrize("name", NAMES)
def test_block_computed_by_hand(name: str) -> None:
    parts, fill, exceptions = BY_HAND[name]
    kind = by_name(name)
    data = sparse_bytes(kind.block_bytes, parts)
    expected = sparse_weights(kind.block_size, fill, exceptions)
    assert_same_bits(dequantize(data, name, kind.block_size), expected)
    assert_same_bits(oracle(data, name), expected)


@pytest.mark.parametrize("name", NAMES)
def test_random_finite_blocks_equal_gguf(name: str) -> None:
    kind = by_name(name)
    n_blocks = 1 + 400_000 // kind.block_size
    data = random_blocks(name, n_blocks, np.random.default_rng(2))
    before = data.copy()
    assert_same_bits(dequantize(data, name, n_blocks * kind.block_size), oracle(data, name))
    assert np.array_equal(data, before)


@pytest.mark.parametrize("name", HALVES_AT)
def test_edge_scales_equal_gguf(name: str) -> None:
    n_blocks = len(EDGE_HALVES) * 8 + 3  # every edge with several neighbours as the second half
    data = random_blocks(name, n_blocks, np.random.default_rng(3), EDGE_HALVES)
    assert_same_bits(dequantize(data, name, n_blocks * by_name(name).block_size), oracle(data, name))


@pytest.mark.parametrize("name", NAMES)
def test_every_value_of_each_byte_equals_gguf(name: str) -> None:
    """Block b holds the byte b everywhere but in its halves, which are 1: every bit is set and clear."""
    kind = by_name(name)
    block = np.repeat(np.arange(256, dtype=np.uint8)[:, None], kind.block_bytes, axis=1)
    for at in HALVES_AT.get(name, ()):
        put_half(block, name, at, 0x3C00)
    data = read_only(block.ravel())
    assert_same_bits(dequantize(data, name, 256 * kind.block_size), oracle(data, name))


def test_every_half_equals_numpy() -> None:
    halves = np.arange(1 << 16, dtype=np.uint16)
    expected = halves.view(np.float16).astype(np.float32)
    assert_same_bits(dequantize(halves.view(np.uint8), "F16", 1 << 16), expected)


def test_f32_and_bf16_keep_bits_of_nan() -> None:
    words = np.array([0x7F800001, 0xFFC12345, 0x00000001, 0x80000000, 0x7F7FFFFF], np.uint32)
    assert np.array_equal(dequantize(words.view(np.uint8), "F32", words.size).view(np.uint32), words)
    halves = np.arange(1 << 16, dtype=np.uint16)
    wide = dequantize(halves.view(np.uint8), "BF16", 1 << 16).view(np.uint32)
    assert np.array_equal(wide, halves.astype(np.uint32) << np.uint32(16))


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, derandomize=True, max_examples=25)
@given(
    n_blocks=st.integers(1, 9),
    cut=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    spare=st.integers(0, 67),
    halves=st.lists(st.sampled_from(EDGE_HALVES) | st.integers(0, 0xFFFF), min_size=1, max_size=4),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_range_of_blocks_equals_that_slice_of_the_whole(
    name: str, n_blocks: int, cut: tuple[int, int], spare: int, halves: list[int], seed: int
) -> None:
    """Scales of any kind, ranges empty or odd; nothing is written past the range, `data` stays as it was."""
    kind = by_name(name)
    data = random_blocks(name, n_blocks, np.random.default_rng(seed), halves)
    before = data.copy()
    first, last = sorted(min(k, n_blocks) for k in cut)
    n_weights = (last - first) * kind.block_size
    out = np.full(n_weights + spare, 0x7FC0BEEF, np.uint32).view(np.float32)
    decoder(name)(data, first, last - first, out)
    expected = oracle(data, name)[first * kind.block_size : last * kind.block_size]
    assert_same_bits(out[:n_weights], expected)
    assert (out[n_weights:].view(np.uint32) == 0x7FC0BEEF).all()
    assert np.array_equal(data, before)


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_a_real_width_equal_gguf(name: str) -> None:
    """A matrix of 9 x 14,336 weights, row by row and backwards into one buffer, as the engine reads it."""
    kind = by_name(name)
    blocks = 14_336 // kind.block_size
    data = random_blocks(name, 9 * blocks, np.random.default_rng(11))
    expected = oracle(data, name).reshape(9, 14_336)
    out = np.empty(14_336, np.float32)
    for row in reversed(range(9)):
        decoder(name)(data, row * blocks, blocks, out)
        assert_same_bits(out, expected[row])


@pytest.mark.parametrize("name", NAMES)
def test_decodes_from_an_odd_address(name: str) -> None:
    kind = by_name(name)
    data = random_blocks(name, 37, np.random.default_rng(5))
    shifted = np.empty(data.size + 1, np.uint8)
    shifted[1:] = data
    assert_same_bits(dequantize(shifted[1:], name, 37 * kind.block_size), oracle(data, name))


@pytest.mark.parametrize("name", NAMES)
def test_kernel_has_one_signature(name: str) -> None:
    """The wrapper, whatever its caller's array allows, and a call by the contract lead to one compilation."""
    kind = by_name(name)
    data = np.zeros(3 * kind.block_bytes, np.uint8)
    dequantize(data, name, 3 * kind.block_size)
    dequantize(read_only(data), name, 3 * kind.block_size)
    decoder(name)(data, 1, 2, np.empty(3 * kind.block_size, np.float32))
    assert len(decoder(name).signatures) == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["Q1_0", "Q9_Z", "q4_1", ""])
def test_type_without_decoder_is_refused_by_name(name: str) -> None:
    for call in (lambda: decoder(name), lambda: dequantize(np.zeros(0, np.uint8), name, 0)):
        with pytest.raises(engine.UnsupportedQuant) as caught:
            call()
        assert repr(name) in str(caught.value)
        assert all(supported in str(caught.value) for supported in NAMES)


def test_supported_are_all_that_gguf_decodes() -> None:
    for kind in GGML_TYPES.values():
        data = np.zeros(kind.block_bytes, np.uint8)
        if kind.name in SUPPORTED:
            assert oracle(data, kind.name).size == kind.block_size
        else:
            with pytest.raises(NotImplementedError):
                oracle(data, kind.name)


def test_grids_are_those_that_the_script_makes() -> None:
    assert make_grids.TARGET.read_text() == make_grids.text()


def test_every_other_ggml_type_is_refused() -> None:
    others = {kind.name for kind in GGML_TYPES.values()} - SUPPORTED
    assert others
    for name in others:
        with pytest.raises(engine.UnsupportedQuant, match=name):
            decoder(name)


@pytest.mark.parametrize(
    ("data", "n_elements", "error", "words"),
    [
        (np.zeros(20, np.int8), 32, TypeError, "int8"),
        (np.zeros((2, 20), np.uint8), 64, ValueError, "contiguous"),
        (np.zeros(40, np.uint8)[::2], 32, ValueError, "contiguous"),
        (np.zeros(20, np.uint8), 31, ValueError, "whole blocks"),
        (np.zeros(20, np.uint8), -32, ValueError, "whole blocks"),
        (np.zeros(19, np.uint8), 32, ValueError, "take 20 bytes, but data has 19"),
        (np.zeros(40, np.uint8), 32, ValueError, "take 20 bytes, but data has 40"),
    ],
)
def test_wrong_call_says_what_is_wrong(
    data: np.ndarray, n_elements: int, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        dequantize(data, "Q4_1", n_elements)


@pytest.mark.parametrize("name", NAMES)
def test_no_blocks_give_no_weights(name: str) -> None:
    assert dequantize(np.zeros(0, np.uint8), name, 0).shape == (0,)


def test_import_leaves_numba_alone_and_decoder_loads_one_family() -> None:
    code = (
        "import sys, engine.quants as q; assert 'numba' not in sys.modules\n"
        "q.decoder('Q4_1'); assert 'numba' in sys.modules and 'engine.quants.k_quants' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.skipif("PAGEMILL_TEST_MODEL" not in os.environ, reason="PAGEMILL_TEST_MODEL names no GGUF file")
def test_rows_of_every_tensor_of_a_real_model_equal_gguf() -> None:
    rng = np.random.default_rng(7)
    with engine.open(os.environ["PAGEMILL_TEST_MODEL"]) as file:
        assert file.tensors
        for tensor in file.tensors.values():
            columns = tensor.shape[-1]
            n_rows = int(np.prod(tensor.shape[:-1]))
            blocks = columns // tensor.type.block_size
            rows = tensor.data.reshape(n_rows, -1)
            out = np.empty(columns, np.float32)
            for row in {0, n_rows - 1, *rng.integers(0, n_rows, 6).tolist()}:
                decoder(tensor.type.name)(tensor.data, row * blocks, blocks, out)
                assert_same_bits(out, oracle(rows[row], tensor.type.name))
