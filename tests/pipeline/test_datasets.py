"""Data sets: bytes as they are, pinned, refused with the likely cause; token streams are cached."""

import dataclasses
import gzip
import hashlib
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_engine import BOS, FakeTokenizer

from pipeline.datasets import WIKITEXT2_SHA256, Text, load_text
from pipeline.errors import DataError, StoreError
from pipeline.settings import DataSettings
from pipeline.tokens import count, token_stream, tokens_sha256

PROSE = b" \n = Heading = \n \n First line .\n Second line .\n"


def write(tmp_path, raw, name="text.txt"):
    path = tmp_path / name
    path.write_bytes(raw)
    return str(path)


def test_exactly_one_newline_at_the_end_is_dropped_and_nothing_else(tmp_path):
    text = load_text(DataSettings(path=write(tmp_path, b"a\r\nb\n\n")))
    assert text.text == "a\r\nb\n"
    assert text.sha256 == hashlib.sha256(b"a\r\nb\n\n").hexdigest()
    assert load_text(DataSettings(path=write(tmp_path, b"a"))).text == "a"


def test_jsonl_documents_are_joined_and_their_starts_are_in_bytes(tmp_path):
    lines = [json.dumps({"text": text}) for text in ("é one", "two", "three")]
    text = load_text(
        DataSettings(path=write(tmp_path, "\n".join([lines[0], "", *lines[1:]]).encode()), format="jsonl")
    )
    assert text.text == "é one\n\ntwo\n\nthree"
    encoded = text.text.encode()
    assert [encoded[start:][:3] for start in text.document_starts] == ["é o".encode()[:3], b"two", b"thr"]


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b'{"text": "a"}\n{"text": \n', r"line 2 is not JSON"),
        (b'{"text": "a"}\n["b"]\n', r"line 2 is a JSON list"),
        (b'{"title": "a", "body": "b"}\n', r"line 1: field 'text' is missing; it has 'title', 'body'"),
        (b'{"text": 3}\n', r"line 1: field 'text' is no string"),
        (b'{"text": "\\ud800"}\n', r"line 1: field 'text' holds half of a surrogate pair"),
    ],
)
def test_broken_jsonl_is_refused_by_line(tmp_path, raw, said):
    with pytest.raises(DataError, match=said) as caught:
        load_text(DataSettings(path=write(tmp_path, raw), format="jsonl"))
    assert caught.value.exit_code == 2


def test_missing_empty_folder_and_blank_are_refused(tmp_path):
    for path, said in [
        (str(tmp_path / "none.txt"), "no such file"),
        (str(tmp_path), "is a folder"),
        (write(tmp_path, b"", "empty"), "is empty"),
        (write(tmp_path, b" \n\n", "blank"), "nothing but 3 bytes of white space"),
        ("python:no.such.module", "has no module"),
        ("python:json", "has no module"),
    ]:
        with pytest.raises(DataError, match=said):
            load_text(DataSettings(path=path))


def test_invalid_utf8_is_refused_with_its_place(tmp_path):
    with pytest.raises(DataError, match=r"byte 6 \(line 2\) is 0xe9") as caught:
        load_text(DataSettings(path=write(tmp_path, b"good\nb\xe9\n")))
    assert "iconv" in caught.value.hint
    with pytest.raises(DataError) as caught:
        load_text(DataSettings(path=write(tmp_path, "text".encode("utf-16"))))
    assert "UTF-16" in caught.value.hint


