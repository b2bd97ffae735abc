"""How the driver grows: planning, memory, scheduling and committing at three sizes each, nothing computed.

    python -m jobs.bench_growth [--sizes 1]     minutes; --sizes 0.01 for a hundredth of everything

The pool and all that stands behind it are the real ones; Ray is replaced by a module of a few lines whose
calls end at once, one at a time, which is the least that a look at all calls can bring. Each size has a
process of its own. Prints a line for each size, and the exponent k of cost ~ size^k over the three: 1 is
proportional.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import math
import multiprocessing
import socket
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from pipeline import events, store
from pipeline.attempts import Attempts
from pipeline.executor import Task
from pipeline.memory import process_memory
from pipeline.placement import Place
from pipeline.ray_pool import Pool
from pipeline.shards import Shard, n_abreast, plan
from pipeline.tables import WINDOWS_SCHEMA, table
from pipeline.worker import ShardResult

WINDOWS = (100_000, 1_000_000, 10_000_000)
PER_SHARD = 40  # ten seconds of a worker at 4 windows a second
WORKERS = (10, 100, 1000)
N_SCHEDULED = 25_000  # shards handed out for each number of workers
COMMITS = (1_000, 4_000, 16_000)
RUN_KEY = "0" * 16


class Spec(SimpleNamespace):
    """What the queue and the pool read of a worker's spec."""

    run_key = RUN_KEY


class _Call:
    """`handle.run.remote(task)` and `handle.ready.options(...).remote(specs)`."""

    def __init__(self, ray: Cluster, answer: Callable[[Any], Any]) -> None:
        self._ray, self._answer = ray, answer

    def options(self, **_: Any) -> _Call:
        return self

    def remote(self, argument: Any) -> int:
        return self._ray.submit(self._answer(argument))


class Cluster:
    """Ray as the pool sees it: nodes of ten workers, calls that have ended when they are looked at.

    Args:
        head: HOST:PORT of something that listens.
    """

    def __init__(self, n_workers: int, head: str) -> None:
        self.places = [Place(f"{number // 10:056}", cpus=(number % 10,)) for number in range(n_workers)]
        self._nodes = [
            {"NodeID": node, "Alive": True} for node in dict.fromkeys(p.node_id for p in self.places)
        ]
        self._head = head
        self._calls: dict[int, Any] = {}
        self._order: deque[int] = deque()
        self._numbers, self._pids = itertools.count(), itertools.count(1)
        self.exceptions = SimpleNamespace(RayError=_Never, RayTaskError=_Never)
        affinity = SimpleNamespace(NodeAffinitySchedulingStrategy=lambda node, soft: node)
        self.util = SimpleNamespace(scheduling_strategies=affinity)

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(gcs_address=self._head)

    def nodes(self) -> list[dict[str, Any]]:
        return self._nodes

    def remote(self, _: type) -> Any:
        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=self._actor))

    def submit(self, answer: Any) -> int:
        number = next(self._numbers)
        self._calls[number] = answer
        self._order.append(number)
        return number

    def wait(self, refs: Sequence[int], num_returns: int, timeout: float) -> tuple[list[int], list[int]]:
        """The one that was called first."""
        if timeout == 0 or not self._order:
            return [], list(refs)
        first = self._order.popleft()
        return [first], [ref for ref in refs if ref != first]

    def get(self, ref: int) -> Any:
        return self._calls.pop(ref)

    def kill(self, handle: Any, no_restart: bool) -> None:
        pass

    def _actor(self, *_: Any) -> Any:
        name = f"host:{next(self._pids)}"

        def info(_: Any) -> dict[str, Any]:
            return {"host": "host", "pid": int(name.partition(":")[2]), "load_s": 0.0, "compile_s": 0.0}

        def result(task: Task) -> ShardResult:
            n = task.shard.n_windows
            return ShardResult(task.shard, n, 256 * n, 512 * n, 700.0 * n, 10.0, 0.0, 0.0, name, "", True)

        return SimpleNamespace(ready=_Call(self, info), run=_Call(self, result))


class _Never(Exception):
    """Nothing fails here."""


def planning(n_windows: int) -> dict[str, float]:
    """From a number of windows to a queue: seconds, and the driver's memory afterwards."""
    before = int(process_memory()["anonymous_bytes"])
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        shards = plan(n_windows, PER_SHARD)
        finished = store.finished_shards(Path(folder), shards, RUN_KEY)
        spec: Any = Spec()
        tasks = [Task(spec, shard) for shard in shards if shard not in finished.paths]
        n_abreast(shards)
        work = Attempts(tasks)
    seconds = time.perf_counter() - started
    n_bytes = int(process_memory()["anonymous_bytes"]) - before
    assert work
    return {"plan_s": seconds, "driver_bytes": n_bytes}


