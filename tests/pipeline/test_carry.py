"""Protocol `carry`: windows by hand and by laws, and runs whose documents are handed from shard to shard."""

from __future__ import annotations

import errno
import json
import logging
import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from fake_engine import BOS, FakeModel, FakeTokenizer, install
from reference import perplexity as reference

import engine
from pipeline import evaluate
from pipeline.datasets import Text
from pipeline.errors import DataError, SettingsError
from pipeline.handover import state_path
from pipeline.protocols.apart import Apart
from pipeline.protocols.carry import Carry
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
from pipeline.shards import plan
from pipeline.tokens import token_stream
from pipeline.windows import CacheShape, cache_shape, open_protocol
from tests.engine.toy_recurrent import Toy

DOCUMENTS = ("A short one.", "x", "", "It was a bright cold day in April. " * 6, "", "Ende.", "ab " * 30)
N_READ = sum(len(text.encode()) for text in DOCUMENTS)  # a BOS in front, and the last byte is not read


def letters(ids):
    return "".join("^" if i == 0 else chr(96 + i) for i in ids.tolist())


def test_ten_tokens_by_hand():
    """The docstring's drawing."""
    protocol, tokens = Carry(4, None, 0), np.arange(11, dtype=np.int32)
    windows = [protocol.window(tokens, i) for i in range(protocol.n_windows(11))]
    assert [(letters(w.tokens), letters(w.targets)) for w in windows] == [
        ("^ab", "abc"),
        ("cdef", "defg"),
        ("ghi", "hij"),
    ]
    assert [(w.position, w.distance, w.half) for w in windows] == [(0, 0, 2), (3, 4, 3), (7, 8, None)]
    assert [letters(w.targets[w.half :]) for w in windows[:2]] == ["c", "g"]


