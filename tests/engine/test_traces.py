"""What is flipped in a file, or changed in the engine, is found at the output where it enters."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader

import engine
from tests.engine.test_bits import AVX2
from tests.make_gguf import llama_extra, split_gguf, tiny_llama
from tests.make_mamba_gguf import tiny_mamba, tiny_mamba2

N = 40
TOKENS = np.random.default_rng(5).integers(0, 300, N).astype(np.int32)

LLAMA = ("attn_v", "attn_k", "attn_q", "attn_output", "ffn_up", "ffn_down")
MAMBA = ("ssm_in", "ssm_x", "ssm_dt", "ssm_scan", "ssm_out")
MAMBA2 = ("ssm_in", "ssm_conv1d", "ssm_norm", "ssm_out")

KINDS = {
    "llama": (tiny_llama, {"tied": False}, LLAMA),
    "qwen3": (
        tiny_llama,
        {"architecture": "qwen3", "extra": llama_extra(head_norms=True)}
        | {"llama.attention.key_length": 16, "llama.attention.value_length": 16},
        LLAMA,
    ),
    "mamba": (tiny_mamba, {"width": 36, "dt_rank": 7, "n_state": 5}, MAMBA),
    "falcon": (tiny_mamba, {"falcon": True, "tied": False}, MAMBA),
    "mamba2": (tiny_mamba2, {"n_heads": 8, "n_groups": 2, "n_state": 8}, MAMBA2),
}


def batch(n=N, **wanted):
    wanted = wanted or {"targets": [*TOKENS[1:n], -1], "outputs": np.arange(n) % 7 == 3}
    return engine.Batch(TOKENS[:n], range(n), **wanted)


def traced(path, asked=None, *, kv="f32", **settings):
    model = engine.load_model(engine.open(path), **{"batch_tokens": 64} | settings)
    return engine.trace(model, asked or batch(), kv=kv)


def first_apart(before, now):
    return next((name for name in now if before[name] != now[name]), None)


@pytest.fixture(scope="module", params=KINDS)
def kind(request, tmp_path_factory):
    build, shape, stages = KINDS[request.param]
    path = build(tmp_path_factory.mktemp("models") / f"{request.param}.gguf", **shape)
    return path, stages, traced(path)


def flipped(path: Path, tensor: str, *place: int) -> Path:
    """The file with one bit of a weight of a float32 tensor turned."""
    with engine.open(path) as file:
        found = file.tensors[tensor]
        at = found.offset + 4 * int(np.ravel_multi_index(place, found.shape)) + 2
        assert found.type.name == "F32"
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1 << 5
    other = path.with_name("flipped.gguf")
    other.write_bytes(raw)
    return other


def test_outputs_come_in_the_order_of_the_network(kind):
    _, stages, trace = kind
    layers = [f"blk.{layer}.{stage}" for layer in (0, 1) for stage in stages]
    assert list(trace) == ["token_embd", *layers, "output_norm", "output", "nll"]


def test_digests_are_of_what_the_model_computes(kind):
    path, _, trace = kind
    file = engine.open(path)
    model = engine.load_model(file, batch_tokens=64)
    logits = model.logits(batch(), model.new_cache(1, N))
    nll = model.nll(batch(), model.new_cache(1, N))
    embedding = next(t for t in GGUFReader(path).tensors if t.name == "token_embd.weight").data
    for name, values in {"token_embd": embedding[TOKENS], "output": logits, "nll": nll}.items():
        assert trace[name] == hashlib.sha256(values.tobytes()).hexdigest(), name


def test_last_layer_is_seen_before_the_final_norm(tmp_path):
    """A model of one layer computes in it what the first of two does; NumPy's final norm follows from it."""
    one = tiny_llama(tmp_path / "one.gguf", n_layers=1)
    seen = {}
    decoder = engine.load_model(engine.open(one), batch_tokens=64)
    decoder.watch(batch(), decoder.new_cache(1, N), lambda name, values: seen.update({name: values.copy()}))
    x = (seen["blk.0.attn_output"] + seen["blk.0.ffn_down"]).astype(np.float64)
    weight = next(t for t in GGUFReader(one).tensors if t.name == "output_norm.weight").data
    want = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-5) * weight
    np.testing.assert_allclose(seen["output_norm"], want, rtol=2e-6)


def test_trace_does_not_depend_on_threads_batches_or_their_order(kind):
    path, _, trace = kind
    assert traced(path, threads=2) == trace
    assert traced(path, batch_tokens=200) == trace
    order = np.random.default_rng(0).permutation(N)
    targets, outputs = np.array([*TOKENS[1:], -1]), np.arange(N) % 7 == 3
    shuffled = engine.Batch(TOKENS[order], order, targets=targets[order], outputs=outputs[order])
    again = traced(path, shuffled, threads=2)
    of_layers = [name for name in trace if name not in ("output", "nll")]  # these are in batch order
    assert [again[name] for name in of_layers] == [trace[name] for name in of_layers]


def test_a_second_sequence_in_the_batch_is_digested_after_the_first(tmp_path):
    path = tiny_mamba(tmp_path / "m.gguf")
    tokens, positions = [*TOKENS[:9], *TOKENS[9:20]], [*range(9), *range(11)]
    model = engine.load_model(engine.open(path), batch_tokens=64)
    two = engine.trace(model, engine.Batch(tokens, positions, [0] * 9 + [3] * 11))
    assert two == engine.trace(model, engine.Batch(tokens, positions, [5] * 9 + [7] * 11))
    assert "nll" not in two
    assert "output" not in two


