"""A recurrent model's cache: states copied on write, and operations that say what cannot be done."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import engine
from tests.engine.toy_recurrent import Toy, tokens_of

SHAPES = [(3, 8), (4, 8)]


def advance(cache, slots, first=None, value=1.0):
    """Decodes one token a slot: every float of its state grows by `value`."""
    slots = np.array(slots, np.int32)
    positions = np.array([cache.length(s) for s in slots] if first is None else first, np.int32)
    cells = cache.claim(slots, positions)
    for state in cache.states:
        for cell in cells:
            state[cell] += value
    cache.release()


def value_of(cache, slot):
    """What `advance` has added up in a slot's state, the same in every float."""
    values = {float(x) for state in cache.states for x in np.unique(state[cache.cell(slot)])}
    assert len(values) == 1
    return values.pop()


def cache_of(n_slots, n_cells=None):
    return engine.RecurrentCache(n_slots, 2, SHAPES, n_cells)


def test_states_are_whole_arrays_for_kernels():
    cache = cache_of(3, 2)
    assert [s.shape for s in cache.states] == [(2, 2, 3, 8), (2, 2, 4, 8)]
    assert all(s.dtype == np.float32 and s.flags.c_contiguous for s in cache.states)
    assert cache.nbytes == 2 * 2 * 56 * 4


@pytest.mark.parametrize("step", [1, 3, 64])
def test_split_anywhere_equals_whole(step):
    toy, tokens = Toy(), tokens_of(50)
    cache, parts = toy.new_cache(2), []
    for at in range(0, 49, step):
        cut = np.arange(at, min(at + step, 49))
        batch = engine.Batch(tokens[cut], cut, np.ones(len(cut)), targets=tokens[cut + 1])
        parts.append(toy.nll(batch, cache))
    np.testing.assert_array_equal(np.concatenate(parts), toy.score(tokens))


def test_batch_equals_single_whatever_the_lengths_and_the_order_of_tokens():
    toy, sequences = Toy(), [tokens_of(n, seed=n) for n in (17, 1, 5, 30)]
    slots = np.repeat([3, 0, 2, 1], [17, 1, 5, 30])
    positions = np.concatenate([np.arange(len(s)) for s in sequences])
    tokens, targets = np.concatenate(sequences), np.concatenate([[*s[1:], -1] for s in sequences])
    mixed = np.random.default_rng(0).permutation(tokens.size)
    batch = engine.Batch(tokens[mixed], positions[mixed], slots[mixed], targets=targets[mixed])
    found = np.full(tokens.size, np.nan)
    found[mixed[batch.scored]] = toy.nll(batch, toy.new_cache(4))
    expected = np.concatenate([[*toy.score(s), np.nan] for s in sequences])
    np.testing.assert_array_equal(found, expected)


def test_a_new_sequence_starts_from_zeros_in_a_used_cell():
    cache = cache_of(2, 1)
    advance(cache, [0], value=7.0)
    assert cache.remove(0)
    advance(cache, [1])
    assert cache.cell(1) == 0
    assert value_of(cache, 1) == 1.0


def test_copies_share_a_cell_until_one_goes_on():
    cache = cache_of(3)
    advance(cache, [0])
    assert cache.copy(0, 2)
    assert (cache.cell(2), cache.n_cells_used) == (cache.cell(0), 1)
    advance(cache, [2])
    assert cache.n_cells_used == 2
    assert [value_of(cache, s) for s in (0, 2)] == [1.0, 2.0]
    assert [cache.length(s) for s in range(3)] == [1, 0, 2]


def test_writing_the_middle_of_a_chain_of_copies_leaves_the_others():
    cache = cache_of(3)
    advance(cache, [0])
    assert cache.copy(0, 1)
    assert cache.copy(1, 2)
    advance(cache, [1])
    assert [value_of(cache, s) for s in range(3)] == [1.0, 2.0, 1.0]
    assert cache.remove(0)
    assert [value_of(cache, s) for s in (1, 2)] == [2.0, 1.0]


def test_all_copies_go_on_in_one_batch_from_the_same_state():
    cache = cache_of(4)
    advance(cache, [0])
    for slot in (1, 2, 3):
        assert cache.copy(0, slot)
    advance(cache, [3, 1, 0, 2])
    assert [value_of(cache, s) for s in range(4)] == [2.0] * 4
    assert cache.n_cells_used == 4


def anonymous_bytes():
    said = Path("/proc/self/smaps_rollup").read_text()
    return int(re.search(r"Anonymous:\s+(\d+) kB", said)[1]) * 1024


def test_a_thousand_copies_allocate_no_state_until_one_is_written():
    state = 1 << 20
    cache = engine.RecurrentCache(1001, 2, [(1 << 16,), (1 << 16,)])
    before = anonymous_bytes()
    advance(cache, [0])
    for slot in range(1, 1001):
        assert cache.copy(0, slot)
    assert state <= anonymous_bytes() - before < 0.01 * 1000 * state
    assert cache.n_cells_used == 1
    advance(cache, [500])
    assert cache.n_cells_used == 2
    assert anonymous_bytes() - before < 0.01 * 1000 * state
    assert cache.nbytes == 1001 * state


