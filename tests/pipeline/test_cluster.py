"""Laws of executors that need no Ray: the inline one, placement, environment, addresses refused."""

from __future__ import annotations

import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import runtime
from pipeline.cluster import InlineExecutor, RayExecutor, open_executor
from pipeline.errors import ClusterUnreachable
from pipeline.executor import Queue, ShardFailure, Task
from pipeline.settings import ClusterSettings, EngineSettings
from pipeline.shards import Shard, plan

FAKE = "tests.pipeline.fake_workers:FakeWorker"


def inline(spec: dict[str, Any]) -> InlineExecutor:
    executor = open_executor(ClusterSettings(kind="inline"), EngineSettings(), FAKE)
    assert isinstance(executor, InlineExecutor)
    executor.start([spec])  # type: ignore[list-item]
    return executor


def run(
    executor: InlineExecutor, spec: dict[str, Any], shards: list[Shard], results: list[Any]
) -> list[ShardFailure]:
    tasks = [Task(spec, shard) for shard in shards]  # type: ignore[arg-type]
    return executor.run(tasks, lambda _, result: results.append(result))


def test_inline_runs_every_shard_once_in_order(tmp_path: Path) -> None:
    spec = {"folder": str(tmp_path)}
    executor = inline(spec)
    results: list[Any] = []
    assert run(executor, spec, plan(5, 2), results) == []
    assert [result.shard.first_window for result in results] == [0, 2, 4]
    assert executor.memory()[0]["pid"] == os.getpid()
    executor.close()
    executor.close()
    assert executor.memory() == []


def test_inline_sets_an_exception_aside_and_finishes_the_rest(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec = {"folder": str(tmp_path), "faulty": [1]}
    results: list[Any] = []
    (failure,) = run(inline(spec), spec, plan(3, 1), results)
    assert (failure.kind, failure.attempts, failure.cause) == ("error", 1, "ValueError: window 1 is wrong")
    assert [result.shard.first_window for result in results] == [0, 2]
    assert len(list(tmp_path.glob("1.*"))) == 1
    assert "shard 1 is set aside" in caplog.text


def test_inline_hands_on_what_the_worker_raises_at_its_start(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="this model is not for me"):
        inline({"folder": str(tmp_path), "refuses": True})


def test_a_worker_turns_to_the_run_that_a_shard_belongs_to(tmp_path: Path) -> None:
    specs: list[Any] = [{"folder": str(tmp_path), "file": name, "refuses": name == "b"} for name in "abc"]
    executor = inline(specs[0])
    tasks = [Task(spec, shard, spec["file"]) for spec in specs for shard in plan(2, 1)]
    done: list[Task] = []
    failures = executor.run(tasks, lambda task, _: done.append(task))
    assert [task.file for task in done] == ["a", "a", "c", "c"], "a run that cannot be opened stops no other"
    assert [(failure.task.file, failure.kind) for failure in failures] == [("b", "error")] * 2
    turned = [path.name.split(".")[1] for path in tmp_path.glob("turned.*")]
    assert turned.count("c") == 1
    assert "a" not in turned, "it was open from the start"


def test_a_worker_begins_with_the_first_run_that_it_can_open(tmp_path: Path) -> None:
    executor = InlineExecutor(FAKE)
    specs: list[Any] = [{"folder": str(tmp_path), "refuses": True}, {"folder": str(tmp_path)}]
    assert executor.start(specs)[0]["pid"] == os.getpid()
    executor.close()


def test_a_queue_hands_out_a_files_shards_before_the_next_files() -> None:
    def task(file: str, first: int) -> Task:
        return Task({"file": file}, Shard(first, 1), file)  # type: ignore[arg-type]

    tasks = [task("a", 0), task("b", 0), task("a", 1), task("b", 1)]
    queue = Queue(tasks)
    assert [spec["file"] for spec in queue.specs()] == ["a", "b"]  # type: ignore[index]
    assert queue.take("b") is tasks[1], "of the file that the worker has open"
    assert queue.take() is tasks[0]
    queue.put(tasks[0])
    assert [queue.take("c"), queue.take("a")] == [tasks[2], tasks[0]], (
        "what comes back is done last of its file"
    )
    assert len(queue) == 1
    assert queue.take("a") is tasks[3], "of the next file when its own has none"
    assert not queue


def chained(spec: Any, lengths: list[int], per_shard: int) -> list[Task]:
    """Tasks of documents of so many windows."""
    ends = np.cumsum(lengths)
    return [Task(spec, shard, "a") for shard in plan(int(ends[-1]), per_shard, ends - lengths)]


def test_a_queue_hands_a_follower_out_when_the_one_before_is_done_and_first() -> None:
    tasks = chained({}, [3, 1, 1], 1)
    queue = Queue(tasks)
    assert (len(queue), queue.take()) == (3, tasks[0])
    assert queue.tasks() == [tasks[3], tasks[4], tasks[1], tasks[2]]
    queue.put(tasks[0])  # its worker died
    assert [queue.take(), queue.take(), queue.take(), len(queue)] == [tasks[3], tasks[4], tasks[0], 0]
    queue.put(tasks[4])
    queue.done(tasks[0])
    assert (len(queue), queue.take()) == (2, tasks[1])
    queue.done(tasks[1])
    assert [queue.take(), queue.take()] == [tasks[2], tasks[4]]
    assert not queue.tasks()


def test_a_queue_of_what_is_left_of_a_document_begins_anywhere_and_runs_do_not_mix() -> None:
    one, other = {"run": 1}, {"run": 2}
    left = chained(one, [6], 1)[2:4] + chained(other, [6], 1)[3:]
    queue = Queue(left)
    assert [queue.take(), queue.take(), len(queue)] == [left[0], left[2], 0]
    assert queue.failed(left[0]) == [
        ShardFailure(left[1], "not reached", "it goes on from shard 2, which was set aside", 0)
    ]
    assert queue.tasks() == left[3:]


def test_inline_sets_aside_what_follows_a_faulty_shard_and_finishes_the_rest(tmp_path: Path) -> None:
    spec = {"folder": str(tmp_path), "faulty": [2]}
    results: list[Any] = []
    tasks = chained(spec, [1, 5, 1], 1)
    failures = inline(spec).run(tasks, lambda _, result: results.append(result))
    assert [result.shard.first_window for result in results] == [0, 1, 6]
    assert [(failure.shard.first_window, failure.kind) for failure in failures] == [
        (2, "error"),
        (3, "not reached"),
        (4, "not reached"),
        (5, "not reached"),
    ]


def test_inline_lets_an_interrupt_through(tmp_path: Path) -> None:
    spec: Any = {"folder": str(tmp_path)}
    executor = inline(spec)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        executor.run([Task(spec, shard) for shard in plan(3, 1)], interrupt)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("executor", [InlineExecutor(FAKE), RayExecutor(ClusterSettings(), 1, FAKE)])
def test_running_before_starting_is_a_wrong_call(executor: InlineExecutor | RayExecutor) -> None:
    assert executor.memory() == []
    with pytest.raises(RuntimeError, match="before start"):
        executor.run([], lambda *_: None)
    executor.close()


@pytest.mark.parametrize(
    "address", ["127.0.0.1:9", "nowhere", "host:port", "ray://127.0.0.1:10001", ":6379", "[::1]:9"]
)
def test_an_unreachable_cluster_is_refused_without_importing_ray(address: str) -> None:
    had_ray = "ray" in sys.modules
    started = time.monotonic()
    executor = open_executor(ClusterSettings(kind="ray", address=address), EngineSettings(), FAKE)
    with pytest.raises(ClusterUnreachable, match=r"cluster[.]address=") as refused:
        executor.start([])
    executor.close()
    assert refused.value.exit_code == 2
    assert refused.value.hint
    assert address in str(refused.value)
    assert time.monotonic() - started < 10
    assert had_ray or "ray" not in sys.modules


def test_a_cluster_without_an_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ClusterUnreachable, match="needs an address"):
        open_executor(ClusterSettings(kind="ray"), EngineSettings(), FAKE).start([])


