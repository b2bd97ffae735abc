"""The whole run, inline, on the real engine."""

import shutil

import numpy as np
import pytest
from make_gguf import tiny_llama

import engine
from pipeline import evaluate
from pipeline.datasets import WIKITEXT2_SHA256
from pipeline.errors import ModelError
from pipeline.settings import (
    ClusterSettings,
    DataSettings,
    EngineSettings,
    ModelSettings,
    PathsSettings,
    PerplexitySettings,
    ProtocolSettings,
    TrackingSettings,
)

TEXT = "The quick brown fox jumps over the lazy dog, and — as ever — nobody asks why. " * 5


@pytest.fixture
def tiny(tmp_path):
    """Settings of a run of the real engine on a tiny model with random weights."""
    tiny_llama(tmp_path / "tiny.gguf", type_name="Q4_1")
    (tmp_path / "t.txt").write_text(TEXT)

    def settings(results, **groups):
        return PerplexitySettings(
            **{
                "model": ModelSettings(str(tmp_path / "tiny.gguf")),
                "data": DataSettings(path=str(tmp_path / "t.txt")),
                "protocol": ProtocolSettings(window=32),
                "cluster": ClusterSettings("inline", windows_per_shard=3),
                "tracking": TrackingSettings("none"),
                "paths": PathsSettings(str(tmp_path / results), str(tmp_path / "cache")),
                **groups,
            }
        )

    return settings


def test_the_real_engine_gives_one_digest_for_any_batch_and_shard(tiny):
    first = evaluate(tiny("a")).summary
    others = [
        evaluate(tiny("b", engine=EngineSettings(batch_tokens=13))).summary,
        evaluate(tiny("c", engine=EngineSettings(batch_tokens=65, threads=2))).summary,
        evaluate(tiny("d", cluster=ClusterSettings("inline", windows_per_shard=1))).summary,
    ]
    assert {s["nll_sha256"] for s in others} == {first["nll_sha256"]}
    assert {s["run_key"] for s in others} == {first["run_key"]}


def test_attention_carries_one_context_to_one_digest(tiny, tmp_path):
    """The text as one sequence: keys and values go from shard to shard by file."""
    protocol = ProtocolSettings("carry", 32, limit=4)  # 128 tokens, which the model was trained for
    runs = [
        tiny("a", protocol=protocol, engine=EngineSettings(batch_tokens=4096)),
        tiny("b", protocol=protocol, engine=EngineSettings(batch_tokens=13)),
        tiny("c", protocol=protocol, engine=EngineSettings(batch_tokens=65, threads=2)),
        tiny("d", protocol=protocol, cluster=ClusterSettings("inline", windows_per_shard=1)),
    ]
    found = [evaluate(settings).summary for settings in runs]
    assert len({(s["nll_sha256"], s["run_key"], s["half_ppl"]) for s in found}) == 1
    with engine.open(str(tmp_path / "tiny.gguf")) as file:
        tokens = engine.Tokenizer(file).encode(TEXT)[:128]
        model = engine.load_model(file, batch_tokens=tokens.size)
        batch = engine.Batch(tokens[:-1], np.arange(tokens.size - 1), targets=tokens[1:])
        scores = model.nll(batch, model.new_cache(1, tokens.size))
        del model
    assert found[0]["n_scored"] == scores.size == 127
    assert found[0]["nll_mean_nats"] == pytest.approx(scores.mean(), rel=1e-14)


def test_a_cut_model_is_refused_by_the_real_reader(tiny, tmp_path):
    whole = (tmp_path / "tiny.gguf").read_bytes()
    for name, raw in {
        "empty": b"",
        "magic": b"GGML" + whole[4:],
        "header": whole[:900],
        "cut": whole[:-64],
    }.items():
        (tmp_path / f"{name}.gguf").write_bytes(raw)
        with pytest.raises(ModelError, match=f"{name}.gguf") as caught:
            evaluate(tiny("results", model=ModelSettings(str(tmp_path / f"{name}.gguf"))))
        assert caught.value.kind == "GGUFFormatError"
    with pytest.raises(ModelError) as caught:
        evaluate(tiny("results", model=ModelSettings(str(tmp_path))))
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("overrides", "kind"),
    [
        ({"general.architecture": "unheard-of"}, "UnsupportedModel"),
        ({"tokenizer.ggml.pre": "unheard-of"}, "UnsupportedTokenizer"),
    ],
)
def test_models_that_are_not_supported_are_refused_by_name(tiny, tmp_path, overrides, kind):
    path = tiny_llama(tmp_path / "other.gguf", **overrides)
    with pytest.raises(ModelError, match="unheard-of") as caught:
        evaluate(tiny("results", model=ModelSettings(str(path))))
    assert caught.value.kind == kind


def test_smollm2_equals_the_float64_oracle(tiny, smollm2, shared_data, tmp_path):
    """Two of the oracle's windows; `ln PPL` within 5e-6 as oracle/README.md asks."""
    oracle = np.load(shared_data / "oracle/smollm2-nll.npz")["nll_float64"][:2]
    data = DataSettings(path=str(shared_data / "data/wiki.test.raw"), sha256=WIKITEXT2_SHA256)
    protocol = ProtocolSettings(window=512, limit=2)
    model = ModelSettings(str(shutil.copy(smollm2, tmp_path)))  # which nothing else on this machine maps
    s = evaluate(tiny("results", model=model, data=data, protocol=protocol)).summary
    assert s["nll_mean_nats"] == pytest.approx(oracle.mean(), abs=5e-6)
    assert s["n_tokens_text"] == 303_415
    assert s["model_pss_sum_bytes"] == pytest.approx(s["model_resident_bytes"], rel=0.02)
