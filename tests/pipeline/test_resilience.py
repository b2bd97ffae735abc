"""Nothing lost, nothing twice: whatever dies, hangs or crawls, the bits are those of an undisturbed run.

The real engine on a tiny model, its workers slowed so that there is a middle to be hit in, until what is
looked for has been seen. Times of detection and recovery are printed at the end (`-s`); the bounds asserted
are generous, for machines are busy.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
from make_gguf import tiny_llama

from pipeline import attempts, evaluate, perplexity, ray_pool
from pipeline.errors import RefusedError
from pipeline.settings import ClusterSettings
from tests.pipeline.ray_script import ROOT, script_environment
from tests.pipeline.slow_workers import prepare, settings_of, slow_executor

pytestmark = pytest.mark.ray

TEXT = "The quick brown fox jumps over the lazy dog, and — as ever — nobody asks why. " * 12
NODE = {"num_cpus": 2, "object_store_memory": 80 << 20}
HEAD = {**NODE, "include_dashboard": False}
TIMES: dict[str, list[float]] = defaultdict(list)
"""Seconds, by what they are of."""


@pytest.fixture(scope="module", autouse=True)
def medians() -> Iterator[None]:
    """Prints what was measured."""
    yield
    for what, seconds in sorted(TIMES.items()):
        print(f"\n{what}: median {statistics.median(seconds):.2f} s of {len(seconds)}", end="")  # noqa: T201


@pytest.fixture(scope="module")
def head() -> Iterator[Any]:
    """A cluster in processes of this one, whose head has two CPUs, and which nodes can join and leave."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        cluster = Cluster(initialize_head=True, head_node_args=HEAD)
    yield cluster
    cluster.shutdown()


class Run:
    """A run to be disturbed, and the undisturbed one's digest."""

    def __init__(self, folder: Path, address: str) -> None:
        self.folder, self.address = folder, address
        tiny_llama(folder / "tiny.gguf", type_name="Q4_1")
        (folder / "t.txt").write_text(TEXT)
        prepare(folder, seconds=0)
        self.whole = evaluate(settings_of(folder, "whole", ClusterSettings("inline"))).summary
        for mark in (folder / "cache" / "marks").iterdir():
            mark.unlink()  # this process's own

    def settings(self, kind: str = "ray") -> Any:
        address = self.address if kind == "ray" else None
        cluster = ClusterSettings(kind, windows_per_shard=1, threads_per_worker=1, address=address)
        return settings_of(self.folder, "results", cluster)

    def disturbed(self, act: Callable[[], None], kind: str = "ray") -> dict[str, Any]:
        """The summary of a run, in a thread, during which `act` is called; what it leaves is done fast."""
        ended: list[Any] = []

        def evaluating() -> None:
            try:
                ended.append(evaluate(self.settings(kind)).summary)
            except BaseException as error:
                ended.append(error)

        thread = threading.Thread(target=evaluating)
        thread.start()
        try:
            act()
        finally:
            prepare(self.folder, seconds=0)
            thread.join()
        assert isinstance(ended[0], dict), ended
        return ended[0]

    def marks(self) -> list[tuple[int, int]]:
        """(first window, process) of each attempt so far."""
        parts = [path.name.split(".") for path in (self.folder / "cache" / "marks").iterdir()]
        return [(int(first), int(pid)) for first, pid in parts]

    def workers(self, n: int, marks: int = 0) -> list[int]:
        """Processes that work, once there are so many of them and so many attempts."""

        def working() -> list[int]:
            found = self.marks()
            pids = [pid for pid in {pid for _, pid in found} if psutil.pid_exists(pid)]
            return pids if len(pids) >= n and len(found) >= marks else []

        found: list[int] = until(working, 60)
        return found

    def same(self, summary: dict[str, Any]) -> None:
        """The bits are the undisturbed run's, and each window is counted once."""
        assert summary["ok"], summary["error"]
        assert summary["nll_sha256"] == self.whole["nll_sha256"]
        assert (summary["run_key"], summary["n_windows"]) == (self.whole["run_key"], self.whole["n_windows"])
        assert sorted(row["window"] for row in self.rows()) == list(range(summary["n_windows"]))

    def rows(self) -> list[dict[str, Any]]:
        files = (self.folder / "results/v1/table=windows").glob("run_key=*/shard-*.parquet")
        return [row for path in files for row in pq.read_table(path, partitioning=None).to_pylist()]


