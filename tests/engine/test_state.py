"""How keys and values are kept: as halves, and one layer at a time."""

from __future__ import annotations

import numpy as np
import pytest

import engine
from engine.kernels._jit import kernel
from engine.kernels.simd import f32_to_half, half_to_f32


def tokens_of(length, seed=0):
    return np.random.default_rng(seed).integers(0, 333, length).astype(np.int32)


def batch_of(tokens, slot=0):
    n = len(tokens)
    return engine.Batch(tokens, np.arange(n), np.full(n, slot), targets=[*tokens[1:], -1])


@kernel
def _to_half(values, out):
    for i in range(values.size):
        out[i] = f32_to_half(values[i])


@kernel
def _from_half(halves, out):
    for i in range(halves.size):
        out[i] = half_to_f32(halves[i])


def test_halves_round_as_numpy_does():
    rng = np.random.default_rng(0)
    every = np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float32)
    finite = every[np.isfinite(every)]
    between = (finite[:-1] + finite[1:]) / 2  # ties, among them
    any_bits = rng.integers(0, 2**32, 500_000, dtype=np.uint64).astype(np.uint32).view(np.float32)
    values = np.concatenate([every, between, np.nextafter(between, np.float32(0)), any_bits])
    out = np.empty(values.size, np.uint16)
    _to_half(values, out)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = values.astype(np.float16).view(np.uint16)
    number = ~np.isnan(values)
    np.testing.assert_array_equal(out[number], expected[number])
    assert (out[~number] & 0x7FFF == 0x7E00).all()


def test_halves_widen_exactly():
    halves = np.arange(65536, dtype=np.uint16)
    out = np.empty(halves.size, np.float32)
    _from_half(halves, out)
    np.testing.assert_array_equal(out, halves.view(np.float16).astype(np.float32))


def test_half_cache_takes_half_the_memory_and_moves_scores_a_little(tiny_model):
    model, tokens = tiny_model.model, tokens_of(200)
    exact, half = model.new_cache(1, 200), model.new_cache(1, 200, "f16")
    assert half.nbytes < 0.51 * exact.nbytes
    a, b = model.nll(batch_of(tokens), exact), model.nll(batch_of(tokens), half)
    difference = np.abs(a - b).max()
    assert 0 < difference < 0.05  # halves hold 11 bits of a key


def test_half_cache_holds_keys_and_values_rounded_to_halves(tiny_model):
    model, tokens = tiny_model.model, tokens_of(100)
    exact, half = model.new_cache(1, 100), model.new_cache(1, 100, "f16")
    for cache in (exact, half):
        model.nll(engine.Batch(tokens[:64], np.arange(64)), cache)
    for exact_cells, half_cells in zip(exact.layer(0), half.layer(0), strict=True):
        # keys and values of layer 0 come from the embedding: nothing was rounded before them
        np.testing.assert_array_equal(exact_cells.astype(np.float16).view(np.uint16), half_cells)


def test_half_cache_gives_the_same_bits_in_pieces(tiny_model):
    model, tokens = tiny_model.model, tokens_of(150)
    whole, pieces = model.new_cache(1, 150, "f16"), model.new_cache(1, 150, "f16")
    expected = model.nll(batch_of(tokens), whole)
    targets = np.array([*tokens[1:], -1])
    parts = [
        model.nll(engine.Batch(tokens[cut], np.arange(150)[cut], targets=targets[cut]), pieces)
        for cut in (slice(0, 1), slice(1, 65), slice(65, 150))
    ]
    np.testing.assert_array_equal(np.concatenate(parts), expected)


@pytest.mark.parametrize("kv", ["f32", "f16"])
def test_fleeting_cache_gives_the_same_bits_in_the_memory_of_one_layer(tiny_model, kv):
    model = tiny_model.model
    lasting, fleeting = model.new_cache(2, 200, kv), model.new_cache(2, 200, kv, fleeting=True)
    assert fleeting.nbytes < 0.51 * lasting.nbytes  # the model has two layers
    for seed in range(2):  # it is empty again after a batch
        tokens = tokens_of(200 - 50 * seed, seed)
        lasting.clear()
        expected = model.nll(batch_of(tokens, 1), lasting)
        np.testing.assert_array_equal(model.nll(batch_of(tokens, 1), fleeting), expected)


def test_fleeting_cache_refuses_the_middle_of_a_sequence(tiny_model):
    model = tiny_model.model
    cache = model.new_cache(1, 64, fleeting=True)
    model.nll(engine.Batch([1, 2], [0, 1]), cache)
    with pytest.raises(ValueError, match="whole sequences"):
        model.nll(engine.Batch([3], [2]), cache)
    model.nll(engine.Batch([1, 2], [0, 1]), cache)  # still of use


def test_unknown_kv_type_is_refused(tiny_model):
    with pytest.raises(ValueError, match="expected one of f32, f16"):
        tiny_model.model.new_cache(1, 64, "q8_0")