def test_trace_leaves_the_model_as_it_was(kind):
    path, _, trace = kind
    model = engine.load_model(engine.open(path), batch_tokens=64)
    before = model.nll(batch(), model.new_cache(1, N))
    assert engine.trace(model, batch()) == trace
    np.testing.assert_array_equal(model.nll(batch(), model.new_cache(1, N)), before)
    with pytest.raises(ValueError, match="target 999"):
        engine.trace(model, batch(targets=[999] * N))
    assert engine.trace(model, batch()) == trace


ENTERS = {  # tensor of layer 1, a place in it -> the output where a flipped bit of it is seen first
    "llama": {
        ("attn_norm", (3,)): "attn_v", ("attn_v", (7, 9)): "attn_v", ("attn_k", (5, 1)): "attn_k",
        ("attn_q", (33, 20)): "attn_q", ("attn_output", (63, 63)): "attn_output",
        ("ffn_norm", (60,)): "ffn_up", ("ffn_gate", (95, 0)): "ffn_up", ("ffn_up", (0, 63)): "ffn_up",
        ("ffn_down", (40, 90)): "ffn_down",
    },
    "qwen3": {("attn_k_norm", (2,)): "attn_k", ("attn_q_norm", (3,)): "attn_q"},
    "mamba": {
        ("attn_norm", (3,)): "ssm_in", ("ssm_in", (70, 30)): "ssm_in", ("ssm_in", (100, 30)): "ssm_in",
        ("ssm_conv1d", (71, 2)): "ssm_x", ("ssm_conv1d.bias", (20,)): "ssm_x", ("ssm_x", (16, 71)): "ssm_x",
        ("ssm_dt", (50, 6)): "ssm_dt", ("ssm_dt.bias", (60,)): "ssm_scan", ("ssm_a", (9, 4)): "ssm_scan",
        ("ssm_d", (64,)): "ssm_scan", ("ssm_out", (35, 71)): "ssm_out",
    },
    "falcon": {("ssm_x", (5, 100)): "ssm_x", ("ssm_out", (1, 2)): "ssm_out"},
    "mamba2": {
        ("ssm_in", (130, 60)): "ssm_in", ("ssm_in", (280, 60)): "ssm_in", ("ssm_in", (295, 3)): "ssm_in",
        ("ssm_in", (5, 60)): "ssm_norm", ("ssm_conv1d", (140, 3)): "ssm_conv1d",
        ("ssm_dt.bias", (2,)): "ssm_norm", ("ssm_a", (3, 0)): "ssm_norm", ("ssm_d", (4, 0)): "ssm_norm",
        ("ssm_norm", (1, 40)): "ssm_norm", ("ssm_out", (63, 127)): "ssm_out",
    },
}  # fmt: skip


def test_one_flipped_bit_is_named_by_layer_stage_and_tensor(kind):
    path, _, trace = kind
    digests = engine.tensor_digests(engine.open(path))
    for (name, place), stage in ENTERS[path.stem].items():
        weights = [f"blk.1.{name}", f"blk.1.{name}.weight"]
        tensor = next(weight for weight in weights if weight in digests)
        other = flipped(path, tensor, *place)
        now = traced(other)
        assert first_apart(trace, now) == f"blk.1.{stage}", tensor
        assert trace["nll"] != now["nll"]
        others = engine.tensor_digests(engine.open(other))
        assert [each for each in others if others[each] != digests[each]] == [tensor]


def test_embedding_final_norm_and_head_are_named(tmp_path):
    path = tiny_llama(tmp_path / "m.gguf", tied=False)
    trace = traced(path)
    for tensor, place, name in [
        ("token_embd.weight", (int(TOKENS[20]), 5), "token_embd"),
        ("output_norm.weight", (8,), "output_norm"),
        ("output.weight", (299, 1), "output"),
    ]:
        assert first_apart(trace, traced(flipped(path, tensor, *place))) == name


def test_the_first_of_two_changes_is_named(tmp_path):
    path = tiny_llama(tmp_path / "m.gguf", n_layers=3)
    later = flipped(path, "blk.2.attn_q.weight", 1, 1)
    assert first_apart(traced(path), traced(later)) == "blk.2.attn_q"
    both = flipped(later, "blk.0.ffn_down.weight", 2, 2)
    assert first_apart(traced(path), traced(both)) == "blk.0.ffn_down"


def test_another_kv_type_parts_at_the_first_attention(tmp_path):
    path = tiny_llama(tmp_path / "m.gguf")
    assert first_apart(traced(path), traced(path, kv="f16")) == "blk.0.attn_q"


def test_tensor_digests_are_of_the_files_bytes_split_or_not(tmp_path):
    path = tiny_llama(tmp_path / "m.gguf", type_name="Q8_0", ff=128)
    want = {t.name: hashlib.sha256(t.data.tobytes()).hexdigest() for t in GGUFReader(path).tensors}
    for threads in (None, 1):
        found = engine.tensor_digests(engine.open(path), threads)
        assert found == want
        assert list(found) == list(want)
    first = split_gguf(path, tmp_path, 3)[0]
    assert engine.tensor_digests(engine.open(first)) == want


CHILD = """
import json, sys
from tests.engine.test_traces import traced
print(json.dumps([traced(path) for path in sys.argv[1:]]))
"""


@pytest.mark.slow
def test_avx2_traces_the_same_bits(tmp_path):
    paths = [build(tmp_path / f"{name}.gguf", **shape) for name, (build, shape, _) in KINDS.items()]
    environment = os.environ | AVX2 | {"NUMBA_CACHE_DIR": str(tmp_path / "kernels")}
    words = [sys.executable, "-c", CHILD, *map(str, paths)]
    child = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(child.stdout.splitlines()[-1]) == [traced(path) for path in paths]
