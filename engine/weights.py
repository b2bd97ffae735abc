"""Weight matrices that stay quantized in the mapping, and the threads that multiply with them."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import UnsupportedModel
from engine.kernels.attention import BLOCK
from engine.kernels.logprob import HEAD_ROWS
from engine.kernels.native import DECODE_SIGNATURE, DOT_SIGNATURE, PACK_SIGNATURE, address_of
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
    PACKS,
    PRODUCT,
    QUERY,
    RUNNING,
    SCORES,
    SPARE,
    SUMS,
    WORK_FIELDS,
    Share,
    group_strips,
)
from engine.kernels.tile import FEW, MR, NR, STRIP
from engine.quants import decoder
from engine.quants.dots import dots
from engine.quants.strips import packer

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

    def __init__(self, tensor: Tensor, bias: NDArray[np.float32] | None = None) -> None:
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

    def add_dots(self) -> None:
        """Compiles, or loads from disk, what multiplies with few tokens; windows of a text need none of it."""
        found = dots(self._type)
        if found is not None and self.columns % found.unit == 0:
            for i, kernel in enumerate(found.kernels):
                self.fields[DOT_1 + i] = address_of(kernel, DOT_SIGNATURE) if kernel else 0


def matrix(file: GGUFFile, name: str, rows: int, columns: int) -> Matrix:
    """The named weight and the bias beside it, their shapes checked."""
    bias = optional_vector(file, f"{name.removesuffix('.weight')}.bias", rows)
    return Matrix(_tensor(file, name, (rows, columns)), bias)


def vector(file: GGUFFile, name: str, size: int) -> NDArray[np.float32]:
    """A private float32 copy of a one-dimensional weight (4 * size bytes; norms and biases)."""
    tensor = _tensor(file, name, (size,))
    out = np.empty(size, np.float32)
    decoder(tensor.type.name)(tensor.data, 0, size // tensor.type.block_size, out)
    return out


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
        nbytes: bytes allocated.
    """

    def __init__(self, depths: Sequence[int], head_width: int) -> None:
        self.clock = np.zeros(CLOCKS, np.int64)
        floats = _work_floats(depths, head_width)
        arrays: dict[int, NDArray[Any]] = {SUMS: np.zeros(NR, np.float64), CLOCK: self.clock}
        arrays |= {field: aligned(size) for field, size in floats.items()}
        self._arrays = [arrays[field] for field in range(WORK_FIELDS)]
        self.fields = np.array([array.ctypes.data for array in self._arrays], np.int64)
        self.nbytes = work_bytes(depths, head_width)


def work_bytes(depths: Sequence[int], head_width: int) -> int:
    """Bytes that a `Work` of these arguments allocates."""
    return 4 * sum(_work_floats(depths, head_width).values()) + 8 * (NR + CLOCKS)


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
    }


class Crew:
    """The threads of one model: each takes its share of a batch through a kernel; all meet at its end.

    Kernels release the GIL, so plain threads run at once.
    """

    def __init__(self, threads: int, make_work: Callable[[], Work]) -> None:
        self.works = [make_work() for _ in range(threads)]
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="engine") if threads > 1 else None

    @property
    def nbytes(self) -> int:
        """Bytes of working memory."""
        return sum(work.nbytes for work in self.works)

    def shares(self, n_tokens: int) -> list[Share]:
        """What each thread does of a batch of so many tokens."""
        threads, n_panels = len(self.works), -(-n_tokens // NR)
        by_rows = threads > 1 and n_panels < _PANELS_OF_A_THREAD * threads
        borders = [n_panels * i // threads for i in range(threads + 1)]
        return [
            Share(i, threads, by_rows, borders[i], borders[i + 1], n_panels, n_tokens) for i in range(threads)
        ]

    def run(self, call: Callable[[Share, Fields], object], shares: Sequence[Share]) -> None:
        """call(share, fields of the thread's work) for every share, each in a thread; returns when all are
        done."""
        pairs = [(share, work.fields) for share, work in zip(shares, self.works, strict=True)]
        if self._pool is None:
            call(*pairs[0])
        else:
            for future in [self._pool.submit(call, *pair) for pair in pairs]:
                future.result()


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
