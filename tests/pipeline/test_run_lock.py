"""Laws of one driver for each run: the second is refused by name, what a dead one left is taken over."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from make_gguf import tiny_llama

from pipeline import evaluate, run_lock
from pipeline.errors import RefusedError, StorageFailure
from pipeline.run_lock import NAME, RunLocks
from pipeline.settings import ClusterSettings
from tests.pipeline.slow_workers import settings_of

ROOT = Path(__file__).parents[2]
HOLDER = """
import sys
from pathlib import Path
from pipeline.run_lock import RunLocks
locks = RunLocks()
locks.take(Path(sys.argv[1]))
print("locked", flush=True)
sys.stdin.read()
locks.close()
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    """Another driver, which holds the lock until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    return process


def leave(folder: Path, **entry: object) -> Path:
    """A lock that a driver of another host left."""
    lock = folder / NAME
    lock.write_text(json.dumps({"host": "far", "pid": 7, "kernel": "another", "began": "then", **entry}))
    return lock


def test_the_second_driver_is_refused_by_name_and_goes_on_when_the_first_is_dead(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = holder(tmp_path)
    try:
        with RunLocks() as locks, pytest.raises(RefusedError, match=f":{first.pid} computes this run") as no:
            locks.take(tmp_path)
        assert no.value.exit_code == 2
        assert no.value.kind == "RunBusy"
        assert no.value.hint
        assert (tmp_path / NAME).exists(), "a driver that was refused unlocks nothing"
    finally:
        first.send_signal(signal.SIGKILL)
        first.communicate()
    assert (tmp_path / NAME).exists()
    with RunLocks() as locks:
        assert locks.take(tmp_path), "said, so that what the dead one finished is looked for"
    assert f":{first.pid} was stale (its process is gone)" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_a_driver_that_ends_unlocks(tmp_path: Path) -> None:
    first = holder(tmp_path)
    first.communicate(timeout=20)
    assert list(tmp_path.iterdir()) == []
    with RunLocks() as locks:
        assert not locks.take(tmp_path)
        assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()
        with pytest.raises(RefusedError, match=f":{os.getpid()} computes"):
            locks.take(tmp_path)
    locks.close()


def test_a_number_that_another_process_has_now_is_no_driver(tmp_path: Path) -> None:
    leave(tmp_path, kernel=run_lock._kernel(), pid=os.getpid(), started_ticks=1)
    with RunLocks() as locks:
        assert locks.take(tmp_path)


def test_on_another_host_heartbeats_decide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(run_lock, "STALE_S", 0.6)
    monkeypatch.setattr(run_lock, "_WATCH_S", 0.05)
    lock = leave(tmp_path)
    os.utime(lock, (9e9, 9e9))  # its clock is far ahead
    beating = threading.Timer(0.2, lambda: os.utime(lock, (9e9 + 1, 9e9 + 1)))
    beating.start()
    with RunLocks() as locks:
        with pytest.raises(RefusedError, match="far:7 computes this run, since then"):
            locks.take(tmp_path)
        beating.join()
        assert locks.take(tmp_path)
        assert "far:7 was stale (no heartbeat in" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_says_nothing_is_judged_by_its_heartbeat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "STALE_S", 0.1)
    (tmp_path / NAME).write_text("")
    with RunLocks() as locks:
        assert locks.take(tmp_path)


def test_a_lock_beats_while_it_is_held_and_one_that_was_lost_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(run_lock, "BEAT_S", 0.05)
    with RunLocks() as locks:
        locks.take(tmp_path)
        lock = tmp_path / NAME
        before = lock.stat().st_mtime_ns
        wait_until(lambda: lock.stat().st_mtime_ns > before)
        lock.rename(tmp_path / "aside")
        leave(tmp_path)
        with caplog.at_level(logging.WARNING):
            wait_until(lambda: "another driver took this run over" in caplog.text)
    assert lock.exists()


def test_of_drivers_that_find_a_stale_lock_at_once_one_wins(tmp_path: Path) -> None:
    for _ in range(20):
        leave(tmp_path, kernel=run_lock._kernel(), pid=0)
        barrier, won, refused = threading.Barrier(4), [], []

        def take(
            barrier: threading.Barrier = barrier, won: list[RunLocks] = won, no: list[int] = refused
        ) -> None:
            locks = RunLocks()
            barrier.wait()
            try:
                locks.take(tmp_path)
                won.append(locks)
            except RefusedError:
                no.append(1)

        threads = [threading.Thread(target=take) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(won), len(refused)) == (1, 3)
        won[0].close()
        assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    with RunLocks() as locks, pytest.raises(StorageFailure, match=r"driver\.lock: cannot be written"):
        locks.take(tmp_path / "missing")


def test_a_run_that_another_driver_computes_is_refused_and_one_that_is_finished_is_read(
    tmp_path: Path,
) -> None:
    tiny_llama(tmp_path / "tiny.gguf", type_name="Q4_1")
    (tmp_path / "t.txt").write_text("The quick brown fox jumps over the lazy dog. " * 5)
    settings = settings_of(tmp_path, "results", ClusterSettings("inline"))
    other = settings_of(tmp_path, "other", ClusterSettings("inline"))
    folder = tmp_path / "results" / Path(evaluate(other).table).relative_to(tmp_path / "other")
    folder.mkdir(parents=True)
    first = holder(folder)
    try:
        with pytest.raises(RefusedError, match=f":{first.pid} computes this run"):
            evaluate(settings)
        assert [path.name for path in folder.iterdir()] == [NAME], "not even a plan was written"
    finally:
        first.communicate()
    digest = evaluate(settings).summary["nll_sha256"]
    with RunLocks() as locks:
        locks.take(folder)
        assert evaluate(settings).summary["nll_sha256"] == digest


def wait_until(check: object) -> None:
    deadline = time.monotonic() + 10
    while not check():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.02)
