"""Comparisons of the real engine on tiny models: what is no variant, types made on the spot, the numbers."""

import numpy as np
import pytest
from make_gguf import Typed, byte_level_vocabulary, tiny_llama

import engine
from pipeline import evaluate
from pipeline.compare import compare
from pipeline.compare.settings import CompareSettings, OnTheSpotSettings
from pipeline.datasets import WIKITEXT2_SHA256
from pipeline.errors import ModelError, RefusedError
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
TOKENS = byte_level_vocabulary(300)["tokenizer.ggml.tokens"]
MERGES = byte_level_vocabulary(300)["tokenizer.ggml.merges"].value


@pytest.fixture(autouse=True)
def _no_page(monkeypatch):
    monkeypatch.setattr(
        "pipeline.compare.report.write", lambda summary, pairs, folder, tokenizer: folder / "report.html"
    )


@pytest.fixture
def make(tmp_path):
    """Settings of a comparison of a tiny model with random weights."""
    (tmp_path / "t.txt").write_text(TEXT)
    tiny_llama(tmp_path / "base.gguf")

    def settings(*variants, results="results", **groups):
        return CompareSettings(
            **{
                "base": ModelSettings(str(tmp_path / "base.gguf")),
                "variants": [str(v) for v in variants],
                "data": DataSettings(path=str(tmp_path / "t.txt")),
                "protocol": ProtocolSettings(window=32),
                "cluster": ClusterSettings("inline", windows_per_shard=3),
                "tracking": TrackingSettings("none"),
                "paths": PathsSettings(str(tmp_path / results), str(tmp_path / "cache")),
                **groups,
            }
        )

    return settings


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"tokenizer.ggml.tokens": ["<|other|>", *TOKENS[1:]]},
            "token 0 is '<|other|>', the base's '<|endoftext|>'",
        ),
        (
            {"tokenizer.ggml.merges": Typed("str", [*MERGES[1:], MERGES[0]])},
            "entry of tokenizer.ggml.merges 0 is 'h e', the base's 'Ġ t'",
        ),
        ({"vocab": 301}, "301 tokens, the base 300"),
        ({"tokenizer.ggml.add_bos_token": True}, "add_bos_token is True, the base's False"),
        ({"architecture": "mistral3"}, "architecture"),
        ({"width": 128}, "llama.embedding_length is 128, the base's 64"),
        ({"n_layers": 1}, "llama.block_count is 1, the base's 2"),
        ({"llama.rope.freq_base": 5e5}, "llama.rope.freq_base is 500000.0, the base's 10000.0"),
    ],
)
def test_a_file_that_is_no_variant_is_refused_naming_the_difference(make, tmp_path, changed, message):
    path = tiny_llama(tmp_path / "other.gguf", **changed)
    with pytest.raises(ModelError, match="no variant of") as caught:
        compare(make(path))
    assert message in str(caught.value)
    assert "make the variants from the base" in caught.value.hint
    assert caught.value.exit_code == 2
    assert not (tmp_path / "results/v1").exists()


def test_a_file_that_says_a_default_outright_is_a_variant(make, tmp_path):
    with engine.open(str(tmp_path / "base.gguf")) as file:
        assert "tokenizer.ggml.add_eos_token" not in file.metadata
    path = tiny_llama(
        tmp_path / "same.gguf", type_name="Q8_0", context=256, **{"tokenizer.ggml.add_eos_token": False}
    )
    assert compare(make(path, dry_run=True)).exit_code == 0


def test_scores_are_those_of_perplexity_and_divergences_those_of_the_logits(make, tmp_path):
    """NLL to the bit; KLD, same top and Δp against float64 NumPy on the engine's own float32 logits."""
    path = tiny_llama(tmp_path / "q.gguf", type_name="Q4_0")
    settings = make(path)
    s = compare(settings).summary
    for entry in (s["base"], s["variants"][0]):
        alone = evaluate(
            PerplexitySettings(
                model=ModelSettings(entry["path"]),
                **{
                    name: getattr(settings, name)
                    for name in ("data", "protocol", "engine", "cluster", "tracking", "paths")
                },
            )
        ).summary
        assert entry["nll_sha256"] == alone["nll_sha256"]
        assert entry["ppl"] == pytest.approx(alone["ppl"], rel=1e-14)
    assert s["overhead"] is None, "nothing was known of the models' speed"
    assert compare(make(path, keep_tokens=False)).summary["overhead"] > 0
    log_p = []
    for name in ("base.gguf", "q.gguf"):
        with engine.open(str(tmp_path / name)) as file:
            tokens = engine.Tokenizer(file).encode(TEXT)
            model = engine.load_model(file, batch_tokens=32)
            found = []
            for first in range(0, tokens.size - 31, 32):
                batch = engine.Batch(
                    tokens[first : first + 32], np.arange(32), outputs=np.arange(32) % 31 >= 16
                )
                found.append(model.logits(batch, model.new_cache(1, 32)).astype(np.float64))
            del model
        logits = np.concatenate(found)
        top = logits.max(axis=1, keepdims=True)
        log_p.append(logits - top - np.log(np.exp(logits - top).sum(axis=1, keepdims=True)))
    base, variant = log_p
    kld = (np.exp(base) * (base - variant)).sum(axis=1)
    targets = np.concatenate([tokens[at + 17 : at + 32] for at in range(0, tokens.size - 31, 32)])
    dp = np.exp(variant[np.arange(targets.size), targets]) - np.exp(base[np.arange(targets.size), targets])
    v = s["variants"][0]
    assert v["n_scored"] == targets.size
    assert v["kld_mean"] == pytest.approx(kld.mean(), abs=1e-6, rel=1e-4)
    assert v["kld_max"] == pytest.approx(kld.max(), abs=1e-6, rel=1e-4)
    assert v["dp_rms"] == pytest.approx(np.sqrt((dp**2).mean()), abs=1e-6)
    assert v["same_top"] == (base.argmax(axis=1) == variant.argmax(axis=1)).mean()


