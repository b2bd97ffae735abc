"""What protocols share: each defines the windows of one piece of a stream; limit and measure are alike."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np

from pipeline.errors import DataError
from pipeline.windows import Counts, Ids, Window


class Piece(ABC):
    """A protocol over one piece: a text, or a document that is kept apart.

    Attributes:
        version: raised when the same settings give other windows; part of the measure.
        carries: whether a window goes on from the one before it; else each is read from an empty cache.
        size: tokens of a window at most.
        limit: the first n windows only.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    carries: ClassVar[bool] = False
    size: int
    limit: int | None

    @abstractmethod
    def counts(self, n_tokens: Counts) -> Counts:
        """(p,) windows of pieces of so many tokens, 0 for one too short; no limit."""

    @abstractmethod
    def window(self, tokens: Ids, index: int) -> Window:
        """The window of that rank; `tokens` (n,) int32 is not changed."""

    @abstractmethod
    def own_settings(self) -> dict[str, Any]:
        """Settings that enter the measure beside name, version, window and limit."""

    @abstractmethod
    def too_short(self, n_tokens: int) -> DataError:
        """What to say of a text of so many tokens, which makes no window."""

    def n_windows(self, n_tokens: int) -> int:
        """Windows of a piece of so many tokens, `limit` applied.

        Raises:
            DataError: it is too short for one.
        """
        whole = self._whole(n_tokens)
        if not whole:
            raise self.too_short(n_tokens)
        return whole if self.limit is None else min(whole, self.limit)

    def measure(self, n_tokens: int) -> dict[str, Any]:
        """Settings of the measure; a limit that cuts nothing off is none."""
        limit = self.n_windows(n_tokens)
        return self.settings() | {"protocol_limit": None if limit == self._whole(n_tokens) else limit}

    def settings(self) -> dict[str, Any]:
        """Settings of the measure but the limit."""
        return {
            "protocol": self.name,
            "protocol_version": self.version,
            "protocol_window": self.size,
            **self.own_settings(),
        }

    def begins(self, n_tokens: int) -> Counts | None:
        """(d,) ranks of the windows that begin from an empty cache; None where all do."""
        return np.zeros(1, np.int64) if self.carries else None

    def longest(self, n_tokens: int) -> int:
        """Positions that the cache of a sequence must have."""
        return min(n_tokens, self.n_windows(n_tokens) * self.size) - 1 if self.carries else self.size

    @property
    def remarks(self) -> list[str]:
        """What is left out of the score that a person should know."""
        return []

    def _whole(self, n_tokens: int) -> int:
        return int(self.counts(np.array([n_tokens]))[0])
