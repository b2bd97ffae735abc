"""SentencePiece-type BPE: text to ids by scores, with bytes for characters that no token holds.

    "Hello wörld"  ->  _Hello_wörld  ->  _ H e l l o _ w ö r l d  ->  _Hello _w <0xC3> <0xB6> r ld

Each character begins as a symbol; the two neighbours whose concatenation is the token of the highest score
join, the leftmost of equal ones, until no two make a token. Merges with ranks, as byte-level BPE has them,
cannot say this: a token of one score can come from several pairs, and Gemma gives one score to hundreds of
tokens. So the loop here is ours, and the `tokenizers` library has no part in it.

There are no pre-tokenizers: in principle a text is one piece. But no symbol ever spans two characters that
are neighbours in no token, so the text is cut there; what is left and right of a cut cannot touch, and is
encoded by itself. In Gemma's vocabulary, for one, only ">" and "_" are neighbours before a space.

Source: llama.cpp, `llm_tokenizer_spm_session`; Kudo and Richardson 2018, https://arxiv.org/abs/1808.06226.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from heapq import heapify, heappop, heappush

import numpy as np
from numpy.typing import NDArray

from engine.vocabulary import SPACE, Vocabulary, byte_token

_CHUNK_CHARS = 1 << 16  # looked at once for places to cut
_KEPT, _KEPT_CHARS = 1 << 16, 32  # pieces whose ids are remembered, and how long they may be


class SentencePiece:
    """Encodes text with a vocabulary and its scores."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._ids = {text: i for i, text in enumerate(vocabulary.tokens)}
        self._costs: list[float] = (-vocabulary.scores).tolist()  # the lowest is merged first
        self._bytes = [self._ids.get(byte_token(byte), len(self._ids)) for byte in range(256)]
        self._prefix = SPACE if vocabulary.add_space_prefix else ""
        self._neighbours = _neighbours(vocabulary.tokens)
        self._kept: dict[str, list[int]] = {}

    def encode(self, text: str) -> NDArray[np.int32]:
        """(T,) int32: ids of `text`; V for bytes that have no token."""
        ids, kept = array("i"), self._kept
        for piece in self._pieces(self._prefix + text.replace(" ", SPACE)):
            found = kept.get(piece)
            if found is None:
                found = self._merge(piece)
                if len(piece) <= _KEPT_CHARS:
                    if len(kept) >= _KEPT:
                        kept.clear()
                    kept[piece] = found
            ids.extend(found)
        return np.array(ids, dtype=np.int32)

    def _pieces(self, text: str) -> Iterator[str]:
        """`text` cut wherever the characters on both sides are neighbours in no token."""
        start = 0
        for at in range(0, len(text), _CHUNK_CHARS):
            keys = _keys(text[at : at + _CHUNK_CHARS + 1])
            apart = self._neighbours[np.searchsorted(self._neighbours, keys)] != keys
            for end in (np.flatnonzero(apart) + (at + 1)).tolist():
                yield text[start:end]
                start = end
        yield text[start:]

    def _merge(self, text: str) -> list[int]:
        """Ids of `text`, whole: the loop of the head of this file."""
        ids, costs, n = self._ids, self._costs, len(text)
        symbols = list(text)  # "" once it has joined the symbol before it
        before, after = list(range(-1, n - 1)), list(range(1, n + 1))
        queue = [
            (costs[ids[text[i : i + 2]]], i, i + 1, 2) for i in range(n - 1) if text[i : i + 2] in ids
        ]  # cost, left symbol, right symbol, length of both
        heapify(queue)
        while queue:
            _, left, right, length = heappop(queue)
            if not symbols[left] or not symbols[right]:
                continue
            joined = symbols[left] + symbols[right]
            if len(joined) != length:  # the right one has grown since
                continue
            symbols[left], symbols[right] = joined, ""
            after[left] = after[right]
            if after[right] < n:
                before[after[right]] = left
            for i, j in ((before[left], left), (left, after[left])):
                if i >= 0 and j < n:
                    pair = symbols[i] + symbols[j]
                    if pair in ids:
                        heappush(queue, (costs[ids[pair]], i, j, len(pair)))
        found: list[int] = []
        for symbol in filter(None, symbols):
            if symbol in ids:
                found.append(ids[symbol])
            else:
                found.extend(self._bytes[byte] for byte in symbol.encode())
        return found


def _keys(text: str) -> NDArray[np.uint64]:
    """One number for each two neighbours in `text`."""
    points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4").astype(np.uint64)
    return (points[:-1] << np.uint64(32)) | points[1:]


def _neighbours(tokens: list[str]) -> NDArray[np.uint64]:
    """Sorted `_keys` of what is neighbours in a token; one that no two characters have comes last."""
    keys = _keys("".join(tokens))
    ends = np.cumsum(np.fromiter(map(len, tokens), dtype=np.int64, count=len(tokens)))
    inside = np.ones(len(keys), dtype=np.bool_)
    inside[ends[:-1] - 1] = False
    return np.append(np.unique(keys[inside]), np.iinfo(np.uint64).max)
