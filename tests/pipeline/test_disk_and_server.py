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

from pipeline import evaluate
from pipeline.errors import StorageFailure
from pipeline.reachable import unreachable
from pipeline.settings import ClusterSettings, PerplexitySettings, TrackingSettings
from pipeline.worker import EvalWorker, ShardResult
from tests.pipeline.slow_workers import settings_of


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
    filler = small_disk / "filler"

    def fill(number: int) -> None:
        if number == whole["n_shards"] + 2:  # the third of the run on this disk
            with suppress(OSError), filler.open("wb", buffering=0) as file:
                while file.write(bytes(4096)):
                    pass

    before_each.append(fill)
    with pytest.raises(StorageFailure, match="no space left on the device") as full:
        evaluate(settings)
    assert full.value.exit_code == 3
    assert "finished shards are kept" in full.value.hint
    assert len(list(small_disk.rglob("shard-*.parquet"))) == 2
    assert not list(small_disk.rglob("*.tmp")), "nothing half-written is left"
    filler.unlink()
    before_each.clear()
    again = evaluate(settings).summary
    assert (again["nll_sha256"], again["shards_reused"]) == (whole["nll_sha256"], 2)


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
