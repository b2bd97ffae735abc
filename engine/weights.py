"""Weight matrices that stay quantized in the mapping, and the threads that multiply with them."""

from __future__ import annotations

import math
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import UnsupportedModel
from engine.kernels.attention import BLOCK
from engine.kernels.int8 import multiplier
from engine.kernels.logprob import HEAD_ROWS
from engine.kernels.native import (
    DECODE_SIGNATURE,
    DOT_SIGNATURE,
    MULTIPLY8_SIGNATURE,
    PACK_SIGNATURE,
    address_of,
)
from engine.kernels.product import (
    ACC,
    BLOCK_KEYS,
    BLOCK_VALUES,
    CLOCK,
    CLOCKS,
    DOT_1,
    FEW_OUT,
    FEW_STRIPS,
    FEW_X,
    FIELDS,
    MORE_PACKS,
    OFFSET8,
    PACK8,
    PACKS,
    PRODUCT,
    QUANTS8,
    QUERY,
    RUNNING,
    SCORES,
    SHARES8,
    SPARE,
    SUMS,
    WIDTH8,
    WORK_FIELDS,
    Share,
    group_strips,
)
from engine.kernels.tile import FEW, MR, NR, STRIP
from engine.quants import decoder
from engine.quants.dots import dots
from engine.quants.strips import packer
from engine.quants.strips8 import packer8

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from engine.gguf import GGUFFile, Tensor

_LINE = 64  # bytes of a cache line
_PANELS_OF_A_THREAD = 4  # fewer than so many each, and the threads divide weights instead of panels


Fields = NDArray[np.int64]  # a table that kernels read; its names are in engine.kernels.product


class Matrix:
    """A (rows, columns) weight: a view on the mapped file and the kernels of its type; owns only its bias.

    Attributes:
        bias: (rows,) float32, or empty where the file has none.
        fields: (FIELDS,) int64, what kernels know it by (engine.kernels.product); valid while this lives.
    """

    def __init__(
        self, tensor: Tensor, bias: NDArray[np.float32] | None = None, activations: str = "f32"
    ) -> None:
        self.bias = np.empty(0, np.float32) if bias is None else bias
        self.rows, self.columns = tensor.shape
        self._data, self._type = tensor.data, tensor.type.name
        kind, pack = tensor.type, packer(tensor.type.name)
        if pack is not None and self.columns % pack.unit:
            pack = None
        blocks = self.columns // kind.block_size
        self.fields = np.array(
            [
                address_of(pack.kernel, PACK_SIGNATURE) if pack else 0,
                address_of(decoder(kind.name), DECODE_SIGNATURE),
                self._data.ctypes.data,
                self.bias.ctypes.data if self.bias.size else 0,
                self._data.size,
                blocks * kind.block_bytes,
                blocks,
                pack.unit if pack else 1,
                self.rows,
                self.columns,
                *[0] * (FIELDS - DOT_1),
            ],
            np.int64,
        )
        if activations == "int8":
            self._add_int8()

    def _add_int8(self) -> None:
        pack = packer8(self._type)
        if pack is not None and self.columns % pack.unit == 0:
            product = multiplier(pack.group, pack.offset)
            self.fields[PACK8 : OFFSET8 + 1] = (
                address_of(pack.kernel, PACK_SIGNATURE),
                address_of(product, MULTIPLY8_SIGNATURE),
                pack.unit,
                pack.unit_bytes,
                pack.offset,
            )

    def add_dots(self) -> None:
        """Compiles, or loads from disk, what multiplies with few tokens; windows of a text need none."""
        found = None if self.fields[PACK8] else dots(self._type)
        if found is not None and self.columns % found.unit == 0:
            for i, kernel in enumerate(found.kernels):
                self.fields[DOT_1 + i] = address_of(kernel, DOT_SIGNATURE) if kernel else 0


def matrix(file: GGUFFile, name: str, rows: int, columns: int, activations: str = "f32") -> Matrix:
    """The named weight and the bias beside it, their shapes checked."""
    bias = optional_vector(file, f"{name.removesuffix('.weight')}.bias", rows)
    return Matrix(_tensor(file, name, (rows, columns)), bias, activations)


def vector(file: GGUFFile, name: str, size: int) -> NDArray[np.float32]:
    """A private float32 copy of a one-dimensional weight (4 * size bytes; norms and biases)."""
    return table(file, name, size)


