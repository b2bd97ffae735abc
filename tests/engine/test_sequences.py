"""Tokens that belong to several sequences: computed once, for both kinds of cache."""

from __future__ import annotations

import numpy as np
import pytest

import engine
from tests.engine.toy_recurrent import Toy, tokens_of


class Counted:
    """A model that counts the tokens it is given."""

    def __init__(self, model, batch_tokens=None):
        self.model, self.n_vocab, self.n_computed = model, model.n_vocab, 0
        self.batch_tokens = batch_tokens or model.batch_tokens

    def new_cache(self, n_slots, capacity=64):
        return self.model.new_cache(n_slots, *([] if isinstance(self.model, Toy) else [capacity]))

    def nll(self, batch, cache):
        self.n_computed += len(batch)
        return self.model.nll(batch, cache)

    def logits(self, batch, cache):
        self.n_computed += len(batch)
        return self.model.logits(batch, cache)

    def score(self, tokens):
        """float64 (T - 1,): a sequence alone, in one batch from an empty cache."""
        batch = engine.Batch(tokens, np.arange(len(tokens)), targets=[*tokens[1:], -1])
        return self.model.nll(batch, self.new_cache(1))


@pytest.fixture(params=["recurrent", "attention"])
def counted(request):
    if request.param == "recurrent":
        return Counted(Toy())
    return Counted(request.getfixturevalue("tiny_model").model)


def prompt_and_endings(endings, first_slot=0):
    """A prompt of 12 tokens under every ending, each in its slot: the batch, and the whole sequences."""
    prompt, rows = tokens_of(12), []
    endings = [tokens_of(n, seed=10 + n) for n in endings]
    slots = range(first_slot, first_slot + len(endings))
    for i, token in enumerate(prompt):
        rows.append((token, i, first_slot, prompt[i + 1] if i < 11 else endings[0][0]))
    also = [(i, slot, -1) for i in range(11) for slot in slots[1:]]
    also += [(11, slot, ending[0]) for slot, ending in zip(slots[1:], endings[1:], strict=True)]
    for slot, ending in zip(slots, endings, strict=True):
        rows += [(token, 12 + i, slot, [*ending[1:], -1][i]) for i, token in enumerate(ending)]
    tokens, positions, slots, targets = np.array(rows).T
    batch = engine.Batch(tokens, positions, slots, targets=targets, also=also)
    return batch, [np.concatenate([prompt, ending]) for ending in endings]


def test_one_prompt_feeds_many_continuations(counted):
    endings = (5, 1, 9, 2)
    batch, sequences = prompt_and_endings(endings)
    cache = counted.new_cache(4)
    found = engine.score(counted, batch, cache)
    assert found.n_tokens_computed == counted.n_computed == 12 + sum(endings)
    assert found.n_tokens == 4 * 12 + sum(endings)
    whole = [counted.score(sequence) for sequence in sequences]
    expected = [whole[0], *[nll[12:] for nll in whole[1:]], [nll[11] for nll in whole[1:]]]
    np.testing.assert_array_equal(found.values, np.concatenate(expected))
    assert [cache.length(slot) for slot in range(4)] == [len(sequence) for sequence in sequences]


def test_every_sequence_goes_on_as_if_it_had_been_alone(counted):
    batch, sequences = prompt_and_endings((3, 7, 1))
    cache = counted.new_cache(3)
    engine.score(counted, batch, cache)
    for slot, sequence in enumerate(sequences):
        more = tokens_of(6, seed=99)
        at = np.arange(len(sequence), len(sequence) + 5)
        rest = engine.Batch(more[:5], at, np.full(5, slot), targets=more[1:])
        expected = counted.score(np.concatenate([sequence, more]))[len(sequence) :]
        np.testing.assert_array_equal(counted.nll(rest, cache), expected)


@pytest.mark.parametrize("batch_tokens", [1, 4, 13])
def test_batches_larger_than_the_model_takes_give_the_same_bits(counted, batch_tokens):
    batch, _ = prompt_and_endings((5, 1, 9, 2))
    expected = engine.score(counted, batch, counted.new_cache(4)).values
    cut = Counted(counted.model, max(batch_tokens, 3))  # one token has three targets
    found = engine.score(cut, batch, cut.new_cache(4))
    np.testing.assert_array_equal(found.values, expected)
    assert cut.n_computed == counted.n_computed


def test_prefixes_branch_again_and_share_what_they_can(counted):
    """abc under all, de under three, f under two; then each its own."""
    words = ["abcdefg", "abcdefh", "abcdei", "abcj"]
    prefixes = sorted({word[: i + 1] for word in words for i in range(len(word))})
    owners = [[slot for slot, word in enumerate(words) if word.startswith(p)] for p in prefixes]
    tokens = [ord(p[-1]) - ord("a") for p in prefixes]
    also = [(i, slot, -1) for i, slots in enumerate(owners) for slot in slots[1:]]
    batch = engine.Batch(
        tokens,
        [len(p) - 1 for p in prefixes],
        [slots[0] for slots in owners],
        outputs=np.ones(len(prefixes)),
        also=also,
    )
    found = engine.predict(counted, batch, counted.new_cache(4))
    assert found.n_tokens_computed == counted.n_computed == len(prefixes)
    assert found.n_tokens == sum(len(word) for word in words)
    for word in words:
        ids = [ord(c) - ord("a") for c in word]
        alone = engine.Batch(ids, np.arange(len(ids)), outputs=np.ones(len(ids)))
        rows = [prefixes.index(word[: i + 1]) for i in range(len(word))]
        expected = counted.model.logits(alone, counted.new_cache(1))
        np.testing.assert_array_equal(found.values[rows], expected)


