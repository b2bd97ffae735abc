"""Tokenizers of checkpoints: names found from their structure, and ids that are the tokenizers library's."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer as Library

import engine
from engine.pretokenizers import RULES
from pipeline.convert.config import Config
from pipeline.convert.vocabulary import Vocabulary, read_vocabulary
from pipeline.errors import ModelError
from tests.checkpoints import byte_level_tokenizer, make_checkpoint
from tests.pipeline.conversions import converted
from tests.vocabularies import File, Strings

TEXT = """It's IT'S 1,234,567 words; naïve cafés \u4e2d\u6587 x1 22 333!\n\n  def f(x):\n\treturn x**2 # ok...
helloWorld HTTPServer don't  stop --- <a href='b'>  &&\r\n end   \n"""
NFC = {"type": "NFC"}
GPT_2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
BYTES = {**GPT_2, "use_regex": False}
DIGITS = {"type": "Digits", "individual_digits": True}
MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
EASTERN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"


def split(pattern: str, **changes: Any) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False} | changes


def steps(*inner: Any) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(inner)}


def cased() -> str:
    """DeepSeek's pattern for letters as tokenizer.json has it: the characters themselves."""
    found = re.findall(r"\\x\{(\w+)\}-\\x\{(\w+)\}", RULES["deepseek-llm"].patterns[1])
    ranges = [(chr(int(first, 16)), chr(int(last, 16))) for first, last in found]
    return r"\s?[" + "".join(a if a == b else f"{a}-{b}" for a, b in ranges) + "]+"


LLAMA_3 = steps(split(rf"{SHORT}|\p{{N}}{{1,3}}|{MARKS}"), BYTES)
STRUCTURES: dict[str, tuple[Any, Any, dict[str, Any]]] = {  # name: normalizer, pre-tokenizer, model's changes
    "gpt-2": (None, GPT_2, {}),
    "olmo": (NFC, GPT_2 | {"use_regex": True}, {}),
    "smollm": (None, steps(DIGITS, GPT_2), {}),
    "command-r": (NFC, steps(DIGITS, GPT_2), {}),
    "llama-bpe": (None, LLAMA_3, {"ignore_merges": True}),
    "dbrx": (None, LLAMA_3, {}),
    "qwen2": (NFC, steps(split(rf"{SHORT}|\p{{N}}|{MARKS}"), BYTES), {}),
    "tekken": (None, steps(split(TEKKEN), BYTES), {"ignore_merges": True}),
    "falcon": (
        None,
        steps(
            {"type": "Punctuation", "behavior": "Contiguous"}, GPT_2,
            {"type": "Digits", "individual_digits": False}, split("[0-9][0-9][0-9]"),
        ),
        {},
    ),
    "deepseek-llm": (
        {"type": "Sequence", "normalizers": []},
        steps(
            split("[\r\n]"), split(cased()),
            split("\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"),
            split(r"\s+$"), split(EASTERN), DIGITS, BYTES,
        ),
        {},
    ),
    "deepseek-coder": (
        None,
        steps(split("[\r\n]"), split(r"\s?\p{L}+"), split(r"\s?\p{P}+"), split(EASTERN), DIGITS, BYTES),
        {},
    ),
}  # fmt: skip


def read(folder: Path, tokenizer: Any = None, said: Any = None, config: Any = None) -> Vocabulary:
    """The vocabulary of a folder with these files."""
    folder.mkdir(exist_ok=True)
    if tokenizer is not None:
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    if said is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(said))
    return read_vocabulary(folder, None, Config(folder / "config.json", config or {}))


def in_engine(vocabulary: Vocabulary) -> engine.Tokenizer:
    """The engine's tokenizer of the metadata."""
    keys = vocabulary.keys()
    return engine.Tokenizer(
        File({key: Strings(value) if isinstance(value, list) else value for key, value in keys.items()})
    )


@pytest.mark.parametrize("name", STRUCTURES)
def test_a_structure_has_its_name_and_the_same_ids(tmp_path: Path, name: str) -> None:
    normalizer, before, changes = STRUCTURES[name]
    described = byte_level_tokenizer(900, before, **changes) | {"normalizer": normalizer}
    vocabulary = read(tmp_path, described)
    assert vocabulary.pre == name
    assert any("NFC" in warning for warning in vocabulary.warnings) is (normalizer == NFC)
    text = TEXT if "falcon" not in name else TEXT.encode("ascii", "ignore").decode()
    ids = in_engine(vocabulary).encode(text).tolist()
    assert ids == Library.from_str(json.dumps(described)).encode(text, add_special_tokens=False).ids


