r"""The name of the pre-tokenizer that tokenizer.json describes, found from what it says, step by step.

GGUF files name their pre-tokenizer (`tokenizer.ggml.pre`) and do not describe it; tokenizer.json describes it
and does not name it:

    [Digits alone, ByteLevel with GPT-2's pattern]    smollm     (with the normalizer NFC: command-r)
    [ByteLevel with GPT-2's pattern]                  gpt-2      (with NFC: olmo; GPT-NeoX)
    [Split by Llama 3's pattern, ByteLevel]           llama-bpe  (where merges are not ignored: dbrx)
    ...

A step is compared whole: its kind, its pattern to the letter, what becomes of the matches. What is not in the
table is refused and shown. Where several names mean the same steps (`engine.pretokenizers`), the first is
taken.

Source: the tokenizer.json files of the models that the names are taken from.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.errors import ModelError

Step = tuple[Any, ...]

_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SHORT = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA_3 = rf"{_SHORT}|{_LETTERS}|\p{{N}}{{1,3}}|{_MARKS}"
_QWEN_2 = rf"{_SHORT}|{_LETTERS}|\p{{N}}|{_MARKS}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_EASTERN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_DEEPSEEK_MARKS = r"\s?[!-/:-~" "\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"
_CASED = "letters with case"  # stands for a pattern of 150 ranges
_PLAIN, _GPT_2 = ("ByteLevel", False), ("ByteLevel", True)

_NAMES: dict[tuple[Step, ...], str] = {
    (_GPT_2,): "gpt-2",
    (("Digits", True), _GPT_2): "smollm",
    (("Split", _LLAMA_3), _PLAIN): "dbrx",
    (("Split", _QWEN_2), _PLAIN): "qwen2",
    (("Split", _TEKKEN), _PLAIN): "tekken",
    (
        ("Punctuation", "Contiguous"), _GPT_2, ("Digits", False), ("Split", "[0-9][0-9][0-9]"),
    ): "falcon",
    (
        ("Split", "[\r\n]"), ("Split", r"\s?" + _CASED), ("Split", _DEEPSEEK_MARKS), ("Split", r"\s+$"),
        ("Split", _EASTERN), ("Digits", True), _PLAIN,
    ): "deepseek-llm",
    (
        ("Split", "[\r\n]"), ("Split", r"\s?\p{L}+"), ("Split", r"\s?\p{P}+"), ("Split", _EASTERN),
        ("Digits", True), _PLAIN,
    ): "deepseek-coder",
}  # fmt: skip
_IGNORING = {"dbrx": "llama-bpe", "tekken": "tekken"}  # with ignore_merges; others have no name with it
_WITH_NFC = {"gpt-2": "olmo", "smollm": "command-r"}


def pre_tokenizer_name(path: str, tokenizer: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The name for `tokenizer.ggml.pre`, and warnings.

    Args:
        path: of the file, for messages.
        tokenizer: tokenizer.json.

    Raises:
        ModelError: no name is known for these steps; the message shows them.
    """
    normalizers = [_normalizer(step) for step in _flat(tokenizer.get("normalizer"), "normalizers")]
    steps = tuple(_step(step) for step in _flat(tokenizer.get("pre_tokenizer"), "pretokenizers"))
    name = _NAMES.get(steps)
    if tokenizer["model"].get("ignore_merges", False):
        name = _IGNORING.get(name or "")
    elif name == "tekken":
        name = None
    if name is None or normalizers not in ([], ["NFC"]):
        shown = {key: tokenizer.get(key) for key in ("normalizer", "pre_tokenizer")}
        shown["ignore_merges"] = tokenizer["model"].get("ignore_merges", False)
        raise ModelError(
            f"{path}: no pre-tokenizer of GGUF's is known by this structure: {json.dumps(shown)}",
            "take the checkpoint of a model whose tokenizer is one of " + ", ".join(_known()),
        )
    if not normalizers:
        return name, []
    remark = f"{path}: its normalizer, NFC, is lost in GGUF: a text that is not in NFC gets other ids"
    return _WITH_NFC.get(name, name), [remark]


def _known() -> list[str]:
    return sorted({*_NAMES.values(), *_IGNORING.values(), *_WITH_NFC.values()})


def _flat(step: Any, inner: str) -> list[Mapping[str, Any]]:
    """The steps of a Sequence, one after the other; none for null."""
    if step is None:
        return []
    if isinstance(step, Mapping) and step.get("type") == "Sequence" and isinstance(step.get(inner), Sequence):
        return [single for each in step[inner] for single in _flat(each, inner)]
    return [step if isinstance(step, Mapping) else {}]


def _normalizer(step: Mapping[str, Any]) -> str:
    return str(step.get("type")) if set(step) == {"type"} else "?"


def _step(step: Mapping[str, Any]) -> Step:
    """A step as it is in _NAMES; what it does not know becomes a step that nothing equals."""
    kind, unknown = step.get("type"), ("?", json.dumps(step, sort_keys=True))
    if kind == "ByteLevel":
        return unknown if step.get("add_prefix_space", True) else (kind, step.get("use_regex", True))
    if kind == "Digits":
        return kind, step.get("individual_digits", False)
    if kind == "Punctuation":
        return kind, step.get("behavior", "Isolated")
    pattern = step.get("pattern")
    # Such patterns match every character: to keep the matches alone is to cut around them.
    cuts = (step.get("behavior"), step.get("invert")) in (("Isolated", False), ("Removed", True))
    if kind != "Split" or not cuts or not isinstance(pattern, Mapping) or set(pattern) != {"Regex"}:
        return unknown
    text = str(pattern["Regex"])
    cased = text.startswith(r"\s?[") and text.endswith("]+") and _points(text[4:-2]) == _cased()
    return kind, r"\s?" + _CASED if cased else text


def _cased() -> frozenset[int] | None:
    """Code points of DeepSeek's letters, from the engine's patterns for them."""
    from engine.pretokenizers import RULES

    ranges = re.findall(r"\\x\{(\w+)\}-\\x\{(\w+)\}", RULES["deepseek-llm"].patterns[1])
    return frozenset(c for first, last in ranges for c in range(int(first, 16), int(last, 16) + 1))


def _points(inside: str) -> frozenset[int] | None:
    """Code points of a character class that has only single characters and ranges; None for another."""
    if "\\" in inside or inside.startswith("^"):
        return None
    ranges = re.findall("(.)-(.)|(.)", inside, re.DOTALL)
    return frozenset(
        c for first, last, single in ranges for c in range(ord(first or single), ord(last or single) + 1)
    )