@pytest.mark.parametrize(
    ("altered", "said"),
    [
        (PROSE.replace(b"\n", b"\r\n"), "CRLF; with LF line ends the digest is right"),
        (b"\xef\xbb\xbf" + PROSE, "byte order mark"),
        (PROSE[:-1], "newline at its end is missing"),
        (PROSE + b"\n", "one newline too many"),
        (b"something else", "another text, another split"),
    ],
)
def test_another_digest_is_refused_with_what_is_wrong(tmp_path, altered, said):
    pinned = hashlib.sha256(PROSE).hexdigest()
    assert load_text(DataSettings(path=write(tmp_path, PROSE), sha256=pinned.upper())).sha256 == pinned
    with pytest.raises(DataError, match=said) as caught:
        load_text(DataSettings(path=write(tmp_path, altered), sha256=pinned))
    assert pinned in str(caught.value)
    assert hashlib.sha256(altered).hexdigest() in str(caught.value)


def test_altered_copies_of_wikitext2_are_told_apart(tmp_path, shared_data):
    raw = (shared_data / "data/wiki.test.raw").read_bytes()
    lines = raw.splitlines(keepends=True)
    stripped = b"".join(line for line in lines if line.strip())
    cases = {
        raw.replace(b"\n", b"\r\n"): "CRLF",
        stripped: "1,467 blank lines are stripped",
        stripped.replace(b"\n", b"\r\n"): "2,891 CRLF line ends; 1,467 blank lines are stripped",
        b"".join(line.strip() + b"\n" for line in lines): "spaces at their ends are stripped",
        raw[:1000]: "it has 1,000 bytes",
    }
    assert load_text(DataSettings(path=write(tmp_path, raw), sha256=WIKITEXT2_SHA256)).text.endswith("\n ")
    for altered, said in cases.items():
        with pytest.raises(DataError, match=said):
            load_text(DataSettings(path=write(tmp_path, altered), sha256=WIKITEXT2_SHA256))


def parquet(path, rows, **columns):
    pq.write_table(pa.table({"text": rows, **columns}), path, row_group_size=2)
    return str(path)


def load(path, **settings):
    return load_text(DataSettings(path=str(path), **settings))


def test_parquet_is_a_document_a_row_and_the_same_as_jsonl(tmp_path):
    rows = ["é one", "", "two\n", "three", " four "]
    path = parquet(tmp_path / "d.parquet", rows, w=[1, 2, 3, 4.5, 5])
    lines = "\n".join(
        json.dumps({"text": row, "w": w}) for row, w in zip(rows, [1, 2, 3, 4.5, 5], strict=True)
    )
    other = write(tmp_path, lines.encode(), "d.jsonl")
    for settings in ({}, {"documents": "apart", "weight": "w"}):
        ours, theirs = load(path, format="parquet", **settings), load(other, format="jsonl", **settings)
        assert dataclasses.replace(ours, sha256="", source="") == dataclasses.replace(
            theirs, sha256="", source=""
        )
    assert ours.documents == tuple(rows)
    assert ours.weights == (1, 2, 3, 4.5, 5)
    assert ours.sha256 == hashlib.sha256((tmp_path / "d.parquet").read_bytes()).hexdigest()


