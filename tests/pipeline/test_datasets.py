"""Data sets: bytes as they are, pinned, refused with the likely cause; token streams are cached."""

import hashlib
import json

import numpy as np
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
    assert sorted(p.suffix for p in (tmp_path / "tokens").iterdir()) == [".npy"] * 2
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
