"""Laws of decoding into strips: the bits of the decoders and of the gguf package."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from engine.ggml_types import by_name
from engine.quants import SUPPORTED, decoder
from engine.quants.strips import packer
from tests.engine.test_bits import AVX2
from tests.engine.test_quants import EDGE_HALVES, HALVES_AT, assert_same_bits, oracle, put_half, random_blocks

ROWS = 16
NAMES = (
    *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"),
)


def packed(name: str, data: np.ndarray, row_bytes: int, columns: int) -> np.ndarray:
    """(16, columns) float32 of sixteen rows of bytes, with what follows the strip left as it was."""
    strip = np.full((columns + 3, ROWS), 0x7FC0BEEF, np.uint32)
    pack, unit = packer(name)
    pack(data.ctypes.data, row_bytes, columns // unit, strip.ctypes.data)
    assert (strip[columns:] == 0x7FC0BEEF).all()
    return strip[:columns].view(np.float32).T.copy()


def columns_of(name: str, n_units: int) -> int:
    return n_units * packer(name).unit


def decoded(name: str, data: np.ndarray, n_weights: int) -> np.ndarray:
    out = np.empty(n_weights, np.float32)
    data.flags.writeable = False
    decoder(name)(data, 0, n_weights // by_name(name).block_size, out)
    return out


def assert_packs_as_decoded(name: str, data: np.ndarray, columns: int) -> None:
    expected = decoded(name, data, ROWS * columns)
    got = packed(name, data, data.size // ROWS, columns)
    assert_same_bits(got.ravel(), expected)
    assert_same_bits(expected, oracle(data, name))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n_units", [1, 2, 9])
def test_random_rows_are_those_of_the_decoder_and_of_gguf(name: str, n_units: int) -> None:
    columns = columns_of(name, n_units)
    blocks = ROWS * columns // by_name(name).block_size
    assert_packs_as_decoded(name, random_blocks(name, blocks, np.random.default_rng(n_units)).copy(), columns)


@pytest.mark.parametrize("name", sorted(HALVES_AT.keys() & set(NAMES)))
def test_edge_scales_are_those_of_the_decoder(name: str) -> None:
    """Zeros, subnormal numbers, largest, infinities and NaN, each with its neighbours as a minimum."""
    columns = columns_of(name, 14)
    blocks = ROWS * columns // by_name(name).block_size
    data = random_blocks(name, blocks, np.random.default_rng(3), EDGE_HALVES[:-1])  # 13: prime to the rows
    assert_packs_as_decoded(name, data.copy(), columns)


@pytest.mark.parametrize("name", NAMES)
def test_every_value_of_each_byte_is_that_of_the_decoder(name: str) -> None:
    """Unit b of a row holds the byte b + row everywhere but in its halves, which are 1."""
    kind, unit = by_name(name), packer(name).unit
    per_unit = unit // kind.block_size
    values = (np.arange(256) + np.arange(ROWS)[:, None]).astype(np.uint8)
    block = np.repeat(values.reshape(-1, 1), per_unit, axis=0).repeat(kind.block_bytes, axis=1)
    for at in HALVES_AT.get(name, ()):
        put_half(block, name, at, 0x3C00)
    assert_packs_as_decoded(name, block.ravel(), 256 * unit)


@pytest.mark.parametrize("name", NAMES)
def test_rows_may_lie_apart_and_at_an_odd_address(name: str) -> None:
    kind, columns = by_name(name), columns_of(name, 3)
    row_bytes = columns // kind.block_size * kind.block_bytes
    rows = random_blocks(name, ROWS * columns // kind.block_size, np.random.default_rng(5))
    apart = np.zeros((ROWS, row_bytes + 13), np.uint8)
    apart[:, 1 : 1 + row_bytes] = rows.reshape(ROWS, row_bytes)
    got = packed(name, apart.ravel()[1:], row_bytes + 13, columns)
    assert_same_bits(got.ravel(), oracle(rows, name))


CHILD = """
import ctypes, hashlib, json, mmap, sys
import numpy as np
from engine.machine import cpu_features
from engine.quants.strips import packer
file, seen = np.load(sys.argv[1]), {"f16c": "f16c" in cpu_features()}
libc = ctypes.CDLL(None, use_errno=True)
for name in file.files:
    data = file[name]
    size = -(-data.size // mmap.PAGESIZE) * mmap.PAGESIZE
    pages = mmap.mmap(-1, size + mmap.PAGESIZE)  # the rows end where a page that nobody may read begins
    place = np.frombuffer(pages, np.uint8)[size - data.size : size]
    place[:] = data
    end = ctypes.c_void_p(place.ctypes.data + data.size)
    assert libc.mprotect(end, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    pack, unit = packer(name)
    strip = np.zeros((2 * unit, 16), np.float32)
    pack(place.ctypes.data, data.size // 16, 2, strip.ctypes.data)
    seen[name] = hashlib.sha256(np.nan_to_num(strip, nan=0.5).tobytes()).hexdigest()
print(json.dumps(seen))
"""
WITHOUT_F16C = AVX2 | {"NUMBA_CPU_FEATURES": AVX2["NUMBA_CPU_FEATURES"].replace(",+f16c", "")}
OLD = {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": "+sse2"}


@pytest.mark.parametrize(
    ("environment", "names"),
    [
        pytest.param({}, NAMES, id="this CPU"),
        pytest.param(WITHOUT_F16C, NAMES, id="AVX2 without f16c"),
        pytest.param(OLD, ("F16", "Q5_1", "IQ4_NL"), id="SSE2", marks=pytest.mark.slow),
    ],
)
def test_any_cpu_gives_the_same_bits_and_reads_no_byte_past_the_rows(environment, names, tmp_path) -> None:
    rows, expected = {}, {}
    for name in names:
        columns = columns_of(name, 2)
        rows[name] = random_blocks(
            name, ROWS * columns // by_name(name).block_size, np.random.default_rng(7), EDGE_HALVES
        )
        values = decoded(name, rows[name], ROWS * columns).reshape(ROWS, columns).T
        expected[name] = hashlib.sha256(np.nan_to_num(values, nan=0.5).tobytes()).hexdigest()
    np.savez(tmp_path / "rows.npz", **rows)
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path / "rows.npz")],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    seen = json.loads(child.stdout.splitlines()[-1])
    assert seen.pop("f16c") or environment
    assert seen == expected


def test_other_types_are_decoded_row_by_row() -> None:
    assert {name for name in SUPPORTED if packer(name)} == set(NAMES)
    assert packer("Q9_Z") is None


@pytest.mark.parametrize("name", NAMES)
def test_unit_is_whole_blocks_and_kernel_has_one_signature(name: str) -> None:
    pack, unit = packer(name)
    assert unit % by_name(name).block_size == 0
    packed(name, np.zeros(ROWS * unit * 4, np.uint8), unit * 4, unit)
    assert len(pack.signatures) == 1
