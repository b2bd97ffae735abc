"""Times the engine's parts against this machine's own limits, measured in the same process and at the same
time.

    python -m jobs.bench_kernels [MODEL.gguf]        about one minute; `make bench` runs it on SmolLM2

Prints tables to standard error and one JSON object as the last line of standard output. Ratios count:
absolute figures on shared machines swing by a factor of two.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

# before NumPy: the GEMM below is compared thread for thread
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
from rich.console import Console
from rich.table import Table

import engine
from engine.ggml_types import by_name
from engine.kernels.tile import MR, NR
from engine.quants import SUPPORTED, decoder
from engine.weights import Crew, Matrix, Scratch, project

console = Console(stderr=True)


def median_s(call: Callable[[], object], rounds: int) -> float:
    """Median wall seconds of a call, after one that is not counted."""
    call()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def time_open(path: Path) -> dict[str, float]:
    """Milliseconds to open the file: warm, with a cold page cache, in a cold process, by the gguf package."""

    def opened() -> None:
        engine.open(str(path)).close()

    def dropped() -> None:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def process(code: str) -> Callable[[], object]:
        return lambda: subprocess.run([sys.executable, "-c", code], check=True)

    result = {"engine.open, warm": median_s(opened, 20) * 1e3}
    cold = []
    for _ in range(5):
        dropped()
        start = time.perf_counter()
        opened()
        cold.append(time.perf_counter() - start)
    result["engine.open, cold page cache"] = statistics.median(cold) * 1e3
    path.read_bytes()
    result["cold process, import and open"] = (
        median_s(process(f"import engine; engine.open({str(path)!r})"), 5) * 1e3
    )
    result["cold process, Python alone"] = median_s(process("pass"), 5) * 1e3
    try:
        from gguf import GGUFReader
    except ImportError:
        return result
    start = time.perf_counter()
    GGUFReader(path)
    result["gguf.GGUFReader, warm"] = (time.perf_counter() - start) * 1e3
    return result


def time_decoders() -> list[dict[str, Any]]:
    """Decoding speed of every type beside a plain copy of the same output."""
    rows = []
    rng = np.random.default_rng(0)
    out, source = np.empty(1 << 16, np.float32), np.zeros(1 << 16, np.float32)
    for name in sorted(SUPPORTED):
        type_ = by_name(name)
        blocks = out.size // type_.block_size
        data = rng.integers(0, 60, blocks * type_.block_bytes).astype(np.uint8)  # small bytes: finite scales
        data.flags.writeable = False
        decode = decoder(name)
        seconds = median_s(partial(decode, data, 0, blocks, out), 50)
        copy = median_s(partial(np.copyto, out, source), 50)
        rows.append(
            {"type": name, "ns_per_weight": seconds / out.size * 1e9, "copy_ns": copy / out.size * 1e9}
        )
    return rows


def time_gemm(path: Path, n_tokens: int) -> list[dict[str, Any]]:
    """One thread's GFLOP/s on the model's matrices, decoding included, beside the ceiling and OpenBLAS."""
    rows = []
    with engine.open(str(path)) as file:
        for name in ("attn_q", "ffn_up", "ffn_down"):
            tensor = file.tensors[f"blk.0.{name}.weight"]
            weight = Matrix(tensor)
            panels = -(-n_tokens // NR)
            rng = np.random.default_rng(0)
            x = rng.standard_normal((panels, -(-weight.columns // MR) * MR, NR), dtype=np.float32)
            out = np.zeros((panels, -(-weight.rows // MR) * MR, NR), np.float32)
            part = Crew(1, partial(Scratch, [weight.columns], 64)).parts(n_tokens)[0]
            dense = rng.standard_normal((weight.rows, weight.columns), dtype=np.float32)
            flat = rng.standard_normal((weight.columns, n_tokens), dtype=np.float32)
            gflop = 2e-9 * weight.rows * weight.columns * n_tokens
            shares = []
            for _ in range(5):
                before = engine.fma_gflops(1, seconds=0.02)
                ours = gflop / median_s(partial(project, weight, x, out, part), 5)
                ceiling = (before + engine.fma_gflops(1, seconds=0.02)) / 2
                blas = gflop / median_s(partial(np.matmul, dense, flat), 5)
                shares.append((ours / ceiling, ours, blas, ceiling))
            share, ours, blas, ceiling = sorted(shares)[2]
            rows.append(
                {"matrix": f"{name} {weight.rows}x{weight.columns} {tensor.type.name}", "n_tokens": n_tokens,
                 "gflops": ours, "ceiling": ceiling, "share": share, "openblas": blas}
            )  # fmt: skip
    return rows


def show(title: str, rows: list[dict[str, Any]]) -> None:
    table = Table(title=title, title_justify="left")
    for key in rows[0]:
        table.add_column(key, justify="left" if isinstance(rows[0][key], str) else "right")
    for row in rows:
        table.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path, default=os.environ.get("PAGEMILL_TEST_MODEL"))
    model = parser.parse_args().model
    if model is None or not Path(model).is_file():
        parser.error(f"no model file at {model}; name a GGUF file, or run `make bench`")
    opening = time_open(Path(model))
    show("Opening, ms", [{"what": what, "ms": ms} for what, ms in opening.items()])
    decoders = time_decoders()
    show("Decoding, one thread", decoders)
    gemm = [row for n_tokens in (512, 2048) for row in time_gemm(Path(model), n_tokens)]
    show("GEMM with decoding, one thread, GFLOP/s", gemm)
    print(json.dumps({"open_ms": opening, "decoders": decoders, "gemm": gemm}))


if __name__ == "__main__":
    main()
