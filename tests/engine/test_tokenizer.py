"""Ids equal llama.cpp's: golden ones (golden/make_tokenizer.py), and live where cyllama is installed.

Byte-level BPE, and what all tokenizers share; SentencePiece-type ones are in test_tokenizer_scores.py.
"""

from __future__ import annotations

import functools
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden.make_tokenizer import (
    NASTY,
    PRES,
    Oracle,
    answers,
    code_points,
    digest,
    random_text,
    tiny_vocabulary,
    vocabulary_of,
    write_model,
)
from vocabularies import (
    DATA,
    MODEL,
    check_golden,
    make,
    needs_data,
    needs_model,
    needs_oracle,
    read_golden,
    read_wikitext,
)

import engine
from engine import Tokenizer, UnsupportedTokenizer, byte_pairs
from engine.pretokenizers import LETTER, NUMBER, PUNCTUATION, RULES

TINY = tiny_vocabulary()
DISTINCT = list({RULES[pre]: pre for pre in reversed(PRES)}.values())  # one name for each set of rules
SILENT = {"tokenizer.ggml.add_bos_token": None, "tokenizer.ggml.add_eos_token": None}


def mostly_slow(pres: Iterable[str | None]) -> list[Any]:
    """Four of the rules in every run, all in `make test-full`; golden files check all in every run."""
    quick = ("smollm", "llama-bpe", "deepseek-llm", None)
    return [pre if pre in quick else pytest.param(pre, marks=pytest.mark.slow) for pre in pres]


@pytest.fixture(scope="module")
def smollm2() -> dict[str, Any]:
    return vocabulary_of(MODEL)


@pytest.mark.parametrize("pre", PRES)
def test_ids_equal_llama_cpp_tiny_vocabulary(pre: str) -> None:
    check_golden("tiny", TINY, pre)


@needs_model
@pytest.mark.parametrize("pre", mostly_slow(PRES))
def test_ids_equal_llama_cpp_smollm2(pre: str, smollm2: dict[str, Any]) -> None:
    check_golden("smollm2", smollm2, pre)


@needs_model
@needs_data
def test_wikitext2_is_303415_tokens_and_its_own_bytes() -> None:
    with engine.open(MODEL) as file:
        ours = Tokenizer(file)
    text = read_wikitext()
    started = time.process_time()
    ids = ours.encode(text)
    assert time.process_time() - started < 3.0
    golden = read_golden("smollm2")
    assert [len(ids), digest(ids)] == golden["wikitext2"]
    tokens = np.load(Path(DATA) / "oracle" / "smollm2-nll.npz")["tokens"]
    np.testing.assert_array_equal(ids[: tokens.size], tokens.ravel())
    assert ours.decode(ids) == text.encode()
    assert ours.byte_lengths[ids].sum() == len(text.encode())


def test_classes_are_those_of_llama_cpp() -> None:
    from tokenizers import Regex, pre_tokenizers

    golden = read_golden("tiny")["classes"]
    text = "".join(map(chr, code_points()))
    patterns = {"letter": LETTER, "number": NUMBER, "punctuation": f"[{PUNCTUATION}$+<=>^~|]", "space": r"\s"}
    for kind, pattern in patterns.items():
        only = pre_tokenizers.Split(Regex(pattern), "removed", invert=True)
        found = [ord(char) for char, _ in only.pre_tokenize_str(text)]
        assert [len(found), digest(found)] == golden[kind], (
            f"the class {kind} is another: a new Unicode version?"
        )


Pair = tuple[Oracle, Tokenizer]


@pytest.fixture(scope="module")
def pair_of(tmp_path_factory: pytest.TempPathFactory, smollm2: dict[str, Any]) -> Callable[[str], Pair]:
    @functools.cache
    def pair(pre: str) -> Pair:
        path = write_model(tmp_path_factory.mktemp("vocabulary") / f"{pre}.gguf", smollm2, pre)
        with engine.open(path) as file:
            return Oracle(path), Tokenizer(file)

    return pair


