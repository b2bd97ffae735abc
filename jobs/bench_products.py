"""Products of the engine against the limits of the process that they run in.

Every figure is taken between two measurements of its ceiling, several times over, and the best of each count:
on a shared machine whoever else runs makes either of them slower, never faster. Weights are blocks of random
small bytes, so that every type can be had in every shape; a product takes the same time whatever they hold.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

import engine
from engine.ggml_types import by_name
from engine.gguf import Tensor
from engine.kernels.int8 import multiplier, quantize_panel
from engine.kernels.product import UNPACK, WAIT, project, spend
from engine.kernels.tile import NR, STRIP
from engine.quants.strips8 import packer8
from engine.weights import Crew, Matrix, Work, aligned
from jobs.bench_blas import Blas

TYPES = ("Q4_1", "Q4_K", "Q6_K", "Q8_0", "Q4_0", "Q2_K", "F16", "F32")
FEW_TOKENS = (1, 2, 4, 8)

_FLOATS = {"F32": "<f4", "F16": "<f2"}
_SETTLE_S = 0.2  # until OpenBLAS's threads have stopped looking for work
_SPIN_S = 0.01  # of each of the five rounds of a ceiling
_READ_BYTES = 64 << 20
_CLOCK = Work([STRIP], STRIP)


def random_tensor(type_name: str, rows: int, columns: int) -> Tensor:
    """A weight of any type, its scales finite and no number of it subnormal."""
    type_, rng = by_name(type_name), np.random.default_rng(0)
    if type_name in _FLOATS:
        data = rng.standard_normal(rows * columns, np.float32).astype(_FLOATS[type_name]).view(np.uint8)
    else:
        n_bytes = rows * columns // type_.block_size * type_.block_bytes
        data = np.resize(rng.integers(4, 60, 999_983, np.uint8), n_bytes)
    data.flags.writeable = False
    return Tensor(type_name, type_, (rows, columns), 0, data.size, data)


def fits(type_name: str, columns: int) -> bool:
    """Whether rows of so many weights are whole blocks."""
    return columns % by_name(type_name).block_size == 0


class Product:
    """Weights of one shape times `n_tokens` tokens, as a model of `threads` threads computes it."""

    def __init__(self, tensors: Sequence[Tensor], n_tokens: int, threads: int) -> None:
        self._weights = [Matrix(tensor) for tensor in tensors]
        for weight in self._weights if n_tokens <= max(FEW_TOKENS) else ():
            weight.add_dots()
        rows, columns = tensors[0].shape
        self.n_weights = sum(weight.rows * weight.columns for weight in self._weights)
        self.n_bytes = sum(tensor.n_bytes for tensor in tensors)
        self.gflop = 2e-9 * self.n_weights * n_tokens
        self._crew = Crew(threads, lambda: Work([columns], STRIP))
        self._shares = self._crew.shares(n_tokens)
        panels = -(-n_tokens // NR)
        self._x = aligned(panels, -(-columns // STRIP) * STRIP, NR)
        self._x[:] = np.random.default_rng(1).standard_normal(self._x.shape, np.float32)
        self._out = aligned(panels, -(-rows // STRIP) * STRIP, NR)
        self()

    def __call__(self) -> None:
        self._crew.run(self._stage, self._shares)

    def ticks(self, item: int) -> int:
        """What the threads' clocks say of an item, all together."""
        return int(sum(work.clock[item] for work in self._crew.works))

    def _stage(self, share: Any, work: Any, gate: Any) -> None:
        for weight in self._weights:
            project(weight.fields, self._x, self._out, share, work)


