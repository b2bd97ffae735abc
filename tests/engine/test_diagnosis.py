"""The first tensor behind scores that are not finite is named."""

from __future__ import annotations

import numpy as np
import pytest

import engine
from tests.make_gguf import tiny_llama
from tests.make_mamba_gguf import tiny_mamba


def story(path):
    model = engine.load_model(engine.open(path), batch_tokens=64)
    tokens = np.arange(30, dtype=np.int32)
    return engine.first_broken(model, engine.Batch(tokens, np.arange(30)))


@pytest.mark.parametrize("make", [tiny_llama, tiny_mamba])
def test_nothing_is_said_of_a_sound_model(tmp_path, make):
    assert story(make(tmp_path / "m.gguf")) is None


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("token_embd.weight", (300, 64)),
        ("blk.0.attn_v.weight", (32, 64)),
        ("blk.1.attn_output.weight", (64, 64)),
        ("blk.1.ffn_down.weight", (64, 96)),
        ("blk.2.attn_norm.weight", (64,)),
        ("output_norm.weight", (64,)),
    ],
)
def test_a_weight_that_is_not_a_number_is_found(tmp_path, name, shape):
    values = np.random.default_rng(0).normal(0, 0.1, shape).astype(np.float32)
    place = tuple(size // 3 for size in shape) if name != "token_embd.weight" else (7, 5)
    values[place] = np.nan
    path = tiny_llama(tmp_path / "m.gguf", n_layers=3, extra={name: values})
    assert story(path) == f"tensor {name!r} holds nan at {list(place)}"


def test_of_mamba_too(tmp_path):
    path = tiny_mamba(tmp_path / "m.gguf")
    shape = engine.open(path).tensors["blk.1.ssm_x.weight"].shape
    values = np.zeros(shape, np.float32)
    values[3, 2] = np.inf
    path = tiny_mamba(tmp_path / "broken.gguf", extra={"blk.1.ssm_x.weight": values})
    assert story(path) == "tensor 'blk.1.ssm_x.weight' holds inf at [3, 2]"


def test_an_overflow_is_named_by_layer(tmp_path):
    huge = np.full((96, 64), 1e38, np.float32)
    path = tiny_llama(tmp_path / "m.gguf", extra={"blk.1.ffn_up.weight": huge})
    found = story(path)
    assert found is not None
    assert found.startswith("of what blk.1.ffn_up computes, or what is made of it, value ")
    assert found.endswith("the weights of its layer are finite, so it overflows")
