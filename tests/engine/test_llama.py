"""The LLaMA architecture against float64 NumPy, and its laws to the bit."""

from __future__ import annotations

import numpy as np
import pytest

import engine
from tests.engine.conftest import Scorer
from tests.make_gguf import tiny_llama
from tests.reference.llama import ReferenceLlama


def tokens_of(length, seed=0, vocab=333):
    return np.random.default_rng(seed).integers(0, vocab, length).astype(np.int32)


@pytest.mark.parametrize(
    "shape",
    [
        {"tied": True},
        {"tied": False, "n_heads": 6, "n_kv_heads": 2, "width": 72, "ff": 100},
        {"n_heads": 8, "n_kv_heads": 1, "head_width": 20},
        {"n_heads": 2, "n_kv_heads": 2, "head_width": 34, "llama.rope.dimension_count": 10},
        {"n_layers": 1, "width": 33, "n_heads": 3, "n_kv_heads": 3, "head_width": 2, "ff": 7, "vocab": 259},
        {"llama.rope.freq_base": 500000.0, "vocab": 1000},
        {"llama.attention.key_length": 16, "llama.rope.dimension_count": None},
    ],
)
def test_nll_and_logits_equal_float64(tmp_path, shape):
    path = tiny_llama(tmp_path / "m.gguf", context=256, **shape)
    scorer = Scorer(path)
    tokens = tokens_of(150, vocab=scorer.model.n_vocab)
    reference = ReferenceLlama(path)
    np.testing.assert_allclose(
        scorer.score(tokens), reference.nll(tokens[:-1], tokens[1:]), rtol=0, atol=2e-5
    )
    batch = engine.Batch(tokens, np.arange(150), outputs=np.arange(150) % 7 == 0)
    logits = scorer.model.logits(batch, scorer.model.new_cache(1, 150))
    expected = reference.logits(tokens)[::7]
    assert np.abs(logits - expected).max() <= 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize("type_name", ["F16", "BF16", "Q4_0", "Q5_1", "Q8_0"])
def test_quantized_weights_are_the_numbers_that_gguf_decodes(tmp_path, type_name):
    path = tiny_llama(tmp_path / "m.gguf", width=64, ff=96, type_name=type_name)
    tokens = tokens_of(64, vocab=300)
    expected = ReferenceLlama(path).nll(tokens[:-1], tokens[1:])
    np.testing.assert_allclose(Scorer(path).score(tokens), expected, rtol=0, atol=2e-5)


