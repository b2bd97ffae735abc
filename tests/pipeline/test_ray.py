"""Laws of the Ray executor: what dies is replaced or given up, and the rest is finished."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from pipeline.cluster import Executor, open_executor
from pipeline.errors import ClusterUnreachable
from pipeline.executor import Task
from pipeline.settings import ClusterSettings, EngineSettings
from pipeline.shards import plan
from tests.pipeline.ray_script import ROOT, script_environment

pytestmark = pytest.mark.ray

FAKE = "tests.pipeline.fake_workers:FakeWorker"


@pytest.fixture
def executor(address: str) -> Iterator[Executor]:
    settings = ClusterSettings(kind="ray", address=address, threads_per_worker=1)
    executor = open_executor(settings, EngineSettings(), FAKE)
    yield executor
    executor.close()


def attempts(folder: Path) -> Counter[int]:
    """Attempts per shard, from the marks that workers left."""
    return Counter(int(path.name.split(".")[0]) for path in folder.iterdir() if path.suffix != ".json")


def run(
    executor: Executor, spec: dict[str, Any], n_shards: int, begins: list[int] | None = None
) -> tuple[list[int], list[Any], list[dict[str, Any]]]:
    """(windows done, failures, what the workers said); a shard a window, all or those of `begins` alone."""
    results: list[Any] = []
    infos = executor.start([spec])  # type: ignore[list-item]
    shards = plan(n_shards, 1, None if begins is None else np.array(begins))
    tasks = [Task(spec, shard) for shard in shards]  # type: ignore[arg-type]
    failures = executor.run(tasks, lambda _, result: results.append(result))
    return sorted(result.shard.first_window for result in results), failures, infos


def test_two_workers_share_the_shards_and_one_warms_up_first(executor: Executor, tmp_path: Path) -> None:
    spec = {"folder": str(tmp_path), "seconds": 0.05, "warm_up_s": 0.5}
    done, failures, infos = run(executor, spec, 12)
    assert (done, failures) == (list(range(12)), [])
    assert set(attempts(tmp_path).values()) == {1}
    assert executor.n_workers == len(infos) == len({info["pid"] for info in infos}) == 2
    first, second = sorted(infos, key=lambda info: info["started"])
    assert first["ready"] <= second["started"], "the second worker started before the first had warmed up"
    assert {entry["pid"] for entry in executor.memory()} == {info["pid"] for info in infos}
    marks = {int(path.suffix[1:]) for path in tmp_path.iterdir()}
    assert marks == {info["pid"] for info in infos}


def test_each_worker_opens_each_file_once_and_none_waits_for_the_other(
    executor: Executor, tmp_path: Path
) -> None:
    specs: list[Any] = [{"folder": str(tmp_path), "file": name, "seconds": 0.05} for name in "ab"]
    executor.start(specs)
    tasks = [Task(spec, shard, spec["file"]) for spec in specs for shard in plan(9, 1)]
    assert executor.run(tasks, lambda *_: None) == []
    turns = Counter(tuple(path.name.split(".")[1:3]) for path in tmp_path.glob("turned.*"))
    assert {file for file, _ in turns} == {"b"}, "all began with the first file"
    assert set(turns.values()) == {1}
    assert len(turns) == 2


def test_documents_go_from_shard_to_shard_in_order(executor: Executor, tmp_path: Path) -> None:
    """A worker that is handed a shard before the state is there raises."""
    spec = {"folder": str(tmp_path), "seconds": 0.02, "faulty": [9]}
    done, failures, _ = run(executor, spec, 13, [0, 4, 5, 8, 12])
    assert done == [0, 1, 2, 3, 4, 5, 6, 7, 8, 12]
    assert [(f.shard.first_window, f.kind, f.attempts) for f in failures] == [
        (9, "error", 1),
        (10, "not reached", 0),
        (11, "not reached", 0),
    ]
    assert "window 9 is wrong" in failures[0].cause


def test_a_killed_worker_loses_no_shard(executor: Executor, tmp_path: Path) -> None:
    killed: list[int] = []

    def kill_one() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not killed:
            for mark in tmp_path.glob("4.*"):
                killed.append(int(mark.suffix[1:]))
                os.kill(killed[0], signal.SIGKILL)
            time.sleep(0.01)

    killer = threading.Thread(target=kill_one)
    killer.start()
    done, failures, _ = run(executor, {"folder": str(tmp_path), "seconds": 0.3}, 12)
    killer.join()
    assert killed
    assert (done, failures) == (list(range(12)), [])
    assert attempts(tmp_path)[4] == 2


def test_poison_is_set_aside_after_three_processes_and_an_exception_at_once(
    executor: Executor, tmp_path: Path
) -> None:
    """And what goes on from it is not reached: window 4 goes on from 3."""
    spec = {"folder": str(tmp_path), "seconds": 0.05, "poison": [3], "faulty": [5]}
    done, failures, _ = run(executor, spec, 10, [0, 1, 2, 3, 5, 6, 7, 8, 9])
    assert done == [0, 1, 2, 6, 7, 8, 9]
    assert [(f.shard.first_window, f.kind, f.attempts) for f in failures] == [
        (3, "killed", 3),
        (4, "not reached", 0),
        (5, "error", 1),
    ]
    assert "ValueError: window 5 is wrong" in failures[2].cause
    assert attempts(tmp_path)[3] == 3
    assert attempts(tmp_path)[5] == 1


def test_a_worker_that_cannot_open_its_model_raises_its_own_error(executor: Executor, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="this model is not for me"):
        executor.start([{"folder": str(tmp_path), "refuses": True}])  # type: ignore[list-item]


@pytest.mark.slow
def test_a_model_that_kills_every_process_is_refused_in_the_end(executor: Executor, tmp_path: Path) -> None:
    with pytest.raises(ClusterUnreachable, match="no worker could be started"):
        executor.start([{"folder": str(tmp_path), "dies_at_start": True}])  # type: ignore[list-item]


def test_a_local_ray_is_silent_and_loopback_only_and_dies_with_its_driver(tmp_path: Path) -> None:
    temp_dir = tempfile.mkdtemp(prefix="pmt", dir="/tmp")  # a driver that is killed leaves its session there
    driver = subprocess.Popen(
        [sys.executable, str(ROOT / "tests/pipeline/local_driver.py"), str(tmp_path)],
        cwd=ROOT,
        env={**script_environment(), "TMPDIR": temp_dir},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        report = json.loads(until(lambda: (tmp_path / "report.json").read_text(), 100))
    finally:
        driver.kill()  # SIGKILL
        said, log = driver.communicate()
        shutil.rmtree(temp_dir, ignore_errors=True)
    assert said == "", "something of Ray reached standard output"
    assert report["done"] == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11], log
    assert report["failures"] == [[5, "killed", 3]]
    assert report["threads"] == ["1"]
    assert report["threads_here"] is None, "the workers' environment stayed in the driver"
    assert len(report["workers"]) == 2
    assert report["listening"]
    assert set(report["listening"]) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    until(lambda: not any(alive(pid) for pid in report["workers"]), 20)


def test_an_address_without_a_cluster_is_refused_in_bounded_time() -> None:
    started = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        executor = open_executor(ClusterSettings(kind="ray", address=address), EngineSettings(), FAKE)
        with pytest.raises(ClusterUnreachable, match="is not the head of a Ray cluster") as refused:
            executor.start([])
    assert refused.value.exit_code == 2
    assert refused.value.hint
    assert time.monotonic() - started < 30


def until(check: Callable[[], Any], timeout_s: float) -> Any:
    """What `check` returns as soon as that is something."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            if found := check():
                return found
        except FileNotFoundError:
            pass
        time.sleep(0.1)
    raise AssertionError(f"not within {timeout_s} s")


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
