"""What attention remembers of its sequences between batches: keys and values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.cache import MAX_POSITION, Read, chosen, span
from engine.errors import CapacityError
from engine.kernels.attention import BLOCK, KEYS
from engine.kernels.state import turn_keys
from engine.kernels.tile import MR

KV_TYPES = {"f32": np.float32, "f16": np.uint16}  # how keys and values are kept


class Rotation(NamedTuple):
    """How a model rotates keys: what a cache must know to move them to other positions."""

    frequencies: NDArray[np.float64]  # (half,) radians per position of each pair
    halves: bool  # pairs are (i, i + half), else (2i, 2i + 1)
    layers: NDArray[np.uint8] | Sequence[bool]  # (L,) whether a layer rotates at all


def kv_bytes(
    n_slots: int, capacity: int, n_layers: int, n_kv_heads: int, head_width: int, kv: str, fleeting: bool
) -> int:
    """Bytes that a `KVCache` of these arguments reserves."""
    cells = n_slots * -(-capacity // BLOCK) * BLOCK
    values = n_kv_heads * (head_width + -(-head_width // MR) * MR) * (1 if fleeting else n_layers)
    return cells * (1 + values * np.dtype(KV_TYPES[kv]).itemsize)


class KVCache:
    """Keys and values of every layer, a slot a sequence, a cell a position.

    Args:
        n_slots: sequences that can be held at once.
        capacity: positions of a slot, rounded up to whole softmax blocks.
        n_layers, n_kv_heads, head_width: of the model.
        kv: `f32`, or `f16`: keys and values are rounded to halves and kept as their uint16 bits.
        fleeting: sequences are whole in one batch and forgotten with it, so that one layer's memory serves
            all layers in turn; what windows of a perplexity need.
        rotation: of the model's keys; without it `shift` and `divide` return False.

    Memory is reserved here and touched when positions are written: 8 bytes (`f16`: 4) per slot, position,
    layer, head and feature; `nbytes` is the reservation.

    A cell is a position until `shift` or `divide` make that impossible: several tokens at one position, or
    one past the capacity. The slot is then packed, its tokens in cells 0, 1, 2 ... in order of their
    positions, and only takes later positions, which follow in the next cells. Attention needs no more than
    the order: a token sees the cells up to its own. `claim` tells the cells.
    """

    def __init__(
        self,
        n_slots: int,
        capacity: int,
        n_layers: int,
        n_kv_heads: int,
        head_width: int,
        kv: str = "f32",
        fleeting: bool = False,
        rotation: Rotation | None = None,
    ) -> None:
        if n_slots < 1 or capacity < 1:
            raise ValueError(f"{n_slots} slots of {capacity} positions; expected at least one of each")
        if kv not in KV_TYPES:
            raise ValueError(f"kv={kv!r}; expected one of {', '.join(KV_TYPES)}")
        self.n_slots, self.capacity = n_slots, -(-capacity // BLOCK) * BLOCK
        padded = -(-head_width // MR) * MR
        self.fleeting = fleeting
        shape = (1 if fleeting else n_layers, n_slots, n_kv_heads, self.capacity)
        self.keys = np.zeros((*shape[:3], self.capacity // KEYS, head_width, KEYS), KV_TYPES[kv])
        self.values = np.zeros((*shape, padded), KV_TYPES[kv])
        self.present = np.zeros((n_slots, self.capacity), np.uint8)
        self._kv, self._n_layers, self._rotation = kv, n_layers, rotation
        self._packed: dict[int, NDArray[np.int32]] = {}  # packed slot -> (C,) positions of its held cells
        self._claimed: tuple[NDArray[Any], NDArray[Any]] | None = None  # slots and cells of a batch

    @property
    def nbytes(self) -> int:
        """Bytes reserved."""
        return self.keys.nbytes + self.values.nbytes + self.present.nbytes

    def length(self, slot: int) -> int:
        """One more than the highest position that the slot holds; 0 when it is empty."""
        positions = self.positions(slot)
        return int(positions[-1]) + 1 if positions.size else 0

    def positions(self, slot: int) -> NDArray[np.int32]:
        """Positions that the slot holds, in rising order; after `divide` several tokens may share one."""
        chosen(slot, self.n_slots)
        return self._held(slot)[1]

    def copy(self, src: int, dst: int, p0: int = 0, p1: int | None = None) -> bool:
        """Replaces positions [p0, p1) of slot `dst` by those of slot `src`; other positions of `dst` stay.

        Raises:
            CapacityError: `dst` was packed, and both are too many tokens for a slot.
        """
        chosen(src, self.n_slots), chosen(dst, self.n_slots)
        p0, p1 = span(p0, p1)
        if src == dst:
            return True
        theirs, positions = self._held(src)
        taken = (positions >= p0) & (positions < p1)
        if self._packed.keys() & {src, dst}:
            own, stay = self._held(dst)
            left = (stay < p0) | (stay >= p1)
            sources = [(dst, own[left]), (src, theirs[taken])]
            self._arrange(dst, sources, np.concatenate([stay[left], positions[taken]]))
            return True
        self.remove(dst, p0, p1)
        if taken.any():
            first, last = int(theirs[taken][0]), int(theirs[taken][-1]) + 1
            self.present[dst, first:last] = self.present[src, first:last]
            self.values[:, dst, :, first:last] = self.values[:, src, :, first:last]
            inner = min(-(-first // KEYS) * KEYS, last), max(last // KEYS * KEYS, first)
            for start, stop in pairwise(sorted({first, *inner, last})):  # whole runs, and what juts out
                runs = slice(start // KEYS, -(-stop // KEYS))
                lanes = slice(start % KEYS, start % KEYS + min(KEYS, stop - start))
                self.keys[:, dst, :, runs, :, lanes] = self.keys[:, src, :, runs, :, lanes]
        return True

    def remove(self, slot: int, p0: int = 0, p1: int | None = None) -> bool:
        """Forgets positions [p0, p1) of the slot, or with -1 of all; later positions keep theirs."""
        p0, p1 = span(p0, p1)
        for each in chosen(slot, self.n_slots, any_=True):
            cells, positions = self._held(each)
            gone = (positions >= p0) & (positions < p1)
            if not gone.any():
                continue
            if each in self._packed:
                self._arrange(each, [(each, cells[~gone])], positions[~gone])
            else:
                self._forget(each, int(cells[gone][0]), int(cells[gone][-1]) + 1)
        return True

    def keep(self, slot: int) -> bool:
        """Forgets every slot but this one."""
        chosen(slot, self.n_slots)
        for other in range(self.n_slots):
            if other != slot:
                self.remove(other)
        return True

    def clear(self) -> bool:
        """Forgets everything."""
        for slot in np.flatnonzero(self.present.any(axis=1)):
            self.remove(int(slot))
        return True

    def shift(self, slot: int, p0: int, p1: int | None, delta: int) -> bool:
        """Adds `delta` to positions [p0, p1) of the slot, or with -1 of all; those below 0 are forgotten.

        Keys are rotated on by the difference: scores agree to 1e-5 with those of tokens decoded there. False
        where the cache does not know the model's rotation.

        Raises:
            ValueError: a position would not fit int32.
        """
        return self._move(slot, p0, p1, lambda positions: positions + delta)

    def divide(self, slot: int, p0: int, p1: int | None, divisor: int) -> bool:
        """Divides positions [p0, p1) of the slot, or with -1 of all, rounding down; otherwise as `shift`.

        Raises:
            ValueError: a divisor below 1.
        """
        if divisor < 1:
            raise ValueError(f"positions divided by {divisor}; expected at least 1")
        return self._move(slot, p0, p1, lambda positions: positions // divisor)

    def claim(self, slots: NDArray[np.int32], positions: NDArray[np.int32]) -> NDArray[np.int32]:
        """Marks cells as held before a batch writes them; the cell of each token, (T,) int32.

        Raises:
            CapacityError: a slot or position that was not allocated.
            ValueError: a position that its slot already holds, or in a packed slot one before its last; in a
                fleeting cache, a sequence that does not begin at position 0 or has a gap.
        """
        cells = self._cells(slots, positions) if self._packed else positions
        if slots.max() >= self.n_slots or cells.max() >= self.capacity:
            raise CapacityError(
                f"slot {slots.max()} or position {cells.max()} lies outside the cache of {self.n_slots} "
                f"slots of {self.capacity} positions; allocate a larger one"
            )
        held = np.flatnonzero(self.present[slots, cells])
        if held.size:
            raise ValueError(
                f"slot {slots[held[0]]} already holds position {positions[held[0]]}; continue behind it, or "
                "remove it before it is decoded again"
            )
        self.present[slots, cells] = 1
        self._claimed = slots, cells
        for slot in self._packed:
            self._packed[slot][cells[slots == slot]] = positions[slots == slot]
        if self.fleeting:
            for slot in np.unique(slots):
                if not self.present[slot, : self.length(slot)].all():
                    self.release()
                    raise ValueError(
                        f"slot {slot}: a fleeting cache takes whole sequences, from position 0 on"
                    )
        return cells

    def release(self) -> None:
        """After a batch: a fleeting cache is empty again, any other keeps what it holds."""
        self._claimed = None
        if self.fleeting:
            self.present[:] = 0

    def cancel(self) -> None:
        """After a batch that failed: its positions are not held; what was held before is as it was."""
        if self._claimed is not None:
            slots, cells = self._claimed
            self.present[slots, cells] = 0
            self.values[:, slots, :, cells] = 0
        self.release()

    def describe(self) -> dict[str, Any]:
        """Kind, type and shapes, for `engine.state_file`."""
        n_kv_heads, width = self.keys.shape[2], self.keys.shape[4]
        shapes = {"layers": self._n_layers, "kv_heads": n_kv_heads, "head_width": width}
        return {"kind": "keys and values", "kv": self._kv, **shapes}

    def dump(self, slots: Sequence[int]) -> tuple[Any, Iterator[NDArray[Any]]]:
        """For each slot the runs [first position, number] that it holds; their keys and values by layer.

        Arrays are (n, G, K), tokens in order of their positions: neither the capacity nor the packing of this
        machine's kernels shows.
        """
        self._refuse_fleeting()
        held = [self._held(slot) for slot in slots]
        arrays = (
            np.ascontiguousarray(array)
            for slot, (cells, _) in zip(slots, held, strict=True)
            if cells.size
            for layer in range(self._n_layers)
            for array in self._tokens(layer, slot, cells)
        )
        return [_runs(positions) for _, positions in held], arrays

    def load(self, slots: Sequence[int], inventory: Any, read: Read) -> None:
        """Puts what `dump` gave into slots, in place of what they held; the number of layers is the same.

        Raises:
            CapacityError: more tokens than a slot takes; nothing was changed.
            ValueError: a fleeting cache, which keeps nothing.
        """
        self._refuse_fleeting()
        held = [
            np.concatenate([np.empty(0, np.int64), *(np.arange(p, p + n) for p, n in runs or [])])
            for runs in inventory
        ]
        for positions in held:
            self._place(positions)
        for slot, positions in zip(slots, held, strict=True):
            self.remove(slot)
            cells = self._note(slot, positions)
            for layer in range(self._n_layers if cells.size else 0):
                shape = (cells.size, self.keys.shape[2], self.keys.shape[4])
                keys, values = (read(shape, self.keys.dtype) for _ in range(2))
                self._write(layer, slot, cells, keys, values)

    def _refuse_fleeting(self) -> None:
        """Raises ValueError in a cache that has nothing to save."""
        if self.fleeting:
            raise ValueError("a fleeting cache keeps no sequences; make one without fleeting=True")

    def _move(
        self, slot: int, p0: int, p1: int | None, moved: Callable[[NDArray[np.int64]], NDArray[np.int64]]
    ) -> bool:
        """Gives positions [p0, p1) those that `moved` makes of them."""
        p0, p1 = span(p0, p1)
        slots = chosen(slot, self.n_slots, any_=True)
        if self._rotation is None:
            return False
        plans = []
        for each in slots:
            cells, old = self._held(each)
            inside = (old >= p0) & (old < p1)
            new = np.where(inside, moved(old.astype(np.int64)), old)
            if new.size and new.max() > MAX_POSITION:
                raise ValueError(f"slot {each}: position {new.max()} does not fit int32")
            if (new != old).any():
                kept = new >= 0
                plans.append((each, cells[kept], new[kept], (new - old)[kept]))
        for each, cells, new, turns in plans:
            self._arrange(each, [(each, cells)], new, turns)
        return True

    def _held(self, slot: int) -> tuple[NDArray[np.intp], NDArray[np.int32]]:
        """Cells that the slot holds, in rising order, and their positions."""
        cells = np.flatnonzero(self.present[slot])
        packed = self._packed.get(slot)
        return cells, cells.astype(np.int32) if packed is None else packed[cells]

    def _cells(self, slots: NDArray[np.int32], positions: NDArray[np.int32]) -> NDArray[np.int32]:
        """Cells of a batch's tokens; those of a packed slot follow its last, in order of their positions."""
        cells = positions.copy()
        for slot in self._packed:
            own = np.flatnonzero(slots == slot)
            last = self.length(slot) - 1
            if own.size and positions[own].min() <= last:
                raise ValueError(
                    f"slot {slot} was shifted or divided and takes positions after {last}; position "
                    f"{positions[own].min()} is not"
                )
            order = own[np.argsort(positions[own], kind="stable")]
            cells[order] = self._held(slot)[0].size + np.arange(own.size)
        return cells

    def _place(self, positions: NDArray[Any]) -> tuple[NDArray[np.intp], bool]:
        """Cells of tokens in order of their positions, and whether these are other than the positions.

        Raises:
            CapacityError: a slot has fewer cells.
        """
        if positions.size > self.capacity:
            raise CapacityError(
                f"{positions.size} tokens for slots of {self.capacity} positions; allocate a larger cache"
            )
        packed = bool((np.diff(positions) == 0).any() or (positions >= self.capacity).any())
        return (np.arange(positions.size) if packed else positions.astype(np.intp)), packed

    def _note(self, slot: int, positions: NDArray[Any]) -> NDArray[np.intp]:
        """Says that a slot holds these positions, in rising order, and nothing else; the cells of each."""
        cells, packed = self._place(positions)
        self._packed.pop(slot, None)
        if packed:
            self._packed[slot] = np.zeros(self.capacity, np.int32)
            self._packed[slot][cells] = positions
        self.present[slot] = 0
        self.present[slot, cells] = 1
        return cells

    def _forget(self, slot: int, first: int, last: int) -> None:
        """Marks cells first <= c < last as not held."""
        self.present[slot, first:last] = 0
        self.values[:, slot, :, first:last] = 0  # a forgotten NaN must not meet the weight 0 of a masked key

    def _arrange(
        self,
        slot: int,
        sources: list[tuple[int, NDArray[np.intp]]],
        positions: NDArray[Any],
        turns: NDArray[Any] | None = None,
    ) -> None:
        """Makes a slot hold the tokens in cells of `sources` at `positions`, keys turned on by `turns`."""
        order = np.argsort(positions, kind="stable")
        before = self._held(slot)[0]
        cells = self._note(slot, positions[order])
        for layer in range(len(self.keys)):
            parts = [self._tokens(layer, *source) for source in sources]
            keys, values = (np.concatenate(arrays)[order] for arrays in zip(*parts, strict=True))
            if turns is not None:
                keys = self._turned(keys, turns[order], layer)
            self.values[layer, slot][:, before] = 0
            self._write(layer, slot, cells, keys, values)

    def _turned(self, keys: NDArray[Any], turns: NDArray[Any], layer: int) -> NDArray[Any]:
        """Keys (n, G, K) of a layer, turned on by `turns` positions."""
        assert self._rotation is not None
        frequencies, halves, layers = self._rotation
        if not layers[layer]:
            return keys
        is_half = self._kv == "f16"
        wide = np.ascontiguousarray(keys.view(np.float16).astype(np.float32) if is_half else keys)
        turn_keys(wide, turns.astype(np.int64), frequencies, halves)
        return wide.astype(np.float16).view(np.uint16) if is_half else wide

    def _tokens(self, layer: int, slot: int, cells: NDArray[np.intp]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Keys and values (n, G, K) of cells in one layer; copies."""
        width = self.keys.shape[4]
        keys = self.keys[layer, slot][:, cells // KEYS, :, cells % KEYS]
        return keys, self.values[layer, slot][:, cells, :width].swapaxes(0, 1)

    def _write(
        self, layer: int, slot: int, cells: NDArray[np.intp], keys: NDArray[Any], values: NDArray[Any]
    ) -> None:
        """Writes keys and values (n, G, K) to cells of one layer."""
        self.keys[layer, slot][:, cells // KEYS, :, cells % KEYS] = keys
        self.values[layer, slot][:, cells, : values.shape[2]] = values.swapaxes(0, 1)


def _runs(positions: NDArray[Any]) -> list[list[int]]:
    """Rising positions as runs [first, number] of neighbours."""
    borders = np.flatnonzero(np.diff(positions) != 1) + 1
    edges = [0, *borders.tolist(), positions.size]
    return [[int(positions[a]), b - a] for a, b in pairwise(edges) if b > a]