@pytest.mark.parametrize("size", [3, 4, 8, 50])
@pytest.mark.parametrize("n", [2, 3, 4, 8, 9, 16, 17, 49, 50, 51])
def test_each_token_is_read_and_scored_once_and_halves_are_those_of_windows(n, size):
    tokens = np.arange(n, dtype=np.int32)
    protocol, read, scored, halves = Carry(size, None, None), [], [], []
    for index in range(protocol.n_windows(n)):
        window = protocol.window(tokens, index)
        assert window.position == len(read), "it goes on where the one before stopped"
        assert window.first_token == window.position
        assert window.targets.tolist() == tokens[window.scored].tolist()
        read += window.tokens.tolist()
        scored += range(n)[window.scored]
        if window.half is not None:
            halves += window.targets[window.half :].tolist()
    assert (read, scored) == (list(range(n - 1)), list(range(1, n)))
    assert protocol.longest(n) == len(read)
    other = Windows(size, None, None)
    windows = [other.window(tokens, i) for i in range(n // size)]
    assert halves == [t for window in windows for t in window.targets.tolist() if t >= 0]


def test_limit_counts_the_first_tokens():
    assert Carry(512, 8, None).longest(10_000) == 4095
    assert Carry(512, 8, None).measure(10_000) == {
        "protocol": "carry",
        "protocol_version": 1,
        "protocol_window": 512,
        "protocol_limit": 8,
        "protocol_bos_id": None,
    }
    assert Carry(512, 20, None).measure(10_000) == Carry(512, None, None).measure(10_000)
    with pytest.raises(DataError, match="1 tokens, expected at least 2"):
        Carry(512, None, None).n_windows(1)


@pytest.fixture
def stream(tmp_path):
    """DOCUMENTS apart, by bytes."""
    return token_stream(Text("", "0" * 64, "t", documents=DOCUMENTS), FakeTokenizer(None), tmp_path)


def test_documents_begin_anew(stream):
    protocol = open_protocol(ProtocolSettings("carry", 16), BOS, stream)
    assert isinstance(protocol, Apart)
    n_windows = protocol.n_windows(stream.tokens.size)
    windows = [protocol.window(stream.tokens, i) for i in range(n_windows)]
    begins = [w.index for w in windows if w.position == 0]
    assert protocol.begins(stream.tokens.size).tolist() == begins
    assert [stream.counted(windows[i])["document"] for i in begins] == [0, 1, 3, 5, 6]
    assert protocol.longest(stream.tokens.size) == len(DOCUMENTS[3])
    assert sum(w.tokens.size for w in windows) == N_READ
    limited = Apart(Carry(16, 4, BOS), stream)
    assert limited.begins(stream.tokens.size).tolist() == begins[:3]
    assert limited.longest(stream.tokens.size) == 31


@pytest.mark.parametrize("per_shard", [1, 2, 3, 4, 100])
@pytest.mark.parametrize(
    "lengths", [[1], [9], [4, 4], [1, 1, 1, 1, 1, 1], [2, 6, 1], [3, 3, 9, 1, 1, 5, 2], [8, 1, 8]]
)
def test_shards_are_cut_by_documents(lengths, per_shard):
    ends = np.cumsum(lengths)
    begins = ends - lengths
    shards = plan(int(ends[-1]), per_shard, begins)
    assert [i for s in shards for i in range(s.first_window, s.end)] == list(range(ends[-1]))
    for shard, following in zip(shards, [*shards[1:], None], strict=True):
        assert shard.n_windows <= per_shard
        assert shard.resumes == (shard.first_window not in begins)
        assert shard.hands_on == (following is not None and following.resumes)
        inside = [b for b in begins if shard.first_window < b < shard.end]
        assert not (inside and (shard.resumes or shard.hands_on)), "a long document shares no shard"
        if following is not None and not shard.resumes and not following.resumes and not shard.hands_on:
            n_next = lengths[begins.tolist().index(following.first_window)]
            assert shard.n_windows + n_next > per_shard, "short ones share what they can"


def test_the_drawing_of_shards():
    made = plan(9, 4, np.array([0, 2, 8]))
    assert [(s.first_window, s.n_windows, s.resumes, s.hands_on) for s in made] == [
        (0, 2, False, False),
        (2, 4, False, True),
        (6, 2, True, False),
        (8, 1, False, False),
    ]


def test_the_cache_keeps_all_layers_of_as_many_sequences_as_there_are(stream):
    windows, carry = ProtocolSettings("windows", 512), ProtocolSettings("carry", 512)
    assert cache_shape(Windows(512, None, 0), 9001, windows, 4, 4096) == CacheShape(4, 512, True)
    assert cache_shape(Carry(512, None, 0), 9001, carry, 4, 4096) == CacheShape(1, 9000, False)
    carry.window = 16
    apart, n_tokens = open_protocol(carry, BOS, stream), stream.tokens.size
    assert cache_shape(apart, n_tokens, carry, 4, 4096) == CacheShape(4, 210, False)
    assert cache_shape(apart, n_tokens, carry, 40, 4096) == CacheShape(5, 210, False)


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Settings of a small inline run over DOCUMENTS on the fake engine, recurrent."""
    install(monkeypatch)
    (tmp_path / "m.gguf").write_bytes(b"GGUFmamb" + bytes(9000))
    lines = [json.dumps({"text": text, "w": i + 1}) for i, text in enumerate(DOCUMENTS)]
    (tmp_path / "d.jsonl").write_text("\n".join(lines))

    def settings(results="results", per_shard=3, **groups):
        return PerplexitySettings(
            **{
                "model": ModelSettings(str(tmp_path / "m.gguf")),
                "data": DataSettings(path=str(tmp_path / "d.jsonl"), format="jsonl"),
                "protocol": ProtocolSettings("carry", 16),
                "cluster": ClusterSettings("inline", windows_per_shard=per_shard),
                "tracking": TrackingSettings("none"),
                "paths": PathsSettings(str(tmp_path / results), str(tmp_path / "cache")),
                **groups,
            }
        )

    return settings


def direct(documents=DOCUMENTS):
    """The fake engine's scores of each document as one sequence, without the pipeline."""
    found = []
    for tokens in map(FakeTokenizer(None).encode, documents):
        if tokens.size > 1:
            model = FakeModel(tokens.size)
            batch = engine.Batch(tokens[:-1], np.arange(tokens.size - 1), targets=tokens[1:])
            found.append(model.nll(batch, model.new_cache(1, tokens.size)))
    return found


def rows_of(summary):
    table = pq.ParquetDataset(sorted(Path(summary["table"]).glob("shard-*.parquet")), partitioning=None)
    return table.read().to_pylist()


def test_a_run_equals_the_definition(make):
    s, scores = evaluate(make()).summary, direct()
    values = np.concatenate(scores)
    windows = np.cumsum(np.concatenate([np.arange(1, x.size + 1) % 16 == 0 for x in scores]))
    windows += np.repeat(np.arange(len(scores)), [x.size for x in scores])
    ppl, stderr, clustered = reference.perplexity(values, windows)
    assert s["ppl"] == pytest.approx(ppl, rel=1e-13)
    assert s["ppl_stderr"] == pytest.approx(stderr, rel=1e-9)
    assert s["ppl_stderr_clustered"] == pytest.approx(clustered, rel=1e-9)
    assert (s["n_scored"], s["n_tokens"]) == (values.size, N_READ)
    assert s["n_documents"] == 7
    raw = "".join(DOCUMENTS).encode()
    assert s["byte_ppl"] == pytest.approx(math.exp(values.sum() / len(raw)), rel=1e-12)


def test_halves_are_scored_on_the_tokens_of_windows(make):
    s, scores = evaluate(make()).summary, direct()
    halves = [x[16 * i + 8 : 16 * i + 15] for x in scores for i in range((x.size + 1) // 16)]
    numbers = np.repeat(np.arange(len(halves)), 7)
    ppl, stderr, clustered = reference.perplexity(np.concatenate(halves), numbers)
    assert s["half_ppl"] == pytest.approx(ppl, rel=1e-13)
    assert s["half_ppl_stderr"] == pytest.approx(stderr, rel=1e-9)
    assert s["half_ppl_stderr_clustered"] == pytest.approx(clustered, rel=1e-9)
    assert s["half_nll_mean_nats"] == pytest.approx(np.mean(halves), rel=1e-13)
    other = make("w", data=DataSettings(path=make().data.path, format="jsonl", documents="apart"))
    other.protocol = ProtocolSettings("windows", 16)
    windows = evaluate(other).summary
    assert windows["n_scored"] == s["half_n_scored"] == len(halves) * 7
    assert windows["half_ppl"] is None


def test_rows_tell_the_distance_from_the_documents_start(make):
    rows = rows_of(evaluate(make()).summary)
    sums, counts = {}, {}
    for row in rows:
        sums[row["distance"]] = sums.get(row["distance"], 0.0) + row["nll_sum_nats"]
        counts[row["distance"]] = counts.get(row["distance"], 0) + row["n_scored"]
    scores = [np.concatenate([[np.nan], x]) for x in direct()]  # by place: a BOS is at 0
    for distance in range(0, 224, 16):
        there = [x[distance : distance + 16] for x in scores]
        assert sums[distance] == pytest.approx(np.nansum(np.concatenate(there)), rel=1e-12)
        assert counts[distance] == np.count_nonzero(~np.isnan(np.concatenate(there)))
    assert len(sums) == 14


@pytest.mark.parametrize("documents", ["joined", "apart"])
def test_one_digest_for_any_batch_and_shard_and_nothing_is_computed_twice(make, documents):
    data, digests = make().data, set()
    data.documents = documents
    settings = [(7, 1), (16, 3), (33, 1000), (4096, 5), (4096, 1)]
    for at, (batch_tokens, per_shard) in enumerate(settings):
        before = FakeModel.tokens
        batch = EngineSettings(batch_tokens=batch_tokens)
        s = evaluate(make(f"r{at}", per_shard, data=data, engine=batch)).summary
        assert s["ok"], s["error"]
        assert FakeModel.tokens - before == s["n_tokens"] == s["n_scored"]
        assert not list(Path(s["table"]).glob(".*")), "no state is left behind"
        digests.add((s["run_key"], s["nll_sha256"], s["ppl"], s["half_ppl"]))
    assert len(digests) == 1


def test_weights_weigh_halves_too(make):
    data = make().data
    data.weight = "w"
    s = evaluate(make(data=data)).summary
    sums = []
    for document, x in zip((0, 1, 3, 5, 6), direct(), strict=True):
        halves = [x[16 * i + 8 : 16 * i + 15] for i in range((x.size + 1) // 16)]
        sums += [(document + 1, half) for half in halves]
    mean = sum(w * x.sum() for w, x in sums) / sum(w * x.size for w, x in sums)
    assert s["half_nll_mean_nats"] == pytest.approx(mean, rel=1e-12)


class Stop(BaseException):
    """Ends a run as a signal would."""


def interrupted(make, monkeypatch, at_call, **groups):
    """Run until the engine's call of that rank, which ends it; returns the tokens that were computed."""
    score, calls, before = FakeModel.nll, [0], FakeModel.tokens

    def nll(self, batch, cache):
        calls[0] += 1
        if calls[0] == at_call:
            raise Stop
        return score(self, batch, cache)

    monkeypatch.setattr(FakeModel, "nll", nll)
    with pytest.raises(Stop):
        evaluate(make(**groups))
    monkeypatch.setattr(FakeModel, "nll", score)
    return FakeModel.tokens - before


@pytest.mark.parametrize("at_call", [2, 3, 5, 8])
def test_a_run_goes_on_in_the_middle_of_a_document(make, monkeypatch, at_call):
    whole = evaluate(make("whole")).summary
    shards = plan(whole["n_windows"], 3, np.array([0, 1, 2, 16, 17]))
    interrupted(make, monkeypatch, at_call)
    run_dir = Path(evaluate(make(dry_run=True)).summary["table"])
    done = shards[: at_call - 1]  # a call a shard
    assert sorted(path.name for path in run_dir.glob("shard-*")) == [shard.file_name for shard in done]
    states = [path.name for path in run_dir.glob(".state-*")]
    assert states == [state_path(run_dir, done[-1].end).name] * done[-1].hands_on
    before = FakeModel.tokens
    s = evaluate(make()).summary
    assert (s["nll_sha256"], s["shards_reused"]) == (whole["nll_sha256"], len(done))
    kept = sum(row["n_tokens"] for row in rows_of(s) if row["shard"] <= done[-1].first_window)
    assert FakeModel.tokens - before == N_READ - kept, "what was finished is not computed again"
    assert not list(run_dir.glob(".*"))


@pytest.mark.parametrize("fault", ["missing", "damaged", "elsewhere"])
def test_a_lost_state_costs_time_and_changes_nothing(make, monkeypatch, caplog, fault):
    whole = evaluate(make("whole")).summary
    interrupted(make, monkeypatch, 5)
    run_dir = Path(evaluate(make(dry_run=True)).summary["table"])
    (state,) = run_dir.glob(".state-*")
    if fault == "missing":
        state.unlink()
    elif fault == "damaged":
        state.write_bytes(state.read_bytes()[:-3])
    else:
        cache = FakeModel(1).new_cache(1, 9)
        cache.cells[0] = [1, 2, 3]
        engine.save_state(state, cache, whole["model_sha256"], slot=0)
    with caplog.at_level(logging.WARNING):
        s = evaluate(make()).summary
    assert s["nll_sha256"] == whole["nll_sha256"]
    assert "its document is read again from its start" in caplog.text
    assert not list(run_dir.glob(".state-*"))


def test_a_broken_shard_of_a_finished_document_is_computed_anew(make):
    first = evaluate(make()).summary
    run_dir = Path(first["table"])
    (run_dir / "shard-00000008.parquet").write_bytes(b"broken")
    again = evaluate(make()).summary
    assert (again["nll_sha256"], again["shards_reused"]) == (first["nll_sha256"], first["shards_done"] - 1)
    assert not list(run_dir.glob(".state-*"))


def test_what_follows_a_faulty_shard_is_not_reached_and_the_rest_is_finished(make, monkeypatch):
    score = FakeModel.nll

    def nll(self, batch, cache):
        found = score(self, batch, cache)
        if 48 + 16 in batch.positions and cache.length(0) > 90:
            found[:] = np.nan
        return found

    monkeypatch.setattr(FakeModel, "nll", nll)
    s = evaluate(make()).summary
    assert (s["exit_code"], s["ppl"], s["half_ppl"]) == (3, None, None)
    assert "window 5: negative log-likelihood at position 47 is nan" in s["error"]["message"]
    assert "it goes on from shard 5, which was set aside (not reached, attempts: 0)" in s["error"]["message"]
    names = sorted(path.name for path in Path(s["table"]).glob("shard-*"))
    assert names == ["shard-00000000.parquet", "shard-00000002.parquet", "shard-00000016.parquet",
                     "shard-00000017.parquet", "shard-00000020.parquet"]  # fmt: skip
    monkeypatch.setattr(FakeModel, "nll", score)
    before = FakeModel.tokens
    s = evaluate(make()).summary
    assert s["ok"]
    assert FakeModel.tokens - before == sum(row["n_tokens"] for row in rows_of(s) if 5 <= row["shard"] < 16)


def test_a_state_that_cannot_be_written_sets_its_shard_aside(make, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(engine, "save_state", full)
        s = evaluate(make()).summary
    assert s["exit_code"] == 3
    assert "the document's state cannot be written: No space left" in s["error"]["message"]
    assert evaluate(make()).summary["ok"]


def test_attention_carries_as_far_as_it_was_trained(make, tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(9000))  # 64 positions
    model = ModelSettings(str(tmp_path / "a.gguf"))
    with pytest.raises(SettingsError, match=r"the longest document as one sequence of 210 positions.*for 64"):
        evaluate(make(model=model))
    data = make().data
    data.documents = "joined"
    with pytest.raises(SettingsError, match="the text as one sequence") as caught:
        evaluate(make(model=model, data=data))
    assert "protocol.limit=4," in caught.value.hint
    s = evaluate(make(model=model, data=data, protocol=ProtocolSettings("carry", 16, 4))).summary
    assert (s["ok"], s["n_scored"]) == (True, 63)


class ToyModel(Toy):
    """The toy's interface made that of an engine's model."""

    def new_cache(self, n_slots, capacity, kv="f32", *, fleeting=False):
        assert not fleeting
        return super().new_cache(n_slots)


def test_a_recurrent_state_goes_through_files_bit_by_bit(make, monkeypatch):
    """The real cache and the real state files; batches, shards and handing over change no bit."""

    class Letters(FakeTokenizer):
        add_bos = False
        byte_lengths = np.ones(Toy.n_vocab, np.int32)

        def encode(self, text, **_):
            return np.frombuffer(text.encode(), np.uint8).astype(np.int32) % Toy.n_vocab

        def decode(self, ids):
            return bytes(97 + int(i) for i in ids)

    def load_model(file, *, batch_tokens, **_):
        return ToyModel(batch_tokens)

    monkeypatch.setattr(engine, "Tokenizer", Letters)
    monkeypatch.setattr(engine, "load_model", load_model)
    tokens = [Letters(None).encode(text) for text in DOCUMENTS]
    expected = [Toy().score(ids) for ids in tokens if ids.size > 1]
    digests = set()
    for at, (batch_tokens, per_shard) in enumerate([(5, 1), (64, 2), (4096, 100)]):
        batch = EngineSettings(batch_tokens=batch_tokens)
        s = evaluate(make(f"t{at}", per_shard, engine=batch)).summary
        assert s["nll_mean_nats"] == pytest.approx(np.concatenate(expected).mean(), rel=1e-14)
        assert s["n_scored"] == sum(x.size for x in expected)
        digests.add(s["nll_sha256"])
    assert len(digests) == 1
