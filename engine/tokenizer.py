"""Text to token ids and back, from the vocabulary in a GGUF file; the ids are llama.cpp's.

    text --cut out special tokens--> fragments --pre-tokenizer--> pieces --byte-level BPE--> ids

Byte-level BPE writes each byte as one printable character, joins neighbours by the rank of their merge,
leftmost first, and looks the symbols that remain up. The `tokenizers` library does this and the
pre-tokenizers' regular expressions. The rest follows llama.cpp where it and the library differ:

- special tokens are cut out one by one, longest first, each over the whole text, not at the leftmost match;
- a byte that the vocabulary has no token for is dropped, but keeps its neighbours apart (the library would
  let them merge). SmolLM2 lacks 21 bytes: six control characters, and what UTF-8 hardly or never uses.

Source: llama.cpp, `llama_vocab::impl::tokenize` and `llm_tokenizer_bpe_session`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from engine.pretokenizers import PATTERNS, pre_tokenizer
from engine.vocabulary import BYTE_OF, CONTROL, UNKNOWN, USER_DEFINED, Vocabulary, piece, read_vocabulary

if TYPE_CHECKING:
    import tokenizers

    from engine.gguf import GGUFFile

_log = logging.getLogger(__name__)

_CHUNK_CHARS = 1 << 16  # handed to the library at once: it works in some hundred bytes a character
_CUT = re.compile(r"(?<=\S)[ \n]")  # all pre-tokenizers begin a piece at white space behind something else


class Tokenizer:
    """The tokenizer of a GGUF file.

    Attributes:
        model: `tokenizer.ggml.model`; `gpt2`, byte-level BPE, is the one that is supported.
        pre: name of the pre-tokenizer, in `engine.pretokenizers.PATTERNS`; `default` if the file names none.
        n_vocab: V, number of tokens in the list; a model's embedding may have more rows.
        bos_id, eos_id: tokens that begin and end a text, None where the file names none.
        add_bos, add_eos: whether `encode` adds them; False where the file does not say.
        sha256: hexadecimal digest of all that determines the ids: vocabulary, types, merges, patterns, flags.
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
            UnsupportedTokenizer: another model or pre-tokenizer; an incomplete or inconsistent vocabulary.
        """
        vocabulary = read_vocabulary(file)
        self._path = file.path
        self._tokens, self._types = vocabulary.tokens, vocabulary.types
        self.model, self.pre, self.n_vocab = vocabulary.model, vocabulary.pre, len(vocabulary.tokens)
        self.bos_id, self.eos_id = vocabulary.bos_id, vocabulary.eos_id
        self.add_bos, self.add_eos = vocabulary.add_bos, vocabulary.add_eos
        self.sha256 = _digest(vocabulary)

        special = np.flatnonzero(np.isin(self._types, (UNKNOWN, CONTROL, USER_DEFINED))).tolist()
        special.sort(key=lambda token: -len(self._tokens[token].encode()))
        # text, id, whether it is cut out even if special tokens are to be read as text
        self._special = [(self._tokens[i], i, bool(self._types[i] == USER_DEFINED)) for i in special]
        self._bpe = _byte_pair_encoder(vocabulary)

    def encode(
        self, text: str, *, add_special: bool = True, parse_special: bool = False
    ) -> NDArray[np.int32]:
        """Token ids of `text`, those of `llama_tokenize`.

        Bytes that have no token in the vocabulary are dropped, with a warning in the log; otherwise the ids
        stand for exactly the bytes of `text` in UTF-8.

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
            for chunk in _chunks(fragment):
                ids = np.array(self._bpe.encode(chunk, add_special_tokens=False).ids, dtype=np.int32)
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
        return [piece(text, kind) for text, kind in zip(self._tokens, self._types.tolist(), strict=True)]

    def _fragments(self, text: str, parse_special: bool) -> list[str | int]:
        """`text` with special tokens cut out: stretches of text, none empty, and ids."""
        fragments: list[str | int] = [text] if text else []
        for special, token, always in self._special:
            if (always or parse_special) and special in text:
                fragments = [part for fragment in fragments for part in _cut_out(special, token, fragment)]
        return fragments


def _one(token: int | None) -> NDArray[np.int32]:
    """An array of one token."""
    return np.array([token], dtype=np.int32)


def _digest(vocabulary: Vocabulary) -> str:
    """SHA-256 of all that determines ids; the patterns are in it, so that a change of ours shows too."""
    flags = [vocabulary.bos_id, vocabulary.eos_id, vocabulary.add_bos, vocabulary.add_eos]
    rules = [vocabulary.model, vocabulary.pre, PATTERNS[vocabulary.pre], flags]
    digest = hashlib.sha256(json.dumps([rules, vocabulary.tokens, vocabulary.merges]).encode())
    digest.update(vocabulary.types.astype("<i4").tobytes())
    return digest.hexdigest()


def _byte_pair_encoder(vocabulary: Vocabulary) -> tokenizers.Tokenizer:
    """The library's encoder; bytes without a token get ids from V on, for the caller to drop."""
    from tokenizers import Tokenizer, models  # here, not above: importing the engine has to be fast

    ids = {text: i for i, text in enumerate(vocabulary.tokens)}
    for symbol in BYTE_OF:
        ids.setdefault(symbol, len(ids))
    encoder = Tokenizer(models.BPE(ids, vocabulary.merges))
    encoder.pre_tokenizer = pre_tokenizer(vocabulary.pre)
    return encoder


def _chunks(text: str) -> Iterator[str]:
    """`text` in stretches that may be tokenized apart."""
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
