"""What a model remembers of its sequences: the interface that attention's and recurrent caches share.

A sequence lives in a slot. Positions [p0, p1) are half open; p1 = None means to the end. ANY, -1, in place
of a slot means every sequence. An operation that a cache can do returns True; one that its kind of state does
not allow returns False and changes nothing; a wrong call raises, and changes nothing either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from numpy.typing import DTypeLike, NDArray

from engine.errors import CapacityError

ANY = -1  # in place of a slot: every sequence
MAX_POSITION = 2**31 - 1  # positions are int32

Read = Callable[[tuple[int, ...], DTypeLike], NDArray[Any]]
"""Gives the next array, of a shape and dtype, of a saved state."""


class Cache(Protocol):
    """States of `n_slots` sequences; `engine.state.KVCache` and `engine.recurrent.RecurrentCache`."""

    n_slots: int

    @property
    def nbytes(self) -> int:
        """Bytes reserved; they are touched when states are written."""

    def length(self, slot: int) -> int:
        """One more than the highest position of the slot's sequence; 0 when it is empty."""

    def copy(self, src: int, dst: int, p0: int = 0, p1: int | None = None) -> bool:
        """Replaces positions [p0, p1) of slot `dst` by those of slot `src`; other positions of `dst` stay."""

    def remove(self, slot: int, p0: int = 0, p1: int | None = None) -> bool:
        """Forgets positions [p0, p1) of the slot, or of all; later positions keep theirs."""

    def keep(self, slot: int) -> bool:
        """Forgets every sequence but this one."""

    def shift(self, slot: int, p0: int, p1: int | None, delta: int) -> bool:
        """Adds `delta` to positions [p0, p1) of the slot, or of all."""

    def divide(self, slot: int, p0: int, p1: int | None, divisor: int) -> bool:
        """Divides positions [p0, p1) of the slot, or of all, rounding down."""

    def clear(self) -> bool:
        """Forgets everything."""

    def claim(self, slots: NDArray[Any], positions: NDArray[Any]) -> NDArray[Any]:
        """Makes room for a batch before it is decoded; the cell of every token, int32 (T,).

        Raises:
            CapacityError: slots, positions or states that do not fit.
            ValueError: positions that cannot follow what their slot holds.
        """

    def release(self) -> None:
        """Ends a batch that was decoded."""

    def cancel(self) -> None:
        """Ends a batch that failed after it was claimed: its tokens are not held."""

    def describe(self) -> dict[str, Any]:
        """What two caches must agree on to exchange states, for JSON."""

    def dump(self, slots: Sequence[int]) -> tuple[Any, Iterator[NDArray[Any]]]:
        """An inventory of the slots' states, for JSON, and the arrays that it speaks of."""

    def load(self, slots: Sequence[int], inventory: Any, read: Read) -> None:
        """Puts dumped states into slots, in place of what they held.

        Raises:
            CapacityError: they do not fit; nothing was changed.
        """


def chosen(slot: int, n_slots: int, *, any_: bool = False) -> list[int]:
    """The slots that `slot` means; with `any_`, -1 means all.

    Raises:
        CapacityError: there is no such slot.
    """
    if any_ and slot == ANY:
        return list(range(n_slots))
    if not 0 <= slot < n_slots:
        other = ", or -1 for all" if any_ else ""
        raise CapacityError(f"slot {slot} of {n_slots}; expected 0 to {n_slots - 1}{other}")
    return [slot]


def span(p0: int, p1: int | None) -> tuple[int, int]:
    """Positions [p0, p1) with an end.

    Raises:
        ValueError: they begin before 0, or end before they begin.
    """
    if p0 < 0 or (p1 is not None and p1 < p0):
        raise ValueError(f"positions [{p0}, {p1}); expected 0 <= p0 <= p1")
    return p0, MAX_POSITION + 1 if p1 is None else p1
