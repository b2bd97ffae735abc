"""SentencePiece-type BPE: tokenizer.model read without its library, and scores from merges.

tokenizer.model is a protocol buffer. Of its fields these are read, numbers in front:

    1 pieces            1 text   2 score   3 type
    2 trainer_spec      3 model_type (2: BPE)
    3 normalizer_spec   3 add_dummy_prefix

Where only tokenizer.json is there, its merges are ranks of pairs, and GGUF wants scores of tokens. A
SentencePiece model turned into merges has all pairs that make one token next to each other, and every pair
that there can be: then the n-th token to be made gets the score -n. Any other list of merges says what scores
cannot, and is refused.

Sources: https://github.com/google/sentencepiece, `sentencepiece_model.proto`;
https://protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from pipeline.errors import ModelError

SPACE = "\u2581"
"""What a space is written as."""

_NORMAL, _BPE, _LOWEST = 1, 2, -1e6


@dataclass(frozen=True)
class Piece:
    """A token; `kind` has GGUF's numbers, which were SentencePiece's."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class Model:
    """A tokenizer.model."""

    pieces: list[Piece]
    adds_prefix: bool


def is_byte(text: str) -> bool:
    """Whether a token stands for one byte, as <0x0A>."""
    return re.fullmatch("<0x[0-9A-F]{2}>", text) is not None


def read_model(path: Path) -> Model:
    """Reads a tokenizer.model.

    Raises:
        ModelError: it is broken, or its model is not BPE.
    """
    pieces, kind, adds_prefix = [], 1, True
    try:
        for number, value in _fields(path.read_bytes()):
            if number == 1:
                fields = dict(_fields(value))
                score = struct.unpack("<f", fields[2])[0] if 2 in fields else 0.0
                pieces.append(Piece(fields[1].decode(), score, fields.get(3, _NORMAL)))
            elif number == 2:
                kind = dict(_fields(value)).get(3, 1)
            elif number == 3:
                adds_prefix = bool(dict(_fields(value)).get(3, True))
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}", "check the file") from error
    except (IndexError, KeyError, ValueError, TypeError, AttributeError, struct.error) as error:
        raise ModelError(f"{path}: is no SentencePiece model ({error!r})", "fetch the file again") from error
    if kind != _BPE or not pieces:
        raise ModelError(
            f"{path}: {len(pieces):,} pieces of a model of type {kind}, expected BPE, type {_BPE}",
            "GGUF's `llama` tokenizer is BPE; models with a unigram tokenizer cannot be converted",
        )
    return Model(pieces, adds_prefix)


def scores_of_merges(path: str, described: Mapping[str, Any]) -> tuple[list[float], bool]:
    """Scores by id from tokenizer.json's merges, and whether a space is put in front of a text.

    Raises:
        ModelError: the merges are not those of a SentencePiece model, or the normalizer or the pre-tokenizer
            is another.
    """
    model = described["model"]
    vocab: dict[str, int] = model["vocab"]
    adds_prefix = _adds_prefix(path, described)
    merges = model.get("merges", [])
    pairs = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in merges]
    ranks: dict[str, int] = {}
    last = ""
    for rank, pair in enumerate(pairs):
        made = "".join(pair)
        if len(pair) != 2 or made not in vocab or (made in ranks and made != last):
            raise _no_scores(path, f"merge {rank} is {list(pair)}")
        ranks.setdefault(made, len(ranks))
        last = made
    known = set(pairs)
    special = {entry["content"] for entry in described.get("added_tokens", [])}
    for text in vocab:
        if text in special or is_byte(text):
            continue
        for at in range(1, len(text)):
            left, right = text[:at], text[at:]
            if (left, right) not in known and left in vocab and right in vocab:
                raise _no_scores(path, f"{[left, right]} is no merge, though {text!r} is a token")
    scores = [_LOWEST] * (max(vocab.values()) + 1)
    for text, rank in ranks.items():
        scores[vocab[text]] = -float(rank)
    return scores, adds_prefix


def _no_scores(path: str, what: str) -> ModelError:
    return ModelError(
        f"{path}: its merges are not those of a SentencePiece model: {what}",
        "put the model's tokenizer.model beside it",
    )


def _adds_prefix(path: str, described: Mapping[str, Any]) -> bool:
    """What normalizer and pre-tokenizer, which only rewrite spaces here, say of the start of a text."""
    normalizer, before = described.get("normalizer"), described.get("pre_tokenizer")
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = {"type": "Prepend", "prepend": SPACE}
    steps = normalizer.get("normalizers") if _is(normalizer, "Sequence") else normalizer and [normalizer]
    if before is None and steps in ([prepend, replace], [replace]):
        return len(steps) == 2
    if _is(before, "Metaspace") and not steps:
        usual = before.get("replacement") == SPACE and before.get("split") is False
        scheme = before.get("prepend_scheme", "always" if before.get("add_prefix_space", True) else "never")
        if usual and scheme in ("always", "first", "never"):
            return bool(scheme != "never")
    raise ModelError(
        f"{path}: no tokenizer of GGUF's is known by this structure: "
        f"normalizer {normalizer!r}, pre-tokenizer {before!r}",
        "put the model's tokenizer.model beside it",
    )


def _is(step: Any, kind: str) -> TypeGuard[Mapping[str, Any]]:
    return isinstance(step, Mapping) and step.get("type") == kind


def _fields(raw: bytes) -> Iterator[tuple[int, Any]]:
    """Numbers and values of a message's fields: ints, or bytes where they have a length, or four or eight."""
    at = 0
    while at < len(raw):
        key, at = _varint(raw, at)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, at = _varint(raw, at)
            yield number, value
            continue
        if kind == 2:
            length, at = _varint(raw, at)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind}")
        if at + length > len(raw):
            raise ValueError(f"a field of {length} bytes ends behind the file")
        yield number, raw[at : at + length]
        at += length


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = raw[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if not byte & 128:
            return value, at
