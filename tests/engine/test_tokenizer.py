"""Ids equal llama.cpp's: golden ones (golden/make_tokenizer.py), and live where cyllama is installed."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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

import engine
from engine import Tokenizer, UnsupportedTokenizer, tokenizer
from engine.pretokenizers import LETTER, NUMBER, PUNCTUATION

GOLDEN = Path(__file__).parents[1] / "golden"
MODEL = os.environ.get("PAGEMILL_TEST_MODEL", "")
DATA = os.environ.get("PAGEMILL_TEST_DATA", "")

needs_model = pytest.mark.skipif(not Path(MODEL).is_file(), reason="PAGEMILL_TEST_MODEL names no GGUF file")
needs_data = pytest.mark.skipif(not DATA, reason="PAGEMILL_TEST_DATA is not set")
needs_oracle = pytest.mark.skipif(
    importlib.util.find_spec("cyllama") is None, reason="cyllama (llama.cpp) is not installed"
)


class Strings(list[str]):
    """Stands in for the file's StringArray."""

    def to_list(self) -> list[str]:
        return list(self)


@dataclass
class File:
    """What a tokenizer needs of a GGUF file."""

    metadata: dict[str, Any]
    path: str = "model.gguf"


def make(vocabulary: dict[str, Any], **changed: Any) -> Tokenizer:
    """A tokenizer of a vocabulary with some of `tokenizer.ggml.*` changed; None leaves one out."""
    metadata = vocabulary | {f"tokenizer.ggml.{key}": value for key, value in changed.items()}
    found = {key: getattr(value, "value", value) for key, value in metadata.items() if value is not None}
    strings = {key: Strings(value) if isinstance(value, list) else value for key, value in found.items()}
    return Tokenizer(File(strings))  # type: ignore[arg-type]


TINY = tiny_vocabulary()


@pytest.fixture(scope="module")
def smollm2() -> dict[str, Any]:
    return vocabulary_of(MODEL)


def check_golden(name: str, vocabulary: dict[str, Any], pre: str) -> None:
    golden = json.loads((GOLDEN / f"tokenizer_{name}.json").read_text())[pre]
    ours = make(vocabulary, pre=pre)
    for text, expected in zip(NASTY, golden["nasty"], strict=True):
        assert answers(lambda *a, **k: ours.encode(*a, **k).tolist(), text) == expected, text
    assert digest(ours.encode(random_text(20_000, seed=1), add_special=False)) == golden["random"]


@pytest.mark.parametrize("pre", PRES)
def test_ids_equal_llama_cpp_tiny_vocabulary(pre: str) -> None:
    check_golden("tiny", TINY, pre)


@needs_model
@pytest.mark.parametrize("pre", PRES)
def test_ids_equal_llama_cpp_smollm2(pre: str, smollm2: dict[str, Any]) -> None:
    check_golden("smollm2", smollm2, pre)


def read_wikitext() -> str:
    return (Path(DATA) / "data" / "wiki.test.raw").read_bytes().decode().removesuffix("\n")


@needs_model
@needs_data
def test_wikitext2_is_303415_tokens_and_its_own_bytes() -> None:
    with engine.open(MODEL) as file:
        ours = Tokenizer(file)
    text = read_wikitext()
    started = time.process_time()
    ids = ours.encode(text)
    assert time.process_time() - started < 3.0
    golden = json.loads((GOLDEN / "tokenizer_smollm2.json").read_text())
    assert [len(ids), digest(ids)] == golden["wikitext2"]
    tokens = np.load(Path(DATA) / "oracle" / "smollm2-nll.npz")["tokens"]
    np.testing.assert_array_equal(ids[: tokens.size], tokens.ravel())
    assert ours.decode(ids) == text.encode()
    assert ours.byte_lengths[ids].sum() == len(text.encode())


def test_classes_are_those_of_llama_cpp() -> None:
    from tokenizers import Regex, pre_tokenizers

    golden = json.loads((GOLDEN / "tokenizer_tiny.json").read_text())["classes"]
    text = "".join(map(chr, code_points()))
    patterns = {"letter": LETTER, "number": NUMBER, "punctuation": f"[{PUNCTUATION}$+<=>^~|]", "space": r"\s"}
    for kind, pattern in patterns.items():
        only = pre_tokenizers.Split(Regex(pattern), "removed", invert=True)
        found = [ord(char) for char, _ in only.pre_tokenize_str(text)]
        assert [len(found), digest(found)] == golden[kind], (
            f"the class {kind} is another: a new Unicode version?"
        )


