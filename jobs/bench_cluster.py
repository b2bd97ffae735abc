"""What distribution costs, and what workers share: the real engine on this machine, `cluster=local`.

    python -m jobs.bench_cluster [MODEL.gguf] [--windows 64] [--pairs 5]      half an hour for SmolLM2
    python -m jobs.bench_cluster tests/data/mamba-tiny-q8_0.gguf --windows 64 --window 128 --pairs 3

- cost: runs with two workers in turn with two bare processes that have the engine and the same windows, but
  no Ray, no shards and no files; of each the tokens/s from the first window to the last, and their ratio.
  With an odd number of pairs the ratio's median lies between the smallest and the largest of n with
  probability 1 - 2^(1-n): 94 % of five.
- share: of the workers' time after their first shard, the part within shards (`worker_busy_share`).
- driver: the part of a core that it takes at the pace of those runs; and at 1,000 windows a minute, of two
  workers that only sleep, which a model of this size does not reach on two cores.
- memory: the model's pages and each worker's own memory with 1, 2, 4 and 8 workers.

`jobs.bench_growth` is the part with fake engines. Ends with a JSON object on a line.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import socket
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import pipeline
from pipeline.cluster import open_executor
from pipeline.executor import Task
from pipeline.preflight import Preflight
from pipeline.progress import LineProgress
from pipeline.runtime import environment, worker_env
from pipeline.settings import (
    ClusterSettings,
    DataSettings,
    EngineSettings,
    ModelSettings,
    PathsSettings,
    PerplexitySettings,
    ProtocolSettings,
    TrackingSettings,
)
from pipeline.shards import Shard, plan
from pipeline.worker import EvalWorker, ShardResult, WorkerSpec

N_WORKERS = 2
WORKERS = (1, 2, 4, 8)
MEMORY = ("model_resident_bytes", "model_pss_sum_bytes", "anonymous_bytes_max")
PER_SHARD = 8  # windows of 512 tokens: one batch of the engine


class Watch:
    """A progress that shows nothing: the driver's CPU time from when workers are ready to the last shard."""

    def __init__(self) -> None:
        self.n_windows, self.cpu_s, self.wall_s, self._began = 0, 0.0, 0.0, (0.0, 0.0)

    def start(self, total_windows: int, done_windows: int = 0, **_: Any) -> None:
        self._began = time.process_time(), time.perf_counter()

    def note(self, message: str) -> None:
        pass

    def advance(self, n_windows: int, n_scored: int, nll_sum: float, n_tokens: int) -> None:
        self.n_windows += n_windows
        self.cpu_s = time.process_time() - self._began[0]
        self.wall_s = time.perf_counter() - self._began[1]

    def stop(self) -> None:
        pass


def settings_of(model: Path, n_windows: int, window: int, folder: Path, text: str) -> PerplexitySettings:
    """A run of a local cluster with results in a folder of its own."""
    return PerplexitySettings(
        model=ModelSettings(str(model)),
        data=DataSettings(name="bench", path=text),
        protocol=ProtocolSettings(window=window, limit=n_windows),
        engine=EngineSettings(threads=1),
        cluster=ClusterSettings(kind="local", workers=N_WORKERS, windows_per_shard=PER_SHARD),
        tracking=TrackingSettings(kind="none"),
        paths=PathsSettings(results=str(folder / "results"), cache=str(folder / "cache")),
    )


def distributed(settings: PerplexitySettings) -> tuple[dict[str, Any], Watch]:
    """A run of its own; results are thrown away. Its summary, and what the driver spent."""
    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        done = pipeline.evaluate(replace(settings, paths=replace(settings.paths, results=folder)), watch)
    if done.exit_code:
        raise SystemExit(f"the run ended with {done.exit_code}: {done.summary['error']}")
    return done.summary, watch


def _bare(spec: WorkerSpec, first: int, end: int, pipe: Connection) -> None:
    """A process with the engine and windows [first, end): says when it is ready, then how long it took."""
    worker = EvalWorker(spec)
    windows = [worker.protocol.window(worker.stream.tokens, index) for index in range(first, end)]
    pipe.send("ready")
    pipe.recv()
    began = time.monotonic()
    worker.scorer.scores(windows)
    pipe.send((began, time.monotonic(), sum(int(window.tokens.size) for window in windows)))
    worker.close()