def test_types_are_made_once_and_kept(make, tmp_path):
    settings = make("Q8_0", "q4_0", dry_run=True)
    planned = compare(settings).summary
    assert [(v["name"], v["to_be_quantized"]) for v in planned["variants"]] == [
        ("Q8_0", True),
        ("Q4_0", True),
    ]
    assert not list((tmp_path / "cache/quantized").glob("*.gguf"))
    s = compare(make("Q8_0", "q4_0")).summary
    assert [(v["name"], v["type"]) for v in s["variants"]] == [("Q8_0", "Q8_0"), ("Q4_0", "Q4_0")]
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache/quantized").glob("*.gguf")}
    assert {path.name.split(".")[1] for path in made} == {"Q8_0", "Q4_0"}
    again = compare(make("Q8_0", "Q4_0")).summary
    assert {path: path.stat().st_mtime_ns for path in made} == made
    assert (again["run_key"], again["n_workers"]) == (s["run_key"], 0)
    by_path = compare(make(*made)).summary
    assert by_path["run_key"] == s["run_key"], "a file is what it holds, whoever made it"


def test_a_quantized_base_makes_types_only_if_allowed(make, tmp_path):
    tiny_llama(tmp_path / "q.gguf", type_name="Q8_0")
    base = ModelSettings(str(tmp_path / "q.gguf"))
    with pytest.raises(RefusedError, match="Q8_0") as caught:
        compare(make("Q4_0", base=base))
    assert "allow_requantize" in f"{caught.value} {caught.value.hint}"
    allowed = OnTheSpotSettings(allow_requantize=True)
    assert compare(make("Q4_0", base=base, quantize=allowed)).exit_code == 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_smollm2_equals_the_float64_oracle(make, smollm2, shared_data):
    """Q8_0 and Q4_K_M of the Q4_1 file: oracle/README.md, mean KLD to 2e-6 + 1e-3 relative."""
    oracle = np.load(shared_data / "oracle/smollm2-kld.npz")
    s = compare(
        make(
            "Q8_0",
            "Q4_K_M",
            base=ModelSettings(str(smollm2)),
            data=DataSettings(path=str(shared_data / "data/wiki.test.raw"), sha256=WIKITEXT2_SHA256),
            protocol=ProtocolSettings(window=512, limit=8),
            quantize=OnTheSpotSettings(allow_requantize=True),
            engine=EngineSettings(),
        )
    ).summary
    for v, key in zip(s["variants"], ("Q8_0", "Q4_K_M"), strict=True):
        kld = oracle[f"{key}_kld"]
        assert v["kld_mean"] == pytest.approx(kld.mean(), abs=2e-6, rel=1e-3)
        assert np.log(v["ppl"]) == pytest.approx(oracle[f"{key}_nll"].mean(), abs=5e-6)
        assert v["dp_rms"] == pytest.approx(np.sqrt((oracle[f"{key}_dp"] ** 2).mean()), rel=1e-3)
        assert v["same_top"] == pytest.approx(oracle[f"{key}_same_top"].mean(), abs=2 / kld.size)


def test_one_context_is_carried_through_all_models_by_file(make, tmp_path):
    """The text as one sequence: keys and values of every model go from shard to shard."""
    path = tiny_llama(tmp_path / "q.gguf", type_name="Q8_0")
    protocol = ProtocolSettings("carry", 32, limit=4)
    found = [
        compare(
            make(
                path,
                results=f"r{n}",
                protocol=protocol,
                cluster=ClusterSettings("inline", windows_per_shard=n),
                engine=EngineSettings(batch_tokens=50, threads=n),
            )
        ).summary
        for n in (1, 2)
    ]
    told = [
        (s["base"]["nll_sha256"], s["variants"][0]["nll_sha256"], s["variants"][0]["kld_sha256"])
        for s in found
    ]
    assert told[0] == told[1]
    assert found[0]["shards_done"] == 4
    assert found[0]["variants"][0]["n_scored"] == 127
