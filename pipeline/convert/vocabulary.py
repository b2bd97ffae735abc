"""A checkpoint's tokenizer as metadata of a GGUF file.

    tokenizer.json    byte-level BPE            tokenizer.ggml.model = gpt2: tokens, types, merges, pre
    tokenizer.json    BPE with byte fallback    tokenizer.ggml.model = llama: tokens, types, scores
    tokenizer.model   SentencePiece             the same; preferred over byte fallback's merges
    tokenizer_config.json, config.json          BOS, EOS and others, and whether they are added

The vocabulary gets as many tokens as the model's embedding has rows: unused ones behind its own.

Source of the keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, "Tokenizer".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.convert import sentencepiece
from pipeline.convert.checkpoint import read_json
from pipeline.convert.config import Config
from pipeline.convert.pretokenizer import pre_tokenizer_name
from pipeline.errors import ModelError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Types of tokens, GGUF's."""

_ROLES = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
_END_OF_TEXT = "<|endoftext|>"  # begins and ends texts where nothing else is said: GPT-2, GPT-NeoX


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """A tokenizer.

    Attributes:
        pre: tokenizer.ggml.pre.
        tokens: texts by id; placeholders where an id has none.
        types: of each token.
        metadata: all other keys, `tokenizer.ggml.` in front.
        scores: of each token, where the model is `llama`.
        n_tokens: without padding.
        warnings: for the user.
    """

    pre: str
    tokens: list[str]
    types: list[int]
    metadata: dict[str, Any]
    scores: list[float] | None
    n_tokens: int
    warnings: list[str] = field(default_factory=list)

    def padded(self, n_rows: int, n_vocab: int) -> Vocabulary:
        """The same with unused tokens behind its own.

        Args:
            n_rows: rows of the checkpoint's embedding; a vocabulary must not have more tokens.
            n_vocab: rows of the file's.

        Raises:
            ModelError: there are more tokens than rows.
        """
        if self.n_tokens > n_rows:
            raise ModelError(
                f"the tokenizer has {self.n_tokens:,} tokens, but the embedding {n_rows:,} rows",
                "give the tokenizer of this model as convert.tokenizer",
            )
        warnings = list(self.warnings)
        if self.n_tokens < n_vocab:
            warnings.append(
                f"the tokenizer has {self.n_tokens:,} tokens, fewer than the embedding's {n_vocab:,} rows: "
                f"padded with {n_vocab - self.n_tokens:,} unused ones"
            )
        fill = n_vocab - self.n_tokens
        return replace(
            self,
            tokens=self.tokens + _placeholders(range(self.n_tokens, n_vocab), set(self.tokens)),
            types=self.types + [UNUSED] * fill,
            scores=None if self.scores is None else self.scores + [0.0] * fill,
            warnings=warnings,
        )

    def keys(self) -> dict[str, Any]:
        """All metadata, values as `writer` takes them."""
        named: dict[str, Any] = {
            "tokenizer.ggml.model": "gpt2" if self.scores is None else "llama",
            "tokenizer.ggml.pre": self.pre,
            "tokenizer.ggml.tokens": self.tokens,
            "tokenizer.ggml.token_type": np.array(self.types, np.int32),
        }
        if self.scores is not None:
            named["tokenizer.ggml.scores"] = np.array(self.scores, np.float32)
        return named | {f"tokenizer.ggml.{key}": value for key, value in self.metadata.items()}


def read_vocabulary(folder: Path, named: Path | None, config: Config) -> Vocabulary:
    """The tokenizer of a checkpoint's folder, or the one that the user names.

    Args:
        folder: the checkpoint's.
        named: another folder, or a file tokenizer.json or tokenizer.model.
        config: the checkpoint's, for the ids of special tokens that the tokenizer does not say.

    Raises:
        ModelError: there is none, or it is of a kind that GGUF has no name for.
    """
    place = folder if named is None else named
    if place.is_file():
        place, files = place.parent, [place]
    else:
        files = [place / name for name in ("tokenizer.json", "tokenizer.model") if (place / name).is_file()]
    if not files:
        raise ModelError(
            f"{place}: no tokenizer.json and no tokenizer.model",
            "give a tokenizer's file or folder as convert.tokenizer (the original Mamba models: GPT-NeoX's)",
        )
    described = next((read_json(file) for file in files if file.suffix == ".json"), {})
    said = read_json(place / "tokenizer_config.json") if (place / "tokenizer_config.json").is_file() else {}
    model = described.get("model")
    by_pieces = [file for file in files if file.suffix == ".model"]
    if described and not (isinstance(model, dict) and isinstance(model.get("vocab"), dict)):
        raise ModelError(f"{files[0]}: holds no BPE model with a vocabulary", "fetch the file again")
    if isinstance(model, dict):
        _refuse_model(files[0], model)
        if not model.get("byte_fallback", False):
            return _byte_level(files[0], described, said, config)
    return _by_score(files[0], described, by_pieces, said, config)


