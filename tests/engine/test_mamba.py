"""Mamba, FalconMamba and, in the laws, Mamba-2: float64 twins, other programs' numbers, laws to the bit."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from golden import make_mamba

import engine
from tests.engine.conftest import Scorer
from tests.engine.mamba_models import (
    KINDS,
    against_golden,
    logits_of,
    opened,
    reference,
    relative,
    states_of,
    tokens_of,
)
from tests.make_mamba_gguf import tiny_mamba, tiny_mamba2

WINDOW = 512


@pytest.fixture(scope="module", params=KINDS)
def path(request, tmp_path_factory):
    build, shape = KINDS[request.param]
    return build(tmp_path_factory.mktemp(request.param) / "m.gguf", **shape)


@pytest.fixture(scope="module")
def scorer(path):
    return Scorer(path)


@pytest.mark.parametrize("name", [n for n, case in make_mamba.CASES.items() if case.file != "mamba2"])
def test_logits_and_states_equal_transformers(tmp_path, name):
    """GGUF has one epsilon for all norms, transformers' FalconMamba two: such a file is another model."""
    differences = against_golden(name, tmp_path)
    assert max(differences) < (2e-5 if name != "falcon_1e_6" else 1e-3)
    case = make_mamba.CASES[name]
    tokens, path = case.tokens, tmp_path / "m.gguf"
    assert relative(logits_of(opened(path), tokens), reference(path).logits(tokens)) < 2e-5


@pytest.mark.parametrize(
    "shape",
    [
        {"type_name": "F16"},
        {"type_name": "BF16", "tied": False},
        {"type_name": "Q8_0", "width": 64, "vocab": 300},
        {"type_name": "Q4_0", "width": 96, "embedding_type": "Q8_0"},
        {"width": 33, "inner": 7, "n_state": 1, "conv": 1, "dt_rank": 1, "n_layers": 1},
        {"width": 16, "inner": 200, "n_state": 17, "conv": 9, "vocab": 259},
    ],
)
def test_nll_and_logits_equal_float64(tmp_path, shape):
    scorer = Scorer(tiny_mamba(tmp_path / "m.gguf", **shape))
    tokens, twin = tokens_of(130, vocab=scorer.model.n_vocab), reference(scorer.path)
    np.testing.assert_allclose(scorer.score(tokens), twin.nll(tokens[:-1], tokens[1:]), rtol=0, atol=2e-5)
    assert relative(logits_of(scorer.model, tokens), twin.logits(tokens)) < 2e-5
    few = np.concatenate([logits_of(scorer.model, tokens[: n or 1]) for n in range(9)])
    want = np.concatenate([logits_of(scorer.model, tokens)[: n or 1] for n in range(9)])
    np.testing.assert_array_equal(few, want)


@pytest.mark.parametrize("sizes", [[1] * 60, [7, 1, 52], [48, 12], [23, 25, 12]])
def test_split_anywhere_equals_whole_final_state_too(scorer, sizes):
    tokens, model = tokens_of(60), scorer.model
    whole, split = model.new_cache(1), model.new_cache(1)
    want, parts, first = logits_of(model, tokens, whole), [], 0
    for size in sizes:
        parts.append(logits_of(model, tokens[first : first + size], split, first))
        first += size
    np.testing.assert_array_equal(np.concatenate(parts), want)
    for one, other in zip(whole.states, split.states, strict=True):
        np.testing.assert_array_equal(one, other)


