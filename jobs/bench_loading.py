"""Times the ways to load a model (`engine.load`), each in a process of its own, page cache warm and cold.

    python -m jobs.bench_loading [MODEL.gguf] [--rounds 3] [--tokens 512]     two minutes for SmolLM2

A process opens the model, loads the kernels while two tokens go through all layers, as a worker does, and
scores one window. The page cache is made cold by posix_fadvise(DONTNEED), which works while nobody else maps
the file; the memory is that at the end. Prints a table to standard error and one JSON object as the last line
of standard output: medians of the rounds, in which the modes take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import engine
from pipeline.memory import process_memory
from pipeline.settings import LOAD_MODES

TIMES = ("open_s", "ready_s", "window_s", "total_s")
MEMORY = ("rss_mb", "pss_mb", "locked_mb", "anonymous_mb")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path, default=os.environ.get("PAGEMILL_TEST_MODEL"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--one", choices=LOAD_MODES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.model is None or not Path(arguments.model).is_file():
        parser.error("name a GGUF file, or set PAGEMILL_TEST_MODEL (`make model` lays one down)")
    path = Path(arguments.model)
    if arguments.one:
        print(json.dumps(one(path, arguments.one, arguments.tokens)))
        return
    rows = measured(path, arguments.rounds, arguments.tokens)
    table = Table(title=f"loading {path.name}, a window of {arguments.tokens} tokens", title_justify="left")
    for key in rows[0]:
        table.add_column(key, justify="left" if isinstance(rows[0][key], str) else "right")
    for row in rows:
        table.add_row(*(f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(stderr=True, width=110).print(table)
    print(json.dumps({"job": "bench_loading", "model_bytes": path.stat().st_size, "rows": rows}))


def one(path: Path, load: str, n_tokens: int) -> dict[str, float]:
    """Loads and scores in this process: seconds, and megabytes at the end."""
    tokens = np.random.default_rng(0).integers(0, 1000, n_tokens).astype(np.int32)
    targets = [*tokens[1:], -1]
    started = time.perf_counter()
    with engine.open(path, load=load) as file:
        opened = time.perf_counter()
        engine.warm_up(file)
        model = engine.load_model(file)
        ready = time.perf_counter()
        model.nll(engine.Batch(tokens, np.arange(n_tokens), targets=targets), model.new_cache(1, n_tokens))
        done = time.perf_counter()
        memory = process_memory(*file.paths)
    seconds = (opened - started, ready - opened, done - ready, done - started)
    megabytes = (int(memory[f"{key.removesuffix('_mb')}_bytes"]) / 1e6 for key in MEMORY)
    return dict(zip((*TIMES, *MEMORY), (*seconds, *megabytes), strict=True))


def measured(path: Path, n_rounds: int, n_tokens: int) -> list[dict[str, Any]]:
    """Medians of each mode, warm and cold; the first process, which may compile, is not counted."""
    with engine.open(path) as file:
        paths = [Path(part) for part in file.paths]
    in_child(path, "mmap", n_tokens)
    rows = []
    for cache in ("warm", "cold"):
        answers: dict[str, list[dict[str, float]]] = {load: [] for load in LOAD_MODES}
        for _ in range(n_rounds):
            for load, seen in answers.items():
                for part in paths:
                    drop(part) if cache == "cold" else part.read_bytes()
                seen.append({"cached_mb": cached_bytes(path) / 1e6} | in_child(path, load, n_tokens))
        for load, seen in answers.items():
            medians = {key: statistics.median(answer[key] for answer in seen) for key in seen[0]}
            rows.append({"cache": cache, "load": load, **medians})
    return rows


def in_child(path: Path, load: str, n_tokens: int) -> dict[str, float]:
    """`one`, in a fresh process."""
    command = [
        sys.executable,
        "-m",
        "jobs.bench_loading",
        str(path),
        "--one",
        load,
        "--tokens",
        str(n_tokens),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    answer: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return answer


def drop(path: Path) -> None:
    """Takes the file out of the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cached_bytes(path: Path) -> int:
    """Bytes of the model in the page cache."""
    with engine.open(path) as file:
        return file.resident_bytes()


if __name__ == "__main__":
    main()
