"""Batches in which a token belongs to several sequences, for any model and cache.

    slots 0, 1   The cat sat on the          computed once, under slot 0; then slot 1 gets a copy
    slot 0                          mat .    \\ in the next part, together
    slot 1                          moon .   /

A batch is a forest of prefixes. It is decoded in parts, a part for each depth of branching, and between them
the cache copies what was computed to the other sequences: keys and values of those positions, or the whole
recurrent state. What the slots of a shared token hold before it must be the same: nothing, or copies of one
another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from engine.batch import Batch
from engine.errors import EngineError

if TYPE_CHECKING:
    from engine.cache import Cache


class Decoder(Protocol):
    """What is asked of a model: `engine.model.Model`, with a cache that it made."""

    n_vocab: int
    batch_tokens: int

    def nll(self, batch: Batch, cache: Any) -> NDArray[np.float64]:
        """See `Model.nll`."""

    def logits(self, batch: Batch, cache: Any) -> NDArray[np.float32]:
        """See `Model.logits`."""


class Decoded(NamedTuple):
    """What a batch gave."""

    values: NDArray[Any]  # float64 (n_scored,) in the order of `Batch.scored`, or float32 (n_outputs, V)
    n_tokens_computed: int  # that went through the model
    n_tokens: int  # the same, counted in each sequence that they belong to


class _Part(NamedTuple):
    """Tokens that can be decoded together."""

    tokens: list[int]
    copies: list[tuple[int, int, int]]  # after them: from slot, to slot, from position


def score(model: Decoder, batch: Batch, cache: Cache) -> Decoded:
    """-ln p(target) in nats as `Model.nll`, of batches with shared tokens, and of any size.

    Raises:
        ValueError: slots that share a token without having the same before it; and as `Model.nll`.
        CapacityError: as `Model.nll`, but for the limit of `batch_tokens`. Earlier parts of the batch stay in
            the cache.
    """
    values = np.empty(batch.scored.size, np.float64)
    own = np.cumsum(batch.targets >= 0) - 1  # where a token's own target is in `values`
    more = np.flatnonzero(batch.also[:, 2] >= 0)
    place = np.full(len(batch), -1)

    def decode(rows: NDArray[np.int64]) -> None:
        place[rows] = np.arange(rows.size)
        here = more[place[batch.also[more, 0]] >= 0]
        tokens, _, targets = batch.also[here].T
        plain = Batch(
            batch.tokens[rows],
            batch.positions[rows],
            batch.slots[rows],
            targets=batch.targets[rows],
            also=np.stack([place[tokens], batch.slots[tokens], targets], axis=1),
        )
        n_own = batch.scored.size - more.size
        to = [own[rows[batch.targets[rows] >= 0]], n_own + np.searchsorted(more, here)]
        found = model.nll(plain, cache)
        assert found.size == plain.scored.size, "a model scores Batch.scored"
        values[np.concatenate(to)] = found
        place[rows] = -1

    return _decode(model, batch, cache, decode, values)


def predict(model: Decoder, batch: Batch, cache: Cache) -> Decoded:
    """Logits of every token marked in `batch.outputs` as `Model.logits`; otherwise as `score`."""
    values = np.empty((np.count_nonzero(batch.outputs), model.n_vocab), np.float32)
    row = np.cumsum(batch.outputs) - 1

    def decode(rows: NDArray[np.int64]) -> None:
        outputs = batch.outputs[rows]
        plain = Batch(batch.tokens[rows], batch.positions[rows], batch.slots[rows], outputs=outputs)
        values[row[rows[outputs]]] = model.logits(plain, cache)

    return _decode(model, batch, cache, decode, values)


def _decode(
    model: Decoder,
    batch: Batch,
    cache: Cache,
    decode: Callable[[NDArray[np.int64]], None],
    values: NDArray[Any],
) -> Decoded:
    """Calls `decode` with tokens of `batch`, part by part and no more than the model takes at once."""
    n_computed = 0
    for part in _parts(batch, cache):
        rows = np.array(part.tokens)
        rows = rows[np.lexsort((batch.positions[rows], batch.slots[rows]))]
        for piece in _pieces(rows, np.bincount(batch.scored, minlength=len(batch))[rows], model.batch_tokens):
            decode(piece)
        n_computed += rows.size
        for src, dst, first in part.copies:
            if not (cache.copy(src, dst, first) or cache.copy(src, dst)):
                raise EngineError(f"slot {src} cannot be copied to slot {dst}")
    return Decoded(values, n_computed, len(batch) + batch.n_shared)


def _pieces(rows: NDArray[np.int64], n_targets: NDArray[np.int64], limit: int) -> Iterator[NDArray[np.int64]]:
    """Cuts `rows` so that no piece has more than `limit` tokens, or targets if a token has no more."""
    start, n_scored = 0, 0
    for i, n in enumerate(n_targets.tolist()):
        if i > start and (i - start == limit or n_scored + n > limit):
            yield rows[start:i]
            start, n_scored = i, 0
        n_scored += n
    yield rows[start:]


def _parts(batch: Batch, cache: Cache) -> list[_Part]:
    """The batch in the order in which it can be decoded."""
    if not batch.is_shared:
        return [_Part(list(range(len(batch))), [])]
    owners = [[slot] for slot in batch.slots.tolist()]
    for token, slot, _ in batch.also.tolist():
        if slot not in owners[token]:
            owners[token].append(slot)
    parts: list[_Part] = []
    depth = [0] * len(batch)
    last: dict[int, int] = {}  # slot -> its token so far
    for token in np.argsort(batch.positions, kind="stable").tolist():
        slots, position = owners[token], int(batch.positions[token])
        before = {last.get(slot) for slot in slots}
        if len(before) > 1 or (before == {None} and len({cache.length(slot) for slot in slots}) > 1):
            raise ValueError(
                f"token {token} at position {position} is shared by slots {slots}, which differ before it; "
                "share the tokens before it too, or copy them"
            )
        previous = before.pop()
        is_border = previous is None or owners[previous] != slots
        if previous is not None:
            depth[token] = depth[previous] + is_border
        if depth[token] == len(parts):
            parts.append(_Part([], []))
        parts[depth[token]].tokens.append(token)
        if is_border:
            parts[depth[token]].copies.extend((slots[0], other, position) for other in slots[1:])
        last.update(dict.fromkeys(slots, token))
    return parts