def test_ragged(tiny_path):
    """Lengths 1, 2, 17, 255, 512 in one batch, permuted: each sequence's bits equal it alone."""
    scorer = Scorer(tiny_path, batch_tokens=1024)
    sequences = [tokens_of(n, seed=n) for n in (255, 1, 512, 2, 17)]
    alone = [scorer.score(s) for s in sequences]
    order = np.random.default_rng(0).permutation(sum(len(s) for s in sequences))
    for together in (scorer.score_all(sequences), scorer.score_all(sequences, order)):
        for a, b in zip(alone, together, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("step", [1, 7, 48, 64, 100])
def test_chunked_prefill_equals_whole(tiny_model, step):
    tokens = tokens_of(200)
    cache, parts = tiny_model.model.new_cache(1, 200), []
    targets = np.array([*tokens[1:], -1])
    for at in range(0, 200, step):
        cut = slice(at, at + step)
        batch = engine.Batch(tokens[cut], np.arange(200)[cut], targets=targets[cut])
        parts.append(tiny_model.model.nll(batch, cache))
    np.testing.assert_array_equal(np.concatenate(parts), tiny_model.score(tokens))


@pytest.mark.parametrize("threads", [2, 3])
def test_bits_do_not_depend_on_threads(tiny_path, tiny_model, threads):
    tokens = tokens_of(300)
    np.testing.assert_array_equal(Scorer(tiny_path, threads=threads).score(tokens), tiny_model.score(tokens))


def test_logits_agree_with_nll(tiny_model):
    tokens = tokens_of(60)
    outputs = np.ones(60, bool)
    logits = tiny_model.model.logits(
        engine.Batch(tokens, np.arange(60), outputs=outputs), tiny_model.model.new_cache(1, 60)
    ).astype(np.float64)
    log_sum = np.log(np.exp(logits - logits.max(axis=1, keepdims=True)).sum(axis=1)) + logits.max(axis=1)
    nll = log_sum[:-1] - logits[np.arange(59), tokens[1:]]
    np.testing.assert_allclose(tiny_model.score(tokens), nll, rtol=0, atol=1e-13)


def test_a_token_sees_only_earlier_positions_of_its_own_slot(tiny_model):
    tokens = tokens_of(40)
    changed = np.where(np.arange(40) >= 30, tokens_of(40, seed=9), tokens)
    a, b = tiny_model.score_all([tokens, changed])
    np.testing.assert_array_equal(a[:29], b[:29])
    assert (a[30:] != b[30:]).any()


def test_copied_slot_continues_as_the_original(tiny_model):
    tokens, model = tokens_of(100), tiny_model.model
    cache = model.new_cache(3, 100)
    model.nll(engine.Batch(tokens[:70], np.arange(70)), cache)
    assert cache.copy(0, 2)
    assert cache.copy(2, 1, 0, 70)
    assert [cache.length(s) for s in range(3)] == [70, 70, 70]
    tail = np.arange(70, 99)
    for slot in range(3):
        batch = engine.Batch(tokens[tail], tail, np.full(29, slot), targets=tokens[tail + 1])
        np.testing.assert_array_equal(model.nll(batch, cache), tiny_model.score(tokens)[70:])


def test_removed_positions_are_not_seen(tiny_model):
    tokens, model = tokens_of(90), tiny_model.model
    cache = model.new_cache(2, 90)
    model.nll(engine.Batch(tokens[:80], np.arange(80)), cache)
    assert cache.remove(0, 50)
    assert cache.length(0) == 50
    tail = np.arange(50, 89)
    batch = engine.Batch(tokens[tail], tail, targets=tokens[tail + 1])
    np.testing.assert_array_equal(model.nll(batch, cache), tiny_model.score(tokens)[50:])


def test_a_hole_in_the_middle_equals_a_sequence_that_never_had_it(tiny_model):
    tokens, model = tokens_of(100), tiny_model.model
    kept = np.r_[0:20, 90:100]
    holed, sparse = model.new_cache(1, 100), model.new_cache(1, 100)
    model.nll(engine.Batch(tokens[:20], np.arange(20)), sparse)
    model.nll(engine.Batch(tokens[:90], np.arange(90)), holed)
    assert holed.remove(0, 20, 90)
    assert holed.present[0].nonzero()[0].tolist() == kept[:20].tolist()
    tail = np.arange(90, 99)
    batch = engine.Batch(tokens[tail], tail, targets=tokens[tail + 1])
    np.testing.assert_array_equal(model.nll(batch, holed), model.nll(batch, sparse))


def test_keep_and_clear_leave_what_they_say(tiny_model):
    tokens, model = tokens_of(30), tiny_model.model
    cache = model.new_cache(3, 30)
    for slot in range(3):
        model.nll(engine.Batch(tokens, np.arange(30), np.full(30, slot)), cache)
    assert cache.keep(1)
    assert [cache.length(s) for s in range(3)] == [0, 30, 0]
    assert cache.clear()
    assert [cache.length(s) for s in range(3)] == [0, 0, 0]
    batch = engine.Batch(tokens, np.arange(30), np.ones(30), targets=[*tokens[1:], -1])
    np.testing.assert_array_equal(model.nll(batch, cache), tiny_model.score(tokens))


def test_head_scratch_does_not_grow_with_the_vocabulary(tmp_path):
    small, large = (
        Scorer(
            tiny_llama(tmp_path / f"{v}.gguf", vocab=v, n_layers=1, width=32, ff=32), batch_tokens=64
        ).model
        for v in (1_000, 200_000)
    )
    assert small.nbytes == large.nbytes


def test_nll_allocates_no_row_of_logits(tmp_path):
    import tracemalloc

    scorer = Scorer(
        tiny_llama(tmp_path / "m.gguf", vocab=200_000, n_layers=1, width=32, ff=32), batch_tokens=64
    )
    tokens = tokens_of(64)
    scorer.score(tokens)
    tracemalloc.start()
    scorer.score(tokens)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000 * 4  # one row of logits; 63 of them would be 50 MB


def test_nan_weight_gives_nan_not_a_number_that_looks_right(tmp_path):
    path = tiny_llama(tmp_path / "m.gguf")
    with engine.open(path) as file:
        offset = file.tensors["token_embd.weight"].offset
    raw = bytearray(path.read_bytes())
    raw[offset + 4 * 64 * 5 : offset + 4 * 64 * 5 + 4] = np.float32(
        np.nan
    ).tobytes()  # row 5: one logit is NaN
    path.write_bytes(raw)
    assert np.isnan(Scorer(path).score(np.array([7, 8, 9]))).all()


def test_wrong_calls_are_refused(tiny_model):
    model = tiny_model.model
    cache = model.new_cache(1, 64)
    with pytest.raises(ValueError, match="token ids"):
        model.nll(engine.Batch([333], [0]), cache)
    with pytest.raises(engine.CapacityError, match="a batch of 600 tokens"):
        model.nll(engine.Batch(np.zeros(600), np.arange(600)), cache)
    with pytest.raises(engine.CapacityError, match="outside the cache"):
        model.nll(engine.Batch([1], [64]), cache)
    with pytest.raises(engine.CapacityError, match="outside the cache"):
        model.nll(engine.Batch([1], [0], [1]), cache)
    model.nll(engine.Batch([1], [0]), cache)
    with pytest.raises(ValueError, match="already holds position 0"):
        model.nll(engine.Batch([1], [0]), cache)
    with pytest.raises(ValueError, match="twice"):
        engine.Batch([1, 2], [3, 3])
    with pytest.raises(ValueError, match="at least one token"):
        engine.Batch([], [])
    with pytest.raises(ValueError, match="do not fit int32"):
        engine.Batch([2**40], [0])
    with pytest.raises(ValueError, match="at least 1"):
        engine.load_model(tiny_model.file, threads=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"general.architecture": "mamba"}, "architecture 'mamba' is not supported; supported: llama"),
        ({"llama.block_count": 3}, "tensor 'blk.2.attn_norm.weight' is missing"),
        ({"llama.block_count": 1}, "has no place"),
        ({"llama.feed_forward_length": 32}, "has shape"),
        ({"llama.attention.head_count": "four"}, "attention.head_count is 'four'; expected a positive int"),
        ({"llama.attention.head_count_kv": 3}, "do not divide"),
        ({"llama.rope.scaling.type": "yarn"}, "rope.scaling.type = 'yarn' is not supported"),
        ({"llama.expert_count": 8}, "expert_count"),
    ],
)
def test_unsupported_models_are_refused_naming_the_key(tmp_path, change, message):
    path = tiny_llama(tmp_path / "m.gguf", **change)
    with engine.open(path) as file, pytest.raises(engine.UnsupportedModel, match=message):
        engine.load_model(file)


def test_unsupported_quantization_is_refused_naming_the_type(tmp_path):
    path = tiny_llama(tmp_path / "m.gguf", width=256, ff=256, type_name="IQ4_XS")
    with engine.open(path) as file, pytest.raises(engine.UnsupportedQuant, match="IQ4_XS"):
        engine.check_supported(file)