def test_batch_equals_single_final_state_too(scorer):
    """Lengths 1, 2, 17, 255 and 130 in one batch, permuted."""
    sequences = [tokens_of(n, seed=n) for n in (130, 1, 255, 2, 17)]
    order = np.random.default_rng(0).permutation(sum(len(s) for s in sequences))
    alone = [scorer.score(s) for s in sequences]
    for together in (scorer.score_all(sequences), scorer.score_all(sequences, order)):
        for a, b in zip(alone, together, strict=True):
            np.testing.assert_array_equal(a, b)
    model, lengths = scorer.model, [len(s) for s in sequences]
    cache = model.new_cache(5)
    positions, slots = np.concatenate([np.arange(n) for n in lengths]), np.repeat(np.arange(5), lengths)
    model.nll(engine.Batch(np.concatenate(sequences)[order], positions[order], slots[order]), cache)
    for slot, tokens in enumerate(sequences):
        single = model.new_cache(1)
        logits_of(model, tokens, single)
        for one, other in zip(states_of(model, cache, slot), states_of(model, single), strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("threads", [2, 3])
def test_bits_do_not_depend_on_threads(path, scorer, threads):
    """Divided by rows, and by panels that one sequence crosses."""
    many = Scorer(path, threads=threads, batch_tokens=2048)
    sequences = [tokens_of(n, seed=n) for n in (1700, 30, 1)]
    large = Scorer(path, batch_tokens=2048)
    for a, b in zip(many.score_all(sequences), large.score_all(sequences), strict=True):
        np.testing.assert_array_equal(a, b)
    tokens = tokens_of(20)
    np.testing.assert_array_equal(logits_of(many.model, tokens), logits_of(scorer.model, tokens))
    np.testing.assert_array_equal(logits_of(many.model, tokens[:2]), logits_of(scorer.model, tokens)[:2])


def test_a_batch_larger_than_the_default_gives_the_same(path, scorer):
    tokens, cache = tokens_of(5000), scorer.model.new_cache(1)
    large = opened(path, batch_tokens=5000)
    targets = np.append(tokens[1:], -1)
    whole = large.nll(engine.Batch(tokens, np.arange(5000), targets=targets), large.new_cache(1))
    pieces = [
        scorer.model.nll(engine.Batch(tokens[at], at, targets=targets[at]), cache)
        for at in np.split(np.arange(5000), range(500, 5000, 500))
    ]
    np.testing.assert_array_equal(whole, np.concatenate(pieces))


def test_a_sequence_starts_from_nothing_in_a_used_slot(scorer):
    tokens, model = tokens_of(40), scorer.model
    cache = model.new_cache(2)
    want = logits_of(model, tokens, cache)
    for forget in (lambda: cache.remove(0), cache.clear):
        logits_of(model, tokens_of(9, seed=9), cache, cache.length(0))
        assert forget()
        np.testing.assert_array_equal(logits_of(model, tokens, cache), want)


def test_copies_continue_as_the_original(scorer):
    tokens, model = tokens_of(50), scorer.model
    want, cache = logits_of(model, tokens), model.new_cache(3)
    logits_of(model, tokens[:30], cache)
    assert cache.copy(0, 2)
    assert cache.n_cells_used == 1
    for slot in (2, 0):
        np.testing.assert_array_equal(logits_of(model, tokens[30:], cache, 30, slot), want[30:])
    assert not cache.remove(0, 40)


def test_a_shared_prompt_is_computed_once(scorer):
    """Twenty tokens feed three continuations of five: 35 are computed of 75."""
    model, prompt = scorer.model, tokens_of(20)
    endings = [tokens_of(5, seed=i) for i in range(3)]
    batch = engine.Batch(
        np.concatenate([prompt, *endings]),
        np.concatenate([np.arange(20), *[np.arange(20, 25)] * 3]),
        np.repeat([0, 0, 1, 2], [20, 5, 5, 5]),
        outputs=np.arange(35) >= 20,
        also=[[t, slot, -1] for t in range(20) for slot in (1, 2)],
    )
    decoded = engine.predict(model, batch, model.new_cache(3))
    assert (decoded.n_tokens_computed, decoded.n_tokens) == (35, 75)
    for i, ending in enumerate(endings):
        want = logits_of(model, np.concatenate([prompt, ending]))[20:]
        np.testing.assert_array_equal(decoded.values[5 * i : 5 * i + 5], want)


def test_a_saved_state_goes_on_with_the_same_bits(scorer, path, tmp_path):
    tokens = tokens_of(60)
    cache = scorer.model.new_cache(1)
    logits_of(scorer.model, tokens[:31], cache)
    engine.save_state(tmp_path / "half.state", cache, "a model")
    other = opened(path, threads=2)
    restored = other.new_cache(4)
    engine.restore_state(tmp_path / "half.state", restored, "a model")
    np.testing.assert_array_equal(
        logits_of(other, tokens[31:], restored, 31), logits_of(scorer.model, tokens)[31:]
    )


def test_what_pads_a_vocabulary_is_part_of_the_soft_max(tmp_path):
    path = tiny_mamba(tmp_path / "m.gguf", vocab=263, padding=3)
    model = opened(path)
    logits = logits_of(model, [7, 8]).astype(np.float64)
    assert logits.shape == (2, 263)
    batch = engine.Batch([7, 8], [0, 1], targets=[262, -1], also=[[1, 0, t] for t in range(263)])
    nll = model.nll(batch, model.new_cache(1))
    np.testing.assert_allclose(np.exp(-nll[1:]).sum(), 1.0, rtol=1e-12)
    np.testing.assert_allclose(nll[0], np.log(np.exp(logits[0]).sum()) - logits[0, 262], atol=1e-12)


def test_activations_of_8_bits_change_little_and_keep_the_laws(tmp_path):
    for build in (tiny_mamba, tiny_mamba2):
        path = build(tmp_path / "m.gguf", type_name="Q8_0", width=128)
        plain, rounded = opened(path), opened(path, activations="int8")
        tokens, cache = tokens_of(100), rounded.new_cache(1)
        want = logits_of(rounded, tokens)
        assert 1e-4 < relative(want, logits_of(plain, tokens)) < 0.1
        parts = [logits_of(rounded, tokens[:3], cache), logits_of(rounded, tokens[3:], cache, 3)]
        np.testing.assert_array_equal(np.concatenate(parts), want)
        np.testing.assert_array_equal(logits_of(opened(path, activations="int8", threads=2), tokens), want)


def test_footprint_is_what_is_allocated(path):
    with engine.open(path) as file:
        for threads, batch_tokens, activations in ((1, 1, "f32"), (3, 700, "f32"), (1, 64, "int8")):
            shape = {"threads": threads, "batch_tokens": batch_tokens, "activations": activations}
            model = engine.load_model(file, **shape)
            cache = model.new_cache(5, 1000, "f16", fleeting=True)
            assert engine.footprint(file, n_slots=5, **shape) == model.nbytes + cache.nbytes


def test_scratch_of_mamba_2_8b_is_at_most_103_mib():
    """512 tokens, one thread, without weights and states; nothing is allocated to know."""
    sizes = {"conv_kernel": 4, "inner_size": 5120, "state_size": 16, "time_step_rank": 160}
    keys = {f"ssm.{key}": value for key, value in sizes.items()}
    keys |= {"context_length": 2**20, "embedding_length": 2560, "block_count": 64}
    keys |= {"attention.layer_norm_rms_epsilon": 1e-5, "attention.head_count": 0, "feed_forward_length": 0}
    file = SimpleNamespace(
        path="mamba-2.8b.gguf",
        metadata={"general.architecture": "mamba"} | {f"mamba.{key}": value for key, value in keys.items()},
        tensors={"token_embd.weight": SimpleNamespace(shape=(50280, 2560))},
    )
    one, two = (engine.footprint(file, batch_tokens=512, n_slots=n) for n in (1, 2))
    assert two - one == 4 * 64 * 5120 * (16 + 3)
    assert one - (two - one) <= 103 * 2**20


def test_nan_weight_gives_nan_not_a_number_that_looks_right(tmp_path):
    weights = {"blk.1.ssm_d": np.full(128, np.nan)}
    assert np.isnan(Scorer(tiny_mamba(tmp_path / "m.gguf", extra=weights)).score([7, 8, 9])).all()


def test_wrong_calls_are_refused(scorer):
    model = scorer.model
    cache = model.new_cache(1)
    with pytest.raises(ValueError, match="token ids"):
        model.nll(engine.Batch([999], [0]), cache)
    with pytest.raises(ValueError, match="target 999 of a vocabulary"):
        model.nll(engine.Batch([1], [0], targets=[999]), cache)
    with pytest.raises(engine.CapacityError, match="a batch of 600 tokens"):
        model.nll(engine.Batch(np.zeros(600), np.arange(600)), cache)
    with pytest.raises(engine.CapacityError, match="600 targets"):
        model.nll(engine.Batch([1], [0], also=[[0, 0, 1]] * 600), cache)
    with pytest.raises(engine.CapacityError, match="slot 1 lies outside"):
        model.nll(engine.Batch([1], [0], [1]), cache)
    with pytest.raises(ValueError, match="position 3 where 0 was expected"):
        model.nll(engine.Batch([1], [3]), cache)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mamba.ssm.inner_size": None}, "mamba.ssm.inner_size is None; expected a positive int"),
        ({"mamba.ssm.state_size": 0}, "mamba.ssm.state_size is 0; expected a positive int"),
        ({"mamba.ssm.conv_kernel": 5}, "tensor 'blk.0.ssm_conv1d.weight' has shape"),
        ({"mamba.ssm.time_step_rank": 9}, "tensor 'blk.0.ssm_x.weight' has shape"),
        ({"mamba.ssm.inner_size": 64}, "tensor 'blk.0.ssm_in.weight' has shape"),
        ({"mamba.block_count": 3}, "tensor 'blk.2.ssm_in.weight' is missing"),
        ({"mamba.block_count": 1}, "tensor 'blk.1.attn_norm.weight' .* has no place"),
        ({"mamba.ssm.dt_b_c_rms": "yes"}, "ssm.dt_b_c_rms is 'yes'; expected true or false"),
        ({"mamba.ssm.group_count": 2}, "mamba.ssm.group_count = 2 is not supported; expected 1"),
        ({"mamba.attention.head_count": 4}, "attention.head_count = 4 is not supported; expected 0"),
        ({"mamba.feed_forward_length": 64}, "feed_forward_length = 64 is not supported; expected 0"),
        ({"mamba.expert_count": 8}, "expert_count = 8 is not supported; expected 0"),
        ({"mamba.attention.layer_norm_rms_epsilon": None}, "layer_norm_rms_epsilon is None; expected a pos"),
        ({"extra": {"blk.0.ssm_in.bias": np.zeros(256)}}, "tensor 'blk.0.ssm_in.bias' .* has no place"),
        ({"extra": {"blk.1.ssm_a": np.full((128, 16), 0.5)}}, "'blk.1.ssm_a' has values above 0; expected A"),
        ({"general.architecture": "mamba3"}, "architecture 'mamba3' is not supported; supported: .* mamba2"),
    ],
)
def test_unsupported_models_are_refused_naming_the_key(tmp_path, change, message):
    path = tiny_mamba(tmp_path / "m.gguf", **change)
    with engine.open(path) as file, pytest.raises(engine.UnsupportedModel, match=message):
        engine.load_model(file)


