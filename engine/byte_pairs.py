"""Byte-level BPE: text to ids inside the pieces that a pre-tokenizer cuts; done by the `tokenizers` library.

    text --pre-tokenizer--> pieces --one printable character a byte--> merges by rank, leftmost first --> ids

A byte that the vocabulary has no token for would let its neighbours merge in the library; here it gets an id
past the vocabulary's end, for the caller to drop, and so keeps them apart as in llama.cpp. SmolLM2 lacks 21
bytes: six control characters, and what UTF-8 hardly or never uses.

Source: llama.cpp, `llm_tokenizer_bpe_session`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from engine.pretokenizers import RULES, pre_tokenizer
from engine.vocabulary import BYTE_OF, Vocabulary

_CHUNK_CHARS = 1 << 16  # handed to the library at once: it works in some hundred bytes a character


class BytePairs:
    """Encodes text with a vocabulary and its merges."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        from tokenizers import Tokenizer, models  # here, not above: importing the engine has to be fast

        rules = RULES[vocabulary.pre]
        ids = {text: i for i, text in enumerate(vocabulary.tokens)}
        for symbol in BYTE_OF:
            ids.setdefault(symbol, len(ids))
        self._library = Tokenizer(models.BPE(ids, vocabulary.merges, ignore_merges=rules.ignore_merges))
        self._library.pre_tokenizer = pre_tokenizer(vocabulary.pre)
        self._cut = re.compile(rules.cut)

    def encode(self, text: str) -> NDArray[np.int32]:
        """(T,) int32: ids of `text`; from V on for bytes that have no token."""
        ids = [self._library.encode(chunk, add_special_tokens=False).ids for chunk in self._chunks(text)]
        return np.concatenate([np.array(part, dtype=np.int32) for part in ids])

    def _chunks(self, text: str) -> Iterator[str]:
        """`text`, which is not empty, in stretches that may be encoded apart."""
        start = 0
        while start < len(text):
            cut = self._cut.search(text, start + _CHUNK_CHARS)
            end = cut.start() if cut else len(text)
            yield text[start:end]
            start = end