@needs_oracle
@needs_model
@pytest.mark.parametrize("pre", mostly_slow(DISTINCT))
def test_ids_equal_live_llama_cpp(pre: str, pair_of: Callable[[str], Pair]) -> None:
    oracle, ours = pair_of(pre)
    for text in [random_text(4_000, seed=3), " ".join(NASTY), "\n".join(reversed(NASTY))]:
        for parse_special in (False, True):
            expected = oracle.encode(text, parse_special=parse_special)
            np.testing.assert_array_equal(ours.encode(text, parse_special=parse_special), expected)


@pytest.mark.slow
@needs_oracle
@needs_model
@needs_data
@pytest.mark.parametrize("pre", PRES)
def test_wikitext2_and_long_random_text_equal_live_llama_cpp(
    pre: str, pair_of: Callable[[str], Pair]
) -> None:
    oracle, ours = pair_of(pre)
    for text in (read_wikitext(), random_text(100_000, seed=7)):
        np.testing.assert_array_equal(ours.encode(text), oracle.encode(text))


@pytest.mark.slow
@needs_oracle
@pytest.mark.parametrize("pre", sorted(set(RULES) - set(PRES)))
def test_names_that_share_patterns_equal_live_llama_cpp(pre: str, tmp_path: Path) -> None:
    path = write_model(tmp_path / "tiny.gguf", TINY | SILENT, pre)
    oracle = Oracle(path)
    with engine.open(path) as file:
        ours = Tokenizer(file)
    assert ours.add_bos == oracle.vocab.get_add_bos()
    for text in [*NASTY, random_text(500, seed=8)]:
        assert ours.encode(text).tolist() == oracle.encode(text), text


@needs_oracle
@pytest.mark.parametrize("pre", mostly_slow([*PRES, None]))
def test_rules_of_special_tokens_equal_live_llama_cpp(pre: str | None, tmp_path: Path) -> None:
    silent = SILENT if pre in ("gpt-2", "llama-bpe", "qwen2", "tekken") else {}
    path = write_model(tmp_path / "tiny.gguf", TINY | silent, pre)
    oracle = Oracle(path)
    with engine.open(path) as file:
        ours = Tokenizer(file)
    assert ours.pre == (pre or "default")
    assert (ours.add_bos, ours.add_eos) == (oracle.vocab.get_add_bos(), oracle.vocab.get_add_eos())
    assert (ours.bos_id, ours.eos_id) == (oracle.vocab.token_bos(), oracle.vocab.token_eos())
    for text in [*NASTY[::2], random_text(2000, seed=4), "<|endoftext|><s>".join(NASTY)]:
        assert answers(lambda *a, **k: ours.encode(*a, **k).tolist(), text) == answers(oracle.encode, text)


