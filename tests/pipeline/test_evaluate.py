"""The whole run, inline, mostly on a fake engine: the laws of resuming, merging and refusing."""

import dataclasses
import errno
import hashlib
import json
import math
import os
import pickle
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from fake_engine import BOS, FakeModel, FakeTokenizer, install
from reference import perplexity as reference

from pipeline import evaluate
from pipeline.errors import DataError, ModelError, SettingsError, StoreError
from pipeline.protocols.windows import Windows
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
from pipeline.worker import EvalWorker, WorkerSpec

TEXT = "The quick brown fox jumps over the lazy dog, and — as ever — nobody asks why. " * 5
CONTRACT_KEYS = (
    "job ok exit_code error run_key measure_key table mlflow_run_id wall_s compile_s load_s version numerics "
    "warnings ppl ppl_stderr ppl_stderr_clustered nll_mean_nats bits_per_byte byte_ppl word_ppl "
    "n_windows n_scored n_tokens "
    "tok_per_s n_workers shards_done shards_reused nll_sha256 model_sha256 data_sha256 tokens_sha256 "
    "model_resident_bytes model_pss_sum_bytes anonymous_bytes_max"
).split()


@pytest.fixture
def fake(monkeypatch):
    """The fake engine's model class, installed."""
    return install(monkeypatch)


@pytest.fixture
def make(tmp_path, fake):
    """Settings of a small inline run; groups can be replaced."""
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + bytes(9000))
    (tmp_path / "t.txt").write_text(TEXT)

    def settings(results="results", **groups):
        return PerplexitySettings(
            **{
                "model": ModelSettings(str(tmp_path / "m.gguf")),
                "data": DataSettings(path=str(tmp_path / "t.txt")),
                "protocol": ProtocolSettings(window=32),
                "cluster": ClusterSettings("inline", windows_per_shard=4),
                "tracking": TrackingSettings("none"),
                "paths": PathsSettings(str(tmp_path / results), str(tmp_path / "cache")),
                **groups,
            }
        )

    return settings


def files(result):
    return sorted(path.name for path in Path(result.table).iterdir())


