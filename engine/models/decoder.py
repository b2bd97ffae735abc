"""What all architectures share: from a batch to scores, around the layers of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import CapacityError
from engine.kernels.logprob import score, write_logits
from engine.kernels.panels import gather_columns
from engine.kernels.product import Share
from engine.kernels.tile import FEW, NR
from engine.weights import Crew, Fields, Matrix

if TYPE_CHECKING:
    from engine.batch import Batch

_PANELS_OF_A_CALL = 8  # up to so many, all layers run in one call; between calls Python hears signals


class Decoder:
    """A model that is loaded; an architecture adds `_run_layers` and what the `Model` protocol asks beside.

    Args:
        head: the output matrix (V, D).
        add_dots: prepares the layers' weights for batches of few tokens (`Matrix.add_dots`).
        normed: (P, >= D, NR) float32 panels in which the layers leave the final norm.
        wide: panels of as many rows at least, free after the layers.
    """

    def __init__(
        self,
        head: Matrix,
        crew: Crew,
        add_dots: Callable[[], None],
        batch_tokens: int,
        normed: NDArray[np.float32],
        wide: NDArray[np.float32],
    ) -> None:
        self.n_vocab, self.batch_tokens = head.rows, batch_tokens
        self._head, self._crew, self._normed, self._wide = head, crew, normed, wide
        self._add_dots, self._has_dots = add_dots, False  # compiled by the first batch of few tokens
        self._top, self._total = (np.zeros((len(normed), NR), np.float64) for _ in range(2))

    def _run_layers(
        self,
        tokens: NDArray[np.int32],
        slots: NDArray[np.int32],
        positions: NDArray[np.int32],
        cells: NDArray[np.int32],
        cache: Any,
    ) -> None:
        """Leaves the final norm of the tokens, in the order `Batch.order`, in the panels `normed`."""
        raise NotImplementedError

    def nll(self, batch: Batch, cache: Any) -> NDArray[np.float64]:
        """-ln p(target) in nats of every target, in the order `batch.scored`: float64 (n_scored,)."""
        rows, targets = batch.scored, batch.wanted
        if rows.size > self.batch_tokens:
            raise CapacityError(
                f"{rows.size} targets in a batch; the model was loaded for {self.batch_tokens}"
            )
        if rows.size and targets.max() >= self.n_vocab:
            raise ValueError(f"target {targets.max()} of a vocabulary of {self.n_vocab}")
        self._forward(batch, cache)
        out = np.empty(rows.size, np.float64)
        if rows.size:
            final, head = self._gathered(batch, rows), self._head.fields

            def call(share: Share, work: Fields, gate: Fields) -> None:
                score(head, final, share, targets, work, self._top, self._total, out)

            self._crew.run(call, self._crew.shares(rows.size))
        return out

    def logits(self, batch: Batch, cache: Any) -> NDArray[np.float32]:
        """Logits of every token marked in `batch.outputs`, in batch order: float32 (n_outputs, V)."""
        rows = np.flatnonzero(batch.outputs)
        self._forward(batch, cache)
        out = np.empty((rows.size, self.n_vocab), np.float32)
        if rows.size:
            final, head = self._gathered(batch, rows), self._head.fields

            def call(share: Share, work: Fields, gate: Fields) -> None:
                write_logits(head, final, share, work, gate, out)

            self._crew.run(call, self._crew.shares(rows.size))
        return out

    def clock(self) -> NDArray[np.int64]:
        """Ticks that threads have spent on each item, all together: (CLOCKS,), see engine.kernels.product."""
        return self._crew.clock()

    def _forward(self, batch: Batch, cache: Any) -> None:
        size = len(batch)
        if size > self.batch_tokens:
            raise CapacityError(f"a batch of {size} tokens; the model was loaded for {self.batch_tokens}")
        tokens = batch.tokens[batch.order]
        if tokens.min() < 0 or tokens.max() >= self.n_vocab:
            raise ValueError(
                f"token ids from {tokens.min()} to {tokens.max()}; expected 0 to {self.n_vocab - 1}"
            )
        if size <= FEW and not self._has_dots:
            self._add_dots()
            self._head.add_dots()
            self._has_dots = True
        slots, positions = batch.slots[batch.order], batch.positions[batch.order]
        cells = cache.claim(slots, positions)
        try:
            self._run_layers(tokens, slots, positions, cells, cache)
        except BaseException:
            cache.cancel()
            raise
        cache.release()

    def _run(self, n_layers: int, shares: list[Share], kernel: Callable[..., None]) -> None:
        """kernel(first layer, last layer, share, work, gate) for all layers, in one call or one by one."""
        step = n_layers if shares[0].n_panels <= _PANELS_OF_A_CALL else 1
        for first in range(0, n_layers, step):

            def call(share: Share, work: Fields, gate: Fields, first: int = first) -> None:
                kernel(first, first + step, share, work, gate)

            self._crew.run(call, shares)

    def _gathered(self, batch: Batch, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """The final norm of the batch's tokens `rows`, side by side in the wide panels."""
        place = np.empty(len(batch), np.int64)
        place[batch.order] = np.arange(len(batch))
        gather_columns(self._normed, place[rows], self._head.columns, self._wide)
        return self._wide