@pytest.mark.parametrize("pre", PRES)
def test_cutting_the_text_anywhere_gives_the_same_ids(pre: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, text = make(TINY, pre=pre), random_text(4000, seed=5) + read_like_prose()
    whole = ours.encode(text)
    monkeypatch.setattr(byte_pairs, "_CHUNK_CHARS", 1)
    np.testing.assert_array_equal(ours.encode(text), whole)


def read_like_prose() -> str:
    lines = " \n = Title = \n \n It 's the 1,234th - don 't - of  two   three\t\n\n four .\r\n+ + 5\n/ !\n\n"
    return (lines + "\u4e2d\u3002\n\u6587 \u0627 \u0628") * 20


def test_pieces_that_are_tokens_stay_whole_under_some_pre_tokenizers() -> None:
    token = TINY["tokenizer.ggml.tokens"].index("\u0120two")
    for pre, rules in RULES.items():
        ids = make(TINY, pre=pre).encode("one two three", add_special=False)
        assert (token in ids) == rules.ignore_merges == (rules.add_bos), pre


def test_bos_is_added_under_some_pre_tokenizers_unless_the_file_says_no() -> None:
    plain = make(TINY, pre="gpt-2", add_bos_token=None, add_eos_token=None)
    assert not plain.add_bos
    for pre in ("llama-bpe", "tekken"):
        assert make(TINY, pre=pre, add_bos_token=None, add_eos_token=None).encode("").tolist() == [1]
        assert make(TINY, pre=pre, add_bos_token=False, add_eos_token=None).encode("").tolist() == []
        with pytest.raises(UnsupportedTokenizer, match="add_bos_token is true, but there is no"):
            make(TINY, pre=pre, add_bos_token=None, bos_token_id=None)


def test_names_of_chat_marks_make_tokens_user_defined() -> None:
    tokens = [*TINY["tokenizer.ggml.tokens"], "<|start|>"]
    types = np.append(TINY["tokenizer.ggml.token_type"], np.int32(3))
    ours = make(TINY, tokens=tokens, token_type=types)
    assert len(tokens) - 1 in ours.encode("a<|start|>b")
    assert ours.token_bytes(len(tokens) - 1) == b"<|start|>"


@pytest.mark.parametrize("pre", PRES)
def test_decode_of_encode_is_the_text(pre: str) -> None:
    ours = make(TINY, pre=pre)
    lacking = {"\x04", "\x06", *map(chr, range(0x40000, 0x80000))}
    for text in [*NASTY, random_text(4000, seed=6)]:
        kept = "".join(char for char in text if char not in lacking)
        ids = ours.encode(kept)
        assert ours.decode(ids) == kept.encode()
        assert ours.byte_lengths[ids].sum() == len(kept.encode())


def test_bytes_without_a_token_are_dropped_but_keep_neighbours_apart(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ours = make(TINY, pre="gpt-2", add_bos_token=False, add_eos_token=False)
    (joined,) = ours.encode("??")
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert ours.encode("?\x04\x04?").tolist() == [*ours.encode("?"), *ours.encode("?")]
    assert "no token stands for 2 bytes" in caplog.text
    assert joined not in ours.encode("?\x04?")
    assert ours.decode(ours.encode("a\U00050000b")) == b"a\x90\x80\x80b"  # F1 begins U+50000


def test_token_bytes_by_type() -> None:
    ours = make(TINY)
    tokens = TINY["tokenizer.ggml.tokens"]
    expected = dict.fromkeys(["<|endoftext|>", "<|im_end|>", "<unk>"], b"")  # control, one by its name
    expected |= {"<tool>": b"<tool>", "   ": b"   ", "\u2581raw text": "\u2581raw text".encode()}
    expected |= {"<0x41>": b"A", "\u0120": b" ", "\u010a\u0120": b"\n ", "\u00a9\u00c3": b"\xa9\xc3"}
    for text, piece in expected.items():
        assert ours.token_bytes(tokens.index(text)) == piece, text
    assert [len(ours.token_bytes(i)) for i in range(ours.n_vocab)] == ours.byte_lengths.tolist()
    assert ours.byte_lengths.dtype == np.int32
    assert not ours.byte_lengths.flags.writeable
    for outside in (-1, ours.n_vocab):
        with pytest.raises(ValueError, match="outside the vocabulary"):
            ours.token_bytes(outside)


def test_bos_and_eos_are_added_where_the_file_says_so() -> None:
    plain = make(TINY, add_bos_token=False, add_eos_token=False).encode("a").tolist()
    assert make(TINY, add_bos_token=None, add_eos_token=None).encode("a").tolist() == plain
    assert make(TINY, add_eos_token=False).encode("a").tolist() == [1, *plain]
    assert make(TINY).encode("a").tolist() == [1, *plain, 0]
    assert make(TINY).encode("").tolist() == [1, 0]
    assert make(TINY).encode("a", add_special=False).tolist() == plain
    assert make(TINY).encode("", add_special=False).dtype == np.int32


def test_file_may_be_closed(tmp_path: Path) -> None:
    with engine.open(write_model(tmp_path / "tiny.gguf", TINY, "smollm")) as file:
        ours = Tokenizer(file)
    assert ours.decode(ours.encode("it's 12")) == b"it's 12"
    assert ours.sha256 == make(TINY, pre="smollm").sha256


def changes() -> Iterator[Callable[[], Tokenizer]]:
    types, merges = TINY["tokenizer.ggml.token_type"], TINY["tokenizer.ggml.merges"].value
    tokens = TINY["tokenizer.ggml.tokens"]
    for pre in RULES:
        yield lambda pre=pre: make(TINY, pre=pre)  # type: ignore[misc]
    yield lambda: make(TINY, pre="smollm", tokens=[tokens[1], tokens[0], *tokens[2:]])
    yield lambda: make(TINY, pre="smollm", token_type=np.where(types == 5, 1, types))
    yield lambda: make(TINY, pre="smollm", merges=[merges[1], merges[0], *merges[2:]])
    yield lambda: make(TINY, pre="smollm", merges=merges[:-1])
    yield lambda: make(TINY, pre="smollm", add_bos_token=False)
    yield lambda: make(TINY, pre="smollm", eos_token_id=2)


def test_digest_changes_with_all_that_determines_ids() -> None:
    digests = [change().sha256 for change in changes()]
    assert len(set(digests)) == len(digests)
    assert digests[0] == make(TINY, pre="smollm").sha256


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": "bert"}, r"model is 'bert'; supported are 'gpt2' \(byte-level BPE\), 'llama' \(Sent"),
        ({"model": None}, r"tokenizer.ggml.model is missing"),
        ({"model": 3}, r"is 3, not a string"),
        ({"pre": "gpt-4o"}, f"pre is 'gpt-4o'; supported are {', '.join(map(repr, RULES))}: use a model"),
        ({"tokens": None}, r"tokenizer.ggml.tokens is missing"),
        ({"tokens": []}, r"tokens is empty"),
        ({"tokens": np.zeros(3, np.int32)}, r"tokens is not an array of strings"),
        ({"tokens": ["a", "b", "a"]}, r"tokens holds 'a' twice"),
        ({"token_type": np.ones(3, np.int32)}, r"token_type has 3 entries for \d,\d+ tokens"),
        ({"token_type": ["normal"]}, r"token_type is not an array of integers"),
        ({"merges": None}, r"tokenizer.ggml.merges is missing"),
        ({"merges": ["a b", "ab"]}, r"merges holds 'ab' as number 1, not two parts"),
        ({"merges": ["a "]}, r"merges holds 'a ' as number 0, not two parts"),
        ({"merges": ["a b", "nothing b"]}, r"number 1, but no token is 'nothing'"),
        ({"bos_token_id": 10**6}, r"bos_token_id is 1000000, but tokens are 0 to"),
        ({"eos_token_id": -1}, r"eos_token_id is -1, but tokens are 0 to"),
        ({"bos_token_id": None}, r"add_bos_token is true, but there is no tokenizer.ggml.bos_token_id"),
        ({"eos_token_id": None}, r"add_eos_token is true, but there is no tokenizer.ggml.eos_token_id"),
        ({"add_bos_token": 1}, r"add_bos_token is 1, not true or false"),
    ],
)
def test_vocabularies_that_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedTokenizer, match=f"^model.gguf: .*{message}"):
        make(TINY, **changed)