@pytest.fixture(scope="module")
def oracles(
    tmp_path_factory: pytest.TempPathFactory, smollm2: dict[str, Any]
) -> dict[str, tuple[Oracle, Tokenizer]]:
    pairs = {}
    for pre in PRES:
        path = write_model(tmp_path_factory.mktemp("vocabulary") / f"{pre}.gguf", smollm2, pre)
        with engine.open(path) as file:
            pairs[pre] = Oracle(path), Tokenizer(file)
    return pairs


@needs_oracle
@needs_model
@pytest.mark.parametrize("pre", PRES)
def test_ids_equal_live_llama_cpp(pre: str, oracles: dict[str, tuple[Oracle, Tokenizer]]) -> None:
    oracle, ours = oracles[pre]
    for text in [*NASTY, random_text(15_000, seed=3), " ".join(NASTY), "\n".join(reversed(NASTY))]:
        for parse_special in (False, True):
            expected = oracle.encode(text, parse_special=parse_special)
            np.testing.assert_array_equal(ours.encode(text, parse_special=parse_special), expected)


@pytest.mark.slow
@needs_oracle
@needs_model
@needs_data
@pytest.mark.parametrize("pre", PRES)
def test_wikitext2_equals_live_llama_cpp(pre: str, oracles: dict[str, tuple[Oracle, Tokenizer]]) -> None:
    oracle, ours = oracles[pre]
    text = read_wikitext()
    np.testing.assert_array_equal(ours.encode(text), oracle.encode(text))


@needs_oracle
@pytest.mark.parametrize("pre", [*PRES, None])
def test_rules_of_special_tokens_equal_live_llama_cpp(pre: str | None, tmp_path: Path) -> None:
    flags = {"tokenizer.ggml.add_bos_token": None, "tokenizer.ggml.add_eos_token": None}
    path = write_model(tmp_path / "tiny.gguf", TINY | (flags if pre == "gpt-2" else {}), pre)
    oracle = Oracle(path)
    with engine.open(path) as file:
        ours = Tokenizer(file)
    assert ours.pre == (pre or "default")
    assert (ours.add_bos, ours.add_eos) == (oracle.vocab.get_add_bos(), oracle.vocab.get_add_eos())
    assert (ours.bos_id, ours.eos_id) == (oracle.vocab.token_bos(), oracle.vocab.token_eos())
    for text in [*NASTY, random_text(3000, seed=4), "<|endoftext|><s>".join(NASTY)]:
        assert answers(lambda *a, **k: ours.encode(*a, **k).tolist(), text) == answers(oracle.encode, text)


@pytest.mark.parametrize("pre", PRES)
def test_cutting_the_text_anywhere_gives_the_same_ids(pre: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, text = make(TINY, pre=pre), random_text(4000, seed=5) + read_like_prose()
    whole = ours.encode(text)
    monkeypatch.setattr(tokenizer, "_CHUNK_CHARS", 1)
    np.testing.assert_array_equal(ours.encode(text), whole)


def read_like_prose() -> str:
    return " \n = Title = \n \n It 's the 1,234th - don 't - of  two   three\t\n\n four .\r\n" * 20


@pytest.mark.parametrize("pre", PRES)
def test_decode_of_encode_is_the_text(pre: str) -> None:
    ours = make(TINY, pre=pre)
    lacking = {"\x04", "\x06", *map(chr, range(0x40000, 0x80000))}
    for text in [*NASTY, random_text(4000, seed=6)]:
        kept = "".join(char for char in text if char not in lacking)
        for add_special in (False, True):
            ids = ours.encode(kept, add_special=add_special)
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
    for pre in PRES:
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
        ({"model": "llama"}, r"tokenizer.ggml.model is 'llama'; supported is 'gpt2'"),
        ({"model": None}, r"tokenizer.ggml.model is missing"),
        ({"model": 3}, r"is 3, not a string"),
        ({"pre": "llama-bpe"}, r"pre is 'llama-bpe'; supported are 'smollm', 'gpt-2', 'default'"),
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


@pytest.mark.parametrize("unit", ["a", " ", "\n", "!", "1", "\u00e9", "'", "\u4e2d", " \t"])
def test_long_runs_take_linear_time(unit: str) -> None:
    ours, text = make(TINY, pre="default"), unit * (200_000 // len(unit)) + "x"
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
