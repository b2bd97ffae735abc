"""Batches of a few tokens, as generation has them, give the bits of large ones."""

from __future__ import annotations

import numpy as np
import pytest

import engine
from engine.kernels.tile import FEW
from engine.quants.dots import dots
from tests.engine.conftest import Scorer
from tests.make_gguf import tiny_llama

N, LENGTH = FEW + 1, 70  # sequences; more positions than a softmax block
SEQUENCES = np.random.default_rng(11).integers(0, 300, (N, LENGTH)).astype(np.int32)


def step_by_step(model, n: int, kv: str = "f32") -> np.ndarray:
    """(n, LENGTH - 1) NLLs of the first n sequences, decoded a token of each at a time."""
    cache = model.new_cache(n, LENGTH, kv)
    slots = np.arange(n)
    steps = []
    for position in range(LENGTH - 1):
        tokens, targets = SEQUENCES[:n, position], SEQUENCES[:n, position + 1]
        batch = engine.Batch(tokens, np.full(n, position), slots, targets=targets)
        steps.append(model.nll(batch, cache))
    return np.stack(steps, axis=1)


@pytest.mark.parametrize(
    ("type_name", "activations"),
    [("F32", "f32"), ("F16", "f32"), ("Q4_0", "f32"), ("Q8_0", "f32"), ("Q2_K", "f32"), ("Q4_1", "int8")],
)
def test_any_number_of_tokens_gives_the_bits_of_a_whole_batch(tmp_path, type_name, activations):
    path = tiny_llama(
        tmp_path / "m.gguf", seed=4, width=256, n_heads=8, n_kv_heads=2, ff=256, type_name=type_name
    )
    scorer = Scorer(path, batch_tokens=N * LENGTH, activations=activations)
    whole = np.stack(scorer.score_all(list(SEQUENCES)))
    threaded = Scorer(path, threads=3, batch_tokens=N * LENGTH, activations=activations)
    for n in (1, 2, 3, 5, FEW, N):
        np.testing.assert_array_equal(step_by_step(scorer.model, n), whole[:n])
    for n in (1, N):
        np.testing.assert_array_equal(step_by_step(threaded.model, n), whole[:n])


@pytest.mark.parametrize("head_width", [16, 12])
def test_cache_of_halves_and_heads_that_fill_no_vector(tmp_path, head_width):
    path = tiny_llama(tmp_path / "m.gguf", seed=5, n_heads=6, n_kv_heads=2, head_width=head_width)
    scorer = Scorer(path, batch_tokens=N * LENGTH)
    slots, positions = np.repeat(np.arange(N), LENGTH), np.tile(np.arange(LENGTH), N)
    targets = np.hstack([SEQUENCES[:, 1:], np.full((N, 1), -1)]).ravel()
    batch = engine.Batch(SEQUENCES.ravel(), positions, slots, targets=targets)
    whole = scorer.model.nll(batch, scorer.model.new_cache(N, LENGTH, "f16")).reshape(N, -1)
    np.testing.assert_array_equal(step_by_step(scorer.model, 2, "f16"), whole[:2])


def test_types_that_are_multiplied_while_decoded_are_those_whose_columns_come_in_order():
    assert dots("Q4_1") is not None
    assert dots("Q2_K") is None