def test_equal_merges_count_once_by_the_first() -> None:
    merges = TINY["tokenizer.ggml.merges"].value
    assert make(TINY, merges=[*merges, merges[0]]).sha256 == make(TINY).sha256


def test_surrogates_are_refused() -> None:
    with pytest.raises(UnicodeEncodeError):
        make(TINY).encode("a\ud800b")


@pytest.mark.parametrize("pre", ["default", "llama-bpe", "tekken", "deepseek-llm"])
@pytest.mark.parametrize("unit", ["a", " ", "\n", "!", "1", "\u00e9", "'", "\u4e2d", " \t"])
def test_long_runs_take_linear_time(unit: str, pre: str) -> None:
    ours, text = make(TINY, pre=pre), unit * (100_000 // len(unit)) + "x"
    started = time.process_time()
    assert ours.decode(ours.encode(text)) == text.encode()
    assert time.process_time() - started < 5.0


def test_library_is_loaded_by_the_first_tokenizer_only() -> None:
    code = "import engine, engine.tokenizer, sys; sys.exit('tokenizers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@needs_model
def test_construction_takes_under_a_second() -> None:
    with engine.open(MODEL) as file:
        Tokenizer(file)
        started = time.process_time()
        Tokenizer(file)
        assert time.process_time() - started < 1.0
