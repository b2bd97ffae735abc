"""Protocols `strided` and `document`, documents apart: windows by hand, laws, the harness's definition."""

import hashlib
import json
import math
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from fake_engine import BOS, FakeModel, FakeTokenizer, install
from reference import perplexity as reference

from pipeline import evaluate
from pipeline.datasets import Text
from pipeline.errors import DataError, SettingsError
from pipeline.protocols.apart import Apart
from pipeline.protocols.document import Rolling
from pipeline.protocols.strided import Strided
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
from pipeline.tokens import token_stream
from pipeline.windows import begin_id, open_protocol, slots

DOCUMENTS = ("It was a bright cold day. ", " x", "", "\u3000Äpfel und Birnen", "q", "ab " * 30)


def shown(protocol, tokens, index):
    """(read, predicts): letters of 1..26, `^` for 0, `.` where nothing is scored."""
    window = protocol.window(np.array(tokens, np.int32), index)

    def letters(ids):
        return "".join("." if i < 0 else "^" if i == 0 else chr(96 + i) for i in ids.tolist())

    assert [tokens[i] for i in range(*window.scored.indices(len(tokens)))] == [
        t for t in window.targets.tolist() if t >= 0
    ]
    return letters(window.tokens), letters(window.targets)


TEN = list(range(1, 11))


def test_strided_with_bos_by_hand():
    """The docstring's drawing."""
    protocol, tokens = Strided(5, 3, None, 0), [0, *TEN]
    assert protocol.n_windows(11) == 3
    assert [shown(protocol, tokens, i) for i in range(3)] == [
        ("^abcd", "abcde"),
        ("^defg", "..fgh"),
        ("^fghi", "...ij"),
    ]


def test_strided_without_bos_by_hand():
    protocol = Strided(5, 3, None, None)
    assert protocol.n_windows(10) == 3
    assert [shown(protocol, TEN, i) for i in range(3)] == [
        ("abcde", "bcdef"),
        ("defgh", "..ghi"),
        ("efghi", "....j"),
    ]
    assert shown(protocol, [1, 2], 0) == ("a", "b")
    assert shown(protocol, [1, 2, 3, 4, 5, 6], 0) == ("abcde", "bcdef")
    assert protocol.n_windows(6) == 1


def test_document_by_hand():
    """The docstring's drawing; a BOS that the tokenizer put there is the prefix and not predicted."""
    expected = [("^abc", "abcd"), ("defg", "efgh"), ("fghi", "..ij")]
    assert [shown(Rolling(4, None, 0, 0), TEN, i) for i in range(3)] == expected
    assert [shown(Rolling(4, None, 0, 1), [0, *TEN], i) for i in range(3)] == expected
    assert shown(Rolling(4, None, 0, 0), [1], 0) == ("^", "a")
    assert shown(Rolling(4, None, 0, 0), [1, 2, 3, 4], 0) == ("^abc", "abcd")
    assert Rolling(4, None, 0, 1).n_windows(5) == 1
    assert Rolling(4, None, 0, 1).n_windows(6) == 2


@pytest.mark.parametrize("size", [3, 4, 8, 50])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 49])
def test_document_windows_are_the_harness_s(size, n):
    tokens = np.arange(1, n + 1, dtype=np.int32)
    protocol = Rolling(size, None, 0, 0)
    expected = reference.rolling_windows(tokens.tolist(), 0, size)
    assert protocol.n_windows(n) == len(expected)
    for index, (read, predicted) in enumerate(expected):
        window = protocol.window(tokens, index)
        assert window.tokens.tolist() == read
        assert window.targets[len(read) - len(predicted) :].tolist() == predicted
        assert np.count_nonzero(window.targets >= 0) == len(predicted)
        assert window.counts_blank_ends == (index == len(expected) - 1)