def seconds(call: Callable[[], object], rounds: int) -> float:
    """Median wall seconds of a call."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return median(times)


def now() -> int:
    """The clock that kernels read, in ticks."""
    return int(spend(_CLOCK.fields, WAIT, 0))


def against_ceiling(call: Callable[[], float], threads: int, rounds: int) -> tuple[float, float, float]:
    """(share, value, ceiling) of a call that returns GFLOP/s: the best of each over the rounds."""
    ceilings, values = [engine.fma_gflops(threads, seconds=_SPIN_S)], []
    for _ in range(rounds):
        values.append(call())
        ceilings.append(engine.fma_gflops(threads, seconds=_SPIN_S))
    value, ceiling = max(values), max(ceilings)
    return value / ceiling, value, ceiling


def gemm(
    types: Sequence[str], shapes: Sequence[tuple[int, int]], tokens: Sequence[int], threads: int
) -> Iterator[dict[str, Any]]:
    """GFLOP/s of products with many tokens, decoding included, beside the ceiling and OpenBLAS's sgemm.

    OpenBLAS multiplies weights that are float32 already.
    """
    with Blas(threads) as blas:
        for n_tokens in tokens:
            for rows, columns in shapes:
                for name in types:
                    if not fits(name, columns):
                        continue
                    product = Product([random_tensor(name, rows, columns)], n_tokens, threads)
                    theirs: list[float] = []

                    def once(product: Product = product, theirs: list[float] = theirs) -> float:
                        value = product.gflop / seconds(product, 3)
                        theirs.append(product.gflop / blas.seconds(rows, columns, n_tokens))  # noqa: B023
                        time.sleep(_SETTLE_S if threads > 1 else 0.0)
                        return value

                    share, value, ceiling = against_ceiling(once, threads, 4)
                    sgemm = max(theirs)
                    yield {
                        "type": name, "matrix": f"{rows}x{columns}", "n_tokens": n_tokens, "threads": threads,
                        "gflops": value, "ceiling": ceiling, "share": share, "openblas": sgemm,
                        "over_openblas": value / sgemm,
                        "flop_per_byte": 1e9 * product.gflop / product.n_bytes,
                    }  # fmt: skip


def unpacking(types: Sequence[str], shape: tuple[int, int]) -> Iterator[dict[str, Any]]:
    """Decoding into strips, one thread, as a product of one panel does it, beside a copy of such floats."""
    source = np.ones(100_000, np.float32)  # a group of strips
    target = np.empty_like(source)
    for name in types:
        if not fits(name, shape[1]):
            continue
        product = Product([random_tensor(name, *shape)], NR, 1)
        times, copies = [], []
        for _ in range(9):
            before, start, began = product.ticks(UNPACK), time.perf_counter(), now()
            product()
            tick_s = (time.perf_counter() - start) / (now() - began)
            times.append((product.ticks(UNPACK) - before) * tick_s)
            copies.append(seconds(lambda: np.copyto(target, source), 9) / source.size)
        spent, copy = median(times) / product.n_weights, median(copies)
        yield {
            "type": name,
            "ns_a_weight": spent * 1e9,
            "gb_per_s": 4e-9 / spent,
            "copy_gb_per_s": 4e-9 / copy,
        }


def few(types: Sequence[str], threads: int, n_bytes: int) -> Iterator[dict[str, Any]]:
    """Products with a few tokens, weights out of memory: bytes and operations beside both limits.

    `share` is of the nearer limit: what the roofline allows at so many operations a byte.
    """
    rows, columns = 6144, 1536
    for name in types:
        one = random_tensor(name, rows, columns)
        data = np.resize(one.data, max(2, n_bytes // one.n_bytes) * one.n_bytes).reshape(-1, one.n_bytes)
        data.flags.writeable = False
        tensors = [Tensor(name, one.type, one.shape, 0, one.n_bytes, part) for part in data]
        for n_tokens in FEW_TOKENS:
            product = Product(tensors, n_tokens, threads)
            tops, times = [limits(threads)], []
            for _ in range(4):
                times.append(seconds(product, 3))
                tops.append(limits(threads))
            spent, (bandwidth, ceiling) = min(times), map(max, zip(*tops, strict=True))
            gflops, read = product.gflop / spent, product.n_bytes / spent / 1e9
            share = max(gflops / ceiling, read / bandwidth)
            yield {
                "type": name, "n_tokens": n_tokens, "threads": threads,
                "ns_a_weight": threads * spent / product.n_weights * 1e9, "gb_per_s": read,
                "read_gb_per_s": bandwidth, "gflops": gflops, "ceiling": ceiling,
                "read_share": read / bandwidth, "fma_share": gflops / ceiling, "share": share,
                "flop_per_byte": 1e9 * product.gflop / product.n_bytes,
            }  # fmt: skip


def limits(threads: int) -> tuple[float, float]:
    """GB/s of reading memory, GFLOP/s of multiply-adds."""
    return engine.read_gb_per_s(threads, _READ_BYTES), engine.fma_gflops(threads, seconds=_SPIN_S)


class Product8:
    """A weight packed as bytes times a batch of quantized activations, one thread, packing included."""

    def __init__(self, tensor: Tensor, n_tokens: int) -> None:
        rows, self._depth = tensor.shape
        packer = packer8(tensor.type.name)
        assert packer is not None, f"{tensor.type.name} has no strips of bytes"
        self._packer, self._data = packer, tensor.data
        self._row_bytes, self._n_units = tensor.n_bytes // rows, self._depth // packer.unit
        self.gflop = 2e-9 * rows * self._depth * n_tokens
        self.n_bytes, self._groups = tensor.n_bytes, range(0, rows // STRIP, 8)
        strip_bytes = self._n_units * packer.unit_bytes
        self._strips = np.zeros(8 * strip_bytes, np.uint8)
        self._at = [self._strips.ctypes.data + i * strip_bytes for i in range(8)]
        x = np.random.default_rng(1).standard_normal((self._depth, NR), np.float32)
        self._panels = [self._quantized(x) for _ in range(n_tokens // NR)]
        self._shares = np.zeros((self._depth // packer.group, NR), np.int32)
        self._out = aligned(rows, NR)
        self()

    def _quantized(self, x: NDArray[np.float32]) -> list[NDArray[Any]]:
        depth = self._depth
        shapes = [((depth // 4, NR, 4), "i1"), ((depth // 32, NR), "f4"), ((depth // 16, NR), "i4")]
        arrays = [np.zeros(shape, kind) for shape, kind in shapes]
        quantize_panel(x.ctypes.data, depth, NR, *(array.ctypes.data for array in arrays))
        return arrays

    def __call__(self) -> None:
        p, first = self._packer, self._data.ctypes.data
        multiply = multiplier(p.group, p.offset)
        for group in self._groups:
            for i, at in enumerate(self._at):
                row = (group + i) * STRIP
                p.kernel(first + row * self._row_bytes, self._row_bytes, self._n_units, at)
            for quants, scales, sums in self._panels:
                multiply(
                    self._at[0], 8, quants.ctypes.data, scales.ctypes.data, sums.ctypes.data, self._depth,
                    p.offset, NR, self._out.ctypes.data + group * STRIP * NR * 4, self._shares.ctypes.data,
                )  # fmt: skip


def int8(types: Sequence[str], n_tokens: int = 480) -> Iterator[dict[str, Any]]:
    """Products with 8-bit activations, packing included, beside the ceiling of float32; one thread."""
    for name in types:
        if packer8(name) is None:
            continue
        product = Product8(random_tensor(name, 1536, 1536), n_tokens)
        share, value, ceiling = against_ceiling(lambda p=product: p.gflop / seconds(p, 3), 1, 4)  # type: ignore[misc]
        yield {
            "type": name, "n_tokens": n_tokens, "gop_per_s": value, "f32_ceiling": ceiling, "over_f32": share,
            "flop_per_byte": 1e9 * product.gflop / product.n_bytes,
        }  # fmt: skip
