"""A driver with a Ray of its own, for tests that watch it from outside.

Runs twelve shards, of which shard 5 ends every process that tries it, leaves a JSON report, and waits.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import psutil

from pipeline.cluster import open_executor
from pipeline.executor import Task
from pipeline.runtime import setup_logging
from pipeline.settings import ClusterSettings, EngineSettings
from pipeline.shards import plan


def main(folder: Path) -> None:
    setup_logging()
    settings = ClusterSettings(kind="local", workers=2, threads_per_worker=1)
    executor = open_executor(settings, EngineSettings(), "tests.pipeline.fake_workers:FakeWorker")
    try:
        spec: Any = {"folder": str(folder), "seconds": 0.05, "poison": [5]}
        executor.start([spec])
        processes = psutil.Process().children(recursive=True)
        listening = {
            connection.laddr.ip
            for process in processes
            for connection in process.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        }
        results: list[Any] = []
        tasks = [Task(spec, shard) for shard in plan(12, 1)]
        failures = executor.run(tasks, lambda _, result: results.append(result))
        report = {
            "workers": [entry["pid"] for entry in executor.memory()],
            "listening": sorted(listening),
            "done": sorted(result.shard.first_window for result in results),
            "threads": sorted({result.threads for result in results}),
            "failures": [
                (failure.shard.first_window, failure.kind, failure.attempts) for failure in failures
            ],
            "threads_here": os.environ.get("NUMBA_NUM_THREADS"),
        }
        partial = folder / "report.tmp"
        partial.write_text(json.dumps(report))
        partial.rename(folder / "report.json")
        sys.stdin.read()
    finally:
        executor.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
