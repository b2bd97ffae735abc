"""Tokens -> scoring windows: what every protocol has in common.

A protocol says how many windows a token stream makes and, for each, what the model reads and which of its
next tokens are scored. It is a pure function of the stream and its settings, so any worker can make any
window. The definition of the number itself is the protocol's own file, `pipeline/protocols/<name>.py`; it
defines the windows of one piece, and `Apart` lines up those of documents that are kept apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from pipeline.errors import SettingsError
from pipeline.settings import PROTOCOLS, ProtocolSettings

if TYPE_CHECKING:
    import engine
    from pipeline.protocols.piece import Piece
    from pipeline.tokens import TokenStream

Ids = npt.NDArray[np.int32]
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Window:
    """What the model reads at positions `position`, `position + 1`, ..., and what it is asked.

    Attributes:
        index: rank of the window in the run.
        first_token: place in the stream of the window's first token.
        tokens: (T,) int32.
        targets: (T,) int32; at each position the token to predict next, -1 where nothing is scored.
        scored: places in the stream of the scored targets, in rising order.
        counts_blank_ends: beside the words that begin in the scored tokens, white space at an end of the
            document counts as one (protocols/document.py).
        position: of the first token, which the cache must stand at; a window with 0 begins anew.
        distance: tokens of its document before the window; None where windows begin anew.
        half: the first of the scored targets that protocol `windows` scores as well, which then are all of
            the rest; None where it scores none of them, or nobody asks.
    """

    index: int
    first_token: int
    tokens: Ids
    targets: Ids
    scored: slice
    counts_blank_ends: bool = False
    position: int = 0
    distance: int | None = None
    half: int | None = None


class ScoringProtocol(Protocol):
    """A way of scoring a token stream."""

    def n_windows(self, n_tokens: int) -> int:
        """Windows that a stream of so many tokens makes, `limit` applied.

        Raises:
            DataError: the stream is too short.
        """
        ...

    def window(self, tokens: Ids, index: int) -> Window:
        """The window of that rank; the stream is (n,) int32 and is not changed."""
        ...

    def measure(self, n_tokens: int) -> dict[str, Any]:
        """Name, version and all settings, as they enter the measure's key."""
        ...

    def begins(self, n_tokens: int) -> Counts | None:
        """(d,) ranks of the windows that begin from an empty cache; None where all do."""
        ...

    def longest(self, n_tokens: int) -> int:
        """Positions that the cache of a sequence must have."""
        ...

    @property
    def remarks(self) -> list[str]:
        """What is left out of the score that a person should know."""
        ...


class CacheShape(NamedTuple):
    """The cache that a run's windows need: see `engine.Model.new_cache`."""

    n_slots: int
    capacity: int
    fleeting: bool


def open_protocol(settings: ProtocolSettings, bos_id: int | None, stream: TokenStream) -> ScoringProtocol:
    """The protocol of that name over a stream, by documents where the stream keeps them apart.

    `bos_id` is what `begin_id` says.

    Raises:
        SettingsError: no such protocol.
    """
    from pipeline.protocols.apart import Apart
    from pipeline.protocols.carry import Carry
    from pipeline.protocols.document import Rolling
    from pipeline.protocols.strided import Strided
    from pipeline.protocols.windows import Windows

    window, limit = settings.window, settings.limit
    protocol: Piece
    if settings.name == Windows.name:
        protocol = Windows(window, limit, bos_id)
    elif settings.name == Strided.name:
        protocol = Strided(window, settings.stride or window // 2, limit, bos_id)
    elif settings.name == Carry.name:
        protocol = Carry(window, limit, bos_id)
    elif settings.name == Rolling.name and bos_id is not None:
        protocol = Rolling(window, limit, bos_id, int(stream.pieces["n_special"][0]))
    else:
        raise SettingsError(f"protocol.name={settings.name} is not known (known: {', '.join(PROTOCOLS)})")
    return Apart(protocol, stream) if stream.is_apart else protocol


def begin_id(settings: ProtocolSettings, tokenizer: engine.Tokenizer) -> int | None:
    """The token that begins a sequence: the BOS of a model that adds one, None where nothing does.

    For protocol `document` the BOS whether the model adds it or not, or the EOS, as lm-evaluation-harness.

    Raises:
        SettingsError: protocol `document`, and the model has neither.
    """
    if settings.name != "document":
        return tokenizer.bos_id if tokenizer.add_bos else None
    found = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    if found is None:
        raise SettingsError(
            "protocol=document begins each document with the model's BOS or EOS token, and it has neither",
            "use protocol=strided, which leaves the first token of a text unscored then",
        )
    return found


def slots(settings: ProtocolSettings, batch_tokens: int, windows_per_shard: int) -> int:
    """Windows that one engine call may take at most; a cache of so many slots is reserved.

    Windows of protocol `windows` are all of one length. Others may be shorter, so more of them fill a batch:
    four times as many slots are reserved, and touched only if they are needed.
    """
    ragged = 1 if settings.name == "windows" else 4
    return max(1, min(ragged * batch_tokens // settings.window, windows_per_shard))


def cache_shape(
    protocol: ScoringProtocol,
    n_tokens: int,
    settings: ProtocolSettings,
    windows_per_shard: int,
    batch_tokens: int,
) -> CacheShape:
    """The cache for the windows of a shard of a stream of so many tokens.

    A window that begins anew and fits a batch is decoded in one call: no layer's keys are needed after it.
    """
    n_slots, begins = slots(settings, batch_tokens, windows_per_shard), protocol.begins(n_tokens)
    if begins is None:
        return CacheShape(n_slots, protocol.longest(n_tokens), settings.window <= batch_tokens)
    return CacheShape(min(n_slots, begins.size), protocol.longest(n_tokens), False)


def batches(windows: Sequence[Window], batch_tokens: int, n_slots: int) -> Iterator[Sequence[Window]]:
    """Consecutive windows for one engine call each: whole ones that fit, or one that is longer by itself."""
    begin, n_tokens = 0, 0
    for at, window in enumerate(windows):
        full = n_tokens + window.tokens.size > batch_tokens or at - begin == n_slots
        if full and at > begin:
            yield windows[begin:at]
            begin, n_tokens = at, 0
        n_tokens += window.tokens.size
    if begin < len(windows):
        yield windows[begin:]
