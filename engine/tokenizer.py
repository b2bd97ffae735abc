"""Text to token ids and back, from the vocabulary in a GGUF file; the ids are llama.cpp's.

    text --cut out special tokens--> fragments --pre-tokenizer--> pieces --byte-level BPE--> ids

Byte-level BPE (`tokenizer.ggml.model = gpt2`) writes each byte as one printable character, joins pairs of symbols by the
rank of their merge, leftmost first, and looks the remaining symbols up. The `tokenizers` library does this and the
pre-tokenizers' regular expressions; the rest follows llama.cpp, not the library, where the two differ:

- special tokens are cut out one by one, longest first, over the whole text, not at the leftmost match;
- a byte that the vocabulary has no token for (SmolLM2 lacks U+0004, for one) is dropped, and still keeps its neighbours
  apart;
- tokens whose text looks like a control token are control tokens, whatever the file says.

Source: llama.cpp, `llama_vocab::impl` and `llm_tokenizer_bpe_session`; byte-level alphabet: Radford et al. 2019.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from engine.errors import UnsupportedTokenizer
from engine.pretokenizers import PATTERNS, pre_tokenizer

if TYPE_CHECKING:
    import tokenizers

    from engine.gguf import GGUFFile, MetadataValue

_log = logging.getLogger(__name__)

_KEY = "tokenizer.ggml."
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6  # token types; 1 is normal, 5 unused

_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]  # bytes that stand for themselves
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]  # are U+0100, U+0101, ... in this order
_BYTE_OF = {chr(byte): byte for byte in _PRINTABLE} | {chr(0x100 + i): byte for i, byte in enumerate(_OTHERS)}

# Files often call these user-defined or normal tokens; llama.cpp takes them for control tokens by their text.
_END_NAMES = frozenset(
    "<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <|endoftext|> </s> <|eom_id|> "
    "<EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> <eos> <turn|> <|tool_response> "
    "<｜end▁of▁sentence｜>".split()
)
_FILL_NAMES = {  # of fill-in-the-middle: the first token with such a text, unless the metadata names one
    "fim_pre": "<|fim_prefix|> <fim-prefix> <fim_prefix> <｜fim▁begin｜> <PRE> ▁<PRE> <|code_prefix|> <|prefix|>",
    "fim_suf": "<|fim_suffix|> <fim-suffix> <fim_suffix> <｜fim▁hole｜> <SUF> ▁<SUF> <|code_suffix|>",
    "fim_mid": "<|fim_middle|> <fim-middle> <fim_middle> <｜fim▁end｜> <MID> ▁<MID> <|code_middle|>",
    "fim_pad": "<|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD]",
    "fim_rep": "<|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame>",
    "fim_sep": "<|file_sep|>",
}

_CHUNK_CHARS = 1 << 16  # handed to the library at once; its working memory is some hundred bytes a character
_CUT = re.compile(r"(?<=\S)[ \n]")  # every pre-tokenizer starts a piece at white space after something else


class Tokenizer:
    """The tokenizer of a GGUF file.

    Attributes:
        model: `tokenizer.ggml.model`; `gpt2` is the one that is supported.
        pre: name of the pre-tokenizer, one of `engine.pretokenizers.PATTERNS`; `default` if the file names none.
        n_vocab: V, number of tokens in the list; a model's embedding may have more rows.
        bos_id, eos_id: tokens that begin and end a text, None where the file names none.
        add_bos, add_eos: whether `encode(..., add_special=True)` adds them; False where the file does not say.
        sha256: hexadecimal digest of everything that determines the ids: vocabulary, types, merges, patterns, flags.
    """

    model: str
    pre: str
    n_vocab: int
    bos_id: int | None
    eos_id: int | None
    add_bos: bool
    add_eos: bool
    sha256: str

    def __init__(self, file: GGUFFile) -> None:
        """Reads `file`'s metadata; `file` may be closed afterwards.

        Raises:
            UnsupportedTokenizer: another model or pre-tokenizer; a vocabulary that is incomplete or inconsistent.
        """
        fields = _Fields(file.path, file.metadata)
        self._path = file.path
        self.model = fields.text("model")
        if self.model != "gpt2":
            raise fields.error(
                "model", f"is {self.model!r}; supported is 'gpt2' (byte-level BPE): use a model with such a vocabulary"
            )
        self.pre = fields.text("pre", "default")
        if self.pre not in PATTERNS:
            raise fields.error("pre", f"is {self.pre!r}; supported are {', '.join(map(repr, PATTERNS))}")

        self._tokens = _check_tokens(fields, fields.strings("tokens"))
        self.n_vocab = len(self._tokens)
        merges = _check_merges(fields, fields.strings("merges"), self._tokens)
        self.bos_id, self.eos_id = fields.token_id("bos", self.n_vocab), fields.token_id("eos", self.n_vocab)
        self.add_bos, self.add_eos = fields.flag("add_bos_token"), fields.flag("add_eos_token")
        for flag, name, token in (("add_bos", "bos", self.bos_id), ("add_eos", "eos", self.eos_id)):
            if getattr(self, flag) and token is None:
                raise fields.error(f"{flag}_token", f"is true, but the file has no {_KEY}{name}_token_id to add")

        self._types = _corrected_types(fields, fields.types(self.n_vocab), self._tokens)
        # (text, id, whether it is cut out of plain text too), longest first
        self._special = [
            (self._tokens[i], int(i), bool(self._types[i] == _USER_DEFINED))
            for i in np.flatnonzero(np.isin(self._types, (_UNKNOWN, _CONTROL, _USER_DEFINED)))
        ]
        self._special.sort(key=lambda special: -len(special[0].encode()))
        self._bpe = _byte_pair_encoder(self._tokens, merges, self.pre)

        flags = [self.model, self.pre, PATTERNS[self.pre], self.bos_id, self.eos_id, self.add_bos, self.add_eos]
        digest = hashlib.sha256(json.dumps([flags, self._tokens, merges]).encode())
        digest.update(self._types.astype("<i4").tobytes())
        self.sha256 = digest.hexdigest()

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> NDArray[np.int32]:
        """Token ids of `text`, those of `llama_tokenize`.

        Bytes that have no token in the vocabulary are dropped (and a warning is logged): without any, the ids stand for
        exactly the UTF-8 bytes of `text`.

        Args:
            add_special: put BOS before and EOS behind, if the file wants them (`add_bos`, `add_eos`).
            parse_special: read the text of a control token as that token, not as text. User-defined tokens are always
                read so.

        Returns:
            (T,) int32.

        Raises:
            UnicodeEncodeError: `text` has surrogates, which UTF-8 cannot hold.
        """
        parts = [np.array([self.bos_id], dtype=np.int32)] if add_special and self.add_bos else []
        n_dropped = 0
        for fragment in self._fragments(text, parse_special):
            if isinstance(fragment, int):
                parts.append(np.array([fragment], dtype=np.int32))
                continue
            for chunk in _chunks(fragment):
                ids = np.array(self._bpe.encode(chunk, add_special_tokens=False).ids, dtype=np.int32)
                known = ids[ids < self.n_vocab]
                n_dropped += len(ids) - len(known)
                parts.append(known)
        if add_special and self.add_eos:
            parts.append(np.array([self.eos_id], dtype=np.int32))
        if n_dropped:
            _log.warning("%s: the vocabulary has no token for %d bytes of the text; dropped", self._path, n_dropped)
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int32)

    def decode(self, ids: Iterable[int]) -> bytes:
        """The bytes that `ids` stand for, one after the other; control tokens stand for none.

        Raises:
            ValueError: an id outside the vocabulary.
        """
        return b"".join(map(self.token_bytes, np.asarray(ids, dtype=np.int64).tolist()))

    def token_bytes(self, token: int) -> bytes:
        """The bytes that `token` stands for: none if it is a control token (or the unknown token).

        Raises:
            ValueError: `token` is outside the vocabulary.
        """
        if not 0 <= token < self.n_vocab:
            raise ValueError(f"token {token} is outside the vocabulary of {self.n_vocab:,} in {self._path}")
        return self._pieces[token]

    @cached_property
    def byte_lengths(self) -> NDArray[np.int32]:
        """(V,) int32, read-only: the number of bytes that each token stands for, see `token_bytes`."""
        lengths = np.fromiter(map(len, self._pieces), dtype=np.int32, count=self.n_vocab)
        lengths.flags.writeable = False
        return lengths

    @cached_property
    def _pieces(self) -> list[bytes]:
        """The bytes of every token."""
        return [_piece(text, kind) for text, kind in zip(self._tokens, self._types.tolist(), strict=True)]

    def _fragments(self, text: str, parse_special: bool) -> list[str | int]:
        """`text` with special tokens cut out: stretches of text, none empty, and ids."""
        fragments: list[str | int] = [text] if text else []
        for special, token, always in self._special:
            if (always or parse_special) and special in text:
                fragments = [part for fragment in fragments for part in _cut_out(special, token, fragment)]
        return fragments


class _Fields:
    """The metadata under `tokenizer.ggml.`, and errors that name file and key."""

    def __init__(self, path: str, metadata: Mapping[str, MetadataValue]) -> None:
        self._path, self._metadata = path, metadata

    def error(self, name: str, what: str) -> UnsupportedTokenizer:
        return UnsupportedTokenizer(f"{self._path}: {_KEY}{name} {what}")

    def has(self, name: str) -> bool:
        return _KEY + name in self._metadata

    def text(self, name: str, default: str | None = None) -> str:
        value = self._metadata.get(_KEY + name, default)
        if value is None:
            raise self.error(name, "is missing; a model file needs it: was it converted without its tokenizer?")
        if not isinstance(value, str):
            raise self.error(name, f"is {value!r}, not a string; convert the model again")
        return value

    def flag(self, name: str) -> bool:
        value = self._metadata.get(_KEY + name, False)
        if not isinstance(value, bool):
            raise self.error(name, f"is {value!r}, not true or false; convert the model again")
        return value

    def strings(self, name: str) -> list[str]:
        value = self._metadata.get(_KEY + name)
        if value is None:
            raise self.error(name, "is missing; byte-level BPE needs it: was it converted without its tokenizer?")
        to_list = getattr(value, "to_list", None)  # StringArray's; arrays of numbers have none
        if to_list is None:
            raise self.error(name, "is not an array of strings; convert the model again")
        strings: list[str] = to_list()
        return strings

    def types(self, n_vocab: int) -> NDArray[np.int32]:
        """(V,) int32, types of the tokens; all normal where the file has none."""
        value = self._metadata.get(_KEY + "token_type")
        if value is None:
            return np.ones(n_vocab, dtype=np.int32)
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "iu":
            raise self.error("token_type", "is not an array of integers; convert the model again")
        if len(value) != n_vocab:
            raise self.error("token_type", f"has {len(value):,} entries for {n_vocab:,} tokens; convert the model again")
        return value.astype(np.int32)

    def token_id(self, name: str, n_vocab: int) -> int | None:
        value = self._metadata.get(f"{_KEY}{name}_token_id")
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < n_vocab:
            raise self.error(
                f"{name}_token_id", f"is {value!r}, not one of the {n_vocab:,} tokens; convert the model again"
            )
        return value


def _check_tokens(fields: _Fields, tokens: list[str]) -> list[str]:
    """`tokens`, refused if there are none or two alike; empty ones get the text that llama.cpp gives them."""
    if not tokens:
        raise fields.error("tokens", "is empty; the file holds no vocabulary")
    named = [text or f"[EMPTY_{i}]" for i, text in enumerate(tokens)]
    first: dict[str, int] = {}
    for i, text in enumerate(named):
        if first.setdefault(text, i) != i:
            raise fields.error("tokens", f"has {text!r} twice, as {first[text]} and {i}; convert the model again")
    return named


def _check_merges(fields: _Fields, merges: Sequence[str], tokens: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs to merge, by rank; of equal ones the first counts. Refused: a part or a result that is no token."""
    known, pairs = set(tokens), {}
    for rank, merge in enumerate(merges):
        at = merge.find(" ", 1)  # a part may begin with a space, none holds one further on
        left, right = merge[:at], merge[at + 1 :]
        if at < 0 or not right:
            raise fields.error("merges", f"has {merge!r} as number {rank}: expected two parts with a space between")
        for text in (left, right, left + right):
            if text not in known:
                raise fields.error("merges", f"number {rank} is {merge!r}, but {text!r} is no token; convert again")
        pairs[left, right] = None
    return list(pairs)