@pytest.mark.parametrize(
    "kind", [pa.large_string(), pa.binary(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_parquet_columns_of_any_text_type(tmp_path, kind):
    column = pa.array(["é one", "two"])
    column = column.dictionary_encode() if pa.types.is_dictionary(kind) else column.cast(kind)
    path = parquet(tmp_path / "d.parquet", column)
    assert load(path, format="parquet", documents="apart").documents == ("é one", "two")


def test_parquet_that_cannot_be_used_is_refused(tmp_path):
    good = parquet(tmp_path / "d.parquet", ["a", "b"], title=["x", "y"], n=[1, 2], w=[1.0, 0.0])
    nulls = parquet(tmp_path / "n.parquet", ["a", "b", None])
    raw = (tmp_path / "d.parquet").read_bytes()
    empty = parquet(tmp_path / "e.parquet", pa.array([], pa.string()))
    for settings, said in [
        ({"path": good, "field": "body"}, r"has no column 'body'; it has 'text', 'title', 'n', 'w'"),
        ({"path": good, "field": "n"}, r"column 'n' is int64, expected strings"),
        ({"path": good, "weight": "v"}, r"has no column 'v'; it has 'text'"),
        ({"path": good, "weight": "w"}, r"row 2: weight 'w' is 0.0, expected a number above 0"),
        ({"path": good, "weight": "title"}, r"row 1: weight 'title' is 'x'"),
        ({"path": nulls}, r"row 3: column 'text' is null"),
        ({"path": write(tmp_path, raw[:-20], "cut.parquet")}, r"cut\.parquet: cannot be read as Parquet"),
        ({"path": write(tmp_path, PROSE)}, r"cannot be read as Parquet"),
        ({"path": empty}, r"none of its 0 documents has a word"),
    ]:
        with pytest.raises(DataError, match=said) as caught:
            load_text(DataSettings(format="parquet", **settings))
        assert caught.value.hint
    with pytest.raises(DataError, match="is a Parquet file") as caught:
        load(good)
    assert "data=parquet" in caught.value.hint


def test_weights_of_jsonl_are_numbers_above_zero(tmp_path):
    for value in ("null", "0", "-1", '"2"', "true", "NaN", "Infinity"):
        path = write(tmp_path, f'{{"text": "a", "w": 1}}\n{{"text": "b", "w": {value}}}\n'.encode())
        with pytest.raises(DataError, match=r"line 2: weight 'w' is .* expected a number above 0"):
            load(path, format="jsonl", weight="w", documents="apart")
    with pytest.raises(DataError, match="line 1: weight 'v' is None"):
        load(path, format="jsonl", weight="v", documents="apart")


def compressed(raw, kind):
    return gzip.compress(raw) if kind == "gz" else bytes(pa.Codec("zstd").compress(raw))


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_a_compressed_copy_is_the_same_data(tmp_path, kind):
    plain, packed = load(write(tmp_path, PROSE)), compressed(PROSE, kind)
    pinned = hashlib.sha256(PROSE).hexdigest()
    for name, raw in [(f"t.txt.{kind}", packed), ("t.txt", packed), (f"two.{kind}", None)]:
        if raw is None:  # two members, as `cat a.gz b.gz` makes
            raw = compressed(PROSE[:20], kind) + compressed(PROSE[20:], kind)
        again = load(write(tmp_path, raw, name), sha256=pinned)
        assert (again.text, again.sha256) == (plain.text, plain.sha256)


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_broken_compression_is_refused(tmp_path, kind):
    packed = compressed(PROSE * 50, kind)
    broken = packed[:-9] + bytes(byte ^ 255 for byte in packed[-9:])
    for raw, said in [
        (packed[:-5], "ends in the middle of its compressed data"),
        (packed[:12], "ends in the middle of its compressed data"),
        (broken, "is broken: |ends in the middle"),
        (packed + b"something", "is broken: "),
        (PROSE, "though its name says so"),
        (compressed(b"", kind), "empty once decompressed"),
    ]:
        with pytest.raises(DataError, match=said) as caught:
            load(write(tmp_path, raw, f"t.{kind}"))
        assert f"t.{kind}" in str(caught.value)


def test_many_files_are_one_set_in_a_defined_order(tmp_path):
    folder = tmp_path / "set"
    (folder / "deep").mkdir(parents=True)
    for name, text in {"b.txt": "two\n", "a.txt": "one", "B.txt": "three", "deep/c.txt": "four"}.items():
        (folder / name).write_text(text)
    found = load(folder / "*.txt")
    assert found.text == "three\n\none\n\ntwo", "by code points of the path: B before a"
    assert [found.text.encode()[start:][:3] for start in found.document_starts] == [b"thr", b"one", b"two"]
    digests = [hashlib.sha256(raw).hexdigest() for raw in (b"three", b"one", b"two\n")]
    digest = hashlib.sha256("".join(f"{line}\n" for line in digests).encode()).hexdigest()
    assert found.sha256 == load(folder / "*.txt", sha256=digest).sha256 == digest
    assert load(folder / "**/*.txt").text.endswith("two\n\nfour")
    given = [str(folder / "b.txt"), str(folder / "a.txt")]
    listed = load_text(DataSettings(path="", files=given, documents="apart"))
    assert listed.documents == ("two", "one"), "a list keeps its order"
    assert load_text(DataSettings(path="", files=given[:1])).sha256 == digests[2]
    with pytest.raises(DataError, match=r"SHA-256 of 3 files is .*another order"):
        load(folder / "*.txt", sha256="0" * 64)
    with pytest.raises(DataError, match="matches no file"):
        load(folder / "*.parquet")


def test_a_name_with_brackets_is_a_name_when_it_is_there(tmp_path):
    assert load(write(tmp_path, b"text", "a[1].txt")).text == "text"


def test_bytes_that_are_not_utf8_are_replaced_on_request_and_said(tmp_path):
    path = write(tmp_path, b"good\nb\xe9 \xff\xef\xbf\xbd\n")
    found = load(path, errors="replace")
    assert found.text == "good\nb\ufffd \ufffd\ufffd"
    assert found.n_replaced == 2, "one was there before"
    assert found.measure["data_errors"] == "replace"
    assert "2 characters U+FFFD" in found.remarks[0]
    with pytest.raises(DataError, match="byte 6"):
        load(path)
    clean = load(write(tmp_path, b"good"), errors="replace")
    assert "data_errors" not in clean.measure, "a policy that changed nothing is none"
    half = load(write(tmp_path, b'{"text": "a\\ud800b"}'), format="jsonl", errors="replace")
    assert (half.text, half.n_replaced) == ("a\ufffdb", 1)
    raw = pa.array([b"ab\n", b"c\xff"]).cast(pa.string(), safe=False)
    stored = parquet(tmp_path / "d.parquet", raw)
    assert load(stored, format="parquet", errors="replace").n_replaced == 1
    with pytest.raises(DataError, match=r"row 2: byte 1 \(line 1\) is 0xff"):
        load(stored, format="parquet")


def test_documents_without_a_word_are_refused(tmp_path):
    path = write(tmp_path, b'{"text": ""}\n{"text": " "}\n')
    with pytest.raises(DataError, match="none of its 2 documents has a word"):
        load(path, format="jsonl")


def test_a_plain_text_adds_its_digest_to_the_measure_and_nothing_else(tmp_path):
    for documents in (None, "joined", "apart"):
        found = load(write(tmp_path, b"one text"), documents=documents)
        assert found.measure == {"data_sha256": found.sha256}
    two = load(write(tmp_path, b'{"text": "a"}\n{"text": "b"}\n'), format="jsonl", documents="apart")
    assert two.measure == {"data_sha256": two.sha256, "data_documents": "apart"}


def test_the_packaged_text_is_the_same_twice():
    first, second = (load_text(DataSettings(path="python:pydoc_data.topics")) for _ in range(2))
    assert first == second
    assert len(first.text) > 100_000
    assert first.sha256 == hashlib.sha256((first.text + "\n").encode()).hexdigest()


def test_token_stream_is_made_once_and_read_back_equal(tmp_path, monkeypatch):
    tokenizer, text = FakeTokenizer(None), Text("é two\nwords", "0" * 64, "t", (0, 3))
    made = token_stream(text, tokenizer, tmp_path)
    assert made.tokens[0] == BOS
    assert made.sha256 == tokens_sha256(np.array(made.tokens))
    assert made.sha256 == hashlib.sha256(made.tokens.astype("<i4").tobytes()).hexdigest()
    assert not made.tokens.flags.writeable
    assert sorted(p.suffix for p in (tmp_path / "tokens").iterdir()) == [".npy"] * 3
    monkeypatch.setattr(FakeTokenizer, "encode", None)
    assert token_stream(text, tokenizer, tmp_path).sha256 == made.sha256
    monkeypatch.undo()
    monkeypatch.setattr(FakeTokenizer, "sha256", "e" * 64)
    assert token_stream(text, tokenizer, tmp_path).tokens_path != made.tokens_path


def test_a_broken_cache_file_is_made_again(tmp_path, caplog):
    tokenizer, text = FakeTokenizer(None), Text("some words", "0" * 64, "t")
    made = token_stream(text, tokenizer, tmp_path)
    made.tokens_path.write_bytes(made.tokens_path.read_bytes()[:-4])
    assert token_stream(text, tokenizer, tmp_path).sha256 == made.sha256
    assert "tokenizing again" in caplog.text


def test_a_cache_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "tokens").write_text("a file where a folder should be")
    with pytest.raises(StoreError, match="token cache"):
        token_stream(Text("some words", "0" * 64, "t"), FakeTokenizer(None), tmp_path)


@pytest.mark.parametrize("text", ["one two", "  é  zwei\u3000drei ", "日本 語", "a\x1cb", "😀 a😀", ""])
def test_words_and_bytes_of_tokens_add_up_to_the_text(text):
    tokenizer = FakeTokenizer(None)
    tokens = tokenizer.encode(text)
    n_bytes, n_words, _ = count(tokens, tokenizer)
    assert n_bytes.sum() == len(text.encode())
    assert n_words.sum() == len(text.split())
    assert n_bytes[0] == n_words[0] == 0, "BOS has no text"


def test_a_word_is_counted_where_it_begins():
    tokenizer = FakeTokenizer(None)
    _n_bytes, n_words, document = count(tokenizer.encode("é b\n\nc"), tokenizer, (0, 6))
    assert n_words.tolist() == [0, 1, 0, 0, 1, 0, 0, 1]
    assert document.tolist() == [0, 0, 0, 0, 0, 0, 0, 1]


def test_documents_apart_are_tokenized_one_by_one(tmp_path):
    documents = ("é b", "", " c ")
    made = token_stream(
        Text("", "0" * 64, "t", documents=documents, weights=(1, 2, 3)), FakeTokenizer(None), tmp_path
    )
    assert made.tokens.tolist() == [BOS, *"é b".encode(), BOS, BOS, *b" c "]
    assert made.pieces["first"].tolist() == [0, 5, 6]
    assert made.pieces["n_blank_ends"].tolist() == [0, 0, 2]
    assert made.pieces["weight"].tolist() == [1, 2, 3]
    assert made.counts[2].tolist() == [0] * 5 + [1] + [2] * 4
    assert (made.n_documents, made.n_short, made.is_apart) == (3, 1, True)
    for other in (
        {"weights": (1, 2, 4)},
        {"documents": ("é b", " c ", "")},
        {"documents": ("é b c ",), "weights": ()},
    ):
        text = Text("", "0" * 64, "t", **{"documents": documents, "weights": (1, 2, 3)} | other)
        assert token_stream(text, FakeTokenizer(None), tmp_path).tokens_path != made.tokens_path
    made.tokens_path.with_name(made.tokens_path.name.replace("tokens", "pieces")).unlink()
    assert token_stream(
        Text("", "0" * 64, "t", documents=documents, weights=(1, 2, 3)), FakeTokenizer(None), tmp_path
    ).is_apart, "a stream whose pieces are gone is made again"


def test_a_space_that_the_tokenizer_puts_in_front_is_no_byte_of_the_text():
    class Prefixing(FakeTokenizer):
        def encode(self, text, **flags):
            return super().encode(" " + text, **flags)

    tokens = Prefixing(None).encode("é b\n\nc")
    n_bytes, n_words, document = count(tokens, Prefixing(None), (0, 6), "é b\n\nc".encode())
    assert n_bytes.sum() == len("é b\n\nc".encode())
    assert n_words.sum() == 3
    assert document.tolist() == [0, 0, 0, 0, 0, 0, 0, 0, 1]