@pytest.mark.parametrize("bos", [None, 0])
@pytest.mark.parametrize("stride", [1, 2, 3, 7])
@pytest.mark.parametrize("n", [2, 3, 7, 8, 9, 10, 11, 30])
def test_strided_scores_each_token_once_with_context(n, stride, bos):
    tokens = np.arange(n, dtype=np.int32)
    protocol, places = Strided(8, stride, None, bos), []
    for index in range(protocol.n_windows(n)):
        window = protocol.window(tokens, index)
        scored = np.flatnonzero(window.targets >= 0)
        assert window.tokens.size == min(8, n - 1)
        assert window.targets[scored].tolist() == tokens[window.scored].tolist()
        assert index == 0 or scored[0] + 1 >= 8 - stride, "tokens before the first target, itself not counted"
        assert bos is None or window.tokens[0] == bos, "the model reads the BOS"
        kept = window.tokens[1:]
        assert kept.tolist() == tokens[window.first_token + 1 : window.first_token + 1 + kept.size].tolist()
        places += range(n)[window.scored]
    assert places == list(range(1, n)), "all but what stands first, which is the BOS when there is one"


def test_a_stream_too_short_is_refused():
    with pytest.raises(DataError, match="1 tokens, expected at least 2"):
        Strided(8, 4, None, 0).n_windows(1)
    with pytest.raises(DataError, match="no token"):
        Rolling(8, None, 0, 1).n_windows(1)


def test_limits_that_cut_nothing_off_are_none():
    for protocol in (Strided, Rolling):
        rest = (0,) if protocol is Rolling else (4,)

        def made(limit, protocol=protocol, rest=rest):
            return Rolling(8, limit, 0, *rest) if protocol is Rolling else Strided(8, *rest, limit, 0)

        whole = made(None).n_windows(40)
        assert made(whole).measure(40) == made(None).measure(40)
        assert made(whole - 1).measure(40)["protocol_limit"] == whole - 1


@pytest.fixture
def stream(tmp_path):
    """DOCUMENTS apart, by bytes."""
    return token_stream(Text("", "0" * 64, "t", documents=DOCUMENTS), FakeTokenizer(None), tmp_path)


@pytest.mark.parametrize("inner", [Windows(8, None, BOS), Strided(8, 3, None, BOS), Rolling(8, None, BOS, 1)])
def test_apart_is_each_document_by_itself(stream, inner):
    protocol, index = Apart(inner, stream), 0
    for number, document in enumerate(DOCUMENTS):
        tokens = FakeTokenizer(None).encode(document)
        for own in range(int(inner.counts(np.array([tokens.size]))[0])):
            window, alone = protocol.window(stream.tokens, index), inner.window(tokens, own)
            assert window.index == index
            assert window.tokens.tolist() == alone.tokens.tolist()
            assert window.targets.tolist() == alone.targets.tolist()
            assert stream.tokens[window.scored].tolist() == tokens[alone.scored].tolist()
            assert stream.counted(window)["document"] == number
            index += 1
    assert protocol.n_windows(stream.tokens.size) == index


def test_documents_without_a_window_are_counted_and_said(stream):
    assert stream.n_short == 2
    assert Apart(Rolling(8, None, BOS, 1), stream).remarks == [
        "of 6 documents 2 are shorter than two tokens, and 1 make no window and are not scored"
    ]
    assert "4 make no window" in Apart(Windows(26, None, BOS), stream).remarks[0]
    with pytest.raises(DataError, match="none of 6 documents makes a window; the longest has 91 tokens"):
        Apart(Windows(92, None, BOS), stream).n_windows(0)


def test_measure_of_apart_names_its_limit_over_all_documents(stream):
    whole = Apart(Strided(8, 3, None, BOS), stream)
    n = whole.n_windows(stream.tokens.size)
    assert Apart(Strided(8, 3, n, BOS), stream).measure(0) == whole.measure(0)
    assert Apart(Strided(8, 3, 5, BOS), stream).measure(0)["protocol_limit"] == 5
    assert whole.measure(0)["protocol_stride"] == 3


def test_what_begins_a_sequence():
    class Neither(FakeTokenizer):
        bos_id = None
        add_bos = False

    class OnlyEos(Neither):
        eos_id = 7

    class BosNotAdded(FakeTokenizer):
        add_bos = False

    for tokenizer, plain, document in [
        (FakeTokenizer, BOS, BOS),
        (BosNotAdded, None, BOS),
        (OnlyEos, None, 7),
    ]:
        assert begin_id(ProtocolSettings(), tokenizer(None)) == plain
        assert begin_id(ProtocolSettings("strided"), tokenizer(None)) == plain
        assert begin_id(ProtocolSettings("document"), tokenizer(None)) == document
    with pytest.raises(SettingsError, match="neither"):
        begin_id(ProtocolSettings("document"), Neither(None))


