"""States in files: gone on with in another process to the same bits, or refused."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import engine
from engine.state_file import VERSION
from tests.engine.conftest import Scorer
from tests.engine.toy_recurrent import Toy, tokens_of

MODEL = "0123456789abcdef" * 4


def decode(model, cache, tokens, first=0, slot=0):
    """NLL of each token but the first, decoded from position `first` on."""
    at = np.arange(first, first + len(tokens))
    batch = engine.Batch(tokens, at, np.full(len(tokens), slot), targets=[*tokens[1:], -1])
    return model.nll(batch, cache)


class Kind:
    """A model with its caches, and what a cache holds, as bytes."""

    def __init__(self, name, tiny_model=None):
        self.is_recurrent = name == "recurrent"
        self.kv = name
        self.model = Toy(512) if self.is_recurrent else tiny_model.model

    def cache(self, n_slots=3, capacity=128):
        if self.is_recurrent:
            return self.model.new_cache(n_slots)
        return self.model.new_cache(n_slots, capacity, self.kv)

    @staticmethod
    def held(cache, slots):
        inventory, arrays = cache.dump(slots)
        return json.dumps(inventory), b"".join(np.ascontiguousarray(a).tobytes() for a in arrays)


@pytest.fixture(params=["recurrent", "f32", "f16"])
def kind(request):
    recurrent = request.param == "recurrent"
    return Kind(request.param, None if recurrent else request.getfixturevalue("tiny_model"))


@pytest.fixture
def toy():
    return Kind("recurrent")


def test_a_sequence_goes_on_in_another_cache_to_the_same_bits(tmp_path, kind):
    tokens = tokens_of(100)
    cache = kind.cache()
    decode(kind.model, cache, tokens[:60], slot=1)
    engine.save_state(tmp_path / "s", cache, MODEL, slot=1)
    expected = decode(kind.model, cache, tokens[60:], 60, slot=1)

    other = kind.cache(2, 512)
    decode(kind.model, other, tokens[:7], slot=0)
    decode(kind.model, other, tokens[:90], slot=1)
    before = kind.held(other, [1])
    engine.restore_state(tmp_path / "s", other, MODEL, slot=0)
    assert kind.held(other, [1]) == before
    np.testing.assert_array_equal(decode(kind.model, other, tokens[60:], 60, slot=0), expected)


def test_a_whole_cache_comes_back_in_place_of_all(tmp_path, kind):
    cache, other = kind.cache(4), kind.cache(6, 300)
    for slot, n in ((0, 20), (2, 33)):
        decode(kind.model, cache, tokens_of(n, seed=n), slot=slot)
    decode(kind.model, other, tokens_of(50), slot=5)
    decode(kind.model, other, tokens_of(50), slot=2)
    engine.save_state(tmp_path / "s", cache, MODEL)
    engine.restore_state(tmp_path / "s", other, MODEL)
    assert [other.length(slot) for slot in range(6)] == [20, 0, 33, 0, 0, 0]
    assert kind.held(other, range(4)) == kind.held(cache, range(4))
    engine.restore_state(tmp_path / "s", smaller := kind.cache(3), MODEL)  # its last slot was empty
    assert smaller.length(2) == 33


def test_an_empty_cache_comes_back_empty(tmp_path, kind):
    engine.save_state(tmp_path / "s", kind.cache(), MODEL)
    other = kind.cache()
    decode(kind.model, other, tokens_of(5))
    engine.restore_state(tmp_path / "s", other, MODEL)
    assert other.length(0) == 0


def test_states_that_were_shared_are_shared_again(tmp_path, toy):
    cache = toy.cache(3)
    decode(toy.model, cache, tokens_of(5))
    assert cache.copy(0, 2)
    engine.save_state(tmp_path / "s", cache, MODEL)
    other = toy.model.new_cache(3, n_cells=1)
    engine.restore_state(tmp_path / "s", other, MODEL)
    assert other.n_cells_used == 1
    assert other.cell(0) == other.cell(2) == 0


def test_a_file_holds_what_is_held_and_no_capacity(tmp_path, tiny_model):
    sizes = []
    for n_slots, capacity in ((1, 64), (8, 4096)):
        cache = tiny_model.model.new_cache(n_slots, capacity)
        decode(tiny_model.model, cache, tokens_of(40))
        engine.save_state(tmp_path / "s", cache, MODEL, slot=0)
        sizes.append((tmp_path / "s").stat().st_size)
    p = tiny_model.model.params
    assert sizes[0] == sizes[1]
    assert 0 <= sizes[0] - 40 * 2 * 4 * p.n_layers * p.n_kv_heads * p.head_width < 512


CHILD = """
import sys
import numpy as np
import engine
from tests.engine.conftest import Scorer
from tests.engine.test_state_file import MODEL, decode
from tests.engine.toy_recurrent import Toy, tokens_of
path, model_path = sys.argv[1:]
model = Toy(512) if model_path == "toy" else Scorer(model_path).model
cache = model.new_cache(2) if model_path == "toy" else model.new_cache(2, 256)
engine.restore_state(path, cache, MODEL, slot=1)
sys.stdout.write(decode(model, cache, tokens_of(200)[120:], 120, slot=1).tobytes().hex())
"""


@pytest.mark.parametrize("name", ["recurrent", "f32"])
def test_half_a_text_saved_and_restored_in_another_process_gives_the_same_bits(
    tmp_path, tiny_path, tiny_model, name
):
    kind, tokens = Kind(name, tiny_model), tokens_of(200)
    whole = decode(kind.model, kind.cache(1, 256), tokens)
    cache = kind.cache(1, 256)
    decode(kind.model, cache, tokens[:120])
    engine.save_state(tmp_path / "s", cache, MODEL, slot=0)
    model_path = "toy" if kind.is_recurrent else str(tiny_path)
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path / "s"), model_path],
        capture_output=True,
        text=True,
        check=True,
    )
    assert bytes.fromhex(child.stdout) == whole[120:].tobytes()


@pytest.fixture
def saved(tmp_path, toy):
    """A saved sequence, and a cache that would lose its own by restoring it."""
    cache = toy.cache(2)
    decode(toy.model, cache, tokens_of(9))
    engine.save_state(tmp_path / "s", cache, MODEL, slot=0)
    return tmp_path / "s", cache


def refused(path, cache, error, message, model=MODEL, slot=0):
    before = Kind.held(cache, range(cache.n_slots))
    with pytest.raises(error, match=message):
        engine.restore_state(path, cache, model, slot=slot)
    assert Kind.held(cache, range(cache.n_slots)) == before


def test_other_models_and_caches_are_refused(saved, toy, tiny_model):
    path, cache = saved
    refused(path, cache, engine.StateError, "saved with model 0123.* expected abc", model="abc")
    wide = engine.RecurrentCache(2, 3, [(3, 5), (5,)])
    refused(path, wide, engine.StateError, r"saved with cache .*\[2, 3, 5\].*expected .*\[3, 3, 5\]")
    refused(path, tiny_model.model.new_cache(1, 64), engine.StateError, "saved with cache .*recurrent")
    engine.save_state(path, tiny_model.model.new_cache(1, 64), MODEL)
    half = tiny_model.model.new_cache(1, 64, "f16")
    refused(path, half, engine.StateError, "'kv': 'f32'.* expected .*'kv': 'f16'", slot=None)


def test_other_numerics_are_refused(saved, monkeypatch):
    path, cache = saved
    monkeypatch.setattr("engine.state_file.NUMERICS", 99)
    refused(path, cache, engine.StateError, "saved with numerics 1, expected 99")


def test_a_whole_cache_is_not_a_sequence(saved):
    path, cache = saved
    refused(path, cache, engine.StateError, "holds one sequence, expected a whole cache", slot=None)
    engine.save_state(path, cache, MODEL)
    refused(path, cache, engine.StateError, "holds a whole cache, expected one sequence", slot=1)


def test_what_does_not_fit_is_refused(saved, toy, tiny_model):
    path, cache = saved
    refused(path, cache, engine.CapacityError, "slot 2 of 2", slot=2)
    full = toy.model.new_cache(2, n_cells=1)
    decode(toy.model, full, tokens_of(3), slot=1)
    refused(path, full, engine.CapacityError, "2 different states in a cache of 1 cells", slot=0)
    many = toy.cache(5)
    decode(toy.model, many, tokens_of(3), slot=4)
    engine.save_state(path, many, MODEL)
    refused(path, cache, engine.CapacityError, "holds 5 slots, the cache has 2", slot=None)
    model = tiny_model.model
    long = model.new_cache(1, 128)
    decode(model, long, tokens_of(100))
    engine.save_state(path, long, MODEL, slot=0)
    refused(path, model.new_cache(1, 64), engine.CapacityError, "100 tokens for slots of 64", slot=0)


def test_a_fleeting_cache_and_an_empty_slot_have_nothing_to_save(tmp_path, saved, tiny_model):
    path, cache = saved
    with pytest.raises(ValueError, match="slot 1 is empty"):
        engine.save_state(tmp_path / "t", cache, MODEL, slot=1)
    with pytest.raises(engine.CapacityError, match="slot 7 of 2"):
        engine.save_state(tmp_path / "t", cache, MODEL, slot=7)
    fleeting = tiny_model.model.new_cache(1, 64, fleeting=True)
    with pytest.raises(ValueError, match="fleeting"):
        engine.save_state(tmp_path / "t", fleeting, MODEL)
    engine.save_state(path, tiny_model.model.new_cache(1, 64), MODEL)
    with pytest.raises(ValueError, match="fleeting"):
        engine.restore_state(path, fleeting, MODEL)
    assert not (tmp_path / "t").exists()


def test_broken_files_are_refused(tmp_path, saved):
    path, cache = saved
    raw = path.read_bytes()
    for n_bytes in (0, 5, 8, 40, 60, len(raw) // 2, len(raw) - 1):
        path.write_bytes(raw[:n_bytes])
        refused(path, cache, engine.StateError, "cut short|not a saved state")
    path.write_bytes(raw + b"\0")
    refused(path, cache, engine.StateError, f"has {len(raw) + 1:,} bytes, expected {len(raw):,}")
    path.write_bytes(raw[:8] + (VERSION + 1).to_bytes(4, "little") + raw[12:])
    refused(path, cache, engine.StateError, "version 2, expected 1")
    path.write_bytes(b"GGUF" + raw[4:])
    refused(path, cache, engine.StateError, "starts with b'GGUFTATE', expected b'PGMSTATE': not a saved")
    with pytest.raises(FileNotFoundError):
        engine.restore_state(tmp_path / "none", cache, MODEL, slot=0)
    path.write_bytes(raw)
    engine.restore_state(path, cache, MODEL, slot=1)
    assert cache.length(1) == 9


def test_every_flipped_bit_is_found(saved):
    path, cache = saved
    raw = path.read_bytes()

    @given(st.integers(0, 8 * len(raw) - 1))
    @settings(max_examples=60)
    def law(bit):
        broken = bytearray(raw)
        broken[bit // 8] ^= 1 << bit % 8
        path.write_bytes(broken)
        refused(path, cache, engine.StateError, str(path))

    law()


def test_saving_over_a_file_that_is_there_is_atomic(tmp_path, saved, monkeypatch):
    path, cache = saved
    before = hashlib.sha256(path.read_bytes()).digest()
    decode(Toy(), cache, tokens_of(3), slot=1)

    def full(descriptor):
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            engine.save_state(path, cache, MODEL)
    assert hashlib.sha256(path.read_bytes()).digest() == before
    assert [p.name for p in tmp_path.iterdir()] == ["s"]
    engine.save_state(path, cache, MODEL)
    engine.restore_state(path, cache, MODEL)
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_shifted_and_divided_positions_come_back(tmp_path, tiny_model):
    """Several tokens at one position, and one past the capacity."""
    shapes = (2, 64, 2, 2, 12)
    rotation = engine.state.Rotation(np.ones(6), False, (True, True))
    cache, other = engine.KVCache(*shapes, rotation=rotation), engine.KVCache(*shapes)
    cells = cache.claim(np.zeros(20, np.int32), np.arange(20, dtype=np.int32))
    rng = np.random.default_rng(0)
    cache.keys[:, 0, :, cells // 16, :, cells % 16] = rng.standard_normal((20, 2, 2, 12))
    cache.release()
    assert cache.divide(0, 5, 10, 4)
    assert cache.shift(0, 15, None, 900)
    engine.save_state(tmp_path / "s", cache, MODEL)
    engine.restore_state(tmp_path / "s", other, MODEL)
    assert other.positions(0).tolist() == cache.positions(0).tolist()
    assert other.length(0) == 920
    assert Kind.held(other, [0, 1]) == Kind.held(cache, [0, 1])


def test_a_restored_cache_goes_on_in_a_model_with_threads(tmp_path, tiny_path, tiny_model):
    tokens, two = tokens_of(100), Scorer(tiny_path, threads=2).model
    cache, other = tiny_model.model.new_cache(1, 128), two.new_cache(1, 128)
    decode(tiny_model.model, cache, tokens[:60])
    engine.save_state(tmp_path / "s", cache, MODEL)
    engine.restore_state(tmp_path / "s", other, MODEL)
    expected = decode(tiny_model.model, cache, tokens[60:], 60)
    np.testing.assert_array_equal(decode(two, other, tokens[60:], 60), expected)