def bare(spec: WorkerSpec, n_windows: int) -> float:
    """Tokens/s of two processes that share the windows, from the first one's start to the last one's end."""
    context, pipes, processes = multiprocessing.get_context("spawn"), [], []
    borders = [n_windows * part // N_WORKERS for part in range(N_WORKERS + 1)]
    with environment(worker_env(spec.engine.threads)):
        for first, end in pairwise(borders):
            ours, theirs = context.Pipe()
            process = context.Process(target=_bare, args=(spec, first, end, theirs))
            process.start()
            pipes.append(ours)
            processes.append(process)
    for pipe in pipes:
        pipe.recv()
    for pipe in pipes:
        pipe.send("go")
    spent = [pipe.recv() for pipe in pipes]
    for process in processes:
        process.join()
    return float(
        sum(n for *_, n in spent) / (max(end for _, end, _ in spent) - min(began for began, *_ in spent))
    )


def cost(settings: PerplexitySettings, n_pairs: int) -> dict[str, Any]:
    """Pairs of a distributed run and bare processes; whoever begins takes turns."""
    with Preflight() as preflight:
        ready = preflight.check(settings)
        spec, n_windows = ready.spec, ready.n_windows
    speeds: list[tuple[float, float]] = []
    shares, cpu = [], []
    for turn in range(n_pairs):
        alone = bare(spec, n_windows) if turn % 2 else 0.0
        summary, watch = distributed(settings)
        alone = alone or bare(spec, n_windows)
        speeds.append((float(summary["tok_per_s"]), alone))
        shares.append(float(summary["worker_busy_share"]))
        cpu.append(watch.cpu_s / watch.wall_s)
        print(
            f"pair {turn + 1}: {speeds[-1][0]:,.1f} tokens/s distributed, {alone:,.1f} bare, "
            f"ratio {speeds[-1][0] / alone:.4f}; {shares[-1]:.2%} of workers' time within shards; "
            f"driver {cpu[-1]:.2%} of a core",
            flush=True,
        )
    ratios = sorted(distributed_ / alone for distributed_, alone in speeds)
    found = {
        "ratio": median(ratios), "ratio_low": ratios[0], "ratio_high": ratios[-1],
        "probability": 1 - 2.0 ** (1 - n_pairs), "worker_busy_share": median(shares),
        "driver_share_of_core": median(cpu),
    }  # fmt: skip
    print(
        f"median ratio {found['ratio']:.4f}, between {ratios[0]:.4f} and {ratios[-1]:.4f} with probability "
        f"{found['probability']:.0%}; workers busy {found['worker_busy_share']:.2%}; driver "
        f"{found['driver_share_of_core']:.2%} of a core",
        flush=True,
    )
    return found


class Sleeper:
    """A worker that computes nothing, in so many seconds a window."""

    def __init__(self, spec: Any) -> None:
        self.seconds = float(spec["seconds"])

    def ready(self) -> dict[str, Any]:
        return {"host": socket.gethostname(), "pid": os.getpid(), "load_s": 0.0, "compile_s": 0.0}

    def turn_to(self, spec: Any) -> None:
        self.seconds = float(spec["seconds"])

    def run(self, shard: Shard) -> ShardResult:
        wall_s, n = self.seconds * shard.n_windows, shard.n_windows
        time.sleep(wall_s)
        worker = f"{socket.gethostname()}:{os.getpid()}"
        return ShardResult(shard, n, 256 * n, 512 * n, 700.0 * n, wall_s, 0.0, 0.0, worker, "", True)

    def memory(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        pass


def driving(seconds: float, per_minute: int = 1000) -> dict[str, float]:
    """The driver's part of a core at a pace, with all that a run does with a result but its files."""
    n_windows = max(2 * N_WORKERS, int(per_minute * seconds / 60))
    spec: Any = {"seconds": 60 / per_minute * N_WORKERS}
    tasks = [Task(spec, shard) for shard in plan(n_windows, ClusterSettings().windows_per_shard)]
    executor = open_executor(
        ClusterSettings(kind="local", workers=N_WORKERS), EngineSettings(), "jobs.bench_cluster:Sleeper"
    )
    progress = LineProgress()
    try:
        executor.start([spec])
        progress.start(n_windows)
        cpu, began = time.process_time(), time.perf_counter()
        executor.run(
            tasks,
            lambda _, got: progress.advance(got.n_windows, got.n_scored, got.nll_sum_nats, got.n_tokens),
        )
        cpu, wall_s = time.process_time() - cpu, time.perf_counter() - began
    finally:
        executor.close()
    found = {"windows_per_minute": 60 * n_windows / wall_s, "driver_share_at_pace": cpu / wall_s}
    print(
        f"driver {found['driver_share_at_pace']:.2%} of a core at {found['windows_per_minute']:,.0f} windows "
        "a minute",
        flush=True,
    )
    return found


def memory(settings: PerplexitySettings, counts: Sequence[int]) -> list[dict[str, Any]]:
    """Memory with so many workers: every one has computed a shard."""
    rows = []
    for n in counts:
        cluster = replace(settings.cluster, workers=n, windows_per_shard=1)
        protocol = replace(settings.protocol, limit=4 * n)
        summary, _ = distributed(replace(settings, cluster=cluster, protocol=protocol))
        rows.append({
            "workers": int(summary["n_workers"]),
            **{key: summary[key] for key in MEMORY},
        })  # fmt: skip
        shown = {key: f"{value / 1e6:,.1f} MB" for key, value in rows[-1].items() if key != "workers"}
        print(
            f"{rows[-1]['workers']} workers: the file's pages {shown['model_resident_bytes']}, their shares "
            f"{shown['model_pss_sum_bytes']} in sum; a worker's own {shown['anonymous_bytes_max']} at most",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path, default=os.environ.get("PAGEMILL_TEST_MODEL"))
    parser.add_argument("--windows", type=int, default=64, help="of a run")
    parser.add_argument("--window", type=int, default=512, help="tokens")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=60.0, help="of the driver at 1,000 windows a minute")
    parser.add_argument("--workers", type=int, nargs="*", default=WORKERS, help="of the part on memory")
    parser.add_argument("--text", default="python:pydoc_data.topics", help="data.path")
    given = parser.parse_args()
    if given.model is None:
        parser.error("give a model, or set PAGEMILL_TEST_MODEL")
    least = 2 * N_WORKERS * PER_SHARD
    if given.pairs and given.windows < least:
        parser.error(
            f"--windows {given.windows}: what is measured begins with a worker's second shard; give {least}"
        )
    logging.basicConfig(level=logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        settings = settings_of(given.model, given.windows, given.window, Path(folder), given.text)
        found: dict[str, Any] = {"model": given.model.name, "n_windows": given.windows}
        if given.pairs:
            found |= cost(settings, given.pairs)
        found |= driving(given.seconds)
        found["memory"] = memory(settings, given.workers)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