def test_removing_what_is_not_matched_is_keeping_the_matches(tmp_path: Path) -> None:
    before = steps(split(rf"{SHORT}|\p{{N}}|{MARKS}", behavior="Removed", invert=True), BYTES)
    assert read(tmp_path, byte_level_tokenizer(300, before)).pre == "qwen2"


@pytest.mark.parametrize(
    ("normalizer", "before", "changes", "shown"),
    [
        (None, steps(split(r"\p{L}+"), BYTES), {}, r"\\p{L}+"),
        (None, GPT_2 | {"add_prefix_space": True}, {}, '"add_prefix_space": true'),
        ({"type": "Lowercase"}, GPT_2, {}, "Lowercase"),
        (None, None, {}, '"pre_tokenizer": null'),
        (None, GPT_2, {"ignore_merges": True}, '"ignore_merges": true'),
        (None, STRUCTURES["tekken"][1], {}, '"ignore_merges": false'),
        (None, steps({"type": "Digits"}, GPT_2), {}, "Digits"),
        (None, {"type": "Whitespace"}, {}, "Whitespace"),
        (None, steps(split(r"\s?[^A]+"), BYTES), {}, "[^A]+"),
        (None, steps(split("x", behavior="MergedWithNext"), BYTES), {}, "MergedWithNext"),
    ],
)
def test_an_unknown_structure_is_refused_and_shown(
    tmp_path: Path, normalizer, before, changes, shown
) -> None:
    described = byte_level_tokenizer(300, **changes) | {"normalizer": normalizer, "pre_tokenizer": before}
    with pytest.raises(ModelError, match="no pre-tokenizer of GGUF's is known by this structure") as info:
        read(tmp_path, described)
    assert shown in str(info.value)
    assert "tekken" in info.value.hint


def test_special_tokens_are_of_the_tokenizers_config_and_else_of_the_models(tmp_path: Path) -> None:
    said = {"bos_token": {"content": "<|im_start|>"}, "eos_token": None, "pad_token": "<|im_end|>"}
    metadata = read(
        tmp_path, byte_level_tokenizer(300), said, {"eos_token_id": [2, 1], "bos_token_id": 0}
    ).metadata
    ids = {role: metadata.get(f"{role}_token_id") for role in ("bos", "eos", "padding", "unknown")}
    assert ids == {"bos": 1, "eos": 2, "padding": 2, "unknown": None}
    assert (metadata["add_bos_token"], metadata["add_eos_token"]) == (False, False)


def test_end_of_text_begins_and_ends_where_nothing_is_said(tmp_path: Path) -> None:
    metadata = read(tmp_path, byte_level_tokenizer(300)).metadata
    assert (metadata["bos_token_id"], metadata["eos_token_id"]) == (0, 0)


