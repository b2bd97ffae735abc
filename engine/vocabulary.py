"""The tokenizer's part of a GGUF file's metadata: read, checked, and corrected as llama.cpp does.

Source of the keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, "Tokenizer".
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from engine.errors import UnsupportedTokenizer
from engine.pretokenizers import PATTERNS

if TYPE_CHECKING:
    from engine.gguf import GGUFFile, MetadataValue

UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6
"""Types of tokens; 1 is normal, 5 unused."""

_KEY = "tokenizer.ggml."
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


@dataclass(frozen=True, slots=True, eq=False)
class Vocabulary:
    """What a file says about its tokenizer, checked.

    Attributes:
        model: `gpt2`, byte-level BPE.
        pre: name of the pre-tokenizer, in `engine.pretokenizers.PATTERNS`.
        tokens: V different texts, none empty.
        types: (V,) int32.
        merges: pairs of tokens whose concatenation is a token, by rank, none twice.
        bos_id, eos_id: None where the file names none; not None if `add_bos`, `add_eos`.
    """

    model: str
    pre: str
    tokens: list[str]
    types: NDArray[np.int32]
    merges: list[tuple[str, str]]
    bos_id: int | None
    eos_id: int | None
    add_bos: bool
    add_eos: bool


def read_vocabulary(file: GGUFFile) -> Vocabulary:
    """Reads and checks `file`'s vocabulary.

    Raises:
        UnsupportedTokenizer: another model or pre-tokenizer; a vocabulary that is incomplete or inconsistent.
    """
    fields = _Fields(file.path, file.metadata)
    model, pre = fields.text("model"), fields.text("pre", "default")
    if model != "gpt2":
        raise fields.error("model", f"is {model!r}; supported is 'gpt2', byte-level BPE")
    if pre not in PATTERNS:
        supported = ", ".join(map(repr, PATTERNS))
        raise fields.error("pre", f"is {pre!r}; supported are {supported}: use a model with one of these")
    tokens = fields.tokens()
    vocabulary = Vocabulary(
        model=model,
        pre=pre,
        tokens=tokens,
        types=fields.types(tokens),
        merges=fields.merges(tokens),
        bos_id=fields.token_id("bos", len(tokens)),
        eos_id=fields.token_id("eos", len(tokens)),
        add_bos=fields.flag("add_bos_token"),
        add_eos=fields.flag("add_eos_token"),
    )
    if vocabulary.add_bos and vocabulary.bos_id is None:
        raise fields.error("add_bos_token", f"is true, but there is no {_KEY}bos_token_id to add")
    if vocabulary.add_eos and vocabulary.eos_id is None:
        raise fields.error("add_eos_token", f"is true, but there is no {_KEY}eos_token_id to add")
    return vocabulary


def piece(text: str, kind: int) -> bytes:
    """The bytes that a token stands for: none for control tokens and the unknown token."""
    if kind in (UNKNOWN, CONTROL):
        return b""
    if kind == USER_DEFINED:
        return text.encode()
    if kind == BYTE and re.fullmatch("<0x[0-9A-Fa-f]{2}>", text):
        return bytes.fromhex(text[3:5])
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

    def flag(self, name: str) -> bool:
        """False where the file does not say, which is llama.cpp's default for these pre-tokenizers."""
        value = self._metadata.get(_KEY + name, False)
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
        value = self._metadata.get(_KEY + "token_type")
        if value is None:
            value = np.ones(len(tokens), dtype=np.int32)
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "iu":
            raise self.error("token_type", "is not an array of integers; convert the model again")
        if len(value) != len(tokens):
            raise self.error(
                "token_type",
                f"has {len(value):,} entries for {len(tokens):,} tokens; convert the model again",
            )
        types = value.astype(np.int32)
        ids = {text: i for i, text in enumerate(tokens)}
        types[[ids[name] for name in _END_NAMES.split() if name in ids]] = CONTROL
        for role, names in _FILL_NAMES.items():
            if f"{_KEY}{role}_token_id" not in self._metadata:
                types[sorted(ids[name] for name in names.split() if name in ids)[:1]] = CONTROL
        return types

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

    def token_id(self, name: str, n_vocab: int) -> int | None:
        value = self._metadata.get(f"{_KEY}{name}_token_id")
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < n_vocab:
            raise self.error(
                f"{name}_token_id",
                f"is {value!r}, but tokens are 0 to {n_vocab - 1:,}; convert the model again",
            )
        return value
