"""SentencePiece-type tokenizers: ids equal llama.cpp's, golden and live; the laws of the merge loop."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden.make_tokenizer import (
    NASTY,
    Oracle,
    answers,
    digest,
    random_text,
    tiny_scores,
    vocabulary_of,
    write_model,
)
from vocabularies import (
    File,
    Strings,
    check_golden,
    make,
    needs_data,
    needs_oracle,
    read_golden,
    read_wikitext,
)

import engine
from engine import Tokenizer, UnsupportedTokenizer, sentencepiece
from engine.sentencepiece import SentencePiece
from engine.vocabulary import SPACE, read_vocabulary

GEMMA = os.environ.get("PAGEMILL_TEST_GEMMA", "")
TINY = tiny_scores()
TOKENS = TINY["tokenizer.ggml.tokens"]
NO_PREFIX = {"tokenizer.ggml.add_space_prefix": False}


def trained_vocabulary(text: str) -> dict[str, Any]:
    """A vocabulary as a SentencePiece trainer makes it: unique scores, spaces only in front."""
    from tokenizers import Tokenizer as Library
    from tokenizers import models, pre_tokenizers, trainers

    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.train_from_iterator([text], trainers.BpeTrainer(vocab_size=2000, show_progress=False))
    learned = sorted(library.get_vocab(), key=library.get_vocab().__getitem__)
    tokens = [*TOKENS[:259], *learned]
    return TINY | {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array([2, 3, 3] + [6] * 256 + [1] * len(learned), np.int32),
        "tokenizer.ggml.scores": np.array([0.0] * 259 + [-i for i in range(len(learned))], np.float32),
    }


@pytest.mark.parametrize("golden", ["default", "no prefix"])
def test_ids_equal_llama_cpp(golden: str) -> None:
    check_golden("scores", TINY | (NO_PREFIX if golden == "no prefix" else {}), "default", golden)


@pytest.mark.slow
@needs_data
@pytest.mark.skipif(not Path(GEMMA).is_file(), reason="PAGEMILL_TEST_GEMMA names no GGUF file of Gemma 3")
def test_ids_equal_llama_cpp_gemma() -> None:
    vocabulary, text = vocabulary_of(GEMMA), read_wikitext()
    check_golden("gemma", vocabulary, "default")
    check_golden("gemma", vocabulary | {"tokenizer.ggml.add_space_prefix": True}, "default", "prefix")
    ours = make(vocabulary)
    started = time.process_time()
    ids = ours.encode(text)
    assert time.process_time() - started < 5.0
    assert [len(ids), digest(ids)] == read_golden("gemma")["wikitext2"]
    assert ours.decode(ids) == text.encode()


@needs_oracle
@pytest.mark.parametrize(
    "changed",
    [
        {},
        NO_PREFIX | {"tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_eos_token": True},
        {"tokenizer.ggml.scores": None, "tokenizer.ggml.bos_token_id": 2, "tokenizer.ggml.eos_token_id": 1},
        {"tokenizer.ggml.token_type": None, "tokenizer.ggml.scores": np.arange(len(TOKENS), dtype=np.int32)},
        {
            "general.name": "My Phi-3 Mini",
            "tokenizer.ggml.tokens": [*TOKENS, "<|endoftext|>"],
            "tokenizer.ggml.token_type": np.append(TINY["tokenizer.ggml.token_type"], np.int32(3)),
            "tokenizer.ggml.scores": np.append(TINY["tokenizer.ggml.scores"], np.float32(0)),
        },
    ],
    ids=["tiny", "flags", "no scores", "no types", "phi-3"],
)
def test_ids_equal_live_llama_cpp(changed: dict[str, Any], tmp_path: Path) -> None:
    path = write_model(tmp_path / "tiny.gguf", TINY | changed, "anything")
    oracle = Oracle(path)
    with engine.open(path) as file:
        ours = Tokenizer(file)
    assert (ours.model, ours.pre) == ("llama", "default")
    assert (ours.add_bos, ours.add_eos) == (oracle.vocab.get_add_bos(), oracle.vocab.get_add_eos())
    assert (ours.bos_id, ours.eos_id) == (oracle.vocab.token_bos(), oracle.vocab.token_eos())
    marked = " </s> \n\t<tool>\n <|im_end|>  <|endoftext|> \v<s>\f\x1c<unk> ".join(NASTY)
    for text in [*NASTY, random_text(10_000, seed=4), marked, prose()]:
        assert answers(lambda *a, **k: ours.encode(*a, **k).tolist(), text) == answers(oracle.encode, text)


@needs_oracle
@needs_data
def test_trained_vocabulary_equals_live_llama_cpp(tmp_path: Path) -> None:
    text = read_wikitext()[:200_000]
    path = write_model(tmp_path / "trained.gguf", trained_vocabulary(text[:50_000]), None)
    with engine.open(path) as file:
        oracle, ours = Oracle(path), Tokenizer(file)
    for some in (text, random_text(8_000, seed=5)):
        np.testing.assert_array_equal(ours.encode(some), oracle.encode(some))


def prose() -> str:
    """Words of the letters that the tiny vocabulary merges, with runs and doubled spaces."""
    rng = np.random.default_rng(9)
    letters = rng.choice(list("aeionrstlhdcum    .,'1234<>/\u00e9\u4e2d\u0430ab"), 30_000)
    return "".join(np.repeat(letters, rng.choice([1, 1, 1, 2, 5], letters.size)).tolist())


def encoder(vocabulary: dict[str, Any]) -> SentencePiece:
    found = {key: Strings(value) if isinstance(value, list) else value for key, value in vocabulary.items()}
    return SentencePiece(read_vocabulary(File({k: v for k, v in found.items() if v is not None})))  # type: ignore[arg-type]


def test_cutting_where_no_token_has_both_neighbours_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, text = encoder(TINY | NO_PREFIX), random_text(500, seed=6) + prose()[:5000]
    whole = ours._merge(text.replace(" ", SPACE))
    assert ours.encode(text).tolist() == whole
    pieces = list(ours._pieces(text.replace(" ", SPACE)))
    assert len(pieces) > 500
    monkeypatch.setattr(sentencepiece, "_CHUNK_CHARS", 1)
    assert list(ours._pieces(text.replace(" ", SPACE))) == pieces
    monkeypatch.setattr(sentencepiece, "_KEPT", 3)
    assert encoder(TINY | NO_PREFIX).encode(text).tolist() == whole


def test_best_score_merges_first_and_the_leftmost_of_equal_ones() -> None:
    letters = ["a", "b", "c", "aa", "ab", "bc", "abc"]
    tokens = TOKENS[:259] + letters
    scores = dict.fromkeys(tokens, 0.0) | {"aa": -1.0, "ab": -3.0, "bc": -2.0, "abc": -9.0}

    def split(text: str, **changed: float) -> list[str]:
        values = np.array([*(scores | changed).values()], np.float32)
        vocabulary = {"tokens": tokens, "token_type": None, "scores": values, "add_space_prefix": False}
        ids = make(TINY, **vocabulary).encode(text, add_special=False)
        return [tokens[i] for i in ids]

    assert split("abc") == ["abc"]
    assert split("abbc") == ["ab", "bc"]
    assert split("aabc") == ["aa", "bc"]
    assert split("aabc", ab=-0.5) == ["a", "abc"]
    assert split("aaa") == ["aa", "a"]
    assert split("aab", ab=-1.0) == ["aa", "b"]
    assert split("adc\u00e9") == ["a", "<0x64>", "c", "<0xC3>", "<0xA9>"]


def test_decode_of_encode_is_the_text_behind_its_space() -> None:
    for prefix, front in ((True, b" "), (False, b"")):
        ours = make(TINY, add_space_prefix=prefix)
        assert ours.add_space_prefix is prefix
        for text in [random_text(4000, seed=6).replace(SPACE, ""), prose(), "q Q\u00e9\U0001f600"]:
            kept = re.sub("\n+", "\n", re.sub(" +", " ", text))  # runs are user-defined, a space goes behind
            ids = ours.encode(kept)
            assert ours.decode(ids) == front + kept.encode()
            assert ours.byte_lengths[ids].sum() == len(front + kept.encode())


def test_special_tokens_get_a_space_behind_them() -> None:
    ours = make(TINY)
    tool = TOKENS.index("<tool>")
    ids = ours.encode("a<tool>b<tool>", add_special=False)
    assert np.array_equal(ids, [*ours.encode("a", add_special=False), tool, *ours.encode("b")[1:], tool])
    assert ours.decode(ids) == b" a<tool> b<tool>"
    assert ours.encode("").tolist() == [1]
    assert ours.encode("", add_special=False).tolist() == []


def test_token_bytes_by_type() -> None:
    ours = make(TINY)
    expected = {
        "<unk>": b"",
        "</s>": b"",
        "<|im_end|>": b"",
        "<0x0A>": b"\n",
        "<0xFF>": b"\xff",
        "   ": b"   ",
    }
    expected |= {
        "<tool>": b"<tool>",
        "\u2581a\u2581": b" a ",
        "\u00e9": "\u00e9".encode(),
        "e\u2581t": b"e t",
    }
    for text, piece in expected.items():
        assert ours.token_bytes(TOKENS.index(text)) == piece, text


def test_bos_and_eos_are_1_and_2_where_the_file_does_not_say() -> None:
    ours = make(TINY)
    assert (ours.bos_id, ours.eos_id, ours.add_bos, ours.add_eos) == (1, 2, True, False)
    assert make(TINY, bos_token_id=5, add_eos_token=True).encode("").tolist() == [5, 2]


def test_digest_changes_with_all_that_determines_ids() -> None:
    scores = TINY["tokenizer.ggml.scores"]
    changed = [make(TINY), make(TINY, add_space_prefix=False), make(TINY, scores=scores[::-1])]
    changed += [
        make(TINY, scores=None),
        make(TINY | {"general.name": "phi3"}),
        make(TINY, add_bos_token=False),
    ]
    assert len({ours.sha256 for ours in changed}) == len(changed)
    assert make(TINY, pre="gpt-2").sha256 == make(TINY).sha256  # it has no pre-tokenizer


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"tokens": TOKENS[:100], "token_type": None, "scores": None},
            "tokens holds no '<0x61>', so some texts",
        ),
        ({"scores": np.zeros(3, np.float32)}, r"scores has 3 entries for \d,\d+ tokens"),
        ({"scores": ["high"]}, "scores is not an array of numbers"),
        ({"scores": np.full(len(TOKENS), np.nan, np.float32)}, "scores is not a number for token 0, '<unk>'"),
        ({"add_space_prefix": "yes"}, "add_space_prefix is 'yes', not true or false"),
        ({"bos_token_id": 10**6}, "bos_token_id is 1000000, but tokens are 0 to"),
    ],
)
def test_vocabularies_that_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedTokenizer, match=f"^model.gguf: .*{message}"):
        make(TINY, **changed)


@pytest.mark.parametrize("unit", ["a", " ", "\n", "!", "1", "\u00e9", "q", "\u4e2d", "ab ", "e t"])
def test_long_runs_take_linear_time(unit: str) -> None:
    ours, text = make(TINY, add_space_prefix=False), unit * (100_000 // len(unit)) + "x"
    started = time.process_time()
    assert ours.decode(ours.encode(text)) == text.encode()
    assert time.process_time() - started < 5.0