@pytest.mark.parametrize(
    ("said", "ends", "adds"),
    [
        ({}, "", (False, False)),
        ({}, "<", (True, False)),
        ({}, "<>", (True, True)),
        ({"add_bos_token": False}, "<", (False, False)),
        ({"add_bos_token": True, "add_eos_token": True}, "", (True, True)),
        ({"add_bos_token": None}, "<", (True, False)),
    ],
)
def test_bos_and_eos_are_added_as_the_flags_or_the_template_say(tmp_path: Path, said, ends, adds) -> None:
    single: list[Any] = [{"Sequence": {"id": "A", "type_id": 0}}]
    single = [{"SpecialToken": {"id": "<|im_start|>"}}, *single] if "<" in ends else single
    single = [*single, {"SpecialToken": {"id": "<|im_end|>"}}] if ">" in ends else single
    template = {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": {}}
    described = byte_level_tokenizer(300) | {
        "post_processor": {"type": "Sequence", "processors": [{"type": "ByteLevel"}, template]}
    }
    metadata = read(
        tmp_path, described, {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"} | said
    ).metadata
    assert (metadata["add_bos_token"], metadata["add_eos_token"]) == adds


def test_added_tokens_and_ids_without_a_token_have_their_types(tmp_path: Path) -> None:
    described = byte_level_tokenizer(300)
    described["added_tokens"] += [
        {"id": 302, "content": "    ", "special": False},
        {"id": 303, "content": "[PAD300]", "special": True},
    ]
    vocabulary = read(tmp_path, described)
    assert vocabulary.tokens[299:] == [vocabulary.tokens[299], "[[PAD300]]", "[PAD301]", "    ", "[PAD300]"]
    assert vocabulary.types[:3] == [3, 3, 3]
    assert vocabulary.types[299:] == [1, 5, 5, 4, 3]
    padded = vocabulary.padded(400, 304 + 8)
    assert padded.tokens[-1] == "[PAD311]"
    assert padded.types[-8:] == [5] * 8
    assert padded.n_tokens == 304


BROKEN = {
    "two ids": (
        lambda d: d["added_tokens"].append({"id": 7, "content": "<|im_end|>"}),
        "has the ids 2 and 7",
    ),
    "one id": (lambda d: d["added_tokens"].append({"id": 7, "content": "new"}), "two tokens have one id"),
    "no id": (lambda d: d["model"]["vocab"].update({"new": -1}), "integers from 0"),
    "far id": (lambda d: d["model"]["vocab"].update({"new": 9999}), "ids up to 9,999"),
    "merge": (lambda d: d["model"]["merges"].append(["a", "Z"]), "merge 41"),
    "merge of three": (lambda d: d["model"]["merges"].append("a b c"), "expected two parts"),
    "unigram": (lambda d: d["model"].update(type="Unigram"), "Unigram"),
    "suffix": (lambda d: d["model"].update(end_of_word_suffix="</w>"), "end_of_word_suffix"),
    "no model": (lambda d: d.pop("model"), "no BPE model"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_tokenizer_is_refused(tmp_path: Path, name: str) -> None:
    change, said = BROKEN[name]
    described = byte_level_tokenizer(300)
    change(described)
    with pytest.raises(ModelError, match=said):
        read(tmp_path, described)


@pytest.mark.parametrize("by", ["file", "folder"])
def test_the_user_names_a_tokenizer_for_a_checkpoint_without_one(tmp_path: Path, by: str) -> None:
    folder = make_checkpoint(tmp_path / "hf", "mamba")
    (tmp_path / "neox").mkdir()
    named = (folder / "tokenizer.json").rename(tmp_path / "neox" / "tokenizer.json")
    with pytest.raises(ModelError, match=r"no tokenizer\.json") as info:
        converted(folder, tmp_path / "m.gguf")
    assert "GPT-NeoX" in info.value.hint
    chosen = named if by == "file" else named.parent
    summary = converted(folder, tmp_path / "m.gguf", tokenizer=str(chosen))
    assert (summary["pre_tokenizer"], summary["n_vocab"]) == ("gpt-2", 290)


def sentencepiece() -> tuple[dict[str, Any], list[tuple[str, float, int]]]:
    """A tokenizer.json with byte fallback, and the same as pieces with scores and types."""
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    pieces += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    made = "_t he th _th the _the _a in ing __ re er _w or _wor _c at ca cat _cat on".replace("_", "\u2581")
    pieces += [(text, -float(rank), 1) for rank, text in enumerate(made.split())]
    letters = "\u2581abcdefghijklmnopqrstuvwxyz.,é"
    pieces += [(text, -100.0 - i, 1) for i, text in enumerate(letters)]
    vocab = {text: i for i, (text, _, _) in enumerate(pieces)}
    merges = [
        [text[:at], text[at:]]
        for text in made.split()
        for at in range(1, len(text))
        if text[:at] in vocab and text[at:] in vocab
    ]
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    described = {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": text, "special": True, "normalized": False, "single_word": False,
             "lstrip": False, "rstrip": False}
            for i, text in enumerate(("<unk>", "<s>", "</s>"))
        ],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, space]},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<s>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": None,
        "model": {
            "type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True,
            "vocab": vocab, "merges": merges,
        },
    }  # fmt: skip
    return described, pieces


