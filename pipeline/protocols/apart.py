"""Documents kept apart: each is a stream by itself to the protocol; no window reaches from one into the next.

The windows of the run are those of the first document, then those of the second, and so on; `limit` counts
them all. A document too short for a window gives none, which is counted and said. Each document begins as a
text does: with the BOS of a model that adds one.

Protocol `windows`, window = 3, documents abcd and efg, with BOS (`^`):

    stream     ^ a b c d ^ e f g        9 tokens
    windows    ^ a b|           ^ e f|  places 0..2 and 5..7; c d, and g, are tails that are dropped
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import DataError
from pipeline.windows import Counts, Ids, Window

if TYPE_CHECKING:
    from pipeline.protocols.piece import Piece
    from pipeline.tokens import TokenStream


@dataclass(frozen=True)
class Apart:
    """A protocol over each piece of a stream."""

    inner: Piece
    stream: TokenStream = field(repr=False)

    @cached_property
    def _borders(self) -> Counts:
        return self.stream.borders

    @cached_property
    def _ends(self) -> Counts:
        """(p,) windows of all pieces up to and with this one; no limit."""
        return np.cumsum(self.inner.counts(np.diff(self._borders)))

    def n_windows(self, n_tokens: int) -> int:
        """Windows of all documents, `limit` applied.

        Raises:
            DataError: no document is long enough for one.
        """
        whole = int(self._ends[-1])
        if not whole:
            longest = int(np.diff(self._borders).max())
            raise DataError(
                f"none of {self._ends.size:,} documents makes a window; the longest has {longest:,} tokens",
                "give a smaller protocol.window, protocol=document, or data.documents=joined",
            )
        return whole if self.inner.limit is None else min(whole, self.inner.limit)

    def window(self, tokens: Ids, index: int) -> Window:
        """The window of that rank, made from its document's tokens alone."""
        piece = int(np.searchsorted(self._ends, index, side="right"))
        before = int(self._ends[piece - 1]) if piece else 0
        begin, end = self._borders[piece : piece + 2].tolist()
        made = self.inner.window(tokens[begin:end], index - before)
        scored = slice(made.scored.start + begin, made.scored.stop + begin)
        return replace(made, index=index, first_token=made.first_token + begin, scored=scored)

    def measure(self, n_tokens: int) -> dict[str, Any]:
        """Settings of the measure; a limit that cuts nothing off is none."""
        limit = self.n_windows(n_tokens)
        whole = int(self._ends[-1])
        return self.inner.settings() | {"protocol_limit": None if limit == whole else limit}

    def begins(self, n_tokens: int) -> Counts | None:
        """(d,) ranks of the windows that begin from an empty cache; None where all do."""
        if not self.inner.carries:
            return None
        first = self._ends - np.diff(self._ends, prepend=0)
        return np.unique(first[first < self.n_windows(n_tokens)])

    def longest(self, n_tokens: int) -> int:
        """Positions that the cache of a sequence must have."""
        if not self.inner.carries:
            return self.inner.size
        n_windows = np.diff(np.minimum(self._ends, self.n_windows(n_tokens)), prepend=0)
        return int(np.minimum(np.diff(self._borders), n_windows * self.inner.size).max()) - 1

    @property
    def remarks(self) -> list[str]:
        """Documents without a window, and those shorter than two tokens."""
        n_windows = np.diff(self._ends, prepend=0)
        n_without, n_short = int(np.count_nonzero(n_windows == 0)), self.stream.n_short
        if not n_without and not n_short:
            return []
        return [
            f"of {n_windows.size:,} documents {n_short:,} are shorter than two tokens, "
            f"and {n_without:,} make no window and are not scored"
        ]
