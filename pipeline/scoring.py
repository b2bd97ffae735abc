"""Windows -> scores by the engine: what goes into one call, and which slot of the cache it sits in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

import engine
from pipeline.errors import ScoreError
from pipeline.windows import batches

if TYPE_CHECKING:
    from pipeline.windows import Window

Scores = npt.NDArray[np.float64]
Decode = Callable[["engine.Batch", Any], Scores]
"""Batch and cache -> (..., n_scored), such as `engine.Model.nll`."""


def first_broken(model: Any, window: Window) -> str:
    """What makes a window's scores not finite, as the end of a message: read again, layer by layer.

    Args:
        model: as `engine.load_model` returned it; the window is read from an empty cache.
    """
    tokens = window.tokens[: model.batch_tokens]
    found = engine.first_broken(model, engine.Batch(tokens, np.arange(tokens.size)))
    return "" if found is None else f"; {found}"


class Scorer:
    """Scores windows in their order, with a cache of its own.

    Args:
        decode: scores a batch with the cache.
        cache: of `n_slots` sequences.

    Attributes:
        slot: of the cache, where the last window's sequence is; a window that does not begin anew goes on
            there.
    """

    def __init__(self, decode: Decode, cache: Any, n_slots: int, batch_tokens: int) -> None:
        self.cache = cache
        self.slot = 0
        self.decode, self._n_slots, self._batch_tokens = decode, n_slots, batch_tokens

    def scores(self, windows: Sequence[Window]) -> list[Scores]:
        """(..., n_scored) float64 per window.

        Raises:
            ScoreError: the engine returned another number of scores.
        """
        calls = batches(windows, self._batch_tokens, self._n_slots)
        return [found for call in calls for found in self._call(call)]

    def _call(self, windows: Sequence[Window]) -> list[Scores]:
        slots = self._place(windows)
        found = self._decode(
            np.concatenate([window.tokens for window in windows]),
            np.concatenate([np.arange(w.tokens.size, dtype=np.int32) + w.position for w in windows]),
            np.repeat(np.array(slots, np.int32), [window.tokens.size for window in windows]),
            np.concatenate([window.targets for window in windows]),
        )
        ends = np.cumsum([np.count_nonzero(window.targets >= 0) for window in windows])
        if found.shape[-1] != ends[-1]:
            raise ScoreError(
                f"the engine returned {found.shape[-1]} scores, expected {ends[-1]}; this is a bug of ours"
            )
        return np.split(found, ends[:-1], axis=-1)

    def _place(self, windows: Sequence[Window]) -> list[int]:
        """A slot for each window: a new one where it begins anew, else that of the window before it."""
        if windows[0].position:
            self.cache.keep(self.slot)
        else:
            self.cache.clear()
            self.slot = -1
        slots = []
        for window in windows:
            if not window.position:
                self.slot = (self.slot + 1) % self._n_slots
            slots.append(self.slot)
        return slots

    def _decode(self, *columns: npt.NDArray[np.int32]) -> Scores:
        """One engine call, or several on the same cache when a window is longer than a batch may be."""
        pieces = []
        for at in range(0, columns[0].size, self._batch_tokens):
            tokens, positions, slots, targets = (column[at : at + self._batch_tokens] for column in columns)
            pieces.append(self.decode(engine.Batch(tokens, positions, slots, targets=targets), self.cache))
        return np.concatenate(pieces, axis=-1)
