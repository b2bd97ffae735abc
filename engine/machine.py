"""What this CPU can do: its vector features, and its fused multiply-add ceiling measured now."""

from __future__ import annotations

import functools
import os
import threading
import time

import numpy as np


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
        workers = [threading.Thread(target=spin, args=(*operands(), repeats)) for _ in range(threads)]
        start = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        rounds.append(threads * repeats * flop / (time.perf_counter() - start) / 1e9)
    return float(np.median(rounds))