def scheduling(n_workers: int, n_shards: int) -> dict[str, float]:
    """Shards through the pool: seconds, first of all to start, then for each shard."""
    logging.basicConfig(level=logging.INFO, handlers=[logging.NullHandler()], force=True)
    with socket.create_server(("127.0.0.1", 0)) as server:
        ray = Cluster(n_workers, f"127.0.0.1:{server.getsockname()[1]}")
        spec: Any = Spec()
        started = time.perf_counter()
        pool = Pool(ray, "", [spec], 1, None, lambda _: ray.places)
        pool.start()
        start_s = time.perf_counter() - started
        tasks = [Task(spec, shard) for shard in plan(n_shards * PER_SHARD, PER_SHARD)]
        n_done = 0

        def count(task: Task, result: ShardResult) -> None:
            nonlocal n_done
            n_done += 1

        with events.of_runs(tasks):
            began, cpu = time.perf_counter(), time.process_time()
            failures = pool.run(tasks, count)
            seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        assert n_done == n_shards
        assert not failures
    return {
        "start_s": start_s,
        "shard_s": seconds / n_shards,
        "cpu_s_1000_windows": 1000 * cpu / n_shards / PER_SHARD,
    }


def committing(n_shards: int) -> dict[str, float]:
    """Files of shards, written, published and found again: seconds of each in all."""
    shards = plan(n_shards * 4, 4)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        began = time.perf_counter()
        for shard in shards:
            rows = [_row(shard, window) for window in range(shard.first_window, shard.end)]
            meta = store.shard_meta(shard, RUN_KEY)
            assert store.commit(table(rows, WINDOWS_SCHEMA), folder / shard.file_name, meta)
        commit_s = time.perf_counter() - began
        began = time.perf_counter()
        found = store.finished_shards(folder, shards, RUN_KEY)
        find_s = time.perf_counter() - began
        began = time.perf_counter()
        store.read_windows(found.paths)
        read_s = time.perf_counter() - began
    assert len(found.paths) == n_shards
    return {"commit_s": commit_s, "find_s": find_s, "read_s": read_s}


def _row(shard: Shard, window: int) -> dict[str, Any]:
    return {"window": window, "n_scored": 255, "nll_sum_nats": 700.0, "nll_sq_sum": 3000.0, "shard": shard.id}


def exponent(sizes: Sequence[int], costs: Sequence[float]) -> float:
    """k of cost ~ size^k, by least squares of logarithms; NaN where a cost is too small to be measured."""
    if min(costs) <= 0:
        return math.nan
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def measure(scale: float) -> list[dict[str, Any]]:
    """Rows: what, of what size, its costs, and the exponents."""
    context = multiprocessing.get_context("spawn")
    scaled: list[tuple[str, Callable[..., dict[str, float]], list[tuple[int, ...]]]] = [
        ("windows", planning, [(int(n * scale),) for n in WINDOWS]),
        ("workers", scheduling, [(n, max(n, int(N_SCHEDULED * scale))) for n in _workers(scale)]),
        ("shards", committing, [(max(10, int(n * scale)),) for n in COMMITS]),
    ]
    rows: list[dict[str, Any]] = []
    for what, work, calls in scaled:
        costs = []
        for arguments in calls:
            with context.Pool(1) as fresh:
                fresh.apply(work, tuple(min(10, n) for n in arguments))  # imports, first calls
                costs.append(fresh.apply(work, arguments))
            rows.append({"of": what, "size": arguments[0], **costs[-1]})
        sizes = [arguments[0] for arguments in calls]
        fitted = {name: exponent(sizes, [cost[name] for cost in costs]) for name in costs[0]}
        rows.append({"of": what, "size": None, **fitted})
    return rows


def _workers(scale: float) -> list[int]:
    return [max(2, int(n * math.sqrt(scale))) for n in WORKERS]


def lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The rows for people."""
    told = []
    for row in rows:
        costs = {name: value for name, value in row.items() if name not in ("of", "size")}
        if row["size"] is None:
            shown = ", ".join(f"{name} ~ {row['of']}^{value:.2f}" for name, value in costs.items())
            told.append(f"    {shown}")
        else:
            shown = ", ".join(f"{_shown(name, value)}" for name, value in costs.items())
            told.append(f"{row['size']:>12,} {row['of']}: {shown}")
    return told


def _shown(name: str, value: float) -> str:
    if name == "driver_bytes":
        return f"driver {value / 1e6:.0f} MB"
    if name == "shard_s":
        return f"{1 / value:,.0f} shards/s"
    if name == "cpu_s_1000_windows":
        return f"{value / 60:.3%} of a core for 1,000 windows a minute"
    return f"{name} {value:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", type=float, default=1.0, help="part of the full sizes")
    print("\n".join(lines(measure(parser.parse_args().sizes))))


if __name__ == "__main__":
    main()