def test_open_protocol_opens_by_name(stream, tmp_path):
    joined = token_stream(Text("some text", "0" * 64, "t"), FakeTokenizer(None), tmp_path)
    assert open_protocol(ProtocolSettings("strided", 8), BOS, joined) == Strided(8, 4, None, BOS)
    assert open_protocol(ProtocolSettings("strided", 8, 2, 3), BOS, joined) == Strided(8, 3, 2, BOS)
    assert open_protocol(ProtocolSettings("document", 8), BOS, joined) == Rolling(8, None, BOS, 1)
    assert isinstance(open_protocol(ProtocolSettings("windows", 8), BOS, stream), Apart)


def test_slots_are_what_they_were_for_windows_and_more_for_the_rest():
    assert slots(ProtocolSettings(window=512), 4096, 4) == 4
    assert slots(ProtocolSettings(window=512), 4096, 100) == 8
    assert slots(ProtocolSettings("document", 512), 4096, 100) == 32
    assert slots(ProtocolSettings("document", 5000), 1000, 100) == 1


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Settings of a small inline run over DOCUMENTS on the fake engine."""
    install(monkeypatch)
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + bytes(9000))
    lines = [json.dumps({"text": text, "w": i + 1}) for i, text in enumerate(DOCUMENTS)]
    (tmp_path / "d.jsonl").write_text("\n".join(lines))

    def settings(results="results", **groups):
        return PerplexitySettings(
            **{
                "model": ModelSettings(str(tmp_path / "m.gguf")),
                "data": DataSettings(path=str(tmp_path / "d.jsonl"), format="jsonl"),
                "protocol": ProtocolSettings("document", 32),
                "cluster": ClusterSettings("inline", windows_per_shard=3),
                "tracking": TrackingSettings("none"),
                "paths": PathsSettings(str(tmp_path / results), str(tmp_path / "cache")),
                **groups,
            }
        )

    return settings


def scores_of(documents, size):
    """The fake engine's score of each token of each document, by the reference's windows."""
    import engine

    found = []
    for document in documents:
        values = []
        for read, predicted in reference.rolling_windows(list(document.encode()), BOS, size):
            targets = [-1] * (len(read) - len(predicted)) + predicted
            batch = engine.Batch(np.array(read, np.int32), np.arange(len(read)), targets=np.array(targets))
            values.append(FakeModel(size).nll(batch, FakeModel(size).new_cache(1, size)))
        found.append(np.concatenate(values) if values else np.zeros(0))
    return found


def test_document_run_equals_the_harness_s_figures(make):
    s = evaluate(make()).summary
    scores = scores_of(DOCUMENTS, 32)
    texts = [text for text in DOCUMENTS if text]  # the harness would count one word in an empty document
    expected = reference.harness([score for score in scores if score.size], texts)
    for name, value in expected.items():
        assert s[name] == pytest.approx(value, rel=1e-12), name
    values = np.concatenate(scores)
    assert s["n_scored"] == values.size == sum(len(text.encode()) for text in DOCUMENTS)
    assert s["ppl"] == pytest.approx(math.exp(values.mean()), rel=1e-12)
    assert (s["n_documents"], s["n_documents_short"]) == (6, 2)
    assert any("2 are shorter than two tokens" in warning for warning in s["warnings"])
    rows = pq.read_table(Path(s["table"]) / "shard-00000000.parquet", partitioning=None).to_pylist()
    assert {row["data_documents"] for row in rows} == {"apart"}
    assert {row["weight"] for row in rows} == {None}
    n_words = sum(len(re.split(r"\s+", text)) for text in texts)
    assert s["word_ppl"] == pytest.approx(math.exp(values.sum() / n_words), rel=1e-12)


@pytest.mark.parametrize("name", ["windows", "strided", "document"])
@pytest.mark.parametrize("documents", ["joined", "apart"])
def test_every_protocol_gives_the_same_bits_for_any_batch_and_shard(make, name, documents):
    data = make().data
    data.documents = documents
    digests, calls = set(), []
    for at, (batch_tokens, per_shard) in enumerate([(7, 1), (16, 3), (33, 1000), (4096, 5)]):
        before = FakeModel.calls
        s = evaluate(
            make(
                f"r{at}",
                data=data,
                protocol=ProtocolSettings(name, 16),
                engine=EngineSettings(batch_tokens=batch_tokens),
                cluster=ClusterSettings("inline", windows_per_shard=per_shard),
            )
        ).summary
        assert s["ok"]
        assert s["ppl_stderr"] is not None
        digests.add((s["run_key"], s["nll_sha256"], s["ppl"]))
        calls.append(FakeModel.calls - before)
    assert len(digests) == 1
    assert calls[-1] < calls[0]


def test_short_documents_share_a_batch(make, tmp_path):
    (tmp_path / "many.jsonl").write_text("\n".join(json.dumps({"text": f"{i:03}"}) for i in range(32)))
    data = DataSettings(path=str(tmp_path / "many.jsonl"), format="jsonl")
    before = FakeModel.calls
    cluster, batch = ClusterSettings("inline", windows_per_shard=100), EngineSettings(batch_tokens=128)
    s = evaluate(make(data=data, cluster=cluster, engine=batch)).summary
    assert s["n_windows"] == 32
    assert FakeModel.calls - before == 2, "sixteen documents a call: 16 slots, not 4 windows of 32 tokens"


def test_weights_are_part_of_the_measure_and_of_the_sums(make):
    plain, weighted = make().data, make().data
    weighted.weight = "w"
    one, other = (evaluate(make(data=data)).summary for data in (plain, weighted))
    assert one["nll_sha256"] == other["nll_sha256"], "the windows are the same"
    assert one["measure_key"] != other["measure_key"]
    scores = scores_of(DOCUMENTS, 32)
    weights = np.arange(1, 7)
    total = sum(w * score.sum() for w, score in zip(weights, scores, strict=True))
    n = sum(w * score.size for w, score in zip(weights, scores, strict=True))
    assert other["nll_mean_nats"] == pytest.approx(total / n, rel=1e-12)
    n_bytes = sum(w * len(text.encode()) for w, text in zip(weights, DOCUMENTS, strict=True))
    assert other["byte_ppl"] == pytest.approx(math.exp(total / n_bytes), rel=1e-12)
    assert one["n_scored"] == other["n_scored"]
    rows = pq.read_table(Path(other["table"]) / "shard-00000000.parquet", partitioning=None).to_pylist()
    assert [row["weight"] for row in rows] == [row["document"] + 1 for row in rows]
    expected = hashlib.sha256(weights.astype("<f8").tobytes()).hexdigest()
    assert rows[0]["data_weights_sha256"] == expected


def test_shards_of_before_a_column_was_added_are_read(make):
    first = evaluate(make()).summary
    added = ["weight", "data_documents", "data_errors", "data_weights_sha256", "protocol_stride"]
    for path in Path(first["table"]).glob("shard-*.parquet"):
        pq.write_table(pq.read_table(path, partitioning=None).drop_columns(added), path)
    again = evaluate(make()).summary
    assert again["shards_reused"] == first["shards_done"]
    assert (again["ppl"], again["nll_sha256"]) == (first["ppl"], first["nll_sha256"])


def test_documents_apart_and_joined_are_different_measures(make):
    keys = set()
    for name in ("windows", "strided", "document"):
        for documents in ("joined", "apart"):
            data = make().data
            data.documents = documents
            keys.add(
                evaluate(make(data=data, protocol=ProtocolSettings(name, 16), dry_run=True)).summary[
                    "run_key"
                ]
            )
    assert len(keys) == 6
    default = evaluate(make(protocol=ProtocolSettings("document", 16), dry_run=True)).summary["run_key"]
    data = make().data
    data.documents = "apart"
    named = evaluate(make(data=data, protocol=ProtocolSettings("document", 16), dry_run=True)).summary[
        "run_key"
    ]
    assert default == named, "null is apart for this protocol"
