"""OpenBLAS beside the engine: a process that multiplies float32 matrices with NumPy when it is told to.

Its number of threads is a matter of its environment, which the engine's own process cannot change any more.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from types import TracebackType


class Blas:
    """A child process whose OpenBLAS runs `threads` threads."""

    def __init__(self, threads: int) -> None:
        names = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "jobs.bench_blas"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **dict.fromkeys(names, str(threads))},
        )

    def seconds(self, rows: int, columns: int, n_tokens: int) -> float:
        """Seconds of one sgemm, (rows, columns) times (columns, n_tokens), the operands in place."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([rows, columns, n_tokens]) + "\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def __enter__(self) -> Blas:
        self.seconds(64, 64, 64)  # imports are over
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate()


def main() -> None:
    """Answers until standard input ends."""
    import numpy as np

    rng = np.random.default_rng(0)
    shape: list[int] = []
    for line in sys.stdin:
        asked = json.loads(line)
        if asked != shape:
            rows, columns, n_tokens = shape = asked
            a, b = (rng.standard_normal(size, np.float32) for size in ((rows, columns), (columns, n_tokens)))
            out = np.zeros((rows, n_tokens), np.float32)
        np.matmul(a, b, out)  # wakes its threads, and brings the operands close
        start = time.perf_counter()
        np.matmul(a, b, out)
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
