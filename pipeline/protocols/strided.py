"""Protocol `strided`: overlapping windows; every token of the text is scored exactly once.

The whole text is tokenized in one call; a BOS is in front when the model adds one. The first window reads
`window` tokens and predicts the token after each. Every further window ends `stride` tokens after the one
before and scores the tokens that are new, with as much context as the window holds; the last ends where the
text ends and reads a full window all the same, so it scores fewer. When the model adds a BOS, the first token
that a window reads is the BOS, and the model sees it: it stands in place of the text's token there. Without a
BOS the text's first token has nothing before it and is the only one that is not scored.

Ten tokens a..j after the BOS (`^`), window = 5, stride = 3:

    stream     ^ a b c d e f g h i j
    read       ^ a b c d                    predicts a b c d e
                     ^ d e f g              predicts       . . f g h     (^ stands for c)
                         ^ f g h i          predicts           . . . i j (the last: two are left)
    scored       a b c d e f g h i j        each once

So a scored token of a further window has at least `window - stride` tokens before it, BOS included. The
smaller the stride, the more context each token has, and the dearer: about `window / stride` times the tokens
are read.

Not llama.cpp's `--ppl-stride` (protocol.md 2.4): there the window is not the one asked for, the BOS is
written after the model has read, the beginning and the end of the text are not scored, and no error is given.

What moves the number: window, stride, BOS, the one call on the whole text, `limit`; all are in the measure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from pipeline.errors import DataError
from pipeline.protocols.piece import Piece
from pipeline.windows import Counts, Ids, Window


@dataclass(frozen=True)
class Strided(Piece):
    """Windows of `size` tokens every `stride`, at most `limit`; `bos_id` is None when the model adds no BOS.

    A stream begins with the BOS when there is one.
    """

    size: int
    stride: int
    limit: int | None
    bos_id: int | None
    name: ClassVar[str] = "strided"

    def counts(self, n_tokens: Counts) -> Counts:
        """(p,) windows until the last token is scored; no limit."""
        last = n_tokens - 1  # place of the last target
        further = -(-np.maximum(last - self.size, 0) // self.stride)
        return np.where(last > 0, 1 + further, 0)

    def window(self, tokens: Ids, index: int) -> Window:
        """The window of that rank: at most (size,) tokens and targets."""
        last = tokens.size - 1
        done = self.size + (index - 1) * self.stride if index else 0  # place of the last target scored before
        end = min(self.size + index * self.stride, last)
        begin = max(0, end - self.size)
        read = np.array(tokens[begin:end], np.int32)
        targets = np.full(read.size, -1, np.int32)
        targets[done - begin :] = tokens[done + 1 : end + 1]
        if self.bos_id is not None:
            read[0] = self.bos_id
        return Window(index, begin, read, targets, slice(done + 1, end + 1))

    def own_settings(self) -> dict[str, Any]:
        """Stride and BOS."""
        return {"protocol_stride": self.stride, "protocol_bos_id": self.bos_id}

    def too_short(self, n_tokens: int) -> DataError:
        """One token predicts nothing that is there."""
        return DataError(
            f"the text has {n_tokens:,} tokens, expected at least 2, one to read and one to predict",
            "use a longer text",
        )