def model_proto(pieces: list[tuple[str, float, int]], kind: int = 2, prefix: int = 1) -> bytes:
    """tokenizer.model, byte by byte."""

    def field(number: int, raw: bytes) -> bytes:
        length, low = len(raw), b""
        while length > 127:
            low += bytes([length & 127 | 128])
            length >>= 7
        return bytes([number << 3 | 2]) + low + bytes([length]) + raw

    raw = b"".join(
        field(1, field(1, text.encode()) + b"\x15" + struct.pack("<f", score) + bytes([3 << 3, type_]))
        for text, score, type_ in pieces
    )
    return raw + field(2, bytes([3 << 3, kind])) + field(3, bytes([3 << 3, prefix]))


SPM_TEXT = "the cat in the water,  working on  theory. \u00e9t\u00e9 \u4e2d Zürich\n and more"


@pytest.mark.parametrize("from_model", [False, True])
def test_sentencepiece_gives_the_librarys_ids(tmp_path: Path, from_model: bool) -> None:
    described, pieces = sentencepiece()
    if from_model:
        (tmp_path / "tokenizer.model").write_bytes(model_proto(pieces))
    said = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    vocabulary = read(tmp_path, described, said)
    assert vocabulary.types[:4] == [2, 3, 3, 6]
    assert vocabulary.metadata["add_bos_token"] is True
    tokenizer = in_engine(vocabulary)
    assert (tokenizer.model, tokenizer.add_space_prefix) == ("llama", True)
    wanted = Library.from_str(json.dumps(described)).encode(SPM_TEXT).ids
    assert tokenizer.encode(SPM_TEXT).tolist() == wanted
    assert vocabulary.scores is not None
    assert (
        vocabulary.scores == np.array([score for _, score, _ in pieces], np.float32).tolist()
    ) is from_model


def test_a_tokenizer_model_alone_adds_bos_and_the_prefix_as_it_says(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(model_proto(sentencepiece()[1], prefix=0))
    said = {
        "bos_token": "<s>",
        "added_tokens_decoder": {"400": {"content": "<tool>\u2581", "special": False}},
    }
    vocabulary = read(tmp_path, None, said)
    assert vocabulary.metadata["add_space_prefix"] is False
    assert vocabulary.metadata["add_bos_token"] is True
    assert (vocabulary.n_tokens, vocabulary.types[400], vocabulary.types[399]) == (401, 4, 5)
    assert vocabulary.tokens[400] == "<tool> "


@pytest.mark.parametrize(
    ("before", "normalizer", "prefix"),
    [
        (
            {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False},
            None,
            True,
        ),
        (
            {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "never", "split": False},
            None,
            False,
        ),
        (None, {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}, False),
        (
            {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": True},
            None,
            None,
        ),
        ({"type": "Whitespace"}, None, None),
    ],
)
def test_spaces_are_put_in_front_as_the_structure_says(tmp_path: Path, before, normalizer, prefix) -> None:
    described = sentencepiece()[0] | {"pre_tokenizer": before, "normalizer": normalizer}
    if prefix is None:
        with pytest.raises(ModelError, match="known by this structure"):
            read(tmp_path, described)
    else:
        assert read(tmp_path, described).metadata["add_space_prefix"] is prefix


def test_merges_that_scores_cannot_say_are_refused(tmp_path: Path) -> None:
    described, _ = sentencepiece()
    merges = described["model"]["merges"]
    for changed, said in (
        ([*merges[1:], merges[0], merges[1]], "is no merge|merge"),
        ([merge for merge in merges if merge != ["t", "he"]], "is no merge, though 'the'"),
        ([*merges, ["\u2581t", "he"]], "merge"),
    ):
        with pytest.raises(ModelError, match=said) as info:
            read(tmp_path, described | {"model": described["model"] | {"merges": changed}})
        assert "tokenizer.model" in info.value.hint


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"\xff\xff", "no SentencePiece model"),
        (model_proto(sentencepiece()[1])[:-3], "no SentencePiece model"),
        (model_proto(sentencepiece()[1], kind=1), "of type 1, expected BPE"),
        (model_proto([("a", 0.0, 1), ("a", 0.0, 1)]), "twice"),
        (b"\x0b", "no SentencePiece model"),
    ],
)
def test_a_broken_tokenizer_model_is_refused(tmp_path: Path, raw: bytes, said: str) -> None:
    (tmp_path / "tokenizer.model").write_bytes(raw)
    with pytest.raises(ModelError, match=said):
        read(tmp_path)