@pytest.fixture
def run(
    tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> Run:
    """A run on two slow workers; the pool looks twice a second, and is impatient."""
    monkeypatch.setattr(perplexity, "open_executor", slow_executor)
    monkeypatch.setattr(ray_pool, "LOOK_S", 0.5)
    monkeypatch.setattr(attempts, "HANG_S", 3.0)
    monkeypatch.setattr(attempts, "FIRST_TIMES", 1.0)
    caplog.set_level(logging.INFO)
    return Run(tmp_path, address)


def until(check: Callable[[], Any], timeout_s: float) -> Any:
    """What `check` returns as soon as that is something."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if found := check():
            return found
        time.sleep(0.02)
    raise AssertionError(f"not within {timeout_s} s")


def when(caplog: pytest.LogCaptureFixture, words: str) -> list[float]:
    """Times of the records that say this."""
    return [record.created for record in caplog.records if words in record.getMessage()]


def after(caplog: pytest.LogCaptureFixture, since: float, what: str) -> None:
    """Wait for detection and recovery, and note how long after `since` they came; a minute is generous."""
    for step, words in [("detected", "event=worker_lost"), ("recovered", "event=worker_back")]:
        times = until(lambda words=words: [m - since for m in when(caplog, words) if m > since], 60)
        TIMES[f"{what}: {step}"].append(times[0])


def test_all_killed_at_once_and_then_one_hangs(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    """The whole story in one run, for the sake of time; each alone is below."""
    prepare(run.folder, seconds=0.25)
    stopped_at: list[float] = []

    def act() -> None:
        pids = run.workers(2, marks=4)
        killed = time.time()
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        n = len(run.marks())
        after(caplog, killed, "all workers killed")
        until(lambda: len({pid for _, pid in run.marks()} - set(pids)) == 2 and len(run.marks()) > n + 3, 60)
        (stopped, *_) = {pid for _, pid in run.marks()} - set(pids)
        stopped_at.append(time.time())
        os.kill(stopped, signal.SIGSTOP)

    summary = run.disturbed(act)
    run.same(summary)
    hung = [moment - stopped_at[0] for moment in when(caplog, "no answer for")]
    assert hung or when(caplog, "is slow,"), "it was neither ended nor helped"
    if hung:
        TIMES["a worker stopped: detected"].append(hung[0])
    assert max(Counter(first for first, _ in run.marks()).values()) <= 3


@pytest.mark.slow
def test_a_second_driver_is_refused_and_the_first_one_ends_well(run: Run) -> None:
    prepare(run.folder, seconds=0.5)
    refused: list[RefusedError] = []

    def act() -> None:
        run.workers(1)
        with pytest.raises(RefusedError, match=f":{os.getpid()} computes this run") as caught:
            evaluate(settings_of(run.folder, "results", ClusterSettings("inline")))
        refused.append(caught.value)

    run.same(run.disturbed(act, "inline"))
    assert (refused[0].exit_code, refused[0].kind) == (2, "RunBusy")
    assert list(run.folder.glob("results/v1/table=windows/*/.driver.lock")) == []


@pytest.mark.slow
def test_workers_killed_one_after_the_other(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    prepare(run.folder, seconds=3.0)

    def act() -> None:
        for turn in range(5):
            pids = run.workers(2, marks=2 + turn)
            killed = time.time()
            os.kill(pids[turn % 2], signal.SIGKILL)
            after(caplog, killed, "a worker killed")

    run.same(run.disturbed(act))
    assert len(run.marks()) == run.whole["n_windows"] + 5, "five shards were computed again, no other"


@pytest.mark.slow
def test_a_worker_that_hangs_is_ended(
    run: Run, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts, "HANG_TIMES", 3.0)
    monkeypatch.setattr(attempts, "SLOW_S", 60.0)
    prepare(run.folder, seconds=0.5)

    def act() -> None:
        (pid, *_) = run.workers(2, marks=4)
        stopped = time.time()
        os.kill(pid, signal.SIGSTOP)
        after(caplog, stopped, "a worker stopped")
        until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie", 60)

    run.same(run.disturbed(act))
    assert len(when(caplog, "event=worker_lost")) == 1
    assert when(caplog, "no answer for")


@pytest.mark.slow
def test_the_tail_of_a_crawling_worker_is_done_by_another(
    run: Run, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts, "SLOW_S", 0.5)
    monkeypatch.setattr(attempts, "HANG_S", 60.0)
    prepare(run.folder, seconds=0.3, crawls=True)
    started = time.monotonic()
    run.same(evaluate(run.settings()).summary)
    wall_s = time.monotonic() - started
    doubled = [record for record in caplog.records if getattr(record, "event", "") == "shard_doubled"]
    assert len(doubled) == 1
    fields = doubled[0].fields  # type: ignore[attr-defined]
    crawler = (run.folder / "cache" / "crawler").read_text()
    assert fields["worker"].endswith(f":{crawler}")
    (row,) = [row for row in run.rows() if row["window"] == fields["shard"]]
    assert row["worker"] == fields["second"], "the first to publish won"
    assert Counter(first for first, _ in run.marks())[fields["shard"]] == 2
    TIMES["a worker ten times as slow: the run"].append(wall_s)


@pytest.mark.slow
def test_poison_is_set_aside_and_computed_when_it_is_none_any_more(run: Run) -> None:
    prepare(run.folder, seconds=0.05, poison=7)
    summary = evaluate(run.settings()).summary
    assert (summary["exit_code"], summary["ok"], summary["nll_sha256"]) == (3, False, None)
    assert "shard-00000007.parquet: its worker's process ended, 3 times" in summary["error"]["message"]
    assert summary["shards_done"] == summary["n_shards"] - 1
    assert Counter(first for first, _ in run.marks())[7] == 3
    prepare(run.folder, seconds=0)
    run.same(evaluate(run.settings("inline")).summary)


@pytest.mark.slow
def test_a_worker_that_the_kernel_ends_for_memory_gets_smaller_batches(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    group = memory_group()
    prepare(run.folder, seconds=0.4)

    def act() -> None:
        (pid, *_) = run.workers(2, marks=4)
        (group / "memory.limit_in_bytes").write_text("4096")  # what it has is not counted, the next page is
        (group / "cgroup.procs").write_text(str(pid))
        until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie", 60)
        until(lambda: when(caplog, "event=out_of_memory"), 60)

    try:
        run.same(run.disturbed(act))
    finally:
        until(lambda: not (group / "cgroup.procs").read_text().split(), 20)
        group.rmdir()
    assert len(when(caplog, "event=out_of_memory")) == 1
    sizes = Counter(row["batch_tokens"] for row in run.rows())
    assert set(sizes) == {256, 128}, "half of the batch from then on, and the same bits"


@pytest.mark.slow
def test_a_node_that_joins_is_used_and_one_that_dies_is_done_without(
    run: Run, head: Any, caplog: pytest.LogCaptureFixture
) -> None:
    run.address = head.address
    prepare(run.folder, seconds=3.0)
    moments = {}

    def act() -> None:
        before = set(run.workers(2, marks=2))
        node = head.add_node(**NODE)
        moments["joined"] = time.time()
        until(lambda: {pid for _, pid in run.marks()} - before, 60)
        moments["used"] = time.time()
        moments["killed"] = time.time()
        end_node(node, "kill_raylet")
        head.worker_nodes.discard(node)
        until(lambda: when(caplog, "event=node_lost"), 90)

    run.same(run.disturbed(act))
    TIMES["a node that joins: used"].append(moments["used"] - moments["joined"])
    assert moments["used"] - moments["joined"] < 60
    lost = [moment - moments["killed"] for moment in when(caplog, "event=shard_retried")]
    gone = [moment - moments["killed"] for moment in when(caplog, "event=node_lost")]
    assert lost
    assert lost[0] < 60
    TIMES["a node killed: its shard given back"].append(lost[0])
    TIMES["a node killed: known to be gone"].append(gone[0])


@pytest.mark.slow
def test_a_driver_without_a_head_ends_in_time_and_the_run_goes_on_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.cluster_utils import Cluster

    monkeypatch.chdir(ROOT)
    own = Cluster(initialize_head=True, head_node_args=HEAD)
    run = Run(tmp_path, own.address)
    prepare(tmp_path, seconds=1.0)
    driver = subprocess.Popen(
        [sys.executable, "-m", "tests.pipeline.slow_workers", str(tmp_path), "results", own.address],
        cwd=ROOT,
        env=script_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        run.workers(2, marks=6)
        killed = time.monotonic()
        end_node(own.head_node, "kill_gcs_server", "kill_raylet")
        out, log = driver.communicate(timeout=90)
        TIMES["the head killed: the driver ends"].append(time.monotonic() - killed)
    finally:
        driver.kill()
        own.shutdown()
    assert driver.returncode == 3, log
    assert json.loads(out.splitlines()[-1]) == {"exit_code": 3, "kind": "HeadLost"}
    n_done = len(run.rows())
    assert 2 <= n_done < run.whole["n_windows"]
    summary = evaluate(settings_of(tmp_path, "results", ClusterSettings("inline"))).summary
    run.same(summary)
    assert summary["shards_reused"] == n_done


def end_node(node: Any, *ways: str) -> None:
    """Kill a node as losing its power would: Ray's own processes there, and all that they started."""
    raylets = [info.process.pid for infos in node.all_processes.values() for info in infos]
    below = [
        p for pid in raylets if psutil.pid_exists(pid) for p in psutil.Process(pid).children(recursive=True)
    ]
    for way in ways:
        getattr(node, way)(check_alive=False)
    for process in below:
        if process.is_running():
            process.kill()
    psutil.wait_procs(below, timeout=5)


def memory_group() -> Path:
    """A new group of processes whose memory can be limited; the test is skipped where that cannot be made."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "memory":
            group = Path(f"/sys/fs/cgroup/memory{path}") / f"pagemill-test-{os.getpid()}"
            try:
                group.mkdir()
                return group
            except OSError:
                break
    pytest.skip("no memory controller here that a group could be made in (cgroup v1, as root)")
