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

    Raises:
        ValueError: arrays of different lengths, not one-dimensional, empty, negative positions or slots, or a
            slot and position that occur twice.
    """

    def __init__(
        self,
        tokens: ArrayLike,
        positions: ArrayLike,
        slots: ArrayLike | None = None,
        *,
        targets: ArrayLike | None = None,
        outputs: ArrayLike | None = None,
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
        self.order: NDArray[np.int64] = np.lexsort((self.positions, self.slots))
        cells = np.stack([self.slots, self.positions])[:, self.order]
        twice = np.flatnonzero((cells[:, 1:] == cells[:, :-1]).all(axis=0))
        if twice.size:
            slot, position = cells[:, twice[0]]
            raise ValueError(f"slot {slot} holds position {position} twice in one batch; expected each once")

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