def _refuse_model(path: Path, model: Mapping[str, Any]) -> None:
    """Raises ModelError of what GGUF's BPE does not do."""
    kind = model.get("type", "BPE")
    odd = [key for key in ("continuing_subword_prefix", "end_of_word_suffix") if model.get(key)]
    if kind != "BPE" or odd:
        what = f"with {odd[0]}" if odd else ""
        raise ModelError(
            f"{path}: a tokenizer of the type {kind} {what}cannot be converted, expected BPE",
            "take a model with byte-level BPE or SentencePiece-type BPE",
        )


def _byte_level(path: Path, described: dict[str, Any], said: Mapping[str, Any], config: Config) -> Vocabulary:
    """Byte-level BPE."""
    model = described["model"]
    pre, warnings = pre_tokenizer_name(str(path), described)
    ids, kinds = _ids(path, described, model["vocab"])
    merges = []
    for rank, merge in enumerate(model.get("merges", [])):
        parts = merge.split(" ") if isinstance(merge, str) else list(merge)
        if len(parts) != 2 or any(not part or " " in part for part in parts):
            raise ModelError(f"{path}: merge {rank} is {merge!r}, expected two parts without spaces")
        if any(text not in ids for text in (*parts, "".join(parts))):
            raise ModelError(f"{path}: merge {rank}, {merge!r}, has a part or a result that is no token")
        merges.append(" ".join(parts))
    tokens, types = _by_id(path, ids, kinds)
    metadata: dict[str, Any] = {"merges": merges} if merges else {}
    metadata |= _special(ids, described, said, config, by_default=False)
    return Vocabulary(pre, tokens, types, metadata, None, len(tokens), warnings)


def _by_score(
    path: Path,
    described: dict[str, Any],
    by_pieces: list[Path],
    said: Mapping[str, Any],
    config: Config,
) -> Vocabulary:
    """SentencePiece-type BPE, from tokenizer.model where there is one, else from tokenizer.json's merges."""
    if by_pieces:
        pieces = sentencepiece.read_model(by_pieces[0])
        vocab = {piece.text: i for i, piece in enumerate(pieces.pieces)}
        if len(vocab) < len(pieces.pieces):
            raise ModelError(f"{by_pieces[0]}: has a piece twice", "fetch the file again")
        scores = [piece.score for piece in pieces.pieces]
        first = {piece.text: piece.kind for piece in pieces.pieces}
        prefix = pieces.adds_prefix
    else:
        vocab = described["model"]["vocab"]
        scores, prefix = sentencepiece.scores_of_merges(str(path), described)
        first = {text: BYTE for text in vocab if sentencepiece.is_byte(text)}
        first |= {described["model"]["unk_token"]: UNKNOWN} if described["model"].get("unk_token") else {}
    ids, kinds = _ids(path, described | {"added_tokens": _added(described, said)}, vocab)
    tokens, types = _by_id(path, ids, kinds | {text: kind for text, kind in first.items() if kind != NORMAL})
    # User-defined tokens are looked for in the text as it is, before its spaces are rewritten.
    plain = (sentencepiece.SPACE, " ")
    tokens = [
        text.replace(*plain) if kind == USER_DEFINED else text
        for text, kind in zip(tokens, types, strict=True)
    ]
    scores += [0.0] * (len(tokens) - len(scores))
    metadata: dict[str, Any] = {"add_space_prefix": prefix}
    metadata |= _special(ids, described, said, config, by_default=True)
    return Vocabulary("default", tokens, types, metadata, scores, len(tokens))


