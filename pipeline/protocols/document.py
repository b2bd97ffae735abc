"""Protocol `document`: rolling windows over each document, lm-evaluation-harness's `loglikelihood_rolling`.

A document is tokenized without special tokens and scored whole. The model's BOS, or its EOS when it has no
BOS, is put before it, so its first token is predicted too. Windows read at most `window` tokens; each
predicts the `window` tokens that come next, with the one token before them as its first context, and the last
is drawn back so that it reads a full window: the tokens it has left to predict have that much more context.

Ten tokens a..j, window = 4, prefix `^`:

    document   a b c d e f g h i j
    read       ^ a b c                    predicts a b c d
                     d e f g              predicts         e f g h     (context d)
                         f g h i          predicts             . . i j (drawn back: context f g h)
    scored     a b c d e f g h i j        each once

Over D documents with log-likelihoods l_d, and with w_d words and b_d bytes of their texts:

    word_ppl       exp(-sum l_d / sum w_d)
    byte_ppl       exp(-sum l_d / sum b_d)
    bits_per_byte  log2(byte_ppl)

sums over documents, not a mean of their perplexities. Words are what the harness counts,
`len(re.split(r"\\s+", text))`: white space at an end of a document makes one more, empty, word there.
`ppl` is per token, which the harness does not give.

Where we differ: an empty document is left out (the harness counts one word and no likelihood for it), and
the words and bytes are those of the text that was scored (a harness task may score a detokenized text and
count the original one, as its `wikitext` does).

What moves the number: window (the harness's `max_length`), prefix, where documents end, `limit`.
Source: EleutherAI/lm-evaluation-harness, `get_rolling_token_windows` (context_len=1, as its models call it),
`weighted_perplexity` and `bits_per_byte`; tests/reference/perplexity.py has them by documents, in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from pipeline.errors import DataError
from pipeline.protocols.piece import Piece
from pipeline.windows import Counts, Ids, Window


@dataclass(frozen=True)
class Rolling(Piece):
    """Windows of one document of which the first `n_special` tokens (0 or 1: a BOS) are not of its text."""

    size: int
    limit: int | None
    prefix_id: int
    n_special: int
    name: ClassVar[str] = "document"

    def counts(self, n_tokens: Counts) -> Counts:
        """(p,) windows until the last token is scored, special tokens counted; no limit."""
        return -(-(n_tokens - self.n_special) // self.size)

    def window(self, tokens: Ids, index: int) -> Window:
        """The window of that rank: at most (size,) tokens and targets."""
        text = tokens[self.n_special :]
        done = index * self.size
        end = min(done + self.size, text.size)
        begin = max(0, end - self.size)  # the token before this place is the first that is read
        before = text[begin - 1 : begin] if begin else np.array([self.prefix_id], np.int32)
        read = np.concatenate([before, text[begin : end - 1]])
        targets = np.full(read.size, -1, np.int32)
        targets[done - begin :] = text[done:end]
        first = max(0, begin - 1) + self.n_special
        scored = slice(done + self.n_special, end + self.n_special)
        return Window(index, first, read, targets, scored, counts_blank_ends=end == text.size)

    def own_settings(self) -> dict[str, Any]:
        """The prefix."""
        return {"protocol_bos_id": self.prefix_id}

    def too_short(self, n_tokens: int) -> DataError:
        """There is nothing to score."""
        return DataError("the text has no token, expected one at least", "use another text")