def table(file: GGUFFile, name: str, *shape: int) -> NDArray[np.float32]:
    """The same of a small weight of any shape."""
    tensor, size = _tensor(file, name, shape), math.prod(shape)
    out = np.empty(size, np.float32)
    decoder(tensor.type.name)(tensor.data, 0, size // tensor.type.block_size, out)
    return out.reshape(shape)


def optional_vector(file: GGUFFile, name: str, size: int) -> NDArray[np.float32]:
    """The same, empty where the file has no such weight."""
    return vector(file, name, size) if name in file.tensors else np.empty(0, np.float32)


def _tensor(file: GGUFFile, name: str, shape: tuple[int, ...]) -> Tensor:
    tensor = file.tensors.get(name)
    if tensor is None:
        raise UnsupportedModel(f"{file.path}: tensor {name!r} is missing; is the file complete?")
    if tensor.shape != shape:
        raise UnsupportedModel(
            f"{file.path}: tensor {name!r} has shape {tensor.shape}; its metadata asks for {shape}"
        )
    return tensor


def aligned(*shape: int) -> NDArray[np.float32]:
    """Zeros, float32, that begin on a cache line: no vector of a panel or strip lies across two."""
    size = math.prod(shape)
    raw = np.zeros(size + _LINE // 4, np.float32)
    start = -raw.ctypes.data % _LINE // 4
    return raw[start : start + size].reshape(shape)


class Work:
    """Working memory of one thread, allocated once; no size in it depends on the vocabulary.

    Attributes:
        fields: (WORK_FIELDS,) int64, the addresses by which kernels know it (engine.kernels.product).
        clock: (CLOCKS,) int64, ticks spent on each item.
    """

    def __init__(self, depths: Sequence[int], head_width: int, octets: Octets | None = None) -> None:
        self.clock, self._octets = np.zeros(CLOCKS, np.int64), octets
        self._arrays: dict[int, NDArray[Any]] = {SUMS: np.zeros(NR, np.float64), CLOCK: self.clock}
        floats = _work_floats(depths, head_width)
        self._arrays |= {field: aligned(size) for field, size in floats.items()}
        self.fields = np.zeros(WORK_FIELDS, np.int64)
        for field, array in self._arrays.items():
            self.fields[field] = array.ctypes.data
        if octets is not None:
            self.fields[QUANTS8 : WIDTH8 + 1] = (*(a.ctypes.data for a in octets.arrays), octets.width)


def work_bytes(depths: Sequence[int], head_width: int) -> int:
    """Bytes that a `Work` of these arguments allocates."""
    return 4 * sum(_work_floats(depths, head_width).values()) + 8 * (NR + CLOCKS)


class Octets:
    """Activations of a batch in 8 bits, as engine.kernels.int8 has them: quants, scales and sums."""

    def __init__(self, n_panels: int, depths: Sequence[int]) -> None:
        self.width = -(-max(depths) // 32) * 32
        n = n_panels * self.width * NR
        self.arrays = np.zeros(n, np.int8), np.zeros(n // 32, np.float32), np.zeros(n // 16, np.int32)


def octets_bytes(n_panels: int, depths: Sequence[int]) -> int:
    """Bytes that `Octets` of these arguments allocate."""
    return n_panels * -(-max(depths) // 32) * 32 * NR * 11 // 8


def _work_floats(depths: Sequence[int], head_width: int) -> dict[int, int]:
    """Sizes of a work's float32 arrays, by field."""
    packs = STRIP * max(max(group_strips(d), HEAD_ROWS // STRIP, FEW_STRIPS) * d for d in depths)
    padded = -(-head_width // MR) * MR
    return {
        SPARE: STRIP * max(depths),
        PACKS: packs,
        MORE_PACKS: packs,
        PRODUCT: NR * max(HEAD_ROWS, *(group_strips(d) * STRIP for d in depths)),
        FEW_X: FEW * max(*depths, BLOCK),
        FEW_OUT: FEW * max(FEW_STRIPS * STRIP, padded),
        QUERY: head_width * NR,
        BLOCK_KEYS: BLOCK * head_width,
        BLOCK_VALUES: BLOCK * padded,
        SCORES: BLOCK * NR,
        ACC: padded * NR,
        RUNNING: 4 * NR,
        SHARES8: -(-max(depths) // 16) * NR,
    }


class Crew:
    """The threads of one model: each takes its share of a batch through a kernel; all meet at its end.

    Kernels release the GIL, so plain threads run at once.
    """

    def __init__(self, threads: int, make_work: Callable[[], Work]) -> None:
        self.works = [make_work() for _ in range(threads)]
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="engine") if threads > 1 else None

    def clock(self) -> NDArray[np.int64]:
        """Ticks that the threads have spent on each item, all together: (CLOCKS,)."""
        total = np.zeros(CLOCKS, np.int64)
        for work in self.works:
            total += work.clock
        return total

    def shares(self, n_tokens: int) -> list[Share]:
        """What each thread does of a batch of so many tokens."""
        threads, n_panels = len(self.works), -(-n_tokens // NR)
        by_rows = threads > 1 and n_panels < _PANELS_OF_A_THREAD * threads
        borders = [n_panels * i // threads for i in range(threads + 1)]
        return [
            Share(i, threads, by_rows, borders[i], borders[i + 1], n_panels, n_tokens) for i in range(threads)
        ]

    def run(self, call: Callable[[Share, Fields, Fields], object], shares: Sequence[Share]) -> None:
        """call(share, fields of the thread's work, gate) for every share, each in a thread.

        Returns when all are done, and raises what one of them raised, or an interrupt. At the gate, (2,)
        int64, threads meet (engine.kernels.native.meet).
        """
        gate = np.zeros(2, np.int64)
        pairs = [(share, work.fields) for share, work in zip(shares, self.works, strict=True)]
        if self._pool is None:
            call(*pairs[0], gate)
            return
        futures: list[Future[object]] = []
        try:
            futures += [self._pool.submit(call, *pair, gate) for pair in pairs]
            for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                future.result()
        except BaseException:
            gate[1] = 1  # one thread will not come: the others must not wait for it
            wait(futures)
            raise


def tasks(slots: NDArray[np.int32], share: Share) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Runs of at most NR neighbouring tokens of one slot in a thread's share: (starts, counts)."""
    first, last = (0, slots.size) if share.by_rows else (share.first * NR, min(share.last * NR, slots.size))
    starts, counts = [], []
    if first < last:
        borders = np.flatnonzero(np.diff(slots[first:last])) + first + 1
        for begin, end in zip([first, *borders.tolist()], [*borders.tolist(), last], strict=True):
            for start in range(begin, end, NR):
                starts.append(start)
                counts.append(min(NR, end - start))
    return np.array(starts, np.int64), np.array(counts, np.int64)