@pytest.fixture(scope="module")
def trained(shared_data, tmp_path_factory):
    """`models/mamba-tiny` as a file of F32, and the known scores: tokens, of windows, of one sequence."""
    from tests.pipeline.conversions import converted

    folder = shared_data / "models" / "mamba-tiny"
    out = tmp_path_factory.mktemp("trained") / "m.gguf"
    converted(folder, out)
    stored = np.load(shared_data / "oracle" / "mamba-tiny.npz")
    return opened(out, batch_tokens=4096, threads=2), stored


@pytest.mark.parametrize(
    ("n_windows", "perplexity"), [(8, 110.26568), pytest.param(40, 120.57932, marks=pytest.mark.slow)]
)
def test_windows_of_a_trained_model_equal_float64(trained, n_windows, perplexity):
    model, stored = trained
    tokens, expected = stored["tokens"].reshape(-1, WINDOW), stored["nll_windows_float64"][:n_windows]
    targets = np.full_like(tokens, -1)
    targets[:, 256:511] = tokens[:, 257:]
    found = []
    for at in range(0, n_windows, 8):
        batch = engine.Batch(
            tokens[at : at + 8].ravel(),
            np.tile(np.arange(WINDOW), 8),
            np.repeat(np.arange(8), WINDOW),
            targets=targets[at : at + 8].ravel(),
        )
        found.append(model.nll(batch, model.new_cache(8, WINDOW)).reshape(8, 255))
    nll = np.concatenate(found)
    assert np.abs(nll - expected).max() < 2e-4
    assert abs(nll.mean() - expected.mean()) < 5e-6
    assert abs(nll.mean() - np.log(perplexity)) < 5e-6


def test_a_state_carried_through_a_text_equals_float64(trained):
    """4,096 tokens as one sequence, in batches of unlike sizes."""
    model, stored = trained
    tokens, expected = stored["tokens"].ravel()[:4096], stored["nll_carry_float64"]
    targets, cache = np.append(tokens[1:], -1), model.new_cache(1)
    nll = np.concatenate(
        [
            model.nll(engine.Batch(tokens[at], at, targets=targets[at]), cache)
            for at in np.split(np.arange(4096), [1, 700, 3000])
        ]
    )
    assert np.abs(nll - expected).max() < 2e-4
    assert abs(nll.mean() - np.log(111.34544)) < 5e-6
    scored = np.arange(4095) % WINDOW
    by_windows = nll[(scored >= 256) & (scored < 511)]
    assert abs(by_windows.mean() - np.log(110.24355)) < 5e-6
