"""Text to token ids and back, from the vocabulary in a GGUF file; the ids are llama.cpp's.

    text --cut out special tokens--> fragments --byte-level BPE or SentencePiece-type BPE--> ids

The two kinds are in `engine.byte_pairs` and `engine.sentencepiece`. Special tokens are cut out one by one,
longest first, each over the whole text, not at the leftmost match.

Source: llama.cpp, `llama_vocab::impl::tokenize`.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from engine.byte_pairs import BytePairs
from engine.pretokenizers import RULES
from engine.sentencepiece import SentencePiece
from engine.vocabulary import CONTROL, UNKNOWN, USER_DEFINED, Vocabulary, piece, read_vocabulary

if TYPE_CHECKING:
    from engine.gguf import GGUFFile

_log = logging.getLogger(__name__)

_WHITE_SPACE = " \t\n\v\f\r"  # of C's `isspace`


class Tokenizer:
    """The tokenizer of a GGUF file.

    Attributes:
        model: `tokenizer.ggml.model`: `gpt2`, byte-level BPE, or `llama`, SentencePiece-type.
        pre: name of the pre-tokenizer, in `engine.pretokenizers.RULES`; `default` if the file names none, and
            for SentencePiece-type ones, which have none.
        n_vocab: V, number of tokens in the list; a model's embedding may have more rows.
        bos_id, eos_id: tokens that begin and end a text, None where the file names none.
        add_bos, add_eos: whether `encode` adds them. Where the file does not say, BOS is added by
            SentencePiece-type ones and some pre-tokenizers, and EOS by none.
        add_space_prefix: whether `encode` puts a space in front of the text, which `decode` gives back.
        sha256: hexadecimal digest of all that determines the ids: vocabulary, types, merges, patterns, flags.
    """

    model: str
    pre: str
    n_vocab: int
    bos_id: int | None
    eos_id: int | None
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    sha256: str

    def __init__(self, file: GGUFFile) -> None:
        """Reads `file`'s metadata; `file` may be closed afterwards.

        Raises:
            UnsupportedTokenizer: another model or pre-tokenizer; an incomplete or inconsistent vocabulary.
        """
        vocabulary = read_vocabulary(file)
        self._path = file.path
        self._tokens, self._types = vocabulary.tokens, vocabulary.types
        self.model, self.pre, self.n_vocab = vocabulary.model, vocabulary.pre, len(vocabulary.tokens)
        self.bos_id, self.eos_id = vocabulary.bos_id, vocabulary.eos_id
        self.add_bos, self.add_eos = vocabulary.add_bos, vocabulary.add_eos
        self.add_space_prefix = vocabulary.add_space_prefix
        self.sha256 = _digest(vocabulary)

        special = np.flatnonzero(np.isin(self._types, (UNKNOWN, CONTROL, USER_DEFINED))).tolist()
        special.sort(key=lambda token: -len(self._tokens[token].encode()))
        self._special = [(self._tokens[i], i) for i in special]
        self._strips = vocabulary.strips
        self._pairs = SentencePiece(vocabulary) if self.model == "llama" else BytePairs(vocabulary)

    def encode(
        self, text: str, *, add_special: bool = True, parse_special: bool = False
    ) -> NDArray[np.int32]:
        """Token ids of `text`, those of `llama_tokenize`.

        Bytes that have no token in the vocabulary are dropped, with a warning in the log; otherwise the ids
        stand for exactly the bytes of `text` in UTF-8, and the spaces in front if `add_space_prefix`: one for
        the text, and one more behind every special token in it.

        Args:
            add_special: put BOS in front and EOS behind, if the file wants them (`add_bos`, `add_eos`).
            parse_special: read the text of a control token as that token, not as text. User-defined tokens
                are always read so.

        Returns:
            (T,) int32.

        Raises:
            UnicodeEncodeError: `text` has surrogates, which UTF-8 cannot hold.
        """
        text.encode()  # surrogates: the library would call them a wrong type
        arrays = [_one(self.bos_id)] if add_special and self.add_bos else []
        n_dropped = 0
        for fragment in self._fragments(text, parse_special):
            if isinstance(fragment, int):
                arrays.append(_one(fragment))
                continue
            ids = self._pairs.encode(fragment)
            known = ids[ids < self.n_vocab]
            n_dropped += len(ids) - len(known)
            arrays.append(known)
        if add_special and self.add_eos:
            arrays.append(_one(self.eos_id))
        if n_dropped:
            _log.warning("%s: no token stands for %d bytes of the text; dropped them", self._path, n_dropped)
        return np.concatenate(arrays) if arrays else np.empty(0, dtype=np.int32)

    def decode(self, ids: Iterable[int] | NDArray[np.integer]) -> bytes:
        """The bytes that `ids` stand for, one after the other; control tokens stand for none.

        Raises:
            ValueError: an id outside the vocabulary.
        """
        return b"".join(self.token_bytes(int(token)) for token in ids)

    def token_bytes(self, token: int) -> bytes:
        """The bytes that `token` stands for: none for control tokens and the unknown token.

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
        kinds = self._types.tolist()
        return [piece(text, kind, self.model) for text, kind in zip(self._tokens, kinds, strict=True)]

    def _fragments(self, text: str, parse_special: bool) -> list[str | int]:
        """`text` with special tokens cut out: stretches of text, none empty, and ids."""
        fragments: list[str | int] = [text] if text else []
        for special, token in self._special:
            if (parse_special or self._types[token] == USER_DEFINED) and special in text:
                stripped = _WHITE_SPACE if token in self._strips else ""
                fragments = [
                    part for fragment in fragments for part in _cut_out(special, token, fragment, stripped)
                ]
        return fragments


def _one(token: int | None) -> NDArray[np.int32]:
    """An array of one token."""
    return np.array([token], dtype=np.int32)


def _digest(vocabulary: Vocabulary) -> str:
    """SHA-256 of all that determines ids; the patterns are in it, so that a change of ours shows too."""
    rules = RULES[vocabulary.pre]
    flags = [vocabulary.bos_id, vocabulary.eos_id, vocabulary.add_bos, vocabulary.add_eos]
    said: list[object] = [vocabulary.model, vocabulary.pre, rules.patterns, flags]
    if rules.ignore_merges:
        said.append("ignore_merges")
    if vocabulary.model == "llama":
        said += [vocabulary.add_space_prefix, sorted(vocabulary.strips)]
    digest = hashlib.sha256(json.dumps([said, vocabulary.tokens, vocabulary.merges]).encode())
    digest.update(vocabulary.types.astype("<i4").tobytes())
    digest.update(vocabulary.scores.astype("<f4").tobytes())
    return digest.hexdigest()


def _cut_out(special: str, token: int, fragment: str | int, stripped: str) -> Iterator[str | int]:
    """`fragment` with every `special` in it, and characters of `stripped` behind it, replaced by `token`."""
    if isinstance(fragment, int):
        yield fragment
        return
    start = 0
    while (at := fragment.find(special, start)) >= 0:
        if at > start:
            yield fragment[start:at]
        yield token
        start = at + len(special)
        while start < len(fragment) and fragment[start] in stripped:
            start += 1
    if start < len(fragment):
        yield fragment[start:]
