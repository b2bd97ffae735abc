"""What this CPU can do: its vector features, and its limits in arithmetic and in reading, measured now."""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from engine.gguf import GGUFFile


@functools.cache
def cpu_features() -> frozenset[str]:
    """Features that kernels are compiled for: the host's, or those that `NUMBA_CPU_FEATURES` names."""
    import llvmlite.binding as llvm

    named = os.environ.get("NUMBA_CPU_FEATURES")
    listed = llvm.get_host_cpu_features().flatten() if named is None else named
    return frozenset(item[1:] for item in listed.split(",") if item.startswith("+"))


def cpu_name() -> str:
    """LLVM's name of the CPU that kernels are compiled for: the host's, or `NUMBA_CPU_NAME`."""
    import llvmlite.binding as llvm

    return os.environ.get("NUMBA_CPU_NAME") or str(llvm.get_host_cpu_name())


def fma_gflops(threads: int = 1, seconds: float = 0.1) -> float:
    """Ceiling of float32 fused multiply-adds, GFLOP/s over `threads` threads at once, measured now.

    The engine's own register tile on data that stays in the first-level cache; the median of five rounds.
    """
    from engine.kernels.tile import MR, NR, spin

    depth = 64
    flop = 2 * MR * NR * depth

    def operands() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return (
            np.ones((depth, MR), np.float32),
            np.ones((depth, NR), np.float32),
            np.zeros((MR, NR), np.float32),
        )

    spin(*operands(), 1)
    start = time.perf_counter()
    spin(*operands(), 2000)
    repeats = max(1, int(2000 * seconds / (time.perf_counter() - start)))
    rounds = []
    for _ in range(5):
        calls = [functools.partial(spin, *operands(), repeats) for _ in range(threads)]
        rounds.append(threads * repeats * flop / _seconds_at_once(calls) / 1e9)
    return float(np.median(rounds))


def read_gb_per_s(threads: int = 1, n_bytes: int = 256 << 20) -> float:
    """Bandwidth of reading memory, GB/s over `threads` threads at once, measured now.

    NumPy's maximum over bytes, which waits for memory and nothing else (beside it on Zen 4, one thread: 27
    GB/s, a sum of float32 20), over memory that no cache holds; the median of five rounds.

    Args:
        n_bytes: read in a round, all threads together; allocated for as long as this takes.
    """
    parts = [np.ones(max(1, n_bytes // threads), np.uint8) for _ in range(threads)]
    calls = [functools.partial(np.maximum.reduce, part) for part in parts]
    size = sum(part.size for part in parts)
    return float(np.median([size / _seconds_at_once(calls) / 1e9 for _ in range(5)]))


def gemm_gflops(file: GGUFFile, threads: int = 1, n_tokens: int = 512) -> float:
    """GFLOP/s of products with the matrices of a model's first block, decoding them included, measured now.

    The engine's own way from quantized weights to activations of `n_tokens` tokens; the median of five
    rounds.
    """
    from engine.kernels.product import project
    from engine.kernels.tile import NR, STRIP
    from engine.weights import Crew, Matrix, Work, aligned

    tensors = [t for name, t in file.tensors.items() if name.startswith("blk.0.") and len(t.shape) == 2]
    weights = [Matrix(tensor) for tensor in tensors]
    crew = Crew(threads, lambda: Work([weight.columns for weight in weights], STRIP))
    shares, panels = crew.shares(n_tokens), -(-n_tokens // NR)
    x = {w.columns: aligned(panels, -(-w.columns // STRIP) * STRIP, NR) for w in weights}
    out = {w.rows: aligned(panels, -(-w.rows // STRIP) * STRIP, NR) for w in weights}

    def stage(share: Any, work: Any, gate: Any) -> None:
        for weight in weights:
            project(weight.fields, x[weight.columns], out[weight.rows], share, work)

    crew.run(stage, shares)
    gflop = 2e-9 * n_tokens * sum(weight.rows * weight.columns for weight in weights)
    rounds = []
    for _ in range(5):
        start = time.perf_counter()
        crew.run(stage, shares)
        rounds.append(gflop / (time.perf_counter() - start))
    return float(np.median(rounds))


def _seconds_at_once(calls: Sequence[Callable[[], object]]) -> float:
    """Wall seconds until every call, each in a thread of its own, is done."""
    workers = [threading.Thread(target=call) for call in calls]
    start = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return time.perf_counter() - start
