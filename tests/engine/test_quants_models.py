"""Whole models in every tensor type: scores against F32 files of the same weights, and float64 NumPy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engine.quants import SUPPORTED
from tests.engine.conftest import Scorer
from tests.make_gguf import expand_to_f32, tiny_llama
from tests.reference.llama import ReferenceLlama

ATOL = 4e-5  # random blocks make stiffer models than F32's 2e-5: up to 2.8e-5 (Q5_K, IQ1_M) over three seeds


@pytest.mark.parametrize("type_name", sorted(SUPPORTED))
def test_scores_are_those_of_the_weights_that_gguf_decodes(tmp_path: Path, type_name: str) -> None:
    path = tiny_llama(tmp_path / "m.gguf", seed=3, n_layers=1, width=256, ff=256, type_name=type_name)
    tokens = np.random.default_rng(4).integers(0, 300, 48).astype(np.int32)
    scores = Scorer(path).score(tokens)
    expanded = Scorer(expand_to_f32(path, tmp_path / "f32.gguf"))
    np.testing.assert_array_equal(scores, expanded.score(tokens))
    expected = ReferenceLlama(path).nll(tokens[:-1], tokens[1:])
    assert expected.std() > 0.1  # weights of some size: the scores depend on them
    np.testing.assert_allclose(scores, expected, rtol=0, atol=ATOL)
