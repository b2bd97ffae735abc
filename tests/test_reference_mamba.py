"""The float64 twins of Mamba, Mamba-2 and FalconMamba: transformers (golden/make_mamba.py), libllama agree.

The largest difference of a logit over the largest logit. Against transformers: 6e-16 to 3e-15. libllama
(cyllama 0.2.18, llama.cpp b9190) computes in float32; 96 tokens at once, and one by one, Zen 4, 2026-11-22:

    mamba              7.7e-07  7.6e-07
    falcon             9.4e-07  9.7e-07
    mamba2             7.9e-07  1.4e-06
    mamba, untied      6.5e-07  7.8e-07
    mamba, odd         4.6e-07  4.2e-07
    mamba2, one group  9.1e-07  5.5e-07
    mamba2, odd        4.0e-06  4.2e-06
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import gguf
import numpy as np
import pytest
from golden import make_mamba

from tests.make_mamba_gguf import tiny_mamba, tiny_mamba2
from tests.reference import mamba, mamba2
from tests.reference.mamba import ReferenceMamba
from tests.reference.mamba2 import ReferenceMamba2

log = logging.getLogger(__name__)

SMALL = {
    "mamba": (tiny_mamba, ReferenceMamba, {"n_layers": 3}),
    "falcon": (tiny_mamba, ReferenceMamba, {"falcon": True, "tied": False}),
    "mamba2": (tiny_mamba2, ReferenceMamba2, {"n_groups": 2, "conv": 3}),
}
LIBLLAMA = SMALL | {
    "mamba, untied": (tiny_mamba, ReferenceMamba, {"tied": False, "vocab": 263, "padding": 3}),
    "mamba, odd": (tiny_mamba, ReferenceMamba, {"width": 36, "conv": 3, "dt_rank": 7, "n_state": 5}),
    "mamba2, one group": (tiny_mamba2, ReferenceMamba2, {"vocab": 263, "padding": 3}),
    "mamba2, odd": (
        tiny_mamba2,
        ReferenceMamba2,
        {"width": 36, "n_heads": 6, "n_groups": 3, "n_state": 9, "tied": False},
    ),
}


def relative(got, want):
    """The largest difference over the largest magnitude."""
    assert got.shape == want.shape
    return np.abs(got - want).max() / np.abs(want).max()


@pytest.mark.parametrize("name", make_mamba.CASES)
def test_logits_and_final_states_equal_transformers(tmp_path, name):
    case = make_mamba.CASES[name]
    golden = np.load(Path(make_mamba.__file__).parent / f"{case.file}.npz")
    path = case.build(tmp_path / "m.gguf", **case.shape)
    hint = "the builder writes other weights than in the golden file: run golden/make_mamba.py"
    assert make_mamba.digest(make_mamba.read(path)) == str(golden[f"{name}.weights"]), hint
    kind = ReferenceMamba2 if case.file == "mamba2" else ReferenceMamba
    logits, state = kind.open(path, case.mixer_eps).forward(golden[f"{name}.tokens"])
    differences = {
        key: relative(values, golden[f"{name}.{key}"])
        for key, values in (("logits", logits), ("conv", state.conv), ("ssm", state.ssm))
    }
    log.info("%-12s %s", name, {key: f"{value:.0e}" for key, value in differences.items()})
    assert max(differences.values()) < 1e-10


@pytest.mark.parametrize("name", SMALL)
def test_split_anywhere_equals_whole(tmp_path, name):
    build, kind, shape = SMALL[name]
    model = kind.open(build(tmp_path / "m.gguf", **shape))
    tokens = np.random.default_rng(1).integers(0, 301, 11)
    logits, end = model.forward(tokens)
    for pieces in ([0, 11], [1, 10], [2, 9], [5, 6], [10, 1], [3, 0, 8], 11 * [1]):
        state, parts = model.start(), []
        for piece in np.split(tokens, np.cumsum(pieces)[:-1]):
            part, state = model.forward(piece, state)
            parts.append(part)
        assert relative(np.concatenate(parts), logits) < 1e-13
        assert relative(state.ssm, end.ssm) < 1e-13
        assert relative(state.conv, end.conv) < 1e-13


@pytest.mark.parametrize("cut", range(8))
def test_convolution_and_scans_split_to_the_bit(cut):
    rng = np.random.default_rng(cut)
    x, dt, z, b, c = (rng.normal(size=(7, n)) for n in (6, 6, 6, 4, 4))
    a, d, weight, bias = -rng.random((6, 4)), rng.random(6), rng.random((6, 4)), rng.random(6)
    heads = (x.reshape(7, 3, 2), dt[:, :3], b[:, None], c[:, None])

    def conv(part, state):
        return mamba.causal_conv(x[part], weight, bias, state)

    def scan(part, state):
        return mamba.selective_scan(x[part], dt[part], a, b[part], c[part], d, z[part], state)

    def scan2(part, state):
        x_, dt_, b_, c_ = (values[part] for values in heads)
        return mamba2.selective_scan(x_, dt_, a[:3, 0], b_, c_, d[:3], state)

    for step, shape in ((conv, (3, 6)), (scan, (6, 4)), (scan2, (3, 2, 4))):
        start = rng.normal(size=shape)
        whole, end = step(slice(None), start)
        first, state = step(slice(cut), start)
        second, state = step(slice(cut, None), state)
        np.testing.assert_array_equal(np.concatenate([first, second]), whole)
        np.testing.assert_array_equal(state, end)


def test_softplus_is_its_argument_above_20():
    assert mamba.softplus(np.array([20.0, 20.1, 800.0])).tolist() == [np.log1p(np.exp(20.0)), 20.1, 800.0]
    assert mamba.softplus(np.array([-800.0, 0.0])).tolist() == [0.0, np.log(2.0)]


@pytest.mark.parametrize("name", SMALL)
def test_steps_of_random_models_are_as_trained_ones_and_some_large(tmp_path, monkeypatch, name):
    build, kind, shape = SMALL[name]
    seen = []

    def softplus(x, softplus=mamba.softplus):
        seen.append(x.copy())
        return softplus(x)

    monkeypatch.setattr(mamba, "softplus", softplus)
    monkeypatch.setattr(mamba2, "softplus", softplus)
    model = kind.open(build(tmp_path / "m.gguf", **shape))
    logits = model.logits(np.arange(64))
    monkeypatch.undo()
    assert 1.0 < logits.std() < 4.0
    assert len(seen) == model.n_layers
    for x in seen:
        steps = mamba.softplus(x)
        assert 1e-5 < np.quantile(steps, 0.05) < np.median(steps) < 0.2
        assert (x[:, -1] > 85).all()
        assert (x[:, -2] < 20).any()
        assert (x[:, -2] > 20).any()


def test_what_pads_a_vocabulary_is_part_of_the_soft_max(tmp_path):
    path = tiny_mamba(tmp_path / "m.gguf", vocab=263, padding=3)
    fields = gguf.GGUFReader(path).fields
    assert fields["tokenizer.ggml.token_type"].contents()[-4:] == [1, 5, 5, 5]
    assert fields["mamba.attention.head_count"].contents() == 0
    model = ReferenceMamba.open(path)
    chances = [np.exp(-model.nll([7, 8], [token, token])) for token in range(263)]
    np.testing.assert_allclose(np.sum(chances, axis=0), 1.0, rtol=1e-12)


def test_trained_model_has_the_known_scores(shared_data):
    """The known ones are off by up to 5e-6: transformers hands out float32 logits."""
    model = ReferenceMamba(*read_checkpoint(shared_data / "models" / "mamba-tiny"))
    known = np.load(shared_data / "oracle" / "mamba-tiny.npz")
    tokens = known["tokens"].reshape(-1, 512)
    window = model.nll(tokens[3, :-1], tokens[3, 1:])[256:]
    np.testing.assert_allclose(window, known["nll_windows_float64"][3], atol=1e-5, rtol=0)
    text, state = known["tokens"][:1025], model.start()
    for first in (0, 400):  # in two parts, the state carried
        part = slice(first, 400 if first == 0 else 1024)
        nll = model.nll(text[part], text[part.start + 1 : part.stop + 1], state)
        np.testing.assert_allclose(nll, known["nll_carry_float64"][part], atol=1e-5, rtol=0)
        state = model.forward(text[part], state)[1]


@pytest.mark.parametrize("name", LIBLLAMA)
def test_libllama_agrees(tmp_path, name):
    pytest.importorskip("cyllama", reason="cyllama (llama.cpp) is not installed")
    build, kind, shape = LIBLLAMA[name]
    path = build(tmp_path / "m.gguf", **shape)
    tokens = np.random.default_rng(0).integers(0, shape.get("vocab", 301), 96)
    want = kind.open(path).logits(tokens)
    differences = [relative(libllama_logits(path, tokens, n_ubatch), want) for n_ubatch in (512, 1)]
    log.info("%-20s %.1e  %.1e", name, *differences)
    assert max(differences) < 2e-5


def libllama_logits(path, tokens, n_ubatch):
    """float64 (T, V) of libllama, on one thread."""
    from cyllama.llama import llama_cpp

    llama_cpp.disable_logging()
    llama_cpp.ggml_backend_load_all()

    class Model(llama_cpp.LlamaModel):
        @property
        def n_vocab(self):  # asked for by get_logits_ith
            return self.get_vocab().n_vocab

    model = Model(str(path), llama_cpp.LlamaModelParams(), verbose=False)
    params = llama_cpp.LlamaContextParams()
    params.n_ctx = params.n_batch = 512
    params.n_ubatch = n_ubatch
    params.n_threads = params.n_threads_batch = 1
    context = llama_cpp.LlamaContext(model, params, verbose=False)
    batch = llama_cpp.LlamaBatch(n_tokens=len(tokens), embd=0, n_seq_max=1)
    for position, token in enumerate(tokens.tolist()):
        batch.add(token, position, [0], True)
    context.decode(batch)
    return np.array([context.get_logits_ith(i) for i in range(len(tokens))], np.float64)


def read_checkpoint(folder):
    """Weights with a file's names and metadata of a Mamba in transformers' form, its vocabulary padded."""
    config = json.loads((folder / "config.json").read_text())
    raw = (folder / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    names = {theirs: ours for ours, theirs in make_mamba.NAMES.items()}
    tops = {"embeddings.weight": "token_embd.weight", "norm_f.weight": "output_norm.weight"}
    weights = {}
    for name, entry in json.loads(raw[8:start]).items():
        if name == "__metadata__":
            continue
        first, last = entry["data_offsets"]
        values = np.frombuffer(raw[start + first : start + last], "<f4").reshape(entry["shape"])
        short = name.removeprefix("backbone.")
        if short.startswith("layers."):
            _, layer, short = short.split(".", 2)
            values = -np.exp(values.astype(np.float64)) if short == "mixer.A_log" else values
            values = values[:, 0] if short == "mixer.conv1d.weight" else values
            weights[f"blk.{layer}.{names[short]}"] = values
        else:
            weights[tops[short]] = values
    padding = -config["vocab_size"] % 8
    weights["token_embd.weight"] = np.pad(weights["token_embd.weight"], ((0, padding), (0, 0)))
    metadata = {
        "general.architecture": "mamba",
        "mamba.block_count": config["n_layer"],
        "mamba.ssm.inner_size": config["d_inner"],
        "mamba.ssm.state_size": config["state_size"],
        "mamba.ssm.conv_kernel": config["conv_kernel"],
        "mamba.ssm.time_step_rank": config["time_step_rank"],
        "mamba.attention.layer_norm_rms_epsilon": config["layer_norm_epsilon"],
    }
    return weights, metadata