def test_local_workers_fill_the_cores_that_are_there() -> None:
    cores = runtime.available_cores()
    assert open_executor(ClusterSettings(), EngineSettings()).n_workers == cores
    assert open_executor(ClusterSettings(threads_per_worker=cores + 1), EngineSettings()).n_workers == 1
    assert open_executor(ClusterSettings(workers=7), EngineSettings()).n_workers == 7


def test_a_quota_of_the_container_limits_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quota = tmp_path / "cpu.max"
    monkeypatch.setattr(runtime, "_CGROUP_QUOTA", quota)
    affinity = len(os.sched_getaffinity(0))
    for text, cores in {"max 100000": affinity, "100000 100000": 1, "50000 100000": 1, "": affinity}.items():
        quota.write_text(text)
        assert runtime.available_cores() == cores


def test_the_workers_environment_does_not_stay_in_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    monkeypatch.setenv("NUMBA_CPU_NAME", "haswell")
    monkeypatch.delenv("NUMBA_NUM_THREADS", raising=False)
    variables = runtime.worker_env(3)
    assert (variables["NUMBA_NUM_THREADS"], variables["OMP_NUM_THREADS"], variables["NUMBA_CPU_NAME"]) == (
        "3",
        "1",
        "haswell",
    )
    with runtime.environment(variables):
        assert os.environ["NUMBA_NUM_THREADS"] == "3"
    assert os.environ["OMP_NUM_THREADS"] == "5"
    assert "NUMBA_NUM_THREADS" not in os.environ


def test_logging_goes_to_standard_error_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    monkeypatch.setattr(root, "handlers", [])
    try:
        runtime.setup_logging()
        runtime.setup_logging()
        logging.getLogger("pipeline.test").info("once")
    finally:
        logging.captureWarnings(False)
        root.handlers[:] = before
        root.setLevel(level)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("once") == 1
