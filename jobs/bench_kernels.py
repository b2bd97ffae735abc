"""Times the engine's kernels against this machine's own limits, measured in the same process and at the same
time.

    python -m jobs.bench_kernels [MODEL.gguf] [--all] [--threads 2] [--only PART] [--json FILE]

Two minutes (`make bench`); with `--all`, every type in every shape and by every number of threads, less than
ten (`make bench-full`).
Prints tables to standard error and one JSON object as the last line of standard output. Ratios count:
absolute figures on shared machines swing by a factor of two. The parts:

    opening     the file: warm, cold, in a cold process, by the gguf package
    gemm        products with many tokens, decoding included, beside the ceiling and OpenBLAS
    unpacking   decoding into strips, beside a copy
    few         products with one to eight tokens, weights out of memory, beside both limits
    int8        products with 8-bit activations, packing included, beside the ceiling of float32
    passes      the whole forward pass by item, for windows of 512 and more
    growth      the cost of a token in longer and longer corpora
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

# before NumPy: nothing here may multiply with more threads than it says
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from rich.console import Console
from rich.table import Table

import engine
from jobs import bench_pass, bench_products
from pipeline import provenance
from pipeline.bench.limits import case_of, vector_features

SHAPES = ((1536, 576), (576, 1536))
PARTS = ("opening", "gemm", "unpacking", "few", "int8", "passes", "growth")
Rows = list[dict[str, Any]]
console = Console(stderr=True, width=None if sys.stderr.isatty() else 120)


def opening(path: Path) -> Rows:
    """Milliseconds to open the file: warm, with a cold page cache, in a cold process, by the gguf package."""

    def opened() -> None:
        engine.open(str(path)).close()

    def dropped() -> None:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def process(code: str) -> Callable[[], object]:
        return lambda: subprocess.run([sys.executable, "-c", code], check=True)

    cold = []
    for _ in range(5):
        dropped()
        cold.append(bench_products.seconds(opened, 1))
    path.read_bytes()
    imported = f"import engine; engine.open({str(path)!r})"
    found = {
        "engine.open, warm": bench_products.seconds(opened, 20),
        "engine.open, cold page cache": statistics.median(cold),
        "cold process, import and open": bench_products.seconds(process(imported), 5),
        "cold process, Python alone": bench_products.seconds(process("pass"), 5),
    }
    try:
        from gguf import GGUFReader
    except ImportError:
        return [{"what": what, "ms": spent * 1e3} for what, spent in found.items()]
    start = time.perf_counter()
    GGUFReader(path)
    found["gguf.GGUFReader, warm"] = time.perf_counter() - start
    return [{"what": what, "ms": spent * 1e3} for what, spent in found.items()]


def gemm(types: tuple[str, ...], threads: int, everything: bool) -> Rows:
    """Every type with 512 tokens on one thread; the first also with 2,048, and on all threads."""
    some = types if everything else types[:1]
    plans: list[tuple[tuple[str, ...], tuple[int, ...], int]] = [(types, (512,), 1), (some, (2048,), 1)]
    plans += [(some, (512, 2048), threads)] if threads > 1 else []
    shapes = ((192, 576), (576, 576), *SHAPES, (2048, 2048)) if everything else SHAPES
    rows: Rows = []
    for names, tokens, n in plans:
        rows += bench_products.gemm(names, shapes, tokens, n)
    return rows


def few(types: tuple[str, ...], threads: int, everything: bool) -> Rows:
    """Every type on one thread; with `--all` on all threads too."""
    counts = (1, threads) if everything and threads > 1 else (1,)
    return [row for n in counts for row in bench_products.few(types, n, 96 << 20)]


def passes(path: Path, threads: int, everything: bool) -> Rows:
    """Profiles of whole passes: (window, tokens of a batch, rounds)."""
    plans = [(512, 4096, 2), (2048, 4096, 1)]
    if everything:
        plans = [(512, 4096, 5), (2048, 4096, 3), (8192, 8192, 1)]
    return [bench_pass.profile(path, threads, *plan) for plan in plans]


def show(title: str, rows: Iterable[dict[str, Any]]) -> None:
    """A table on standard error."""
    rows = list(rows)
    if not rows:
        return
    hidden = ("flop_per_byte",)  # for the figure
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for key, value in rows[0].items():
        if key not in hidden:
            name = key.replace("_", " ").replace("gflops", "GFLOP/s").replace("gb per s", "GB/s")
            table.add_column(name, justify="left" if isinstance(value, str) else "right")
    for row in rows:
        table.add_row(*(_shown(value) for key, value in row.items() if key not in hidden))
    console.print(table)


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return "" if value is None else str(value)


def run(model: Path, parts: tuple[str, ...], threads: int, everything: bool) -> dict[str, Any]:
    """The parts, shown as they are done; returns the JSON object."""
    types, features = bench_products.TYPES, vector_features()
    bandwidth, ceiling = bench_products.limits(threads)
    counts = (1, 4, 16) if everything else (1, 4)
    measures: dict[str, tuple[str, Callable[[], Iterable[dict[str, Any]]]]] = {
        "opening": ("Opening, ms", lambda: opening(model)),
        "gemm": ("GEMM with decoding, GFLOP/s", lambda: gemm(types, threads, everything)),
        "unpacking": ("Decoding into strips, one thread", lambda: bench_products.unpacking(types, SHAPES[1])),
        "few": ("A few tokens, weights out of memory", lambda: few(types, threads, everything)),
        "int8": ("8-bit activations, one thread, 1e9 operations/s", lambda: bench_products.int8(types)),
        "passes": ("", lambda: passes(model, threads, everything)),
        "growth": ("Cost of a token, windows of 128", lambda: bench_pass.growth(model, threads, counts)),
    }
    result: dict[str, Any] = {
        "job": "bench_kernels", "model": model.name, "cpu": provenance.cpu_model(), "features": features,
        "case": case_of(features), "threads": threads, "version": provenance.version(),
        "measured_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "fma_gflops": ceiling, "read_gb_per_s": bandwidth,
    }  # fmt: skip
    for part in parts:
        title, measure = measures[part]
        start = time.perf_counter()
        result[part] = list(measure())
        if part == "passes":
            for done in result[part]:
                show(_told(done), done["items"])
        else:
            show(title, result[part])
        console.print(f"{part}: {time.perf_counter() - start:.0f} s")
    return result


def _told(done: dict[str, Any]) -> str:
    return (
        f"Windows of {done['window']:,} tokens, {done['n_tokens']:,} a batch, {done['threads']} threads: "
        f"{done['tok_per_s']:.0f} tokens/s, {done['fma_share']:.0%} of {done['fma_gflops']:.0f} GFLOP/s; "
        "shares of wall time times threads"
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path, default=os.environ.get("PAGEMILL_TEST_MODEL"))
    parser.add_argument("--all", action="store_true", help="everything: ten minutes")
    parser.add_argument("--threads", type=int, default=min(2, len(os.sched_getaffinity(0))))
    parser.add_argument("--only", choices=PARTS, action="append", help="a part; several with several --only")
    parser.add_argument("--json", type=Path, help="write the JSON object to this file too")
    given = parser.parse_args()
    if given.model is None or not Path(given.model).is_file():
        parser.error(f"no model file at {given.model}; name a GGUF file, or run `make bench`")
    cores = len(os.sched_getaffinity(0))
    if not 1 <= given.threads <= cores:
        parser.error(f"--threads {given.threads}: expected 1 to {cores}, the cores here")
    parts = tuple(part for part in PARTS if part in (given.only or PARTS))
    line = json.dumps(run(Path(given.model), parts, given.threads, given.all))
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(line + "\n", encoding="utf-8")
    print(line)


if __name__ == "__main__":
    main()
