"""The targets at which base and variant disagree most, in the text that they stand in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pipeline.compare.report.binned import Targets

if TYPE_CHECKING:
    from pipeline.compare.report import Decoder

N_SHOWN = 20
N_CONTEXT = 12
"""Tokens on either side."""


@dataclass(frozen=True)
class Disagreement:
    """One target, with texts as a person can read them: control characters are drawn, not obeyed.

    Attributes:
        row: which row of the table it is in.
        position: tokens of its window before it.
        before, target, after: the text.
        top_base, top: the most likely token of base and variant.
        nll_base, nll, kld: nats.
    """

    row: int
    position: int
    before: str
    target: str
    after: str
    top_base: str
    top: str
    nll_base: float
    nll: float
    kld: float


def most(
    found: Targets, tokens: NDArray[np.int32], tokenizer: Decoder, n: int = N_SHOWN
) -> list[Disagreement]:
    """The `n` targets with the largest divergence, the largest first; of equals the first in the text.

    A divergence that is not a number comes before all others.
    """
    order = np.argsort(-np.nan_to_num(found.kld, nan=np.inf), kind="stable")[:n]
    told = []
    for at in order.tolist():
        place = int(found.place[at])
        told.append(
            Disagreement(
                int(found.row[at]),
                int(found.position[at]),
                text(tokenizer, tokens[max(place - N_CONTEXT, 0) : place]),
                token(tokenizer, int(tokens[place])),
                text(tokenizer, tokens[place + 1 : place + 1 + N_CONTEXT]),
                token(tokenizer, int(found.top_base[at])),
                token(tokenizer, int(found.top[at])),
                float(found.nll_base[at]),
                float(found.nll[at]),
                float(found.kld[at]),
            )
        )
    return told


def text(tokenizer: Decoder, ids: NDArray[np.int32]) -> str:
    """Tokens as running text; a line's end is an arrow, white space otherwise as it is."""
    return _drawn(tokenizer.decode(ids.tolist()).decode("utf-8", "replace"))


def token(tokenizer: Decoder, token_id: int) -> str:
    """One token: its spaces are drawn too, and one that stands for no bytes is told by its id."""
    try:
        said = tokenizer.decode([token_id])
    except ValueError:  # a row of the output layer that the vocabulary has no token for
        said = b""
    return _drawn(said.decode("utf-8", "replace")).replace(" ", "␣") if said else f"⟨{token_id}⟩"


def _drawn(said: str) -> str:
    return "".join(map(_character, said))


def _character(c: str) -> str:
    """Line ends and tabs as arrows, controls as their pictures; nothing turns the direction of the page."""
    code = ord(c)
    if c in "\n\u2028\u2029":
        return "↵"
    if c == "\t":
        return "⇥"
    if code < 0x20:
        return chr(0x2400 + code)
    if 0x7F <= code < 0xA0 or 0x202A <= code <= 0x202E or 0x2066 <= code <= 0x2069:
        return "\ufffd"
    return c
