"""What a recurrent model remembers of its sequences: one state each, however long they are."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.cache import ANY, MAX_POSITION, Read, chosen, span
from engine.errors import CapacityError

EMPTY = -1  # in place of a cell: the slot's sequence has no state yet


class _Claimed(NamedTuple):
    """A slot of the batch in hand, as it was before."""

    slot: int
    cell: int
    length: int
    is_kept: bool  # its state still lies in `cell`, which others share, or it had none


class RecurrentCache:
    """States of sequences in cells, copied on write.

    Args:
        n_slots: sequences that can be held at once.
        n_layers: of the model.
        shapes: of the arrays that a layer keeps of a sequence, for Mamba of its convolution and of its state
            space (engine.kernels.ssm).
        n_cells: different states that can be held at once; as many as slots where it is not given. Sequences
            that were copied and not continued since share a cell.

    `states[i]` is (n_cells, L, *shapes[i]) float32, contiguous: a kernel takes the whole array, the layer and
    the cells that `claim` gave. Memory is reserved here and touched when a cell is first written, so that a
    thousand copies cost what one does; `nbytes` is the reservation.

    A state stands behind its last token: only the next position can follow it, and no part of it can be taken
    back. `copy` and `remove` of a part return False; `shift` and `divide` change nothing but the number that
    the next position is counted from.
    """

    def __init__(
        self, n_slots: int, n_layers: int, shapes: Sequence[tuple[int, ...]], n_cells: int | None = None
    ) -> None:
        n_cells = n_slots if n_cells is None else n_cells
        if n_slots < 1 or n_cells < 1:
            raise ValueError(f"{n_slots} slots and {n_cells} cells; expected at least one of each")
        self.n_slots, self.n_cells = n_slots, n_cells
        self.states = tuple(np.zeros((n_cells, n_layers, *shape), np.float32) for shape in shapes)
        self._cell, self._length = [EMPTY] * n_slots, [0] * n_slots  # of each slot
        self._n_owners = [0] * n_cells
        self._free = list(range(n_cells))  # a heap: cells that were never touched come last
        self._claimed: list[_Claimed] = []

    @property
    def nbytes(self) -> int:
        """Bytes reserved."""
        return sum(state.nbytes for state in self.states)

    @property
    def n_cells_used(self) -> int:
        """Different states that are held now."""
        return self.n_cells - len(self._free)

    def length(self, slot: int) -> int:
        """The position that the slot's sequence goes on at; 0 when it is empty."""
        return self._length[chosen(slot, self.n_slots)[0]]

    def cell(self, slot: int) -> int:
        """Where the slot's state lies, maybe shared; -1 when it is empty."""
        return self._cell[chosen(slot, self.n_slots)[0]]

    def copy(self, src: int, dst: int, p0: int = 0, p1: int | None = None) -> bool:
        """Makes `dst` share the state of `src`, until one of them goes on.

        False where positions [p0, p1) are not all of `src`, or `dst` has others that would have to stay.
        """
        chosen(src, self.n_slots), chosen(dst, self.n_slots)
        p0, p1 = span(p0, p1)
        if src == dst:
            return True
        taken = len(range(p0, min(p1, self._length[src])))
        left = self._length[dst] - len(range(p0, min(p1, self._length[dst])))
        if left == 0 and taken == self._length[src]:
            self._share(src, dst)
            return True
        return taken == 0 and left == self._length[dst]

    def remove(self, slot: int, p0: int = 0, p1: int | None = None) -> bool:
        """Forgets the slot's sequence, or with -1 all; False where positions [p0, p1) are a part of one."""
        p0, p1 = span(p0, p1)
        slots = chosen(slot, self.n_slots, any_=True)
        hit = [each for each in slots if p0 < min(p1, self._length[each])]
        if any(p0 > 0 or p1 < self._length[each] for each in hit):
            return False
        for each in hit:
            self._forget(each)
        return True

    def keep(self, slot: int) -> bool:
        """Forgets every sequence but this one."""
        chosen(slot, self.n_slots)
        for other in range(self.n_slots):
            if other != slot:
                self._forget(other)
        return True

    def clear(self) -> bool:
        """Forgets everything."""
        return self.remove(ANY)

    def shift(self, slot: int, p0: int, p1: int | None, delta: int) -> bool:
        """Adds `delta` to the position that a sequence stands at, where its last token lies in [p0, p1).

        False where that would come to lie below 0.
        """
        return self._move(slot, p0, p1, lambda last: last + delta)

    def divide(self, slot: int, p0: int, p1: int | None, divisor: int) -> bool:
        """Divides the position of a sequence's last token, where it lies in [p0, p1), rounding down.

        Raises:
            ValueError: a divisor below 1.
        """
        if divisor < 1:
            raise ValueError(f"positions divided by {divisor}; expected at least 1")
        return self._move(slot, p0, p1, lambda last: last // divisor)

    def claim(self, slots: NDArray[np.int32], positions: NDArray[np.int32]) -> NDArray[np.int32]:
        """Gives every sequence of a batch a cell of its own; the cell of each token, (T,) int32.

        The state in it is the one to go on from: zeros at the start of a sequence, a copy where the cell was
        shared. All tokens of a slot get the same cell.

        Raises:
            CapacityError: a slot, or more states than cells.
            ValueError: a sequence does not go on, without a gap, where its state stands.
            Nothing was changed then.
        """
        if slots.max() >= self.n_slots:
            raise CapacityError(
                f"slot {slots.max()} lies outside the cache of {self.n_slots} slots; allocate a larger one"
            )
        order = np.lexsort((positions, slots))
        names, starts, counts = np.unique(slots[order], return_index=True, return_counts=True)
        ends = []
        for slot, start, count in zip(names.tolist(), starts.tolist(), counts.tolist(), strict=True):
            stands = self._length[slot]
            given, expected = positions[order[start : start + count]], np.arange(stands, stands + count)
            if not np.array_equal(given, expected):
                at = int(np.flatnonzero(given != expected)[0])
                raise ValueError(
                    f"slot {slot}: position {given[at]} where {expected[at]} was expected; a recurrent state "
                    f"stands at {stands} and takes one position after the other, each once"
                )
            ends.append(stands + count)
        n_owners, fresh = self._n_owners.copy(), []
        for slot in names.tolist():
            cell = self._cell[slot]
            fresh.append(cell == EMPTY or n_owners[cell] > 1)
            if cell != EMPTY and n_owners[cell] > 1:
                n_owners[cell] -= 1
        if sum(fresh) > len(self._free):
            raise CapacityError(
                f"{self.n_cells_used + sum(fresh)} different states in a cache of {self.n_cells} cells; "
                "remove sequences or allocate a larger one"
            )
        self._claimed = []
        for slot, is_fresh, end in zip(names.tolist(), fresh, ends, strict=True):
            before = self._cell[slot]
            self._claimed.append(_Claimed(slot, before, self._length[slot], is_fresh))
            if is_fresh:
                cell = self._take()
                for state in self.states:
                    state[cell] = 0 if before == EMPTY else state[before]
                if before != EMPTY:
                    self._n_owners[before] -= 1
                self._cell[slot] = cell
            self._length[slot] = end
        return np.array(self._cell, np.int32)[slots]

    def release(self) -> None:
        """After a batch that was decoded."""
        self._claimed = []

    def cancel(self) -> None:
        """After a batch that failed: its sequences are as they were, or empty where that is lost.

        A state that nobody shared was written in place: half of it may be of the batch. Whoever must not lose
        it copies its sequence to another slot before.
        """
        written = {cell for _, cell, _, is_kept in self._claimed if not is_kept}
        for slot, cell, length, is_kept in reversed(self._claimed):
            self._forget(slot)
            if is_kept and cell != EMPTY and cell not in written:  # the last who shared it wrote it in place
                self._cell[slot], self._length[slot] = cell, length
                self._n_owners[cell] += 1
        self._claimed = []

    def describe(self) -> dict[str, Any]:
        """Kind and shapes, for `engine.state_file`."""
        return {"kind": "recurrent", "shapes": [list(state.shape[1:]) for state in self.states]}

    def dump(self, slots: Sequence[int]) -> tuple[Any, Iterator[NDArray[Any]]]:
        """For each slot its length and which state it has, or None; then the states, each once."""
        cells = sorted({self._cell[slot] for slot in slots} - {EMPTY})
        place = {EMPTY: EMPTY} | {cell: i for i, cell in enumerate(cells)}
        arrays = (state[cell] for cell in cells for state in self.states)
        inventory = [[self._length[slot], place[self._cell[slot]]] for slot in slots]
        return [entry if entry[0] else None for entry in inventory], arrays

    def load(self, slots: Sequence[int], inventory: Any, read: Read) -> None:
        """Puts what `dump` gave into slots, in place of what they held; shared states are shared again.

        Raises:
            CapacityError: more states than cells; nothing was changed.
        """
        entries = [entry or (0, EMPTY) for entry in inventory]
        n_states = 1 + max((place for _, place in entries), default=EMPTY)
        staying = {self._cell[slot] for slot in range(self.n_slots) if slot not in slots} - {EMPTY}
        if len(staying) + n_states > self.n_cells:
            raise CapacityError(
                f"{len(staying) + n_states} different states in a cache of {self.n_cells} cells; remove "
                "sequences or allocate a larger one"
            )
        for slot in slots:
            self._forget(slot)
        cells = [self._take() for _ in range(n_states)]
        for cell in cells:
            self._n_owners[cell] = 0
            for state in self.states:
                state[cell] = read(state.shape[1:], state.dtype)
        for slot, (length, place) in zip(slots, entries, strict=True):
            if place != EMPTY:
                self._cell[slot], self._length[slot] = cells[place], length
                self._n_owners[cells[place]] += 1

    def _move(self, slot: int, p0: int, p1: int | None, moved: Callable[[int], int]) -> bool:
        """Gives last positions in [p0, p1) those that `moved` makes of them."""
        p0, p1 = span(p0, p1)
        slots = chosen(slot, self.n_slots, any_=True)
        ends = {each: moved(self._length[each] - 1) for each in slots if p0 < self._length[each] <= p1}
        if any(not 0 <= last <= MAX_POSITION for last in ends.values()):
            return False
        for each, last in ends.items():
            self._length[each] = last + 1
        return True

    def _share(self, src: int, dst: int) -> None:
        """Lets `dst` have the cell and the position of `src`."""
        if self._cell[src] != EMPTY:
            self._n_owners[self._cell[src]] += 1
        self._forget(dst)
        self._cell[dst], self._length[dst] = self._cell[src], self._length[src]

    def _forget(self, slot: int) -> None:
        """Empties a slot; a cell that nobody has any more is free."""
        cell = self._cell[slot]
        self._cell[slot], self._length[slot] = EMPTY, 0
        if cell != EMPTY:
            self._n_owners[cell] -= 1
            if self._n_owners[cell] == 0:
                heapq.heappush(self._free, cell)

    def _take(self) -> int:
        """A free cell, now with one owner: the first, for it was touched before."""
        cell = heapq.heappop(self._free)
        self._n_owners[cell] = 1
        return cell