def test_a_part_of_a_sequence_cannot_be_removed():
    cache = cache_of(2)
    for _ in range(5):
        advance(cache, [0])
    for p0, p1 in ((0, 4), (1, None), (4, 5), (4, 99), (2, 3), (0, 1)):
        assert not cache.remove(0, p0, p1)
        assert not cache.remove(-1, p0, p1)
    assert cache.remove(0, 5)  # nothing lies there
    assert cache.remove(0, 3, 3)
    assert cache.remove(1, 0, 4)
    assert (cache.length(0), value_of(cache, 0)) == (5, 5.0)
    assert cache.remove(0, 0, 99)
    assert (cache.length(0), cache.n_cells_used) == (0, 0)


def test_any_sequence_is_removed_only_if_all_can_be():
    cache = cache_of(3)
    advance(cache, [0, 1])
    advance(cache, [1])
    assert not cache.remove(-1, 0, 1)
    assert [cache.length(s) for s in range(3)] == [1, 2, 0]
    assert cache.remove(-1, 0, 2)
    assert [cache.length(s) for s in range(3)] == [0, 0, 0]


def test_a_part_of_a_sequence_cannot_be_copied():
    cache = cache_of(3)
    advance(cache, [0, 1])
    advance(cache, [0])
    assert not cache.copy(0, 2, 0, 1)
    assert not cache.copy(0, 2, 1)
    assert not cache.copy(2, 0, 0, 1)  # would leave slot 0 its second token only
    assert not cache.copy(1, 0, 0, 1)  # would put another first token under it
    assert cache.copy(0, 2, 2)  # nothing from there on, on either side
    assert cache.copy(0, 2, 0, 2)
    assert cache.copy(0, 0, 1, 2)
    assert cache.copy(0, 1)  # in place of what slot 1 held
    assert cache.cell(0) == cache.cell(1) == cache.cell(2)
    advance(cache, [2])
    assert cache.copy(1, 2, 0, 3)
    assert [cache.length(s) for s in range(3)] == [2, 2, 2]
    cache.keep(0)
    assert cache.copy(1, 0)  # of an empty sequence
    assert [cache.length(s) for s in range(3)] == [0, 0, 0]


def test_shift_and_divide_move_the_position_and_no_float():
    cache = cache_of(2)
    for _ in range(6):
        advance(cache, [0])
    assert cache.shift(0, 5, None, 10)
    assert cache.length(0) == 16
    assert cache.shift(0, 0, 15, 100)  # the last token is at 15: not in there
    assert cache.length(0) == 16
    assert cache.divide(0, 0, None, 4)
    assert cache.length(0) == 4
    assert cache.shift(-1, 0, None, -2)
    assert cache.length(0) == 2
    assert not cache.shift(0, 0, None, -2)
    assert not cache.shift(0, 0, None, 2**31)
    assert (cache.length(0), cache.length(1), value_of(cache, 0)) == (2, 0, 6.0)
    advance(cache, [0], first=[2])
    assert value_of(cache, 0) == 7.0
    with pytest.raises(ValueError, match="divided by 0; expected at least 1"):
        cache.divide(0, 0, None, 0)


def test_keep_and_clear_leave_what_they_say():
    cache = cache_of(3)
    advance(cache, [0, 1, 2])
    assert cache.keep(1)
    assert [cache.length(s) for s in range(3)] == [0, 1, 0]
    assert cache.clear()
    assert ([cache.length(s) for s in range(3)], cache.n_cells_used) == ([0, 0, 0], 0)


@pytest.mark.parametrize(
    ("slots", "positions", "message"),
    [
        ([0], [1], "slot 0: position 1 where 2 was expected; a recurrent state stands at 2"),
        ([0], [3], "position 3 where 2 was expected"),
        ([0, 0], [2, 4], "position 4 where 3 was expected"),
        ([1, 0], [0, 0], "slot 0: position 0 where 2 was expected"),
        ([1], [1], "slot 1: position 1 where 0 was expected"),
    ],
)
def test_tokens_that_do_not_continue_the_state_are_refused(slots, positions, message):
    cache = cache_of(2)
    advance(cache, [0])
    advance(cache, [0])
    with pytest.raises(ValueError, match=message):
        advance(cache, slots, first=positions)
    assert ([cache.length(0), cache.length(1)], value_of(cache, 0)) == ([2, 0], 2.0)


def test_more_sequences_than_cells_are_refused_before_anything_changes():
    cache = cache_of(4, 2)
    advance(cache, [0, 1])
    with pytest.raises(engine.CapacityError, match="3 different states in a cache of 2 cells"):
        advance(cache, [0, 2])
    assert cache.copy(0, 2)
    with pytest.raises(engine.CapacityError, match="3 different states"):
        advance(cache, [1, 2])
    assert [cache.length(s) for s in range(4)] == [1, 1, 1, 0]
    assert [value_of(cache, s) for s in range(3)] == [1.0, 1.0, 1.0]
    assert cache.remove(1)
    advance(cache, [2])
    assert value_of(cache, 2) == 2.0
    with pytest.raises(engine.CapacityError, match="slot 4 lies outside"):
        advance(cache, [4], first=[0])
    for call in (lambda: cache.length(4), lambda: cache.copy(0, -1), lambda: cache.keep(-1)):
        with pytest.raises(engine.CapacityError, match="expected 0 to 3"):
            call()
    with pytest.raises(ValueError, match="expected 0 <= p0 <= p1"):
        cache.remove(0, 3, 2)
    with pytest.raises(ValueError, match="expected at least one of each"):
        cache_of(2, 0)


