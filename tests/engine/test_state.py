"""How keys and values are kept: as halves, and one layer at a time; what can be done to sequences of them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import engine
from engine.kernels._jit import kernel
from engine.kernels.attention import KEYS
from engine.kernels.simd import f32_to_half, half_to_f32
from engine.state import Rotation


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
    for exact_cells, half_cells in [(exact.keys, half.keys), (exact.values, half.values)]:
        # layer 0's come from the embedding: nothing was rounded before them
        rounded = exact_cells[0].astype(np.float16).view(np.uint16)
        np.testing.assert_array_equal(rounded, half_cells[0])


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


# Operations on sequences.


class Told(NamedTuple):
    """A token as it was written: its key before rotation, its value."""

    position: int
    key: np.ndarray  # (L, G, K)
    value: np.ndarray


N_LAYERS, N_HEADS, WIDTH, HALF, CAPACITY = 3, 2, 10, 4, 64
FREQUENCIES = 100.0 ** (-np.arange(HALF) / HALF)
LAYERS = (True, False, True)
COMPLEX = {True: (np.s_[..., :HALF], np.s_[..., HALF : 2 * HALF])}
COMPLEX[False] = (np.s_[..., 0 : 2 * HALF : 2], np.s_[..., 1 : 2 * HALF : 2])


def cache_of(n_slots, kv="f32", halves=False, rotation=True):
    rotation = Rotation(FREQUENCIES, halves, LAYERS) if rotation else None
    return engine.KVCache(n_slots, CAPACITY, N_LAYERS, N_HEADS, WIDTH, kv, rotation=rotation)


def rotated(key, position, halves):
    """(L, G, K) key of a token at a position, in float64."""
    out, (real, imaginary) = key.astype(np.float64), COMPLEX[halves]
    turned = (out[real] + 1j * out[imaginary]) * np.exp(1j * position * FREQUENCIES)
    out[real], out[imaginary] = turned.real, turned.imag
    return np.where(np.array(LAYERS)[:, None, None], out, key)


def append(cache, slot, positions, rng, halves=False):
    """Decodes tokens with random keys and values; what was told of each."""
    positions = np.array(positions, np.int32)
    cells = cache.claim(np.full(positions.size, slot, np.int32), positions)
    assert cells.dtype == np.int32
    told = []
    for position, cell in zip(positions.tolist(), cells.tolist(), strict=True):
        key, value = rng.standard_normal((2, N_LAYERS, N_HEADS, WIDTH)).astype(np.float32)
        stored = rotated(key, position, halves).astype(np.float32), value
        is_half = cache.keys.dtype == np.uint16
        keys, values = (x.astype(np.float16).view(np.uint16) if is_half else x for x in stored)
        cache.keys[:, slot, :, cell // KEYS, :, cell % KEYS] = keys
        cache.values[:, slot, :, cell, :WIDTH] = values
        told.append(Told(position, key, value))
    cache.release()
    return told


def check(cache, slot, told, halves=False, tolerance=1e-5):
    """The slot holds what was told, in order of positions, keys rotated for where they are now."""
    assert cache.positions(slot).tolist() == [t.position for t in told]
    assert cache.length(slot) == (told[-1].position + 1 if told else 0)
    if not told:
        return
    _, arrays = cache.dump([slot])
    arrays = [a.view(np.float16) if a.dtype == np.uint16 else a for a in arrays]
    keys, values = np.stack(arrays[0::2], axis=1), np.stack(arrays[1::2], axis=1)
    expected = np.stack([rotated(t.key, t.position, halves) for t in told])
    np.testing.assert_allclose(keys, expected, rtol=0, atol=tolerance)
    exact = np.stack([t.value for t in told])
    np.testing.assert_array_equal(values, exact.astype(values.dtype))


def placed(told):
    return sorted(told, key=lambda t: t.position)


def changed(told, name, inside, by=0):
    """The tokens after `remove`, or after `shift` or `divide` by a number."""
    if name == "remove":
        return [t for t in told if t.position not in inside]
    move = {"shift": lambda p: p + by, "divide": lambda p: p // by}[name]
    moved = [t._replace(position=move(t.position)) if t.position in inside else t for t in told]
    return placed([t for t in moved if t.position >= 0])


SLOT, ANY_SLOT, BORDER = st.integers(0, 2), st.integers(-1, 2), st.integers(0, 30)
END = st.none() | BORDER
OPERATION = st.one_of(
    st.tuples(st.just("append"), SLOT, st.sets(st.integers(0, 12), min_size=1, max_size=8)),
    st.tuples(st.just("copy"), SLOT, SLOT, BORDER, END),
    st.tuples(st.just("remove"), ANY_SLOT, BORDER, END),
    st.tuples(st.just("shift"), ANY_SLOT, BORDER, END, st.integers(-15, 40)),
    st.tuples(st.just("divide"), ANY_SLOT, BORDER, END, st.integers(1, 4)),
    st.tuples(st.just("keep"), SLOT),
)


@pytest.mark.parametrize(("kv", "halves"), [("f32", False), ("f16", True)])
def test_random_operations_equal_a_list_of_tokens(kv, halves):
    @given(st.lists(OPERATION, max_size=14), st.integers(0, 2**32 - 1))
    @settings(max_examples=100)
    def law(operations, seed):
        cache, said = cache_of(3, kv, halves), {0: [], 1: [], 2: []}
        rng = np.random.default_rng(seed)
        for name, slot, *rest in operations:
            slots = [0, 1, 2] if slot == -1 else [slot]
            if name == "append":  # behind the last token, with gaps
                positions = [cache.length(slot) + i for i in sorted(rest[0])]
                try:
                    said[slot] = said[slot] + append(cache, slot, positions, rng, halves)
                except engine.CapacityError:
                    assert max(positions[-1], len(said[slot]) + len(positions)) >= CAPACITY
                continue
            if name == "keep":
                assert cache.keep(slot)
                said = {s: told if s == slot else [] for s, told in said.items()}
                continue
            p0, p1 = rest[1:3] if name == "copy" else rest[:2]
            if p1 is not None and p1 < p0:
                with pytest.raises(ValueError, match="expected 0 <= p0 <= p1"):
                    getattr(cache, name)(slot, *rest)
                continue
            inside = range(p0, 10**9 if p1 is None else p1)
            if name == "copy":
                dst = rest[0]
                taken = [t for t in said[slot] if t.position in inside]
                after = placed([t for t in said[dst] if t.position not in inside] + taken)
                if len(after) > CAPACITY:
                    with pytest.raises(engine.CapacityError):
                        cache.copy(slot, *rest)
                    continue
                assert cache.copy(slot, *rest)
                said[dst] = said[dst] if dst == slot else after
                continue
            assert getattr(cache, name)(slot, *rest)
            for each in slots:
                said[each] = changed(said[each], name, inside, *rest[2:])
        for slot, told in said.items():
            check(cache, slot, told, halves, 1e-5 if kv == "f32" else 0.02)

    law()


@pytest.mark.parametrize("p0", [0, 1, 15, 16, 17, 37])
@pytest.mark.parametrize("p1", [None, 16, 18, 32, 39, 48, 50])
def test_copied_ranges_leave_their_neighbours(p0, p1):
    cache, rng = cache_of(2), np.random.default_rng(0)
    src, dst = append(cache, 0, range(45), rng), append(cache, 1, range(3, 60), rng)
    if p1 is not None and p1 < p0:
        return
    assert cache.copy(0, 1, p0, p1)
    inside = range(p0, 99 if p1 is None else p1)
    taken = [t for t in src if t.position in inside]
    check(cache, 1, placed(taken + [t for t in dst if t.position not in inside]))
    check(cache, 0, src)


def test_a_copy_touches_no_memory_behind_what_is_held():
    cache, rng = cache_of(2), np.random.default_rng(0)
    append(cache, 0, range(5), rng)
    cache.values[:, 1, :, 40:] = 7  # never written, so never held
    assert cache.copy(0, 1)
    assert (cache.values[:, 1, :, 40:] == 7).all()


def test_divided_positions_share_one_and_tokens_follow_behind():
    cache, rng = cache_of(1), np.random.default_rng(0)
    told = append(cache, 0, range(10), rng)
    assert cache.divide(0, 2, 8, 3)
    expected = [0, 1, *[p // 3 for p in range(2, 8)], 8, 9]
    told = placed([t._replace(position=p) for t, p in zip(told, expected, strict=True)])
    check(cache, 0, told)
    for positions in ([9], [4], [10, 3]):
        with pytest.raises(ValueError, match="takes positions after 9"):
            append(cache, 0, positions, rng)
    check(cache, 0, told)
    assert cache.claim(np.zeros(3, np.int32), np.array([14, 10, 12], np.int32)).tolist() == [12, 10, 11]
    cache.cancel()
    told += append(cache, 0, [10, 12], rng)
    check(cache, 0, told)
    assert cache.remove(0, 0, 3)  # nothing is left twice: a cell is a position again
    assert cache.claim(np.zeros(1, np.int32), np.array([3], np.int32)).tolist() == [3]


def test_positions_past_the_capacity_are_held_but_not_more_tokens():
    cache, rng = cache_of(2), np.random.default_rng(0)
    told = append(cache, 0, range(60), rng)
    assert cache.shift(0, 0, None, 1000)
    told = [t._replace(position=t.position + 1000) for t in told]
    told += append(cache, 0, range(1060, 1064), rng)
    check(cache, 0, told, tolerance=1e-4)  # an angle of 1000 radians, rounded to float32 in between
    with pytest.raises(engine.CapacityError, match="outside the cache"):
        append(cache, 0, [1064], rng)
    other = append(cache, 1, range(1), rng)
    with pytest.raises(engine.CapacityError, match="65 tokens for slots of 64"):
        cache.copy(1, 0, 0, 1)
    check(cache, 0, told, tolerance=1e-4)
    check(cache, 1, other)


def test_wrong_operations_are_refused_and_change_nothing():
    cache, rng = cache_of(2), np.random.default_rng(0)
    told = append(cache, 0, range(5), rng)
    with pytest.raises(ValueError, match="does not fit int32"):
        cache.shift(0, 0, None, 2**31 - 1)
    with pytest.raises(ValueError, match="divided by 0; expected at least 1"):
        cache.divide(0, 0, None, 0)
    for call in (cache.length, cache.keep, cache.positions, lambda slot: cache.copy(slot, 0)):
        for slot in (-1, 2):
            with pytest.raises(engine.CapacityError, match="expected 0 to 1"):
                call(slot)
    with pytest.raises(engine.CapacityError, match="expected 0 to 1, or -1 for all"):
        cache.remove(2)
    blind = cache_of(2, rotation=False)
    append(blind, 0, range(5), np.random.default_rng(0))
    assert not blind.shift(0, 0, None, 1)
    assert not blind.divide(-1, 0, None, 2)
    check(cache, 0, told)
    check(blind, 0, told)


def test_a_batch_that_failed_leaves_what_was_held():
    cache, rng = cache_of(2), np.random.default_rng(0)
    told = append(cache, 0, range(5), rng)
    cells = cache.claim(np.array([0, 0, 1], np.int32), np.array([5, 6, 0], np.int32))
    cache.values[:, 0, :, cells[:2]] = np.nan
    cache.cancel()
    check(cache, 0, told)
    check(cache, 1, [])
    assert np.isfinite(cache.values).all()
    cache.cancel()  # nothing is claimed any more
    check(cache, 0, told + append(cache, 0, [5], rng))