def test_a_cached_prompt_goes_on_from_its_state_without_its_last_token(counted):
    prompt, endings = tokens_of(12), [tokens_of(4, seed=s) for s in (1, 2)]
    cache = counted.new_cache(3)
    counted.nll(engine.Batch(prompt, np.arange(12)), cache)
    for slot in (1, 2):
        assert cache.copy(0, slot)
    at = np.arange(12, 16)
    for again in (11, 0):
        with pytest.raises(ValueError, match=f"position {again}"):
            counted.nll(engine.Batch([prompt[again]], [again], [1]), cache)
    counted.n_computed = 0
    for slot, ending in zip((1, 2), endings, strict=True):
        batch = engine.Batch(ending, at, np.full(4, slot), targets=[*ending[1:], -1])
        whole = counted.score(np.concatenate([prompt, ending]))
        np.testing.assert_array_equal(counted.nll(batch, cache), whole[12:])
    assert counted.n_computed == 8
    assert cache.length(0) == 12


def test_copies_of_a_cached_prompt_share_tokens_behind_it(counted):
    prompt, sequence = tokens_of(12), tokens_of(20)
    cache = counted.new_cache(2)
    counted.nll(engine.Batch(prompt, np.arange(12)), cache)
    assert cache.copy(0, 1)
    at = np.arange(12, 19)
    also = [(i, 1, -1) for i in range(7)]
    batch = engine.Batch(sequence[at], at, np.zeros(7), targets=sequence[at + 1], also=also)
    found = engine.score(counted, batch, cache)
    assert (found.n_tokens_computed, found.n_tokens) == (7, 14)
    np.testing.assert_array_equal(found.values, counted.score(sequence)[12:])
    assert cache.length(1) == 19
    batch = engine.Batch(sequence[19:], [19], [1], targets=[3])
    whole = counted.score(np.concatenate([sequence, [3]]))
    np.testing.assert_array_equal(counted.nll(batch, cache), whole[19:])


def test_plain_batches_pass_as_they_are(counted):
    tokens = tokens_of(20)
    batch = engine.Batch(tokens, np.arange(20), targets=[*tokens[1:], -1], also=[(3, 0, 5), (3, 0, 6)])
    found = engine.score(counted, batch, counted.new_cache(1))
    assert (found.n_tokens_computed, found.n_tokens) == (20, 20)
    np.testing.assert_array_equal(found.values[:19], counted.score(tokens))
    for value, target in zip(found.values[19:], (5, 6), strict=True):
        np.testing.assert_array_equal(value, counted.score([*tokens[:4], target])[3])


@pytest.mark.parametrize(
    ("slots", "also"),
    [
        ([0, 0, 0], [(1, 1, -1), (2, 1, -1)]),  # token 0 is slot 0's alone
        ([0, 1, 0], [(2, 1, -1)]),
        ([0, 0, 0], [(0, 1, -1), (2, 1, -1)]),
    ],
)
def test_a_token_shared_by_sequences_that_differ_is_refused(slots, also):
    toy = Toy()
    batch = engine.Batch([1, 2, 3], [0, 1, 2] if slots != [0, 1, 0] else [0, 0, 1], slots, also=also)
    with pytest.raises(ValueError, match="which differ before it"):
        engine.score(toy, batch, toy.new_cache(2))
    assert toy.n_computed == 0


def test_a_token_shared_with_a_longer_sequence_is_refused():
    toy = Toy()
    cache = toy.new_cache(2)
    toy.nll(engine.Batch([1], [0], [1]), cache)
    with pytest.raises(ValueError, match="which differ before it"):
        engine.score(toy, engine.Batch([1], [0], also=[(0, 1, -1)]), cache)


def test_a_cache_that_cannot_copy_is_an_error():
    class Stubborn(engine.RecurrentCache):
        def copy(self, *arguments):
            return False

    toy = Toy()
    cache = Stubborn(2, toy.n_layers, [(toy.window, toy.inner), (toy.inner,)])
    with pytest.raises(engine.EngineError, match="slot 0 cannot be copied to slot 1"):
        engine.score(toy, engine.Batch([1], [0], also=[(0, 1, -1)]), cache)


def test_models_take_plain_batches_only():
    toy = Toy()
    with pytest.raises(ValueError, match=r"engine\.score and engine\.predict decode them"):
        toy.nll(engine.Batch([1], [0], also=[(0, 1, -1)]), toy.new_cache(2))


@pytest.mark.parametrize(
    ("also", "message"),
    [
        ([(0, 1)], r"shape \(1, 2\), expected \(M, 3\)"),
        ([0, 1, -1], r"shape \(3,\), expected \(M, 3\)"),
        ([(2, 1, -1)], "expected tokens 0 to 1"),
        ([(-1, 1, -1)], "expected tokens 0 to 1"),
        ([(0, -1, -1)], "slots of at least 0"),
        ([(0, 2**40, -1)], "do not fit int32"),
        ([(0, 1, -1), (0, 1, -1)], "slot 1 holds position 0 twice"),
        ([(1, 1, -1), (0, 1, -1), (1, 0, -1)], None),
    ],
)
def test_wrong_rows_of_other_slots_are_refused(also, message):
    if message is None:
        assert engine.Batch([1, 2], [0, 1], also=also).n_shared == 2
        return
    with pytest.raises(ValueError, match=message):
        engine.Batch([1, 2], [0, 1], also=also)
