"""The LLaMA architecture against float64 NumPy, and its laws to the bit."""

from __future__ import annotations

import numpy as np
import pytest

import engine
from tests.engine.conftest import Scorer
from tests.make_gguf import llama_extra, tiny_llama
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


YARN = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
BIASES = ("attn_q", "attn_k", "attn_v", "attn_output")


@pytest.mark.parametrize(
    "relative",
    [
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 3.0},
        {"llama.rope.scaling.factor": 0.5, "llama.rope.scaling.attn_factor": 1.2},
        YARN | {"context": 40, "llama.rope.freq_base": 5e5},
        YARN | {"llama.rope.scaling.original_context_length": 900, "llama.rope.dimension_count": 10},
        {"extra": llama_extra(rope_freqs=[1, 1, 1, 2, 4, 8, 8, 8], biases=BIASES)},
        {"architecture": "qwen2", "extra": llama_extra(biases=BIASES[:3]), "llama.rope.dimension_count": 6}
        | YARN,
        {"architecture": "qwen3", "extra": llama_extra(head_norms=True, head_width=18), "head_width": 18},
        {"architecture": "exaone", "extra": llama_extra(rope_freqs=np.linspace(1, 8, 8))},
        {"architecture": "smollm3", "n_layers": 4},
        {"architecture": "granite", "llama.embedding_scale": 5.0, "llama.residual_scale": 0.3}
        | {"llama.logit_scale": 3.0, "llama.attention.scale": 0.1},
        {"architecture": "mistral3", "llama.rope.scaling.yarn_beta_fast": 8.0}
        | {"llama.rope.scaling.yarn_beta_slow": 0.5, "llama.rope.scaling.yarn_log_multiplier": 0.7}
        | YARN,
    ],
    ids=lambda relative: relative.get("architecture", "llama"),
)
def test_relatives_equal_float64(tmp_path, relative):
    path = tiny_llama(tmp_path / "m.gguf", **{"context": 64} | relative)
    tokens = tokens_of(110, vocab=300)
    expected = ReferenceLlama(path).nll(tokens[:-1], tokens[1:])
    np.testing.assert_allclose(Scorer(path).score(tokens), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({}, {"architecture": "mistral"}),
        ({}, {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}),
        ({}, {"llama.rope.scaling.type": "", "llama.rope.scaling.original_context_length": 7}),
        ({}, YARN | {"llama.rope.scaling.factor": 1.0}),
        ({}, {"extra": llama_extra(rope_freqs=np.ones(8))}),
        ({}, {"llama.expert_count": 0, "llama.attention.causal": True, "llama.logit_scale": 1.0}),
        ({"llama.rope.scaling.factor": 2.0}, {"extra": llama_extra(rope_freqs=np.full(8, 2.0))}),
        ({"llama.rope.scaling.factor": 2.5}, {"llama.rope.scale_linear": 2.5}),
        ({"architecture": "granite"}, {"architecture": "llama"}),
    ],
)
def test_two_ways_to_say_the_same_give_the_same_bits(tmp_path, one, other):
    tokens = tokens_of(60, vocab=300)
    a, b = (
        Scorer(tiny_llama(tmp_path / f"{i}.gguf", **said)).score(tokens)
        for i, said in enumerate((one, other))
    )
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("threads", [1, 2])
def test_bits_of_a_relative_do_not_depend_on_batch_and_threads(tmp_path, threads):
    weights = llama_extra(biases=BIASES[:3], head_norms=True)
    path = tiny_llama(tmp_path / "m.gguf", architecture="qwen3", extra=weights, **YARN)
    sequences = [tokens_of(n, seed=n, vocab=300) for n in (130, 1, 60)]
    together = Scorer(path, threads=threads).score_all(sequences)
    for sequence, nll in zip(sequences, together, strict=True):
        np.testing.assert_array_equal(nll, Scorer(path).score(sequence))


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


@pytest.fixture(scope="module")
def wide_scorer(tmp_path_factory):
    """A vocabulary of 200,000."""
    path = tmp_path_factory.mktemp("wide") / "m.gguf"
    return Scorer(tiny_llama(path, vocab=60_000, n_layers=1, width=32, ff=32), batch_tokens=64)


def test_head_scratch_does_not_grow_with_the_vocabulary(tmp_path, wide_scorer):
    path = tiny_llama(tmp_path / "m.gguf", vocab=1_000, n_layers=1, width=32, ff=32)
    assert Scorer(path, batch_tokens=64).model.nbytes == wide_scorer.model.nbytes