def direct(window=32):
    """Scores of the fake engine without the pipeline: per window, from its definition."""
    import engine

    tokens = FakeTokenizer(None).encode(TEXT)
    protocol, scores = Windows(window, None, BOS), []
    for index in range(tokens.size // window):
        w, model = protocol.window(tokens, index), FakeModel(window)
        batch = engine.Batch(w.tokens, np.arange(window), targets=w.targets)
        scores.append(model.nll(batch, model.new_cache(1, window)))
    return scores


def test_result_equals_the_definition_and_has_every_key(make):
    result = evaluate(make())
    s, scores = result.summary, direct()
    values, windows = np.concatenate(scores), np.repeat(np.arange(len(scores)), [len(x) for x in scores])
    ppl, stderr, clustered = reference.perplexity(values, windows)
    assert set(CONTRACT_KEYS) <= s.keys()
    assert s["ppl"] == pytest.approx(ppl, rel=1e-13)
    assert s["ppl_stderr"] == pytest.approx(stderr, rel=1e-9)
    assert s["ppl_stderr_clustered"] == pytest.approx(clustered, rel=1e-9)
    sums = np.array([math.fsum(x.tolist()) for x in scores], "<f8")
    assert s["nll_sha256"] == hashlib.sha256(sums.tobytes()).hexdigest()
    assert (s["ok"], s["exit_code"], result.exit_code, s["error"]) == (True, 0, 0, None)
    assert (s["n_windows"], s["n_scored"], s["n_tokens"]) == (len(scores), values.size, len(scores) * 32)
    assert (s["n_workers"], s["shards_reused"], s["shards_done"]) == (1, 0, -(-len(scores) // 4))
    assert s["model_pss_sum_bytes"] is not None
    assert s["tok_per_s"] > 0
    assert len(s["run_key"]) == len(s["measure_key"]) == 16
    json.dumps(s, allow_nan=False)


def test_bytes_and_words_of_scored_tokens(make):
    s = evaluate(make()).summary
    raw, n_bytes, text_seen = TEXT.encode(), 0, 0
    for index in range(s["n_windows"]):
        low, high = index * 32 + 17 - 1, index * 32 + 32 - 1  # the stream has BOS in front of the bytes
        n_bytes += high - low
        text_seen += sum(
            (at == 0 or raw[at - 1 : at].isspace()) and not raw[at : at + 1].isspace()
            for at in range(low, high)
        )
    nats = s["nll_mean_nats"] * s["n_scored"]
    assert s["bits_per_byte"] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-12)
    assert s["word_ppl"] == pytest.approx(math.exp(nats / text_seen), rel=1e-10)


@pytest.mark.parametrize("per_shard", [1, 3, 1000])
@pytest.mark.parametrize("batch_tokens", [7, 32, 33, 64, 4096])
def test_perplexity_independent_of_shards_and_batch(make, per_shard, batch_tokens):
    s = evaluate(
        make(
            cluster=ClusterSettings("inline", windows_per_shard=per_shard),
            engine=EngineSettings(batch_tokens=batch_tokens),
        )
    ).summary
    sums = np.array([math.fsum(x.tolist()) for x in direct()], "<f8")
    assert s["nll_sha256"] == hashlib.sha256(sums.tobytes()).hexdigest()


def test_resume_recomputes_nothing_and_gives_the_same_bits(make, fake):
    first = evaluate(make())
    calls = fake.calls
    second = evaluate(make())
    assert fake.calls == calls > 0, "no engine call the second time"
    assert second.summary["nll_sha256"] == first.summary["nll_sha256"]
    assert second.summary["shards_reused"] == second.summary["shards_done"] == first.summary["shards_done"]
    assert second.summary["tok_per_s"] is None
    assert second.summary["n_workers"] == 0
    assert [second.summary[name] for name in ("ppl", "run_key")] == [
        first.summary[name] for name in ("ppl", "run_key")
    ]


def test_resume_computes_only_what_is_missing(make):
    first = evaluate(make())
    untouched = {name: (Path(first.table) / name).stat() for name in files(first)}
    (Path(first.table) / "shard-00000004.parquet").unlink()
    second = evaluate(make())
    assert second.summary["shards_reused"] == first.summary["shards_done"] - 1
    assert second.summary["nll_sha256"] == first.summary["nll_sha256"]
    for name in files(second):
        if name != "shard-00000004.parquet":
            assert (Path(second.table) / name).stat() == untouched[name], "a published file is never touched"


def test_plan_of_the_first_start_holds(make):
    first = evaluate(make())
    second = evaluate(make(cluster=ClusterSettings("inline", windows_per_shard=2)))
    assert second.summary["shards_reused"] == first.summary["shards_done"]
    assert "windows_per_shard=2 is ignored" in " ".join(second.warnings)


def test_an_interrupt_keeps_finished_shards_and_closes_the_workers(make, monkeypatch):
    real, closed = EvalWorker.run, []

    def interrupted(self, shard):
        if shard.first_window == 8:
            raise KeyboardInterrupt
        return real(self, shard)

    monkeypatch.setattr(EvalWorker, "run", interrupted)
    monkeypatch.setattr(EvalWorker, "close", lambda self: closed.append(self))
    with pytest.raises(KeyboardInterrupt):
        evaluate(make())
    assert len(closed) == 1


def test_after_an_interrupt_the_rest_is_computed(make, monkeypatch):
    real = EvalWorker.run

    def interrupted(self, shard):
        if shard.first_window == 8:
            raise KeyboardInterrupt
        return real(self, shard)

    with monkeypatch.context() as patch:
        patch.setattr(EvalWorker, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            evaluate(make())
    resumed, whole = evaluate(make()), evaluate(make("other"))
    assert resumed.summary["shards_reused"] == 2
    assert resumed.summary["nll_sha256"] == whole.summary["nll_sha256"]


def test_different_limits_and_models_are_different_runs(make, tmp_path):
    keys = [evaluate(make()).summary]
    keys.append(evaluate(make(protocol=ProtocolSettings(window=32, limit=2))).summary)
    (tmp_path / "n.gguf").write_bytes(b"GGUF" + bytes(9001))
    keys.append(evaluate(make(model=ModelSettings(str(tmp_path / "n.gguf")))).summary)
    assert len({s["run_key"] for s in keys}) == 3
    assert keys[0]["measure_key"] == keys[2]["measure_key"] != keys[1]["measure_key"]
    assert keys[1]["n_windows"] == 2


def test_engine_settings_are_in_no_key(make):
    keys = {
        evaluate(make(engine=engine)).summary["run_key"]
        for engine in (EngineSettings(), EngineSettings(threads=2), EngineSettings(batch_tokens=64))
    }
    assert len(keys) == 1


def test_window_rows_and_run_rows_say_what_they_are_of(make):
    result = evaluate(make())
    rows = pq.read_table(Path(result.table) / "shard-00000000.parquet", partitioning=None).to_pylist()
    assert [row["window"] for row in rows] == [0, 1, 2, 3]
    assert rows[0].keys() >= {
        "document",
        "n_scored",
        "nll_sq_sum",
        "n_bytes",
        "n_words",
        "shard",
        "worker",
        "host",
    }
    assert rows[0]["measure_key"] == result.summary["measure_key"]
    assert rows[0]["numerics"] == result.summary["numerics"]
    runs = Path(result.table).parents[1] / "table=runs" / Path(result.table).name
    (run,) = [pq.read_table(path, partitioning=None).to_pylist()[0] for path in runs.iterdir()]
    assert run["nll_sha256"] == result.summary["nll_sha256"]
    assert json.loads(run["settings"])["protocol"]["window"] == 32
    assert "numpy" in json.loads(run["versions"])
    evaluate(make())
    assert len(list(runs.iterdir())) == 2, "a row per invocation"


def test_jsonl_windows_name_their_document(make, tmp_path):
    lines = [json.dumps({"text": letter * 60}) for letter in "abc"]
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    result = evaluate(make(data=DataSettings(path=str(tmp_path / "d.jsonl"), format="jsonl")))
    rows = pq.read_table(Path(result.table) / "shard-00000000.parquet", partitioning=None).to_pylist()
    assert [row["document"] for row in rows] == [0, 0, 1, 1]


def test_a_failing_shard_is_set_aside_and_named(make, monkeypatch):
    real = FakeModel.nll

    def broken(self, batch, cache):
        out = real(self, batch, cache)
        if FakeModel.calls == 2:
            out[3] = np.nan
        return out

    with monkeypatch.context() as patch:
        patch.setattr(FakeModel, "nll", broken)
        result = evaluate(make())
    s = result.summary
    assert (s["ok"], s["exit_code"], result.exit_code) == (False, 3, 3)
    assert s["ppl"] is s["nll_sha256"] is s["nll_mean_nats"] is None
    assert s["error"]["type"] == "IncompleteError"
    assert "window 4: negative log-likelihood at position 19 is nan" in s["error"]["message"]
    assert "shard-00000004.parquet" in s["error"]["message"]
    assert s["shards_done"] == s["n_shards"] - 1
    assert evaluate(make()).exit_code == 0, "once the cause is gone the rest is computed"


def test_a_disk_that_fills_up_ends_incomplete_with_finished_shards_kept(make, monkeypatch):
    real, written = pq.write_table, []

    def filling(table, file, **options):
        if "window" in table.column_names:
            written.append(table.num_rows)
            if len(written) > 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(table, file, **options)

    with monkeypatch.context() as patch:
        patch.setattr(pq, "write_table", filling)
        result = evaluate(make())
    assert result.exit_code == 3
    assert result.summary["shards_done"] == 2
    assert "no space left on the device" in result.summary["error"]["message"]
    assert files(result) == ["plan.json", "shard-00000000.parquet", "shard-00000004.parquet"]
    again = evaluate(make())
    assert again.exit_code == 0
    assert again.summary["shards_reused"] == 2


def test_a_broken_shard_file_is_reported_and_computed_again(make):
    first = evaluate(make())
    path = Path(first.table) / "shard-00000004.parquet"
    path.write_bytes(path.read_bytes()[:200])
    (Path(first.table) / "notes.txt").write_text("mine")
    second = evaluate(make())
    assert second.summary["nll_sha256"] == first.summary["nll_sha256"]
    said = " ".join(second.warnings)
    assert "shard-00000004.parquet: is broken" in said
    assert "notes.txt" in said
    assert second.summary["shards_reused"] == first.summary["shards_done"] - 1


@pytest.mark.parametrize(
    ("raw", "kind", "said"),
    [
        (None, "FileNotFoundError", "No such file"),
        (b"", "GGUFFormatError", "expected b'GGUF'"),
        (b"GGUF", "GGUFFormatError", "ends at byte 4"),
        (b"PK\x03\x04 not a model", "GGUFFormatError", "expected b'GGUF'"),
        (b"GGUFwhat....", "UnsupportedModel", "architecture"),
    ],
)
def test_models_that_cannot_be_used_are_refused_before_work(make, tmp_path, raw, kind, said):
    path = tmp_path / "bad.gguf"
    if raw is not None:
        path.write_bytes(raw)
    with pytest.raises(ModelError, match=said) as caught:
        evaluate(make(model=ModelSettings(str(path))))
    assert caught.value.exit_code == 2
    assert caught.value.kind == kind
    assert caught.value.hint
    assert "bad.gguf" in str(caught.value)
    assert not list((tmp_path / "results").rglob("*.parquet"))


def test_a_tokenizer_that_appends_eos_is_refused(make, monkeypatch):
    monkeypatch.setattr(FakeTokenizer, "add_eos", True)
    with pytest.raises(ModelError, match="end-of-sequence"):
        evaluate(make())


def test_short_text_wrong_digest_and_bad_settings_are_refused_before_work(make, tmp_path, fake):
    with pytest.raises(DataError, match="expected at least"):
        evaluate(make(protocol=ProtocolSettings(window=4000)))
    crlf = tmp_path / "crlf.txt"
    crlf.write_bytes(b"one\r\ntwo\r\n")
    pinned = hashlib.sha256(b"one\ntwo\n").hexdigest()
    with pytest.raises(DataError, match="CRLF"):
        evaluate(make(data=DataSettings(path=str(crlf), sha256=pinned)))
    with pytest.raises(SettingsError, match=r"protocol\.window=0"):
        evaluate(make(protocol=ProtocolSettings(window=0)))
    assert fake.calls == 0


def test_results_or_cache_that_cannot_be_written_are_refused_before_work(make, tmp_path, fake):
    (tmp_path / "file").write_text("")
    for paths in (
        PathsSettings(str(tmp_path / "file"), str(tmp_path / "cache")),
        PathsSettings(str(tmp_path / "results"), str(tmp_path / "file/cache")),
    ):
        with pytest.raises(StoreError, match="cannot write"):
            evaluate(make(paths=paths))
    assert fake.calls == 0


def test_a_window_beyond_the_trained_context_is_a_warning(make):
    result = evaluate(make(protocol=ProtocolSettings(window=65)))
    assert "trained with, 64 tokens" in " ".join(result.summary["warnings"])
    assert not evaluate(make(protocol=ProtocolSettings(window=64))).warnings


def test_dry_run_tells_the_plan_and_starts_nothing(make, fake):
    result = evaluate(make(dry_run=True))
    s = result.summary
    assert set(CONTRACT_KEYS) <= s.keys()
    assert (s["dry_run"], s["n_workers"], s["shards_todo"], s["n_shards"]) == (
        True,
        1,
        s["n_shards"],
        -(-s["n_windows"] // 4),
    )
    assert s["n_tokens"] == s["n_windows"] * 32
    assert fake.calls == 0
    assert not Path(result.table).exists()
    assert evaluate(make()).summary["run_key"] == s["run_key"]
    assert evaluate(make(dry_run=True)).summary["shards_todo"] == 0


def test_tracking_that_fails_costs_a_warning_and_no_number(make, monkeypatch):
    from pipeline import perplexity

    class Broken:
        def __init__(self):
            self.warnings, self.closed = [], False

        def prepare(self):
            pass

        def log_run(self, *_args, **_options):
            raise RuntimeError("the index is gone")

        def close(self):
            self.closed = True

    tracker = Broken()
    monkeypatch.setattr(perplexity, "open_tracker", lambda *_: tracker)
    result = evaluate(make())
    assert result.exit_code == 0
    assert result.summary["ppl"] > 1
    assert result.summary["mlflow_run_id"] is None
    assert "the index is gone" in result.summary["warnings"][0]
    assert tracker.closed


def test_tracking_is_handed_settings_numbers_and_files(make, monkeypatch):
    from pipeline import perplexity

    logged = []

    class Tracker:
        warnings = ()

        def prepare(self):
            pass

        def log_run(self, name, params, metrics, tags, artifacts, data, **rest):
            logged.append(
                (params, metrics, tags, [path.name for path in artifacts if path.stat().st_size], data, rest)
            )
            return "an id"

        def close(self):
            pass

    monkeypatch.setattr(perplexity, "open_tracker", lambda *_: Tracker())
    s = evaluate(make()).summary
    (params, metrics, tags, names, data, rest), *_ = logged
    assert s["mlflow_run_id"] == "an id"
    assert params["protocol"]["window"] == 32
    assert metrics["ppl"] == s["ppl"]
    assert tags["run_key"] == s["run_key"]
    assert names[1:] == ["windows.parquet", "plan.json"]
    assert data.sha256 == s["data_sha256"]
    assert rest["complete"]


def test_progress_is_told_of_every_window(make):
    told = []

    class Progress:
        def start(self, *counts, **sums):
            told.append(("start", counts, sums))

        def note(self, message):
            pass

        def advance(self, n_windows, n_scored, nll_sum, n_tokens):
            told.append(("advance", n_windows, n_scored, n_tokens))

        def stop(self):
            told.append(("stop",))

    first = evaluate(make(), Progress())
    n = first.summary["n_windows"]
    assert told[0][:2] == ("start", (n, 0))
    assert told[-1] == ("stop",)
    assert sum(entry[1] for entry in told if entry[0] == "advance") == n
    (Path(first.table) / "shard-00000000.parquet").unlink()
    told.clear()
    evaluate(make(), Progress())
    assert told[0][:2] == ("start", (n, n - 4))
    assert told[0][2]["n_scored"] == first.summary["n_scored"] - told[1][2]


def spec_of(make, monkeypatch):
    specs = []
    real = EvalWorker.__init__
    with monkeypatch.context() as patch:
        patch.setattr(EvalWorker, "__init__", lambda self, spec: (specs.append(spec), real(self, spec))[1])
        evaluate(make())
    return specs[0]


def test_worker_spec_is_small_and_travels(make, monkeypatch):
    spec = spec_of(make, monkeypatch)
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert len(pickle.dumps(spec)) < 4096
    assert isinstance(spec, WorkerSpec)


@pytest.mark.parametrize("changed", ["model_sha256", "tokens_sha256"])
def test_a_worker_with_another_file_under_the_path_refuses(make, monkeypatch, changed):
    spec = dataclasses.replace(spec_of(make, monkeypatch), **{changed: "0" * 64})
    with pytest.raises(Exception, match="expected 0000") as caught:
        EvalWorker(spec)
    assert caught.value.kind == "ScoreError"
    assert pickle.loads(pickle.dumps(caught.value)).hint == caught.value.hint
