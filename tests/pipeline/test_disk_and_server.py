"""A disk that fills and an MLflow server that goes away, both real: nothing is lost, and it goes on after."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from make_gguf import tiny_llama

from pipeline import evaluate, perplexity
from pipeline.errors import StorageFailure
from pipeline.perplexity import Scoring
from pipeline.reachable import unreachable
from pipeline.settings import ClusterSettings, PerplexitySettings, TrackingSettings
from pipeline.worker import EvalWorker, ShardResult
from tests.pipeline.slow_workers import prepare, settings_of, slow_executor


@pytest.fixture
def settings(tmp_path: Path) -> PerplexitySettings:
    tiny_llama(tmp_path / "tiny.gguf", type_name="Q4_1")
    (tmp_path / "t.txt").write_text("The quick brown fox jumps over the lazy dog. " * 10)
    return settings_of(tmp_path, "results", ClusterSettings("inline", windows_per_shard=2))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 20 MB under the results folder; the test is skipped where none can be mounted."""
    folder = tmp_path / "results"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=20m", "pagemill-test", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no disk can be mounted here (needs root)")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def before_each(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Functions to be called with the number of shards begun, before each shard."""
    calls: list[Any] = []
    real, n = EvalWorker.run, iter(range(10**6))

    def run(self: EvalWorker, shard: Any) -> ShardResult:
        number = next(n)
        for call in calls:
            call(number)
        return real(self, shard)

    monkeypatch.setattr(EvalWorker, "run", run)
    return calls


def test_a_disk_that_is_full_ends_incomplete_and_the_run_goes_on_when_there_is_room(
    settings: PerplexitySettings, small_disk: Path, tmp_path: Path, before_each: list[Any]
) -> None:
    elsewhere = replace(settings, paths=replace(settings.paths, results=str(tmp_path / "whole")))
    whole = evaluate(elsewhere).summary

    def fill(number: int) -> None:
        if number == whole["n_shards"] + 2:  # the third of the run on this disk
            fill_up(small_disk)

    begun: list[int] = []
    before_each += [fill, begun.append]
    full = evaluate(settings).summary
    assert (full["exit_code"], full["error"]["type"]) == (3, "StorageFailure")
    assert f"{whole['n_shards'] - 2} of {whole['n_shards']} shards were set aside" in full["error"]["message"]
    assert "shard-00000004.parquet: no space left on the device" in full["error"]["message"]
    assert "make room" in full["error"]["hint"]
    assert len(begun) == 3, "none after the one that found no room was begun"
    assert len(list(small_disk.rglob("shard-*.parquet"))) == full["shards_done"] == 2
    assert not list(small_disk.rglob("*.tmp")), "nothing half-written is left"
    (small_disk / "filler").unlink()
    before_each.clear()
    again = evaluate(settings).summary
    assert (again["nll_sha256"], again["shards_reused"]) == (whole["nll_sha256"], 2)


def test_a_shard_that_the_driver_cannot_store_ends_the_run_as_well(
    settings: PerplexitySettings, before_each: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[int] = []
    before_each.append(begun.append)

    def full(scoring: Scoring, result: ShardResult) -> None:
        if len(begun) == 2:
            raise StorageFailure("/results: no space left on the device", "make room")

    monkeypatch.setattr(Scoring, "take", full)
    summary = evaluate(settings).summary
    assert (summary["exit_code"], summary["error"]["type"]) == (3, "StorageFailure")
    assert "/results: no space left on the device" in summary["error"]["message"]
    assert len(begun) == 2


@pytest.mark.slow
@pytest.mark.ray
def test_workers_on_a_cluster_finish_what_they_have_when_the_disk_is_full(
    settings: PerplexitySettings,
    small_disk: Path,
    tmp_path: Path,
    address: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(perplexity, "open_executor", slow_executor)
    prepare(tmp_path, seconds=0.1)
    cluster = ClusterSettings("ray", windows_per_shard=1, threads_per_worker=1, address=address)
    asked = replace(settings, cluster=cluster)
    n_begun: list[int] = []
    real = Scoring.take

    def fill(scoring: Scoring, result: ShardResult) -> None:
        if not n_begun:
            fill_up(small_disk)
            n_begun.append(len(list((tmp_path / "cache" / "marks").iterdir())))
        real(scoring, result)

    monkeypatch.setattr(Scoring, "take", fill)
    summary = evaluate(asked).summary
    assert (summary["exit_code"], summary["error"]["type"]) == (3, "StorageFailure")
    assert 1 <= summary["shards_done"] < summary["n_shards"]
    n_marks = len(list((tmp_path / "cache" / "marks").iterdir()))
    assert n_begun[0] <= n_marks <= n_begun[0] + 2, "at most one more for each of the two workers"
    (small_disk / "filler").unlink()
    prepare(tmp_path, seconds=0)
    again = evaluate(asked).summary
    assert again["ok"]
    assert again["shards_reused"] == summary["shards_done"]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_server_that_goes_away_costs_a_message_and_gets_the_run_when_it_is_back(
    settings: PerplexitySettings, tmp_path: Path, before_each: list[Any]
) -> None:
    port = 20000 + os.getpid() % 20000
    uri = f"http://127.0.0.1:{port}"
    server = start(tmp_path, port)

    def kill(number: int) -> None:
        if number == 2:
            stop(server)

    before_each.append(kill)
    asked = replace(settings, tracking=TrackingSettings("server", uri))
    try:
        without = evaluate(asked).summary
        assert without["ok"]
        assert without["nll_sha256"] is not None
        assert without["mlflow_run_id"] is None
        assert any("run the same command again" in words for words in without["warnings"])
        before_each.clear()
        server = start(tmp_path, port)
        again = evaluate(asked).summary
    finally:
        stop(server)
    assert again["mlflow_run_id"] is not None
    assert again["nll_sha256"] == without["nll_sha256"]
    assert again["shards_reused"] == again["n_shards"], "nothing is computed again for it"


def fill_up(disk: Path) -> None:
    """Leave no byte free."""
    with suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


def start(folder: Path, port: int) -> subprocess.Popen[bytes]:
    """An MLflow server on loopback, once it answers."""
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)),
        *("--workers", "1", "--backend-store-uri", f"sqlite:///{folder / 'server.db'}"),
        *("--artifacts-destination", str(folder / "server-artifacts")),
    ]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "server.log").open("ab") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=folder)
    deadline = time.monotonic() + 120
    while unreachable(f"http://127.0.0.1:{port}") is not None:
        assert time.monotonic() < deadline, (folder / "server.log").read_text()
        time.sleep(0.2)
    return server


def stop(server: subprocess.Popen[bytes]) -> None:
    """Kill it with all that it started."""
    if server.poll() is None:
        processes = [*psutil.Process(server.pid).children(recursive=True), psutil.Process(server.pid)]
        for process in processes:
            process.kill()
        server.wait()
