"""Models that arrive slowly: however long a source takes, nobody hangs and no start has failed."""

from __future__ import annotations

import http.server
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline import attempts, fetch, hosted, ray_pool
from pipeline.attempts import Attempts
from pipeline.cluster import open_executor
from pipeline.errors import ModelError
from pipeline.executor import Task
from pipeline.hosted import Hosted
from pipeline.node_cache import kept
from pipeline.placement import Place
from pipeline.settings import ClusterSettings, EngineSettings
from pipeline.shards import plan
from tests.pipeline.fake_workers import FetchedSpec

FAKE = "tests.pipeline.fake_workers:FakeWorker"


class Slow(http.server.BaseHTTPRequestHandler):
    """Sends a file piece by piece: that of the first model takes 2.5 seconds."""

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(0)

    def do_GET(self) -> None:
        self._answer(5)

    def _answer(self, n_pieces: int) -> None:
        is_there = not self.path.startswith("/none")
        self.send_response(200 if is_there else 404)
        self.send_header("Content-Length", str(5 * len(self.path) if is_there else 0))
        self.end_headers()
        for _ in range(n_pieces if is_there else 0):
            time.sleep(0.5 if self.path == "/a.gguf" else 0.1)
            self.wfile.write(self.path.encode())
            self.wfile.flush()


@pytest.fixture
def source() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.mark.ray
@pytest.mark.slow
def test_a_fetch_may_take_longer_than_a_start_and_comes_before_the_shard(
    source: str, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both workers of the node begin with one model, and turn to another one."""
    monkeypatch.setattr(ray_pool, "START_TIMEOUT_S", 2.0)
    specs: list[Any] = [
        FetchedSpec(
            f"{source}/{name}.gguf", str(tmp_path / "cache"), folder=str(tmp_path / "marks"), file=name
        )
        for name in "ab"
    ]
    (tmp_path / "marks").mkdir()
    settings = ClusterSettings(kind="ray", address=address, threads_per_worker=1)
    executor = open_executor(settings, EngineSettings(), FAKE)
    try:
        executor.start(specs)
        done: list[str] = []
        tasks = [Task(spec, shard, spec.wanted.url) for spec in specs for shard in plan(4, 1)]
        failures = executor.run(tasks, lambda task, _: done.append(task.file[-6:]))
    finally:
        executor.close()
    assert failures == []
    assert sorted(done) == ["a.gguf"] * 4 + ["b.gguf"] * 4
    assert len({path.suffix for path in (tmp_path / "marks").glob("[0-9]*")}) <= 2, "nobody was replaced"
    assert all(kept(spec.wanted.url, tmp_path / "cache") for spec in specs)


def test_time_that_a_fetch_takes_is_nobodys_fault_but_another_worker_may_help(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [0.0]
    monkeypatch.setattr(attempts.time, "monotonic", lambda: clock[0])
    spec: Any = {}
    tasks = [Task(spec, shard, "f") for shard in plan(3, 1)]
    work = Attempts(tasks)

    def wait(seconds: int) -> None:
        for _ in range(seconds):
            clock[0] += 1
            work.tick()

    first, _ = work.take("n", "w", "f", {"f"})
    slow, _ = work.take("m", "v", None, set())
    slow.is_fetching = True
    wait(1)
    assert work.done(first, object())  # type: ignore[arg-type]
    last, _ = work.take("n", "w", "f", {"f"})
    assert work.done(last, object())  # type: ignore[arg-type]
    wait(5000)
    assert (work.overdue(), work.late()) == ([], [slow])
    work.fetched(slow)
    assert (work.overdue(), work.late()) == ([], [])
    wait(5000)
    assert [attempt for attempt, _ in work.overdue()] == [slow]


def test_a_worker_lets_its_model_go_before_the_next_one_is_fetched(
    source: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosted, "setup_logging", lambda: None)
    monkeypatch.setattr(fetch, "PAUSE_S", 0.01)
    (tmp_path / "marks").mkdir()
    cache, marks = str(tmp_path / "cache"), str(tmp_path / "marks")
    spec, none, by_path = (
        FetchedSpec(f"{source}/{name}.gguf", cache, folder=marks, file=name) for name in ("b", "none", "p")
    )
    by_path.wanted = None
    host = Hosted(FAKE, Place("n"))
    host.fetch([none, spec])
    assert (len(kept(spec.wanted.url, tmp_path / "cache")), "none.gguf: no such file" in caplog.text) == (
        1,
        True,
    )
    assert host._held is not None
    host.ready([spec])
    assert host._held is None, "the worker has it open"
    worker: Any = host._worker
    host.fetch([none])
    assert worker.spec is spec, "a probe of a worker that has its model fetches nothing"
    with pytest.raises(ModelError, match=r"none\.gguf: no such file"):
        host.fetch([none], is_turn=True)
    assert worker.spec == {}, "closed"
    host.fetch([by_path], is_turn=True)
    assert host._held is None, "a path is fetched by nobody"
    host.run(Task(spec, plan(1, 1)[0], "f"))  # type: ignore[arg-type]
    assert worker.spec is spec, "turned to it again"
    host.fetch([spec], is_turn=True)
    assert (worker.spec, host._held) == (spec, None), "it is open"