def _corrected_types(fields: _Fields, types: NDArray[np.int32], tokens: Sequence[str]) -> NDArray[np.int32]:
    """`types` with the tokens that are control tokens by their text made such."""
    ids = {text: i for i, text in enumerate(tokens)}
    control = [ids[name] for name in _END_NAMES if name in ids]
    for role, names in _FILL_NAMES.items():
        if not fields.has(f"{role}_token_id"):
            control += sorted(ids[name] for name in names.split() if name in ids)[:1]
    types[control] = _CONTROL
    return types


def _byte_pair_encoder(tokens: Sequence[str], merges: list[tuple[str, str]], pre: str) -> tokenizers.Tokenizer:
    """The library's tokenizer; bytes without a token of their own get ids from V on, for the caller to drop."""
    from tokenizers import Tokenizer, models  # here, not above: importing the engine has to be fast

    ids = {text: i for i, text in enumerate(tokens)}
    for symbol in _BYTE_OF:
        ids.setdefault(symbol, len(ids))
    encoder = Tokenizer(models.BPE(ids, merges))
    encoder.pre_tokenizer = pre_tokenizer(pre)
    return encoder


def _chunks(text: str) -> Iterator[str]:
    """`text` in stretches that can be tokenized apart, to bound the library's memory."""
    start = 0
    while start < len(text):
        cut = _CUT.search(text, start + _CHUNK_CHARS)
        end = cut.start() if cut else len(text)
        yield text[start:end]
        start = end


def _cut_out(special: str, token: int, fragment: str | int) -> Iterator[str | int]:
    """`fragment` with every `special` in it replaced by `token`."""
    if isinstance(fragment, int):
        yield fragment
        return
    for i, text in enumerate(fragment.split(special)):
        if i:
            yield token
        if text:
            yield text


def _piece(text: str, kind: int) -> bytes:
    """The bytes that a token stands for."""
    if kind in (_UNKNOWN, _CONTROL):
        return b""
    if kind == _USER_DEFINED:
        return text.encode()
    if kind == _BYTE and re.fullmatch("<0x[0-9A-Fa-f]{2}>", text):
        return bytes.fromhex(text[3:5])
    try:
        return bytes(map(_BYTE_OF.__getitem__, text))
    except KeyError:  # not written in the byte-level alphabet, like added tokens that are marked normal
        return b"".join(bytes([_BYTE_OF[char]]) if char in _BYTE_OF else char.encode() for char in text)
