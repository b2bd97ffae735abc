"""Sums of squares of what matrices multiply: exact, whatever the order."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import engine
from engine.input_sums import carried
from engine.kernels.squares import LARGEST, LIMBS, add_squares
from engine.kernels.tile import NR
from tests.make_gguf import tiny_llama
from tests.make_mamba_gguf import tiny_mamba, tiny_mamba2


def exact(limbs):
    """The number that carried limbs stand for."""
    l0, l1, l2 = (Fraction(int(limb)) for limb in limbs)
    return l0 + l1 / 2**44 + l2 / 2**88


@given(st.lists(st.floats(-LARGEST, LARGEST, exclude_max=True, exclude_min=True, width=32), max_size=NR))
def test_squares_add_up_exactly(values):
    panel, sums = np.zeros((1, NR), np.float32), np.zeros((2, LIMBS), np.int64)
    panel[0, : len(values)] = values
    for _ in range(3):
        add_squares(panel.ctypes.data, 1, len(values), sums.ctypes.data)
    cut = [Fraction(Fraction(x) ** 2 // Fraction(1, 2**88), 2**88) for x in values]  # the rest is dropped
    assert exact(sums[0]) == 3 * sum(cut)
    assert not sums[1, 0]
    expected = float(3 * sum(cut))
    assert engine.exact_sum(sums[0]) == pytest.approx(expected, rel=1e-15, abs=0)


def test_values_that_do_not_fit_are_counted():
    panel, sums = np.zeros((2, NR), np.float32), np.zeros((3, LIMBS), np.int64)
    panel[0, :4], panel[1, :2] = [np.inf, -LARGEST, np.nan, 1.0], [LARGEST, 2.0]
    add_squares(panel.ctypes.data, 2, 4, sums.ctypes.data)
    assert sums.tolist() == [[1, 0, 0], [4, 0, 0], [4, 0, 0]]


def summed(path, batches, **settings):
    """Groups, and sums added up over batches, each drained by itself."""
    model = engine.load_model(engine.open(path), **{"batch_tokens": 256} | settings)
    sums = engine.sum_inputs(model)
    total, n_tokens = [np.zeros((n, 3), np.int64) for n in sums.columns], 0
    for batch in batches:
        model.nll(batch, model.new_cache(4, 64))
        n, found = sums.drain()
        n_tokens += n
        total = [a + b for a, b in zip(total, found, strict=True)]
    return sums.groups, n_tokens, [carried(limbs) for limbs in total]


def batches_of(n_seqs, together):
    tokens = np.random.default_rng(3).integers(0, 300, (n_seqs, 40)).astype(np.int32)
    if together:
        yield engine.Batch(tokens.ravel(), np.tile(np.arange(40), n_seqs), np.repeat(np.arange(n_seqs), 40))
    else:
        for row in tokens:
            yield engine.Batch(row, np.arange(40))


@pytest.mark.parametrize("make", [tiny_llama, tiny_mamba, tiny_mamba2])
def test_sums_do_not_depend_on_batches_or_threads(tmp_path, make):
    path = make(tmp_path / "m.gguf")
    groups, n_tokens, sums = summed(path, batches_of(4, together=True))
    assert n_tokens == 160
    for together, settings in ((False, {}), (True, {"threads": 2}), (False, {"threads": 2})):
        again = summed(path, batches_of(4, together=together), **settings)
        assert again[:2] == (groups, n_tokens)
        for one, other in zip(sums, again[2], strict=True):
            np.testing.assert_array_equal(one, other)
    products = {name for name in engine.open(path).tensors if name.endswith(".weight") and "blk." in name}
    products = {name for name in products if "norm" not in name and "conv1d" not in name}
    assert {name for names in groups for name in names} == products


def test_the_first_input_is_the_normed_embedding(tmp_path):
    path = tiny_llama(tmp_path / "m.gguf", type_name="F32")
    file = engine.open(path)
    (batch,) = batches_of(1, together=True)
    _, _, sums = summed(path, [batch])
    embedding, norm = (
        file.tensors[name].data.view(np.float32).astype(np.float64).reshape(file.tensors[name].shape)
        for name in ("token_embd.weight", "blk.0.attn_norm.weight")
    )
    x = embedding[batch.tokens]
    eps = file.metadata["llama.attention.layer_norm_rms_epsilon"]
    normed = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + eps) * norm
    np.testing.assert_allclose(engine.exact_sum(sums[0]), (normed**2).sum(axis=0), rtol=1e-6)


def test_summing_changes_no_score_and_begins_anew(tmp_path):
    path = tiny_llama(tmp_path / "m.gguf")
    (batch,) = batches_of(1, together=True)
    batch = engine.Batch(batch.tokens, batch.positions, targets=np.roll(batch.tokens, -1))
    plain, model = (engine.load_model(engine.open(path), batch_tokens=64) for _ in range(2))
    sums = engine.sum_inputs(model)
    assert sums.drain()[0] == 0
    np.testing.assert_array_equal(
        model.nll(batch, model.new_cache(1, 64)), plain.nll(batch, plain.new_cache(1, 64))
    )
    n_tokens, found = sums.drain()
    assert n_tokens == 40
    assert all(limbs.any() for limbs in found)
    assert not any(limbs.any() for limbs in sums.drain()[1])


def test_an_overflow_is_named(tmp_path):
    huge = {"blk.1.ffn_norm.weight": np.full(64, 1e9, np.float32)}
    path = tiny_llama(tmp_path / "m.gguf", extra=huge)
    with pytest.raises(engine.EngineError, match=r"that 'blk\.1\.ffn_gate\.weight' multiplies are not"):
        summed(path, batches_of(1, together=True))
