"""Variants against a base of which there is only a file of 16-bit logits."""

import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf

import engine
from pipeline.compare import compare, logit_files, to_file
from pipeline.compare.settings import OnTheSpotSettings, SensitivitySettings
from pipeline.datasets import WIKITEXT2_SHA256
from pipeline.errors import DataError, ModelError, SettingsError
from pipeline.settings import (
    ClusterSettings,
    DataSettings,
    EngineSettings,
    ProtocolSettings,
)
from tests.make_gguf import tiny_llama
from tests.pipeline.foreign_logits import (
    TEXT,
    VOCAB,
    WINDOW,
    Foreign,
    libllama_logits,
    logits_of,
    rows_of,
)


def expected_figures(rows, variant, targets, clip=16):
    """protocol.md 2.5 in float64, from the engine's logits of base and variant."""
    foreign, found = Foreign(clip), []
    for base, row, target in zip(rows, variant, targets, strict=True):
        lpb = foreign.ln_p(foreign.record(base), row.size)
        l = row.astype(np.float64)  # noqa: E741
        lp = l - np.logaddexp.reduce(l)
        counted = lpb > -16
        kld = (np.exp(lpb) * (lpb - lp))[counted].sum()
        found.append((-lpb[target], -lp[target], kld, lpb.argmax(), row.argmax()))
    return [np.array(column) for column in zip(*found, strict=True)]


@pytest.mark.parametrize("with_text", [True, False])
def test_figures_against_a_file_equal_the_definition(make, tmp_path, written, with_text):
    data = {} if with_text else {"data": DataSettings()}
    s = compare(make("q4.gguf", base="b.logits", **data)).summary
    _, rows, targets = logits_of(tmp_path / "base.gguf")
    _, variant, _ = logits_of(tmp_path / "q4.gguf")
    nll_base, nll, kld, top_base, top = expected_figures(rows, variant, targets)
    found = rows_of(s)
    (v,) = s["variants"]
    for name, expected, tolerance in (("nll_base", nll_base, 1e-12), ("nll", nll, 1e-12), ("kld", kld, 1e-7)):
        values = np.concatenate([row[name] for row in found])
        assert np.abs(values - expected).max() < tolerance
    assert np.concatenate([row["top_base"] for row in found]).tolist() == top_base.tolist()
    assert np.concatenate([row["top"] for row in found]).tolist() == top.tolist()
    assert v["kld_mean"] == pytest.approx(kld.mean(), abs=1e-8)
    assert v["ppl_base"] == s["base"]["ppl"] == pytest.approx(math.exp(nll_base.mean()))
    assert {row["base_format"] for row in found} == {"16-bit logits"}
    assert (s["base"]["type"], s["base"]["bpw"]) == ("16-bit logits", None)
    (warning,) = (w for w in s["warnings"] if w.startswith("16-bit base"))
    assert "16 nats below the maximum" in warning
    assert "ik_llama.cpp" not in warning
    assert any("give its text as data.path" in w for w in s["warnings"]) == (not with_text)
    (table,) = Path(s["table"]).glob("run-*.parquet")
    assert pq.read_table(table, partitioning=None).column("base_format").to_pylist() == ["16-bit logits"]


def test_with_its_text_a_file_has_the_measure_of_the_model_itself(make, tmp_path, written):
    of_file, of_model = compare(make("q4.gguf", base="b.logits")), compare(make("q4.gguf"))
    assert of_file.summary["measure_key"] == of_model.summary["measure_key"]
    assert of_file.summary["run_key"] != of_model.summary["run_key"]
    a, b = of_file.summary["variants"][0], of_model.summary["variants"][0]
    assert a["ppl"] == pytest.approx(b["ppl"], rel=1e-12)
    assert a["kld_mean"] == pytest.approx(b["kld_mean"], rel=0.02)
    assert rows_of(of_model.summary)[0]["base_format"] is None


