"""llama.cpp's 16-bit logit files: written byte for byte, refused when they are broken."""

import errno
import hashlib
import math
import shutil
import struct
from types import SimpleNamespace

import numpy as np
import pytest

import engine
from pipeline import evaluate
from pipeline.compare import compare, logit_files, to_file
from pipeline.errors import ModelError, RefusedError, ScoreError, SettingsError, StorageFailure
from pipeline.settings import (
    EngineSettings,
    PerplexitySettings,
    ProtocolSettings,
)
from tests.make_gguf import tiny_llama
from tests.pipeline.foreign_logits import (
    TEXT,
    VOCAB,
    WINDOW,
    Foreign,
    logits_of,
    patched,
)


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
