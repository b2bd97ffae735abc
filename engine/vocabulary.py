"""The tokenizer's part of a GGUF file's metadata: read, checked, and corrected as llama.cpp does.

Source of the keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, "Tokenizer".
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import UnsupportedTokenizer
from engine.pretokenizers import RULES

if TYPE_CHECKING:
    from engine.gguf import GGUFFile, MetadataValue

UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6
"""Types of tokens; 1 is normal, 5 unused."""

SPACE = "\u2581"
"""What a space is written as in SentencePiece-type vocabularies."""

_KEY = "tokenizer.ggml."
_MODELS = {"gpt2": "byte-level BPE", "llama": "SentencePiece-type"}
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]  # bytes that stand for themselves
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]  # are U+0100, U+0101, ... in this order

BYTE_OF = {chr(byte): byte for byte in _PRINTABLE} | {chr(0x100 + i): byte for i, byte in enumerate(_OTHERS)}
"""The byte-level alphabet: a printable character for each byte. Source: Radford et al. 2019, encoder.py."""

# Files often call these user-defined or normal tokens; llama.cpp makes them control tokens by their text.
_END_NAMES = (
    "<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <|endoftext|> </s> "
    "<|eom_id|> <EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> <eos> <turn|> <|tool_response> "
    "<\uff5cend\u2581of\u2581sentence\uff5c>"
)
_FILL_NAMES = {  # of fill-in-the-middle, by key: the first of the vocabulary, unless the metadata names one
    "fim_pre": "<|fim_prefix|> <fim-prefix> <fim_prefix> <PRE> \u2581<PRE> <|code_prefix|> <|prefix|> "
    "<\uff5cfim\u2581begin\uff5c>",
    "fim_suf": "<|fim_suffix|> <fim-suffix> <fim_suffix> <SUF> \u2581<SUF> <|code_suffix|> "
    "<\uff5cfim\u2581hole\uff5c>",
    "fim_mid": "<|fim_middle|> <fim-middle> <fim_middle> <MID> \u2581<MID> <|code_middle|> "
    "<\uff5cfim\u2581end\uff5c>",
    "fim_pad": "<|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD]",
    "fim_rep": "<|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame>",
    "fim_sep": "<|file_sep|>",
}
_SHOWN_NAMES = "<|channel|> <|message|> <|start|> <|constrain|>"  # user-defined, whatever the file says
_KEEP_SPACE_NAMES = ("<unk>", "<s>", "<|endoftext|>")  # of Phi-3's special tokens


@dataclass(frozen=True, slots=True, eq=False)
class Vocabulary:
    """What a file says about its tokenizer, checked.

    Attributes:
        model: `gpt2`, byte-level BPE, or `llama`, SentencePiece-type.
        pre: name of the pre-tokenizer, in `engine.pretokenizers.RULES`; `default` if SentencePiece-type.
        tokens: V different texts, none empty.
        types: (V,) int32.
        merges: byte-level: pairs of tokens whose concatenation is a token, by rank, none twice.
        scores: SentencePiece-type: (V,) float32, the highest is merged first. Empty if byte-level.
        bos_id, eos_id: None where the file names none; not None if `add_bos`, `add_eos`.
        add_space_prefix: SentencePiece-type: a space is put in front of the text, and behind special tokens.
        strips: tokens that take the white space behind them with them when they are cut out of a text.
    """

    model: str
    pre: str
    tokens: list[str]
    types: NDArray[np.int32]
    merges: list[tuple[str, str]]
    scores: NDArray[np.float32]
    bos_id: int | None
    eos_id: int | None
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    strips: frozenset[int]


def read_vocabulary(file: GGUFFile) -> Vocabulary:
    """Reads and checks `file`'s vocabulary.

    Raises:
        UnsupportedTokenizer: another model or pre-tokenizer; a vocabulary that is incomplete or inconsistent.
    """
    fields = _Fields(file.path, file.metadata)
    model = fields.text("model")
    if model not in _MODELS:
        supported = ", ".join(f"{name!r} ({kind})" for name, kind in _MODELS.items())
        raise fields.error("model", f"is {model!r}; supported are {supported}: use a model with one of these")
    by_score = model == "llama"
    pre = "default" if by_score else fields.text("pre", "") or "default"  # by score there is none
    if pre not in RULES:
        supported = ", ".join(map(repr, RULES))
        raise fields.error("pre", f"is {pre!r}; supported are {supported}: use a model with one of these")
    tokens = fields.tokens()
    types = fields.types(tokens)
    vocabulary = Vocabulary(
        model=model,
        pre=pre,
        tokens=tokens,
        types=types,
        merges=[] if by_score else fields.merges(tokens),
        scores=fields.scores(tokens) if by_score else np.empty(0, dtype=np.float32),
        bos_id=fields.token_id("bos", len(tokens), 1 if by_score else None),
        eos_id=fields.token_id("eos", len(tokens), 2 if by_score else None),
        add_bos=fields.flag("add_bos_token", by_score or RULES[pre].add_bos),
        add_eos=fields.flag("add_eos_token", False),
        add_space_prefix=by_score and fields.flag("add_space_prefix", True),
        strips=fields.strips(tokens, types) if by_score else frozenset(),
    )
    if vocabulary.add_bos and vocabulary.bos_id is None:
        raise fields.error("add_bos_token", f"is true, but there is no {_KEY}bos_token_id to add")
    if vocabulary.add_eos and vocabulary.eos_id is None:
        raise fields.error("add_eos_token", f"is true, but there is no {_KEY}eos_token_id to add")
    return vocabulary


def byte_token(byte: int) -> str:
    """The text of the token that stands for one byte in a SentencePiece-type vocabulary."""
    return f"<0x{byte:02X}>"


def piece(text: str, kind: int, model: str) -> bytes:
    """The bytes that a token stands for: none for control tokens and the unknown token."""
    if kind in (UNKNOWN, CONTROL):
        return b""
    if kind == USER_DEFINED:
        return text.encode()
    if kind == BYTE and re.fullmatch("<0x[0-9A-Fa-f]{2}>", text):
        return bytes.fromhex(text[3:5])
    if model == "llama":
        return text.replace(SPACE, " ").encode()
    try:
        return bytes(map(BYTE_OF.__getitem__, text))
    except KeyError:  # not in the byte-level alphabet, like added tokens that are marked normal
        return b"".join(bytes([BYTE_OF[char]]) if char in BYTE_OF else char.encode() for char in text)


class _Fields:
    """The metadata under `tokenizer.ggml.`, and errors that name file and key."""

    def __init__(self, path: str, metadata: Mapping[str, MetadataValue]) -> None:
        self._path, self._metadata = path, metadata

    def error(self, name: str, what: str) -> UnsupportedTokenizer:
        return UnsupportedTokenizer(f"{self._path}: {_KEY}{name} {what}")

    def text(self, name: str, default: str | None = None) -> str:
        value = self._metadata.get(_KEY + name, default)
        if value is None:
            raise self.error(name, "is missing; was the model converted without its tokenizer?")
        if not isinstance(value, str):
            raise self.error(name, f"is {value!r}, not a string; convert the model again")
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self._metadata.get(_KEY + name, default)
        if not isinstance(value, bool):
            raise self.error(name, f"is {value!r}, not true or false; convert the model again")
        return value

    def strings(self, name: str) -> list[str]:
        value = self._metadata.get(_KEY + name)
        if value is None:
            raise self.error(name, "is missing; was the model converted without its tokenizer?")
        to_list = getattr(value, "to_list", None)  # StringArray's; arrays of numbers have none
        if to_list is None:
            raise self.error(name, "is not an array of strings; convert the model again")
        strings: list[str] = to_list()
        return strings

    def tokens(self) -> list[str]:
        """The texts; empty ones get the text that llama.cpp gives them."""
        tokens = [text or f"[EMPTY_{i}]" for i, text in enumerate(self.strings("tokens"))]
        if not tokens:
            raise self.error("tokens", "is empty; the file holds no vocabulary")
        if len(set(tokens)) < len(tokens):
            twice = Counter(tokens).most_common(1)[0][0]
            raise self.error("tokens", f"holds {twice!r} twice; convert the model again")
        return tokens

    def types(self, tokens: Sequence[str]) -> NDArray[np.int32]:
        """(V,) int32: all normal where the file has none; control for tokens that are such by their text."""
        types = self.numbers("token_type", "iu", 1, len(tokens)).astype(np.int32)
        ids = {text: i for i, text in enumerate(tokens)}
        types[[ids[name] for name in _END_NAMES.split() if name in ids]] = CONTROL
        for role, names in _FILL_NAMES.items():
            if f"{_KEY}{role}_token_id" not in self._metadata:
                types[sorted(ids[name] for name in names.split() if name in ids)[:1]] = CONTROL
        types[[ids[name] for name in _SHOWN_NAMES.split() if name in ids]] = USER_DEFINED
        return types

    def numbers(self, name: str, kinds: str, default: int, n: int) -> NDArray[Any]:
        """An array with a number for each of `n` tokens; all `default` where the file has none."""
        value = self._metadata.get(_KEY + name)
        if value is None:
            return np.full(n, default)
        if not isinstance(value, np.ndarray) or value.dtype.kind not in kinds:
            what = "integers" if kinds == "iu" else "numbers"
            raise self.error(name, f"is not an array of {what}; convert the model again")
        if len(value) != n:
            raise self.error(name, f"has {len(value):,} entries for {n:,} tokens; convert the model again")
        return value

    def scores(self, tokens: Sequence[str]) -> NDArray[np.float32]:
        """(V,) float32; also checks that all bytes that may be needed have a token."""
        scores = self.numbers("scores", "fi", 0, len(tokens)).astype(np.float32)
        if np.isnan(scores).any():
            at = int(np.isnan(scores).argmax())
            raise self.error("scores", f"is not a number for token {at}, {tokens[at]!r}; convert again")
        known = set(tokens)
        for byte in (*range(0xC0), *range(0xC2, 0xF5)):  # those that UTF-8 has
            if byte_token(byte) not in known and not (byte < 0x80 and chr(byte).replace(" ", SPACE) in known):
                raise self.error(
                    "tokens",
                    f"holds no {byte_token(byte)!r}, so some texts have no ids; "
                    "use a model whose vocabulary was made with byte fallback",
                )
        return scores

    def strips(self, tokens: Sequence[str], types: NDArray[np.int32]) -> frozenset[int]:
        """Special tokens of models called Phi-3: their files do not say that these take white space along."""
        name = str(self._metadata.get("general.name", "")).lower()
        if "phi-3" not in name and "phi3" not in name:
            return frozenset()
        special = np.flatnonzero(np.isin(types, (UNKNOWN, CONTROL, USER_DEFINED))).tolist()
        return frozenset(i for i in special if tokens[i] not in _KEEP_SPACE_NAMES)

    def merges(self, tokens: Sequence[str]) -> list[tuple[str, str]]:
        """Pairs to merge, by rank; of equal ones the first counts."""
        known = set(tokens)
        pairs: dict[tuple[str, str], None] = {}
        for rank, merge in enumerate(self.strings("merges")):
            at = merge.find(" ", 1)
            left, right = merge[:at], merge[at + 1 :]
            if at < 0 or not right:
                raise self.error(
                    "merges", f"holds {merge!r} as number {rank}, not two parts with a space between"
                )
            for text in (left, right, left + right):
                if text not in known:
                    raise self.error(
                        "merges", f"holds {merge!r} as number {rank}, but no token is {text!r}; convert again"
                    )
            pairs[left, right] = None
        return list(pairs)

    def token_id(self, name: str, n_vocab: int, default: int | None) -> int | None:
        """None where the file names none, and there is no token `default`."""
        value = self._metadata.get(f"{_KEY}{name}_token_id")
        if value is None:
            return default if default is not None and default < n_vocab else None
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < n_vocab:
            raise self.error(
                f"{name}_token_id",
                f"is {value!r}, but tokens are 0 to {n_vocab - 1:,}; convert the model again",
            )
        return value