def test_bits_independent_of_shards_batches_and_other_variants(make, monkeypatch, written):
    first = compare(make("q4.gguf", "q8.gguf", base="b.logits")).summary
    monkeypatch.setattr(to_file, "LOGITS_BYTES", 4 * VOCAB * 5)
    other = compare(
        make(
            "q4.gguf",
            base="b.logits",
            results="other",
            engine=EngineSettings(batch_tokens=11, threads=2),
            cluster=ClusterSettings("inline", windows_per_shard=100),
        )
    ).summary
    of_q4 = {v["name"]: (v["nll_sha256"], v["kld_sha256"]) for v in first["variants"]}["q4"]
    (v,) = other["variants"]
    assert (v["nll_sha256"], v["kld_sha256"]) == of_q4


def test_finished_shards_are_reused_and_fewer_windows_can_be_asked_for(make, written):
    first = compare(make("q4.gguf", base="b.logits")).summary
    again = compare(make("q4.gguf", base="b.logits")).summary
    assert (again["n_workers"], again["run_key"]) == (0, first["run_key"])
    few = compare(make("q4.gguf", base="b.logits", protocol=ProtocolSettings(window=WINDOW, limit=3))).summary
    assert few["n_windows"] == 3 < first["n_windows"]
    assert few["shards_reused"] == 0, "another measure"


@pytest.mark.slow
def test_worker_processes_give_the_same_bits(make, written):
    inline = compare(make("q4.gguf", base="b.logits")).summary
    local = compare(
        make("q4.gguf", base="b.logits", results="l", cluster=ClusterSettings("local", 2, 1, 2))
    ).summary
    assert local["n_workers"] == 2
    assert [v["kld_sha256"] for v in local["variants"]] == [v["kld_sha256"] for v in inline["variants"]]


def test_the_model_itself_against_its_file_shows_the_floor(make, written):
    (v,) = compare(make("base.gguf", base="b.logits")).summary["variants"]
    assert abs(v["kld_mean"]) < 1e-5
    assert v["ppl_base"] != v["ppl"]
    assert v["same_top"] > 0.98


def test_a_file_of_ik_llama_cpp_is_told_apart_by_its_clip(make, tmp_path):
    tokens, rows, targets = logits_of(tmp_path / "base.gguf")
    rows = rows * np.float32(3)  # further apart than 24 nats
    (tmp_path / "ik.logits").write_bytes(Foreign(24).file(WINDOW, tokens.tolist(), rows))
    s = compare(make("q4.gguf", base="ik.logits")).summary
    assert any("24 nats below the maximum were raised (as ik_llama.cpp does)" in w for w in s["warnings"])
    _, variant, _ = logits_of(tmp_path / "q4.gguf")
    nll_base, _, kld, _, _ = expected_figures(rows, variant, targets, clip=24)
    (v,) = s["variants"]
    assert v["kld_mean"] == pytest.approx(kld.mean(), rel=1e-6)
    assert math.log(v["ppl_base"]) == pytest.approx(nll_base.mean(), rel=1e-9)


def test_a_file_of_libllama_s_logits_is_read_like_ours(make, tmp_path):
    """Written from libllama's own float32 logits by the writer above; ours differs by steps."""
    pytest.importorskip("cyllama", reason="cyllama (llama.cpp) is not installed")
    compare(make(out="b.logits"))
    tokens, ours, _ = logits_of(tmp_path / "base.gguf")
    theirs = libllama_logits(tmp_path / "base.gguf", tokens)
    assert np.abs(theirs - ours).max() < 1e-4
    (tmp_path / "lib.logits").write_bytes(Foreign().file(WINDOW, tokens.tolist(), theirs))
    mine = logit_files.LogitFile(str(tmp_path / "b.logits"))
    other = logit_files.LogitFile(str(tmp_path / "lib.logits"))
    assert np.array_equal(mine.tokens, other.tokens)
    assert mine.records.shape == other.records.shape
    differences = [np.abs(mine.ln_p(i) - other.ln_p(i)).max() for i in range(len(mine.records))]
    assert max(differences) < 1e-4 + 16 / 65535
    mine.close()
    other.close()
    found = [compare(make("q4.gguf", base=name)).summary for name in ("b.logits", "lib.logits")]
    (a,), (b,) = (s["variants"] for s in found)
    assert a["ppl_base"] == pytest.approx(b["ppl_base"], rel=2e-5)
    assert a["kld_mean"] == pytest.approx(b["kld_mean"], abs=2e-5)