def test_nll_allocates_no_row_of_logits(wide_scorer):
    import tracemalloc

    tokens = tokens_of(64)
    wide_scorer.score(tokens)
    tracemalloc.start()
    wide_scorer.score(tokens)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60_000 * 4  # one row of logits; 63 of them would be 15 MB


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
        ({"general.architecture": "rwkv7"}, "architecture 'rwkv7' is not supported; supported: llama, mis"),
        ({"llama.block_count": 3}, "tensor 'blk.2.attn_q.weight' is missing"),
        ({"llama.block_count": 1}, "has no place"),
        ({"llama.feed_forward_length": 32}, "has shape"),
        ({"llama.attention.head_count": "four"}, "attention.head_count is 'four'; expected a positive int"),
        ({"llama.attention.head_count_kv": 3}, "do not divide"),
        ({"llama.rope.scaling.type": "longrope"}, "type = 'longrope' is not supported; supported: none, lin"),
        ({"llama.rope.scaling.type": 2}, "rope.scaling.type is 2; expected a string"),
        ({"llama.rope.scaling.factor": -4.0}, "rope.scaling.factor is -4.0; expected a positive"),
        ({"llama.rope.scaling.factor": [4, 4]}, "rope.scaling.factor is .*; expected a positive float"),
        (YARN | {"llama.rope.scaling.factor": 0.5}, "rope.scaling.factor is 0.5; expected at least 1"),
        (YARN | {"llama.rope.scaling.yarn_ext_factor": 0.5}, "yarn_ext_factor = 0.5 is not supported"),
        ({"llama.rope.scaling.yarn_ext_factor": 1.0}, "yarn_ext_factor = 1.0 is not supported; expected 0.0"),
        (YARN | {"llama.rope.scaling.yarn_beta_fast": 4.0}, "yarn_beta_fast = 4.0 is not .* expected 32.0"),
        (
            YARN | {"llama.rope.scaling.yarn_log_multiplier": 1.0},
            "yarn_log_multiplier = 1.0 is not supported",
        ),
        ({"llama.rope.dimension_sections": [8, 4, 4, 0]}, "rope.dimension_sections = .* is not supported"),
        ({"llama.rope.dimension_count": 15}, "15 rotated features of a head of 16"),
        ({"llama.expert_count": 8}, "expert_count = 8 is not supported; expected 0"),
        ({"llama.attention.sliding_window": 4096}, "sliding_window = 4096 is not supported; expected 0"),
        ({"llama.attention.value_length": 8}, "attention.value_length = 8 is not supported; expected 16"),
        ({"llama.attention.causal": False}, "attention.causal = False is not supported; expected True"),
        ({"llama.attention.max_alibi_bias": 8.0}, "attention.max_alibi_bias = 8.0 is not supported"),
        ({"llama.attention.scale": 0.2}, "attention.scale = 0.2.* is not supported"),
        ({"llama.attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0 is not supported"),
        ({"llama.final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0 is not supported"),
        ({"llama.use_parallel_residual": True}, "use_parallel_residual = True is not supported"),
        ({"llama.logit_scale": 0.5}, "logit_scale = 0.5 is not supported; expected 0.0"),
        ({"architecture": "mistral3", "llama.attention.temperature_scale": 0.1}, "temperature_scale = 0.1"),
        ({"architecture": "granite", "llama.rope.scaling.finetuned": False}, "finetuned = False is not supp"),
        ({"architecture": "qwen3"}, "tensor 'blk.0.attn_q_norm.weight' is missing"),
        ({"extra": llama_extra(head_norms=True)}, "tensor 'blk.0.attn_k_norm.weight' .* has no place"),
        ({"extra": {"blk.0.ffn_up.bias": np.zeros(96)}}, "'blk.0.ffn_up.bias' .* biases only of attention"),
        ({"extra": {"blk.0.attn_q.bias": np.zeros(63)}}, "tensor 'blk.0.attn_q.bias' has shape"),
        (
            {"architecture": "qwen2", "extra": llama_extra(biases=BIASES)},
            "'blk.0.attn_output.bias' .* has no place",
        ),
        ({"extra": llama_extra(rope_freqs=np.ones(7))}, "tensor 'rope_freqs.weight' has shape"),
        (
            {"extra": llama_extra(rope_freqs=np.zeros(8))},
            "'rope_freqs.weight' has factors that are not positive",
        ),
    ],
)
def test_unsupported_models_are_refused_naming_the_key(tmp_path, change, message):
    path = tiny_llama(tmp_path / "m.gguf", **change)
    with engine.open(path) as file, pytest.raises(engine.UnsupportedModel, match=message):
        engine.load_model(file)


def test_unsupported_quantization_is_refused_naming_the_type(tmp_path):
    path = tiny_llama(tmp_path / "m.gguf", type_name="I8")
    with engine.open(path) as file, pytest.raises(engine.UnsupportedQuant, match="I8"):
        engine.check_supported(file)
