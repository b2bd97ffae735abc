"""Mamba-2: transformers' and libllama's numbers, groups of heads, metadata. Its laws are in test_mamba.py."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from golden import make_mamba

import engine
from tests.engine.conftest import Scorer
from tests.engine.mamba_models import against_golden, logits_of, opened, reference, relative, tokens_of
from tests.make_mamba_gguf import tiny_mamba2
from tests.test_reference_mamba import LIBLLAMA, libllama_logits

log = logging.getLogger(__name__)


@pytest.mark.parametrize("name", [n for n, case in make_mamba.CASES.items() if case.file == "mamba2"])
def test_logits_and_states_equal_transformers(tmp_path, name):
    assert max(against_golden(name, tmp_path)) < 2e-5


@pytest.mark.parametrize(
    "shape",
    [
        {"type_name": "F16", "n_groups": 2},
        {"type_name": "Q8_0", "width": 64, "n_state": 64, "tied": False},
        {"width": 33, "inner": 7, "n_heads": 7, "n_state": 1, "conv": 1, "n_layers": 1},
        {"width": 16, "inner": 200, "n_heads": 10, "n_groups": 5, "n_state": 33, "conv": 2, "vocab": 259},
        {"width": 64, "inner": 128, "n_heads": 1, "conv_bias": False},
    ],
)
def test_nll_and_logits_equal_float64(tmp_path, shape):
    scorer = Scorer(tiny_mamba2(tmp_path / "m.gguf", **shape))
    tokens, twin = tokens_of(130, vocab=scorer.model.n_vocab), reference(scorer.path)
    np.testing.assert_allclose(scorer.score(tokens), twin.nll(tokens[:-1], tokens[1:]), rtol=0, atol=3e-5)
    assert relative(logits_of(scorer.model, tokens), twin.logits(tokens)) < 2e-5


@pytest.mark.parametrize("name", LIBLLAMA)
def test_libllama_agrees(tmp_path, name):
    """Mamba and FalconMamba too; both sides round float32 in their own ways."""
    pytest.importorskip("cyllama", reason="cyllama (llama.cpp) is not installed")
    build, _, shape = LIBLLAMA[name]
    path = build(tmp_path / "m.gguf", **shape)
    tokens = tokens_of(96, vocab=shape.get("vocab", 301))
    difference = relative(logits_of(opened(path), tokens), libllama_logits(path, tokens, 512))
    log.info("%-20s %.1e", name, difference)
    assert difference < 2e-5


def test_a_head_count_of_0_and_of_the_heads_mean_the_same(tmp_path):
    tokens = tokens_of(20)
    zero, all_ = (
        tiny_mamba2(tmp_path / f"{n}.gguf", n_heads=8, **{"mamba2.attention.head_count": n}) for n in (0, 8)
    )
    np.testing.assert_array_equal(logits_of(opened(zero), tokens), logits_of(opened(all_), tokens))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mamba2.attention.head_count": 4}, "attention.head_count = 4 is not supported; expected 0"),
        ({"mamba2.ssm.time_step_rank": 6}, "inner_size 128, heads .* 6 and ssm.group_count 1 do not divide"),
        ({"mamba2.ssm.group_count": 3}, "inner_size 128, heads .* 8 and ssm.group_count 3 do not divide"),
        ({"mamba2.ssm.group_count": 2}, "tensor 'blk.0.ssm_in.weight' has shape"),
        ({"mamba2.ssm.dt_b_c_rms": True}, "ssm.dt_b_c_rms = True is not supported; expected 0"),
        ({"extra": {"blk.0.ssm_norm.weight": np.ones(128)}}, "'blk.0.ssm_norm.weight' has shape"),
        ({"extra": {"blk.0.ssm_dt.weight": np.ones((8, 8))}}, "tensor 'blk.0.ssm_dt.weight' .* has no place"),
    ],
)
def test_unsupported_models_are_refused_naming_the_key(tmp_path, change, message):
    path = tiny_mamba2(tmp_path / "m.gguf", **change)
    with engine.open(path) as file, pytest.raises(engine.UnsupportedModel, match=message):
        engine.load_model(file)
