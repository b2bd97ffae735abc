"""Protocol `carry`: the state is carried through a whole document; every token has all that came before it.

A document is read once, from its first token to its last but one, and each token predicts the next. A BOS
stands in front when the model adds one; without it the first token has nothing before it and is the only one
that is not scored. For a recurrent model that costs no more than windows do, whatever the length; for
attention it is one growing context, which ends where the model was trained to.

A window is a run of `window` places of the document: those whose tokens it scores, which are predicted from
the place before. It changes no score, only what a row of the table sums up, and what `limit` counts.

Ten tokens a..j, window = 4, with BOS (`^`):

    document   ^ a b c d e f g h i j
    window 0     a b c                 reads ^ a b, from an empty cache
    window 1           d e f g         reads c d e f, where window 0 stopped
    window 2                   h i j   reads g h i
    half             c       g         places window // 2 + 1 .. window - 1 of each whole window

So `limit` windows score the first `limit * window` tokens of the document but its very first. A row's
`distance` is how many tokens of the document, BOS counted, lie before its window: likelihoods by distance
from the document's start are sums over rows of one distance.

What protocol `windows` scores with the same window are the second halves (`half_...` in rows and summary):
the same tokens, here with the whole document before them, there with at most a window.

What moves the number: where documents end, BOS, `limit`. The standard error clustered by window takes the
windows of a document to be independent of each other, which neighbours are not quite.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from pipeline.errors import DataError
from pipeline.protocols.piece import Piece
from pipeline.windows import Counts, Ids, Window


@dataclass(frozen=True)
class Carry(Piece):
    """Windows of `size` places that go on from each other; `bos_id` is None when the model adds no BOS.

    A document begins with the BOS when there is one.
    """

    size: int
    limit: int | None
    bos_id: int | None
    name: ClassVar[str] = "carry"
    carries: ClassVar[bool] = True

    def counts(self, n_tokens: Counts) -> Counts:
        """(p,) windows until the last token is scored; no limit."""
        return np.where(n_tokens < 2, 0, -(-n_tokens // self.size))

    def window(self, tokens: Ids, index: int) -> Window:
        """The window of that rank: at most (size,) tokens, each with a target."""
        begin = index * self.size
        end = min(begin + self.size, tokens.size)
        first = max(begin, 1)  # place of the first target
        is_whole = end - begin == self.size
        return Window(
            index,
            first - 1,
            np.array(tokens[first - 1 : end - 1], np.int32),
            np.array(tokens[first:end], np.int32),
            slice(first, end),
            position=first - 1,
            distance=begin,
            half=begin + self.size // 2 + 1 - first if is_whole else None,
        )

    def own_settings(self) -> dict[str, Any]:
        """The BOS."""
        return {"protocol_bos_id": self.bos_id}

    def too_short(self, n_tokens: int) -> DataError:
        """One token predicts nothing that is there."""
        return DataError(
            f"the text has {n_tokens:,} tokens, expected at least 2, one to read and one to predict",
            "use a longer text",
        )
