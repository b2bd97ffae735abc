"""Tokens -> scoring windows: what every protocol has in common.

A protocol says how many windows a token stream makes and, for each, what the model reads and which of its
next tokens are scored. It is a pure function of the stream and its settings, so any worker can make any
window. The definition of the number itself is the protocol's own file, `pipeline/protocols/<name>.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from pipeline.errors import SettingsError
from pipeline.settings import ProtocolSettings

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Window:
    """What the model reads at positions 0..T-1, and what it is asked.

    Attributes:
        index: rank of the window in the run.
        first_token: place in the stream of the window's first token.
        tokens: (T,) int32.
        targets: (T,) int32; at each position the token to predict next, -1 where nothing is scored.
        scored: places in the stream of the scored targets, in rising order.
    """

    index: int
    first_token: int
    tokens: Ids
    targets: Ids
    scored: slice


class ScoringProtocol(Protocol):
    """A way of scoring a token stream."""

    name: ClassVar[str]
    version: ClassVar[int]
    """Raised when the same settings give other windows; part of the measure."""

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


def open_protocol(settings: ProtocolSettings, bos_id: int | None) -> ScoringProtocol:
    """The protocol of that name; `bos_id` begins a sequence, None when the model adds no BOS."""
    from pipeline.protocols.windows import Windows

    if settings.name != Windows.name:
        raise SettingsError(f"protocol.name={settings.name} is not known (known: {Windows.name})")
    return Windows(settings.window, settings.limit, bos_id)