def test_another_vocabulary_is_refused(make, tmp_path, written):
    tiny_llama(tmp_path / "large.gguf", vocab=301)
    for data in ({}, {"data": DataSettings()}):
        with pytest.raises(
            ModelError, match=r"b\.logits: has 300 logits a token, and .*large\.gguf gives 301"
        ):
            compare(make("large.gguf", base="b.logits", **data))


def test_variants_of_different_models_are_refused(make, tmp_path, written):
    tiny_llama(tmp_path / "wide.gguf", width=128)
    with pytest.raises(ModelError, match="embedding_length"):
        compare(make("q4.gguf", "wide.gguf", base="b.logits"))


def test_another_window_is_refused(make, written):
    with pytest.raises(SettingsError, match=r"protocol\.window=16, and .* windows of 32 tokens") as caught:
        compare(make("q4.gguf", base="b.logits", protocol=ProtocolSettings(window=16)))
    assert caught.value.hint == "give protocol.window=32"


def test_another_text_or_tokenizer_is_refused_at_the_first_token_that_differs(make, tmp_path, written):
    (tmp_path / "other.txt").write_text(TEXT[:100] + "!" + TEXT[100:])
    with pytest.raises(DataError, match=r"b\.logits: token \d+ is \d+; of .*other\.txt .* it is \d+"):
        compare(make("q4.gguf", base="b.logits", data=DataSettings(path=str(tmp_path / "other.txt"))))
    (tmp_path / "short.txt").write_text(TEXT[: len(TEXT) // 2])
    with pytest.raises(DataError, match="missing: the text is shorter"):
        compare(make("q4.gguf", base="b.logits", data=DataSettings(path=str(tmp_path / "short.txt"))))


@pytest.mark.parametrize(
    ("variants", "groups", "message"),
    [
        (("Q4_0",), {}, "Q4_0 is a type"),
        (("q4.gguf",), {"out": "c.logits"}, "is a file of logits already"),
        (("q4.gguf",), {"sensitivity": SensitivitySettings("layer")}, "no tensors"),
        (("q4.gguf",), {"protocol": ProtocolSettings("strided", WINDOW)}, "each from an empty cache"),
        ((), {}, "variants is empty"),
    ],
)
def test_what_a_file_cannot_be_asked_is_refused(make, written, variants, groups, message):
    with pytest.raises(SettingsError, match=message):
        compare(make(*variants, base="b.logits", **groups))


def test_documents_apart_are_refused(make, tmp_path, written):
    (tmp_path / "u.txt").write_text(TEXT)
    files = [str(tmp_path / name) for name in ("t.txt", "u.txt")]
    apart = DataSettings(files=files, documents="apart")
    with pytest.raises(SettingsError, match="apart"):
        compare(make("q4.gguf", base="b.logits", data=apart))
    with pytest.raises(SettingsError, match="apart"):
        compare(make(out="c.logits", data=apart))
    with pytest.raises(SettingsError, match="protocol=strided"):
        compare(make(out="c.logits", protocol=ProtocolSettings("strided", WINDOW)))


def test_a_file_of_one_window_needs_its_text(make, tmp_path):
    compare(make(out="one.logits", protocol=ProtocolSettings(window=WINDOW, limit=1)))
    assert compare(make("q4.gguf", base="one.logits")).summary["n_windows"] == 1
    with pytest.raises(DataError, match="holds 1 window"):
        compare(make("q4.gguf", base="one.logits", data=DataSettings()))


def test_tokens_beyond_the_variant_s_vocabulary_are_refused(make, tmp_path, written, monkeypatch):
    monkeypatch.setattr(engine.Tokenizer, "byte_lengths", np.zeros(50, np.int32), raising=False)
    with pytest.raises(ModelError, match=r"holds token \d+, and the vocabulary of .* ends at 49"):
        compare(make("q4.gguf", base="b.logits", data=DataSettings()))


def test_a_missing_variant_is_refused(make, written):
    with pytest.raises(ModelError, match=r"gone\.gguf"):
        compare(make("gone.gguf", base="b.logits"))


def test_a_variant_whose_logits_are_no_numbers_is_named(make, tmp_path, written):
    tiny_llama(tmp_path / "nan.gguf", extra={"output_norm.weight": np.full(64, np.nan, np.float32)})
    result = compare(make("nan.gguf", "q4.gguf", base="b.logits"))
    assert result.exit_code == 3
    assert "of nan.gguf at position 16 is nan" in result.summary["error"]["message"]
    assert {v["name"]: v["kld_mean"] is None for v in result.summary["variants"]} == {
        "nan": True,
        "q4": False,
    }


@pytest.mark.parametrize(
    ("base", "data", "expected"),
    [("b.logits", "???", ""), ("base.gguf", "???", "???"), ("b.logits", "t", "t")],
)
def test_the_job_asks_for_no_text_where_the_base_brings_tokens(written, base, data, expected):
    from jobs.compare import _need_no_text

    cfg = OmegaConf.create({"base": {"path": str(written.parent / base)}, "data": {"path": data}})
    _need_no_text(cfg)
    assert OmegaConf.to_container(cfg)["data"]["path"] == expected
    _need_no_text(OmegaConf.create({"base": {"path": "???"}, "data": {"path": "???"}}))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_smollm2_against_its_file_shows_what_llama_cpp_shows(make, tmp_path, smollm2, shared_data):
    """kld-*-f32.txt: against the 16-bit base of the same weights in F32, 8 windows (oracle/README.md)."""
    common = {
        "data": DataSettings(path=str(shared_data / "data/wiki.test.raw"), sha256=WIKITEXT2_SHA256),
        "protocol": ProtocolSettings(window=512, limit=8),
        "engine": EngineSettings(threads=2),
    }
    types = {"Q8_0": "q8_0", "Q4_K_M": "q4_k_m"}
    told = compare(
        make(
            *types,
            base=str(smollm2),
            out="b.logits",
            quantize=OnTheSpotSettings(allow_requantize=True),
            **common,
        )
    ).summary
    assert told["logits"]["ppl"] == pytest.approx(24.497366, rel=1e-5)
    assert told["logits"]["ppl_read_back"] == pytest.approx(24.452163, rel=2e-4)
    made = {v["name"]: v["path"] for v in told["variants"]}
    s = compare(make(*made.values(), base="b.logits", **common)).summary
    by_path = {v["path"]: v for v in s["variants"]}
    names = {"Mean PPL(Q)": "ppl", "Mean PPL(base)": "ppl_base", "Mean    KLD": "kld_mean"} | {
        title: f"kld_{key}"
        for title, key in (
            ("Maximum KLD", "max"), ("99.9%   KLD", "p999"), ("99.0%   KLD", "p99"), ("95.0%   KLD", "p95"),
            ("90.0%   KLD", "p90"), ("Median  KLD", "p50"),
        )
    }  # fmt: skip
    for name, key in types.items():
        v, block = by_path[made[name]], {}
        for line in (shared_data / f"oracle/kld-{key}-f32.txt").read_text().splitlines():
            title, _, value = line.partition(":")
            block[title.strip()] = value.split("±")[0].strip(" %")
        for title, figure in names.items():
            tolerance = {"ppl": 1e-4, "ppl_base": 2e-4, "kld_mean": 0.03}.get(figure, 0.05)
            assert v[figure] == pytest.approx(float(block[title]), rel=tolerance), (name, title)
        assert 100 * v["dp_rms"] == pytest.approx(float(block["RMS Δp"]), rel=0.01)
        assert 100 * v["same_top"] == pytest.approx(float(block["Same top p"]), abs=0.2)
