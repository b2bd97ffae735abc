"""llama.cpp's 16-bit logit files: written byte for byte, read as a base, refused when they are broken.

`Foreign` below is a writer and reader of its own, value by value from protocol.md 2.5.
"""

import errno
import hashlib
import math
import shutil
import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from make_gguf import tiny_llama
from omegaconf import OmegaConf

import engine
from pipeline import evaluate
from pipeline.compare import compare, logit_files, to_file
from pipeline.compare.settings import (
    CompareSettings,
    LogitsSettings,
    OnTheSpotSettings,
    SensitivitySettings,
)
from pipeline.datasets import WIKITEXT2_SHA256
from pipeline.errors import DataError, ModelError, RefusedError, ScoreError, SettingsError, StorageFailure
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

TEXT = "The quick brown fox jumps over the lazy dog, and — as ever — nobody asks why. " * 2
WINDOW, VOCAB = 32, 300


class Foreign:
    """The format as protocol.md tells it; the clip is 24 nats in ik_llama.cpp."""

    def __init__(self, clip=16):
        self.clip = np.float32(clip)

    def record(self, logits):
        f = np.float32
        m = max(logits)
        lo = max(min(logits), m - self.clip)
        total = sum(math.exp(float(x) - float(m)) for x in logits)
        scale = f(m - lo) / f(65535)
        inverse = f(1) / scale if scale else f(0)
        steps = [round(float(f(inverse * f(x - lo)))) if x > lo else 0 for x in logits]
        pad = [0] * (len(logits) % 2)
        return struct.pack("<ff", scale, f(f(lo - m) - f(math.log(total)))) + struct.pack(
            f"<{len(steps + pad)}H", *steps, *pad
        )

    def file(self, n_ctx, tokens, rows):
        head = struct.pack("<8siii", b"_logits_", n_ctx, rows.shape[1], len(tokens) // n_ctx)
        return head + struct.pack(f"<{len(tokens)}i", *tokens) + b"".join(map(self.record, rows))

    def ln_p(self, record, n_vocab):
        scale, least = struct.unpack_from("<ff", record)
        return np.array(struct.unpack_from(f"<{n_vocab}H", record, 8), np.float64) * scale + least


@pytest.fixture(autouse=True)
def _no_page(monkeypatch):
    monkeypatch.setattr(
        "pipeline.compare.report.write", lambda summary, pairs, folder, tokenizer: folder / "x.html"
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model of 300 tokens in three types, and a text."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "t.txt").write_text(TEXT)
    for name, type_name in (("base", "F32"), ("q8", "Q8_0"), ("q4", "Q4_0")):
        tiny_llama(folder / f"{name}.gguf", type_name=type_name)
    return folder


@pytest.fixture
def make(tmp_path, models):
    """Settings of a comparison of these; `out` writes the base's logits."""
    for path in [*models.glob("*.gguf"), *models.glob("*.txt")]:
        (tmp_path / path.name).write_bytes(path.read_bytes())

    def settings(*variants, base="base.gguf", out=None, overwrite=False, results="results", **groups):
        return CompareSettings(
            **{
                "base": ModelSettings(str(tmp_path / base)),
                "variants": [str(tmp_path / v) if "." in v else v for v in variants],
                "data": DataSettings(path=str(tmp_path / "t.txt")),
                "protocol": ProtocolSettings(window=WINDOW),
                "cluster": ClusterSettings("inline", windows_per_shard=2),
                "tracking": TrackingSettings("none"),
                "paths": PathsSettings(str(tmp_path / results), str(tmp_path / "cache")),
                "logits": LogitsSettings(None if out is None else str(tmp_path / out), overwrite),
                **groups,
            }
        )

    return settings


@pytest.fixture
def written(make, tmp_path, models):
    """The base's file, by ourselves; kept for all tests."""
    if not (models / "b.logits").exists():
        compare(make(out="b.logits"))
        (models / "b.logits").write_bytes((tmp_path / "b.logits").read_bytes())
    (tmp_path / "b.logits").write_bytes((models / "b.logits").read_bytes())
    return tmp_path / "b.logits"


def logits_of(path, tokens=None):
    """Tokens of the text's whole windows, and the engine's logits of each scored token, window by window."""
    with engine.open(str(path)) as file:
        tokens = engine.Tokenizer(file).encode(TEXT) if tokens is None else tokens
        tokens = tokens[: tokens.size // WINDOW * WINDOW]
        model = engine.load_model(file, batch_tokens=WINDOW)
        scored = (np.arange(WINDOW) >= WINDOW // 2) & (np.arange(WINDOW) < WINDOW - 1)
        rows = [
            model.logits(
                engine.Batch(tokens[at : at + WINDOW], np.arange(WINDOW), outputs=scored),
                model.new_cache(1, WINDOW),
            )
            for at in range(0, tokens.size, WINDOW)
        ]
        del model
    targets = np.concatenate(
        [tokens[at + WINDOW // 2 + 1 : at + WINDOW] for at in range(0, tokens.size, WINDOW)]
    )
    return tokens, np.concatenate(rows), targets


def rows_of(summary):
    """Rows of the only variant."""
    (variant,) = summary["variants"]
    paths = sorted(Path(variant["table"]).glob("shard-*"))
    return [row for path in paths for row in pq.read_table(path, partitioning=None).to_pylist()]


def patched(path, at, raw, name="broken.logits"):
    data = bytearray(path.read_bytes())
    data[at : at + len(raw)] = raw
    (path.parent / name).write_bytes(data)
    return name


@pytest.mark.parametrize("n_vocab", [1, 2, 7, 300, 9001])
def test_records_equal_the_definition_byte_for_byte(n_vocab):
    rng = np.random.default_rng(n_vocab)
    for spread in (0.1, 3.0, 12.0):
        row = (rng.normal(0, spread, n_vocab) - 5).astype(np.float32)
        found = logit_files.record(row, logit_files.ln_sum_exp(row))
        assert found.tobytes() == Foreign().record(row)
        assert found.size == logit_files.record_words(n_vocab)
        ln_p = logit_files.ln_p(found, n_vocab)
        assert ln_p.tolist() == Foreign().ln_p(found.tobytes(), n_vocab).tolist()
        assert [logit_files.ln_p_of(found, i) for i in range(n_vocab)] == ln_p.tolist()
        exact = row.astype(np.float64) - logit_files.ln_sum_exp(row)
        clipped = np.maximum(exact, exact.max() - 16)
        assert np.abs(ln_p - clipped).max() < 16 / 65535 / 2 + 1e-5


def test_logits_that_are_all_the_same_have_no_steps():
    row = np.full(5, 2.5, np.float32)
    found = logit_files.record(row, logit_files.ln_sum_exp(row))
    assert found.tobytes() == Foreign().record(row)
    assert logit_files.ln_p(found, 5) == pytest.approx(-math.log(5), abs=1e-7)


def ln_sum(row):
    """In float64, summed exactly."""
    return math.log(math.fsum(math.exp(x) for x in row.tolist()))


def test_sums_of_exp_equal_those_of_the_math_library():
    rng = np.random.default_rng(0)
    for n in (1, 9001):
        row, other = rng.normal(0, 6, (2, n)).astype(np.float32)
        assert logit_files.ln_sum_exp(row) == pytest.approx(ln_sum(row), abs=2e-14)
        base, mine = row - ln_sum(row), other - ln_sum(other)
        expected = (np.exp(base) * (base - mine))[base > -16].sum()
        found = logit_files.divergence(base, other, logit_files.ln_sum_exp(other))
        assert found == pytest.approx(expected, abs=1e-13)


def test_the_size_is_the_one_of_protocol_2_5():
    for n_ctx, n_vocab, n_chunk in ((512, 49152, 8), (512, 50280, 560), (33, 301, 2)):
        nv = 2 * ((n_vocab + 1) // 2) + 4
        per_window = len(range(n_ctx // 2, n_ctx - 1))
        expected = 20 + 4 * n_chunk * n_ctx + n_chunk * per_window * 2 * nv
        assert logit_files.file_bytes(n_ctx, n_vocab, n_chunk) == expected


@pytest.mark.parametrize("vocab", [300, 301])
def test_the_file_equals_an_independent_writer_s(make, tmp_path, vocab):
    tiny_llama(tmp_path / "base.gguf", vocab=vocab)
    s = compare(make(out="b.logits")).summary
    tokens, rows, _ = logits_of(tmp_path / "base.gguf")
    data = (tmp_path / "b.logits").read_bytes()
    assert data == Foreign().file(WINDOW, tokens.tolist(), rows)
    told = s["logits"]
    assert (told["bytes"], told["n_windows"]) == (len(data), tokens.size // WINDOW)
    assert told["sha256"] == hashlib.sha256(data).hexdigest()
    assert told["clipped"] == np.mean(rows < rows.max(axis=1, keepdims=True) - np.float32(16))
    assert list(tmp_path.glob(".*")) == [], "no temporary file is left"


def test_the_bytes_depend_on_neither_batch_nor_what_is_held_at_once(make, tmp_path, monkeypatch, written):
    monkeypatch.setattr(to_file, "LOGITS_BYTES", 4 * VOCAB * 4)
    compare(make(out="few.logits", engine=EngineSettings(batch_tokens=7)))
    compare(make(out="threads.logits", engine=EngineSettings(threads=2)))
    assert (tmp_path / "few.logits").read_bytes() == written.read_bytes()
    assert (tmp_path / "threads.logits").read_bytes() == written.read_bytes()


def test_logits_alone_leave_the_file_and_the_perplexities(make, tmp_path):
    settings = make(out="b.logits")
    s = compare(settings).summary
    alone = evaluate(
        PerplexitySettings(
            model=settings.base,
            **{
                n: getattr(settings, n)
                for n in ("data", "protocol", "engine", "cluster", "tracking", "paths")
            },
        )
    ).summary
    assert (s["exit_code"], s["variants"], s["run_key"], s["table"]) == (0, [], None, None)
    assert s["base"]["ppl"] == s["logits"]["ppl"] == pytest.approx(alone["ppl"], rel=1e-12)
    tokens, _, targets = logits_of(tmp_path / "base.gguf")
    data = (tmp_path / "b.logits").read_bytes()
    start, size = 20 + 4 * tokens.size, 2 * logit_files.record_words(VOCAB)
    stored = [Foreign().ln_p(data[start + i * size :][:size], VOCAB)[t] for i, t in enumerate(targets)]
    assert s["logits"]["ppl_read_back"] == pytest.approx(math.exp(-np.mean(stored)), rel=1e-12)
    (warning,) = (w for w in s["warnings"] if "16 bits" in w)
    assert f"{len(data):,} bytes" in warning
    assert "16 nats below the maximum" in warning


def test_logits_beside_variants_change_no_figure(make, tmp_path):
    with_file = compare(make("q4.gguf", out="b.logits")).summary
    without = compare(make("q4.gguf", results="other")).summary
    assert with_file["logits"]["ppl"] == pytest.approx(with_file["base"]["ppl"], rel=1e-12)
    assert without["logits"] is None
    assert [v["kld_sha256"] for v in with_file["variants"]] == [v["kld_sha256"] for v in without["variants"]]


def test_a_dry_run_says_the_size_and_writes_nothing(make, tmp_path):
    s = compare(make(out="b.logits", dry_run=True)).summary
    n_windows = s["n_windows"]
    assert any(f"{logit_files.file_bytes(WINDOW, VOCAB, n_windows):,} bytes" in w for w in s["warnings"])
    assert not (tmp_path / "b.logits").exists()


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


def libllama_logits(path, tokens):
    from cyllama.llama import llama_cpp

    llama_cpp.disable_logging()
    llama_cpp.ggml_backend_load_all()

    class Model(llama_cpp.LlamaModel):
        @property
        def n_vocab(self):  # asked for by get_logits_ith
            return self.get_vocab().n_vocab

    model = Model(str(path), llama_cpp.LlamaModelParams(), verbose=False)
    rows = []
    for at in range(0, tokens.size, WINDOW):
        params = llama_cpp.LlamaContextParams()
        params.n_ctx = params.n_batch = params.n_ubatch = 64
        params.type_k = params.type_v = params.flash_attn_type = 0  # F32, F32, none
        params.n_threads = params.n_threads_batch = 1
        context = llama_cpp.LlamaContext(model, params, verbose=False)
        batch = llama_cpp.LlamaBatch(n_tokens=WINDOW, embd=0, n_seq_max=1)
        for position, token in enumerate(tokens[at : at + WINDOW].tolist()):
            batch.add(token, position, [0], True)
        context.decode(batch)
        rows += [np.array(context.get_logits_ith(i), np.float32) for i in range(WINDOW // 2, WINDOW - 1)]
    return np.array(rows)


def test_a_file_cut_short_is_refused_saying_where(make, tmp_path, written):
    data = written.read_bytes()
    (tmp_path / "cut.logits").write_bytes(data[:-100])
    with pytest.raises(ModelError, match=r"cut\.logits: ends at byte") as caught:
        compare(make("q4.gguf", base="cut.logits"))
    assert f"{len(data) - 100:,}, expected {len(data):,}" in str(caught.value)
    assert "interrupted" in caught.value.hint
    (tmp_path / "long.logits").write_bytes(data + b"\0")
    with pytest.raises(ModelError, match="ends at byte"):
        compare(make("q4.gguf", base="long.logits"))
    (tmp_path / "head.logits").write_bytes(data[:12])
    with pytest.raises(ModelError, match="12 bytes"):
        compare(make("q4.gguf", base="head.logits"))


@pytest.mark.parametrize(
    ("at", "raw", "message"),
    [
        (8, struct.pack("<i", -1), "windows of -1 tokens"),
        (12, struct.pack("<i", 0), "0 logits a token"),
        (16, struct.pack("<i", 0), "0 windows"),
        (16, struct.pack("<i", 2**31 - 1), "ends at byte"),
        (20 + 4 * 5, struct.pack("<i", 300), "token 5 at byte 40 is 300, expected 0 to 299"),
        (20 + 4 * 5, struct.pack("<i", -7), "token 5 at byte 40 is -7"),
    ],
)
def test_a_broken_head_is_refused(make, written, at, raw, message):
    with pytest.raises(ModelError, match="broken") as caught:
        compare(make("q4.gguf", base=patched(written, at, raw)))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "head", [(math.nan, -20.0), (-1e-4, -3.0), (1e-3, -20.0), (1e-4, -3.0), (1e-9, -20.0)]
)
def test_a_record_that_no_softmax_gives_is_refused(make, written, head):
    with engine.open(str(written.parent / "base.gguf")) as file:
        n_tokens = engine.Tokenizer(file).encode(TEXT).size // WINDOW * WINDOW
    at = 20 + 4 * n_tokens + 17 * 2 * logit_files.record_words(VOCAB)
    name = patched(written, at, struct.pack("<ff", *head))
    with pytest.raises(ModelError, match=f"record 2 of window 1, at byte {at:,}, has scale"):
        compare(make("q4.gguf", base=name))
    one = ProtocolSettings(window=WINDOW, limit=1)
    assert compare(make("q4.gguf", base=name, protocol=one, dry_run=True)).exit_code == 0, "it is not needed"


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


def test_places_where_no_file_can_go_are_refused_before_work(make, tmp_path, written, monkeypatch):
    with pytest.raises(RefusedError, match=r"logits\.out: .*b\.logits exists") as caught:
        compare(make(out="b.logits"))
    assert "logits.overwrite=true" in caught.value.hint
    assert compare(make(out="b.logits", overwrite=True)).exit_code == 0
    with pytest.raises(SettingsError, match="is a model of this comparison"):
        compare(make(out="base.gguf", overwrite=True))
    with pytest.raises(SettingsError, match="is a model of this comparison"):
        compare(make("q4.gguf", out="q4.gguf", overwrite=True))
    with pytest.raises(RefusedError, match="there is no folder"):
        compare(make(out="no/b.logits"))
    usage = SimpleNamespace(total=1, used=1, free=30 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    compare(make(out="fits.logits"))
    usage.free = 17 << 20
    monkeypatch.setattr(logit_files, "file_bytes", lambda *sizes: 1 << 30)
    with pytest.raises(RefusedError, match="the file needs 1,073,741,824"):
        compare(make(out="c.logits"))


def test_a_disk_that_fills_up_leaves_nothing(make, tmp_path, monkeypatch):
    calls = []

    def full(row, ln_sum):
        calls.append(row)
        if len(calls) == 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        return np.zeros(logit_files.record_words(row.size), np.uint16)

    monkeypatch.setattr(logit_files, "record", full)
    with pytest.raises(StorageFailure, match="No space left on device; nothing is left of it"):
        compare(make(out="b.logits"))
    assert not list(tmp_path.glob("*b.logits*"))


@pytest.mark.parametrize("error", [KeyboardInterrupt, ScoreError])
def test_what_is_interrupted_leaves_nothing(make, tmp_path, monkeypatch, error):
    def stop(row, ln_sum):
        raise error("stop")

    monkeypatch.setattr(logit_files, "record", stop)
    with pytest.raises(error):
        compare(make(out="b.logits"))
    assert not [path for path in tmp_path.iterdir() if "b.logits" in path.name]


def test_logits_that_are_no_numbers_are_named(make, tmp_path):
    tiny_llama(tmp_path / "nan.gguf", extra={"output_norm.weight": np.full(64, np.nan, np.float32)})
    with pytest.raises(ScoreError, match="window 0: the logit of token 0 at position 16 is nan"):
        compare(make(base="nan.gguf", out="b.logits"))
    assert not (tmp_path / "b.logits").exists()


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
