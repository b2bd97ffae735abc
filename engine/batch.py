"""A ragged batch: tokens of any number of sequences, at any positions, in one call."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


class Batch:
    """Tokens to decode, each with its sequence's cache slot and its position in that sequence.

    Args:
        tokens: (T,) token ids.
        positions: (T,) positions; a token sees the tokens of its slot at positions up to its own, from the
            cache and from this batch. The order of the tokens in the batch does not matter.
        slots: (T,) cache slots; default 0 everywhere.
        targets: (T,) the token id whose likelihood is wanted after this token, -1 where none is (default).
        outputs: (T,) bool, rows of logits that `Model.logits` returns; default none.
        also: (M, 3) rows [token, slot, target]: the batch's token of that index belongs to another slot too,
            where `target` follows it, or -1. With the token's own slot: one more target.

    A token that belongs to several slots is computed once, under its first, for `engine.score` and
    `engine.predict`, which decode one part of such a batch after the other; models take no other than plain
    ones.

    Attributes:
        scored: (n_scored,) int64, the tokens that a likelihood is wanted after: those with a target, in batch
            order, then those of `also`; wanted: (n_scored,) int32, the targets themselves.
        is_shared: whether any token belongs to several slots; n_shared: how many more tokens the batch has
            when each is counted in every slot that it belongs to.

    Raises:
        ValueError: arrays of different lengths, not one-dimensional, empty, negative positions or slots, a
            slot and position that occur twice, or `also` of a token that is not there.
    """

    def __init__(
        self,
        tokens: ArrayLike,
        positions: ArrayLike,
        slots: ArrayLike | None = None,
        *,
        targets: ArrayLike | None = None,
        outputs: ArrayLike | None = None,
        also: ArrayLike | None = None,
    ) -> None:
        self.tokens = _vector("tokens", tokens, np.int32)
        size = self.tokens.size
        self.positions = _vector("positions", positions, np.int32, size)
        self.slots = _vector("slots", np.zeros(size) if slots is None else slots, np.int32, size)
        self.targets = _vector("targets", np.full(size, -1) if targets is None else targets, np.int32, size)
        self.outputs = _vector("outputs", np.zeros(size) if outputs is None else outputs, np.bool_, size)
        if size == 0:
            raise ValueError("tokens: the batch is empty; expected at least one token")
        if self.positions.min() < 0 or self.slots.min() < 0:
            raise ValueError("positions and slots: expected no negative values")
        self.also = _rows("also", also, size)
        others = self.also[self.also[:, 1] != self.slots[self.also[:, 0]]]
        self.is_shared, self.n_shared = others.size > 0, len(others)
        slots = np.concatenate([self.slots, others[:, 1]])
        positions = np.concatenate([self.positions, self.positions[others[:, 0]]])
        order: NDArray[np.int64] = np.lexsort((positions, slots))
        cells = np.stack([slots, positions])[:, order]
        twice = np.flatnonzero((cells[:, 1:] == cells[:, :-1]).all(axis=0))
        if twice.size:
            slot, position = cells[:, twice[0]]
            raise ValueError(f"slot {slot} holds position {position} twice in one batch; expected each once")
        self._order = order
        own, more = np.flatnonzero(self.targets >= 0), self.also[self.also[:, 2] >= 0]
        self.scored: NDArray[np.int64] = np.concatenate([own, more[:, 0]])
        self.wanted: NDArray[np.int32] = np.concatenate([self.targets[own], more[:, 2]])

    @property
    def order(self) -> NDArray[np.int64]:
        """(T,) tokens by slot and position, in which a model decodes them.

        Raises:
            ValueError: tokens of several slots, which no model takes.
        """
        if self.is_shared:
            raise ValueError("tokens belong to several slots; engine.score and engine.predict decode them")
        return self._order

    def __len__(self) -> int:
        return int(self.tokens.size)


def _vector(name: str, values: ArrayLike, dtype: Any, size: int | None = None) -> NDArray[Any]:
    """`values` as a one-dimensional array of `dtype`, checked for shape and for values that do not fit."""
    given = np.asarray(values)
    array = np.ascontiguousarray(given, dtype=dtype)
    if array.ndim != 1 or (size is not None and array.size != size):
        raise ValueError(f"{name}: shape {given.shape}, expected ({'T' if size is None else size},)")
    if given.size and not np.array_equal(array, given):
        raise ValueError(f"{name}: values of {given.dtype} do not fit {np.dtype(dtype).name}")
    return array


def _rows(name: str, values: ArrayLike | None, size: int) -> NDArray[np.int32]:
    """`values` as an (M, 3) int32 array of [token, slot, target], of tokens that are there."""
    given = np.empty((0, 3)) if values is None else np.asarray(values)
    if given.ndim != 2 or given.shape[1] != 3:
        raise ValueError(f"{name}: shape {given.shape}, expected (M, 3)")
    rows = _vector(name, given.ravel(), np.int32).reshape(-1, 3)
    if rows.size and (rows[:, 0].min() < 0 or rows[:, 0].max() >= size or rows[:, 1].min() < 0):
        raise ValueError(f"{name}: expected tokens 0 to {size - 1} and slots of at least 0")
    return rows