def test_a_batch_that_failed_is_taken_back():
    """Of a shared state to the bit; a state of one owner was written in place and is forgotten."""
    cache = cache_of(4)
    advance(cache, [0, 1])
    assert cache.copy(0, 2)
    for state in cache.states:
        state[cache.claim(np.array([0, 1, 3], np.int32), np.array([1, 1, 0], np.int32))] = np.nan
        cache.cancel()
        assert [cache.length(s) for s in range(4)] == [1, 0, 1, 0]
        assert [value_of(cache, s) for s in (0, 2)] == [1.0, 1.0]
        assert (cache.cell(0), cache.n_cells_used) == (cache.cell(2), 1)
        advance(cache, [1])
    cache.cancel()  # nothing is claimed any more
    assert cache.length(1) == 1


SLOT = st.integers(0, 3)
BORDER = st.integers(0, 6)
OPERATION = st.one_of(
    st.tuples(st.just("advance"), st.sets(SLOT, min_size=1)),
    st.tuples(st.just("copy"), SLOT, SLOT, BORDER, st.none() | BORDER),
    st.tuples(st.just("remove"), st.integers(-1, 3), BORDER, st.none() | BORDER),
    st.tuples(st.just("shift"), st.integers(-1, 3), BORDER, st.none() | BORDER, st.integers(-3, 3)),
    st.tuples(st.just("keep"), SLOT),
    st.tuples(st.just("cancel"), st.sets(SLOT, min_size=1)),
)


@given(st.lists(OPERATION, max_size=40), st.integers(2, 4))
@settings(max_examples=150)
def test_random_operations_equal_a_dictionary(operations, n_cells):
    """slot -> (length, value, identity of the state): whatever is shared, a sequence has its own numbers."""
    cache, said, fresh = cache_of(4, n_cells), {}, iter(range(10**6))
    for name, *arguments in operations:
        if name in ("advance", "cancel"):
            slots = sorted(arguments[0])
            after = said | {s: (said.get(s, (0,))[0] + 1, said.get(s, (0, 0.0))[1] + 1.0) for s in slots}
            after = {s: (*v[:2], next(fresh) if s in slots else v[2]) for s, v in after.items()}
            if len({v[2] for v in after.values()}) > n_cells:
                with pytest.raises(engine.CapacityError):
                    advance(cache, slots)
            elif name == "advance":
                advance(cache, slots)
                said = after
            else:
                cache.claim(np.array(slots, np.int32), np.array([cache.length(s) for s in slots], np.int32))
                cache.cancel()
                for slot in slots:
                    if slot in said and cache.length(slot) == 0:
                        said.pop(slot)
        elif name == "keep":
            assert cache.keep(arguments[0])
            said = {s: v for s, v in said.items() if s == arguments[0]}
        else:
            slots = arguments[0]
            p0, p1 = arguments[2:] if name == "copy" else arguments[1:3]
            if p1 is not None and p1 < p0:
                with pytest.raises(ValueError, match="expected 0 <= p0 <= p1"):
                    getattr(cache, name)(*arguments)
            elif getattr(cache, name)(*arguments):
                said = changed(said, name, arguments, 10**9 if p1 is None else p1)
        assert [cache.length(s) for s in range(4)] == [said.get(s, (0,))[0] for s in range(4)]
        assert all(value_of(cache, s) == v[1] for s, v in said.items())
        assert cache.n_cells_used == len({cache.cell(s) for s in said})


def changed(said, name, arguments, p1):
    """The dictionary after an operation that succeeded."""
    if name == "copy":
        src, dst, p0, _ = arguments
        inside = set(range(p0, min(p1, 99)))
        held = {s: set(range(said.get(s, (0,))[0])) for s in (src, dst)}
        after = (held[dst] - inside) | (held[src] & inside)
        if src == dst or (after == held[dst] - inside == held[dst] and not held[src] & inside):
            return said
        assert after == held[src]  # nothing in between can succeed
        rest = {s: v for s, v in said.items() if s != dst}
        return rest | ({dst: said[src]} if src in said else {})
    chosen = set(said) if arguments[0] == -1 else {arguments[0]} & set(said)
    if name == "remove":
        gone = {s for s in chosen if arguments[1] < min(p1, said[s][0])}
        assert all(arguments[1] == 0 and p1 >= said[s][0] for s in gone)
        return {s: v for s, v in said.items() if s not in gone}
    moved = {s for s in chosen if arguments[1] <= said[s][0] - 1 < p1}
    return {s: (v[0] + arguments[3] * (s in moved), *v[1:]) for s, v in said.items()}