def _added(described: Mapping[str, Any], said: Mapping[str, Any]) -> list[Any]:
    """Added tokens, of tokenizer.json or else of tokenizer_config.json."""
    if described:
        return list(described.get("added_tokens", []))
    return [{"id": int(key), **entry} for key, entry in said.get("added_tokens_decoder", {}).items()]


def _ids(
    path: Path, described: Mapping[str, Any], vocab: Mapping[str, int]
) -> tuple[dict[str, int], dict[str, int]]:
    """Ids by text, added tokens among them, and the types of those that are not normal."""
    ids, kinds = dict(vocab), {}
    for entry in described.get("added_tokens", []):
        text, token = entry["content"], entry["id"]
        if ids.setdefault(text, token) != token:
            raise ModelError(f"{path}: token {text!r} has the ids {ids[text]} and {token}")
        kinds[text] = CONTROL if entry.get("special", False) else USER_DEFINED
    if not ids or any(type(i) is not int or i < 0 for i in ids.values()):
        raise ModelError(f"{path}: ids of tokens are not all integers from 0", "fetch the file again")
    return ids, kinds


def _by_id(path: Path, ids: Mapping[str, int], kinds: Mapping[str, int]) -> tuple[list[str], list[int]]:
    """Texts and types by id; ids without a token get unused ones."""
    by_id = {token: text for text, token in ids.items()}
    if len(by_id) < len(ids):
        raise ModelError(f"{path}: two tokens have one id", "fetch the file again")
    if max(by_id) > 2 * len(by_id):
        raise ModelError(f"{path}: has {len(by_id):,} tokens, but ids up to {max(by_id):,}")
    holes = [token for token in range(max(by_id) + 1) if token not in by_id]
    by_id |= dict(zip(holes, _placeholders(holes, set(ids)), strict=True))
    texts = [by_id[token] for token in range(len(by_id))]
    return texts, [kinds.get(text, NORMAL) if text in ids else UNUSED for text in texts]


def _placeholders(ids: Any, taken: set[str]) -> list[str]:
    """A text for each id that no token has."""
    texts = []
    for token in ids:
        text = f"[PAD{token}]"
        while text in taken:
            text = f"[{text}]"
        texts.append(text)
    return texts


def _special(
    ids: Mapping[str, int],
    described: Mapping[str, Any],
    said: Mapping[str, Any],
    config: Config,
    *,
    by_default: bool,
) -> dict[str, Any]:
    """Keys of BOS, EOS, unknown and padding tokens, and which are added."""
    found: dict[str, Any] = {}
    for role, name in _ROLES.items():
        text = said.get(name)
        text = text.get("content") if isinstance(text, Mapping) else text
        token = ids.get(text) if isinstance(text, str) else config.values.get(f"{name}_id")
        token = token[0] if isinstance(token, list) and token else token
        if type(token) is int and 0 <= token <= max(ids.values()):
            found[f"{role}_token_id"] = token
    if _END_OF_TEXT in ids:
        for role in ("bos", "eos"):
            found.setdefault(f"{role}_token_id", ids[_END_OF_TEXT])
    begins, ends = _template(ids, described, found)
    for role, by_template in (("bos", begins), ("eos", ends)):
        flag = said.get(f"add_{role}_token")
        usual = by_template if by_template is not None else by_default and role == "bos"
        adds = flag if isinstance(flag, bool) else usual
        found[f"add_{role}_token"] = adds and f"{role}_token_id" in found
    return found


def _template(
    ids: Mapping[str, int], described: Mapping[str, Any], found: Mapping[str, Any]
) -> tuple[bool | None, bool | None]:
    """Whether tokenizer.json's post-processor puts BOS in front and EOS behind; None if it does not say."""
    step = described.get("post_processor")
    steps = [step] if isinstance(step, Mapping) else []
    if steps and steps[0].get("type") == "Sequence":
        steps = steps[0].get("processors", [])
    for step in steps:
        if step.get("type") == "TemplateProcessing" and step.get("single"):
            ends = [step["single"][at].get("SpecialToken", {}).get("id") for at in (0, -1)]
            tokens = [ids.get(text) if text else None for text in ends]
            return (
                tokens[0] is not None and tokens[0] == found.get("bos_token_id"),
                tokens[1] is not None and tokens[1] == found.get("eos_token_id"),
            )
    return (False, False) if described else (None, None)
