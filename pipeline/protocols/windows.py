"""Protocol `windows`: the perplexity that llama.cpp computes (protocol.md 2.2).

The whole text is tokenized in one call and cut into windows of `window` tokens that do not overlap; the tail
is dropped. Each window is read from an empty cache. The first half is context only; every token after `window
// 2` is predicted once. When the model adds a BOS, it REPLACES the first token of each window on the way in;
targets are the stream's own tokens. So nothing before a window's second half is scored, and a scored token
has between `window // 2 + 1` and `window - 1` tokens before it.

Ten tokens a..j, window = 5, with BOS (`^`); first = 5 // 2 = 2:

    stream     a b c d e | f g h i j          a is itself the text's BOS
    read       ^ b c d e | ^ g h i j          positions 0 1 2 3 4 of two windows
    predicts   . . d e . | . . i j .          p predicts the token at p + 1, for p in first .. window - 2
    scored           d e         i j          places first + 1 .. window - 1 of each window; 2 of 5 tokens

What moves the number: the window, the BOS, the one call on the whole text (documents are joined before), the
trailing newline (datasets.py), `limit`. All are in the run key or in the token stream's digest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from pipeline.errors import DataError
from pipeline.protocols.piece import Piece
from pipeline.windows import Counts, Ids, Window


@dataclass(frozen=True)
class Windows(Piece):
    """Windows of `window` tokens, at most `limit` of them; `bos_id` is None when the model adds no BOS."""

    size: int
    limit: int | None
    bos_id: int | None
    name: ClassVar[str] = "windows"

    def n_windows(self, n_tokens: int) -> int:
        """Whole windows in the stream, `limit` applied.

        Raises:
            DataError: fewer than two windows' tokens, as llama.cpp refuses.
        """
        if n_tokens < 2 * self.size:
            raise self.too_short(n_tokens)
        return super().n_windows(n_tokens)

    def counts(self, n_tokens: Counts) -> Counts:
        """(p,) whole windows of pieces of so many tokens; no limit."""
        return n_tokens // self.size

    def window(self, tokens: Ids, index: int) -> Window:
        """The window of that rank: (size,) tokens and targets."""
        start, first = index * self.size, self.size // 2
        read = np.array(tokens[start : start + self.size], np.int32)
        targets = np.full(self.size, -1, np.int32)
        targets[first:-1] = read[first + 1 :]
        if self.bos_id is not None:
            read[0] = self.bos_id
        return Window(index, start, read, targets, slice(start + first + 1, start + self.size))

    def own_settings(self) -> dict[str, Any]:
        """The BOS."""
        return {"protocol_bos_id": self.bos_id}

    def too_short(self, n_tokens: int) -> DataError:
        """Two windows are llama.cpp's least."""
        shorter = f", or protocol.window={n_tokens // 2} or less" if n_tokens >= 6 else ""
        return DataError(
            f"the text has {n_tokens:,} tokens, expected at least {2 * self.size:,}, two windows",
            f"use a longer text{shorter}",
        )
