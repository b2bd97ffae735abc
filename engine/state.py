"""What a model remembers of its sequences between batches."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import CapacityError
from engine.kernels.attention import BLOCK, KEYS
from engine.kernels.tile import MR

KV_TYPES = {"f32": np.float32, "f16": np.uint16}  # how keys and values are kept


class KVCache:
    """Keys and values of every layer, a slot a sequence, a cell a position.

    Args:
        n_slots: sequences that can be held at once.
        capacity: positions of a slot, rounded up to whole softmax blocks.
        n_layers, n_kv_heads, head_width: of the model.
        kv: `f32`, or `f16`: keys and values are rounded to halves and kept as their uint16 bits.
        fleeting: sequences are whole in one batch and forgotten with it, so that one layer's memory serves
            all layers in turn; what windows of a perplexity need.

    Memory is reserved here and touched when positions are written: 8 bytes (`f16`: 4) per slot, position,
    layer, head and feature; `nbytes` is the reservation.
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

    @property
    def nbytes(self) -> int:
        """Bytes reserved."""
        return self.keys.nbytes + self.values.nbytes + self.present.nbytes

    def layer(self, index: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Keys (S, G, C / KEYS, K, KEYS) and values (S, G, C, Kp) of a layer; views."""
        kept = 0 if self.fleeting else index
        return self.keys[kept], self.values[kept]

    def length(self, slot: int) -> int:
        """One more than the highest position that the slot holds; 0 when it is empty."""
        held = np.flatnonzero(self.present[self._checked(slot)])
        return int(held[-1]) + 1 if held.size else 0

    def copy(self, src: int, dst: int, p0: int = 0, p1: int | None = None) -> bool:
        """Replaces positions [p0, p1) of slot `dst` by those of slot `src`; other positions of `dst` stay."""
        self._checked(src), self._checked(dst)
        cells = self._range(p0, p1)
        if src != dst:
            self.present[dst, cells] = self.present[src, cells]
            self.values[:, dst, :, cells] = self.values[:, src, :, cells]
            at = np.arange(cells.start, cells.stop)
            run, lane = at // KEYS, at % KEYS
            self.keys[:, dst, :, run, :, lane] = self.keys[:, src, :, run, :, lane]
        return True

    def remove(self, slot: int, p0: int = 0, p1: int | None = None) -> bool:
        """Forgets positions [p0, p1) of the slot; later positions keep theirs."""
        cells = self._range(p0, p1)
        self.present[self._checked(slot), cells] = 0
        self.values[:, slot, :, cells] = 0  # a forgotten NaN must not meet the weight 0 of a masked key
        return True

    def keep(self, slot: int) -> bool:
        """Forgets every slot but this one."""
        self._checked(slot)
        for other in range(self.n_slots):
            if other != slot and self.present[other].any():
                self.remove(other)
        return True

    def clear(self) -> bool:
        """Forgets everything."""
        for slot in np.flatnonzero(self.present.any(axis=1)):
            self.remove(int(slot), 0, self.length(int(slot)))
        return True

    def claim(self, slots: NDArray[np.int32], positions: NDArray[np.int32]) -> None:
        """Marks cells as held before a batch writes them.

        Raises:
            CapacityError: a slot or position that was not allocated.
            ValueError: a position that its slot already holds; in a fleeting cache, a sequence that does not
                begin at position 0 or has a gap.
        """
        if slots.max() >= self.n_slots or positions.max() >= self.capacity:
            raise CapacityError(
                f"slot {slots.max()} or position {positions.max()} lies outside the cache of {self.n_slots} "
                f"slots of {self.capacity} positions; allocate a larger one"
            )
        held = np.flatnonzero(self.present[slots, positions])
        if held.size:
            raise ValueError(
                f"slot {slots[held[0]]} already holds position {positions[held[0]]}; "
                "remove it before it is decoded again"
            )
        self.present[slots, positions] = 1
        if self.fleeting:
            for slot in np.unique(slots):
                if not self.present[slot, : self.length(slot)].all():
                    self.release()
                    raise ValueError(
                        f"slot {slot}: a fleeting cache takes whole sequences, from position 0 on"
                    )

    def release(self) -> None:
        """After a batch: a fleeting cache is empty again, any other keeps what it holds."""
        if self.fleeting:
            self.present[:] = 0

    def _checked(self, slot: int) -> int:
        if not 0 <= slot < self.n_slots:
            raise CapacityError(f"slot {slot} of {self.n_slots}; expected 0 to {self.n_slots - 1}")
        return slot

    def _range(self, p0: int, p1: int | None) -> slice:
        stop = self.capacity if p1 is None else min(p1, self.capacity)
        if p0 < 0 or stop < p0:
            raise ValueError(f"positions [{p0}, {p1}); expected 0 <= p0 <= p1")
        return slice(p0, stop)
