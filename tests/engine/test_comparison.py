"""Base and variants side by side: against float64 on the engine's own logits, and its laws to the bit."""

from __future__ import annotations

import numpy as np
import pytest

import engine
from tests.make_gguf import tiny_llama
from tests.make_mamba_gguf import tiny_mamba

SIZE = 70  # tokens of a sequence: more than a panel


def batch_of(model, n_seqs=2, seed=0, outputs=False):
    """Sequences of random tokens, targets from the tenth token on."""
    tokens = np.random.default_rng(seed).integers(0, model.n_vocab, n_seqs * SIZE).astype(np.int32)
    positions, slots = np.tile(np.arange(SIZE), n_seqs), np.repeat(np.arange(n_seqs), SIZE)
    targets = np.where((positions >= 10) & (positions < SIZE - 1), np.roll(tokens, -1), -1)
    marked = targets >= 0 if outputs else None
    return engine.Batch(tokens, positions, slots, targets=None if outputs else targets, outputs=marked)


def compared(files, batch, **settings):
    """(3 M - 1, n) of one batch from empty caches."""
    comparison = engine.Comparison(files[0], files[1:], batch_tokens=512, **settings)
    return comparison.compare(batch, comparison.new_cache(2, SIZE, fleeting=True))


@pytest.fixture(scope="module", params=["llama", "tied", "mamba"])
def files(request, tmp_path_factory):
    """A base and two others of its shape."""
    folder, opened = tmp_path_factory.mktemp("compared"), []
    for seed, type_name in enumerate(("F32", "Q8_0", "Q4_1")):
        path = folder / f"{seed}.gguf"
        if request.param == "mamba":
            tiny_mamba(path, seed=seed, type_name=type_name)
        else:
            tiny_llama(path, seed=seed, type_name=type_name, vocab=333, tied=request.param == "tied")
        opened.append(engine.open(path))
    return opened


def test_equals_float64_on_the_same_logits(files):
    models = [engine.load_model(file, batch_tokens=512) for file in files]
    marked, batch = batch_of(models[0], outputs=True), batch_of(models[0])
    logits = np.stack([m.logits(marked, m.new_cache(2, SIZE)) for m in models]).astype(np.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    n = len(files)
    found = compared(files, batch)
    assert found.shape == (3 * n - 1, batch.scored.size)
    nll = -np.take_along_axis(log_p, batch.wanted[None, :, None].astype(np.int64), axis=-1)[..., 0]
    np.testing.assert_allclose(found[:n], nll, rtol=0, atol=1e-9)
    kld = (np.exp(log_p[:1]) * (log_p[:1] - log_p[1:])).sum(axis=-1)
    np.testing.assert_allclose(found[n : 2 * n - 1], kld, rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(found[2 * n - 1 :], logits.argmax(axis=-1))


def test_likelihoods_have_the_bits_of_each_model_alone(files):
    alone = [engine.load_model(file, batch_tokens=512) for file in files]
    batch = batch_of(alone[0])
    for settings in ({}, {"threads": 2}, {"activations": "int8"}):
        models = [engine.load_model(file, batch_tokens=512, **settings) for file in files]
        expected = [model.nll(batch, model.new_cache(2, SIZE)) for model in models]
        np.testing.assert_array_equal(compared(files, batch, **settings)[: len(files)], expected)


def test_comparisons_do_not_depend_on_threads_or_company(files):
    model = engine.load_model(files[0])
    whole = batch_of(model)
    together = compared(files, whole)
    np.testing.assert_array_equal(compared(files, whole, threads=2), together)
    pair = compared(files[::2], whole)  # base and the last variant alone
    np.testing.assert_array_equal(pair, together[[0, 2, 4, 5, 7]])
    first = slice(0, SIZE)
    one = engine.Batch(
        whole.tokens[first], whole.positions[first], whole.slots[first], targets=whole.targets[first]
    )
    np.testing.assert_array_equal(compared(files, one), together[:, : one.scored.size])


def test_a_variant_that_is_the_base_has_no_divergence(files):
    batch = batch_of(engine.load_model(files[0]))
    nll, same, kld, top, same_top = compared([files[0], files[0]], batch)
    assert not kld.any()
    np.testing.assert_array_equal(nll, same)
    np.testing.assert_array_equal(top, same_top)


def test_sequences_go_on_in_the_cache(files):
    model = engine.load_model(files[0])
    batch, whole = batch_of(model, n_seqs=1), compared(files, batch_of(model, n_seqs=1))
    comparison = engine.Comparison(files[0], files[1:], batch_tokens=512)
    cache, parts = comparison.new_cache(1, SIZE), []
    for part in (slice(0, 33), slice(33, SIZE)):
        columns = (batch.tokens[part], batch.positions[part], batch.slots[part])
        parts.append(comparison.compare(engine.Batch(*columns, targets=batch.targets[part]), cache))
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)


def test_footprint_is_what_is_allocated(files):
    comparison = engine.Comparison(files[0], files[1:], batch_tokens=300, threads=2)
    cache = comparison.new_cache(3, 50, "f16")
    expected = engine.footprint(
        files[0], threads=2, batch_tokens=300, n_slots=3, capacity=50, kv="f16", n_variants=2
    )
    assert comparison.nbytes + cache.nbytes == expected


def test_swapped_tensors_are_those_of_the_other_file(files):
    base, other = files[:2]
    batch = batch_of(engine.load_model(base))
    nothing = engine.with_tensors(base, other, [])
    everything = engine.with_tensors(base, other, base.tensors)
    found = compared([base, nothing, everything, other], batch)
    assert not found[4].any()
    np.testing.assert_array_equal(found[2], found[3])
    np.testing.assert_array_equal(found[5], found[6])
    one = engine.with_tensors(base, other, ["output_norm.weight"])
    assert one.tensors["output_norm.weight"] is other.tensors["output_norm.weight"]
    one.close()
    assert base.tensors
    with pytest.raises(ValueError, match=r"tensor 'blk\.9\.nothing' is of shape None"):
        engine.with_tensors(base, other, ["blk.9.nothing"])


def test_other_vocabularies_are_refused(tmp_path):
    sizes = [engine.open(tiny_llama(tmp_path / f"{n}.gguf", vocab=n)) for n in (300, 301)]
    with pytest.raises(engine.UnsupportedModel, match=r"301 tokens .* the base .* has 300"):
        engine.Comparison(sizes[0], sizes[1:])
