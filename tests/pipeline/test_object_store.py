"""Results in an object store: the same laws as on a disk, and the same bits. Against moto's server."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_engine import install

from pipeline import evaluate, folders, run_lock, store
from pipeline.errors import RefusedError, SettingsError, StorageFailure, StoreError
from pipeline.folders import ObjectPath, folder_of
from pipeline.results import ResultsSettings, Selection, results
from pipeline.run_lock import NAME, RunLocks
from pipeline.settings import (
    ClusterSettings,
    DataSettings,
    ModelSettings,
    PathsSettings,
    PerplexitySettings,
    ProtocolSettings,
    TrackingSettings,
)
from pipeline.shards import Shard, plan
from tests.pipeline.s3_server import ENVIRONMENT, forget_clients, request_credentials
from tests.pipeline.test_run_lock import wait_until
from tests.pipeline.test_store import KEY, WANTED, commit

ROOT = Path(__file__).parents[2]
TEXT = "The quick brown fox jumps over the lazy dog, and — as ever — nobody asks why. " * 5


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PerplexitySettings:
    """An inline run of the fake engine, with results on the disk."""
    monkeypatch.chdir(tmp_path)
    install(monkeypatch)
    return settings_of(tmp_path, str(tmp_path / "results"))


def settings_of(folder: Path, to: str) -> PerplexitySettings:
    (folder / "m.gguf").write_bytes(b"GGUF" + bytes(9000))
    (folder / "t.txt").write_text(TEXT)
    return PerplexitySettings(
        model=ModelSettings(str(folder / "m.gguf")),
        data=DataSettings(path=str(folder / "t.txt")),
        protocol=ProtocolSettings(window=32),
        cluster=ClusterSettings("inline", windows_per_shard=4),
        tracking=TrackingSettings("none"),
        paths=PathsSettings(to, str(folder / "cache")),
    )


def at(settings: PerplexitySettings, results_in: str) -> PerplexitySettings:
    return replace(settings, paths=replace(settings.paths, results=results_in))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_first_writer_wins_and_nothing_is_left_beside(s3: str) -> None:
    folder, shard = folder_of(s3) / "a", Shard(0, 2)
    assert commit(folder, shard)
    assert not commit(folder, shard, 9.0)
    assert names(folder) == [shard.file_name]
    back = store.read_windows({shard: folder / shard.file_name})
    assert back.column("nll_sum_nats").to_pylist() == [1.0, 2.0]
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda value: commit(folder, Shard(2, 2), float(value)), range(8)))
    assert sum(won) == 1
    stored = store.read_windows({Shard(2, 2): folder / "shard-00000002.parquet"})
    assert stored.column("nll_sum_nats").to_pylist() == [won.index(True) + 2.0, won.index(True) + 3.0]


def test_the_plan_is_fixed_and_listing_is_resuming(s3: str) -> None:
    folder, shards = folder_of(s3), plan(6, 2)
    assert not store.finished_shards(folder, shards, KEY).paths
    assert store.read_plan(folder, WANTED) is None
    assert store.fix_plan(folder, WANTED) == WANTED
    assert store.fix_plan(folder, WANTED | {"windows_per_shard": 5}) == WANTED
    commit(folder, shards[0])
    commit(folder / "deeper", shards[1])
    (folder / "notes.txt").put(b"mine")
    (folder / shards[1].file_name).put(b"PAR1, and then nothing")
    found = store.finished_shards(folder, shards, KEY)
    assert list(found.paths) == shards[:1]
    assert "shard-00000002.parquet: is broken" in found.remarks[1]
    assert "notes.txt: not a file of this run" in found.remarks[0]
    assert any(name.startswith(".shard-00000002.parquet.broken-") for name in names(folder))
    assert commit(folder, shards[1]), "a broken file does not block its shard"
    assert len(store.finished_shards(folder, shards, KEY).paths) == 2


def test_a_listing_of_many_pages_is_whole(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, real = folder_of(s3), ObjectPath._request
    for number in range(7):
        (folder / f"shard-{number:08d}.parquet").put(b"")

    def paged(self: ObjectPath, what: str, **arguments: Any) -> dict[str, Any]:
        more = {"MaxKeys": 3} if what == "list_objects_v2" else {}
        return real(self, what, **arguments, **more)

    monkeypatch.setattr(ObjectPath, "_request", paged)
    assert len(names(folder)) == 7


def test_bits_resuming_and_reading_are_those_of_a_folder(
    s3: str,
    asked: PerplexitySettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import fake_engine

    on_disk = evaluate(asked).summary
    there = at(asked, s3)
    first = evaluate(there)
    assert first.summary["nll_sha256"] == on_disk["nll_sha256"]
    assert first.table == f"{s3}/v1/table=windows/run_key={on_disk['run_key']}"
    (folder_of(first.table) / "shard-00000004.parquet").unlink()
    n_calls = fake_engine.FakeModel.calls
    again = evaluate(there).summary
    assert (again["shards_reused"], again["nll_sha256"]) == (on_disk["n_shards"] - 1, on_disk["nll_sha256"])
    assert fake_engine.FakeModel.calls == n_calls + 1, "one shard was computed again"
    rows = results(ResultsSettings(there.paths, Selection(latest=False, columns=["nll_sha256", "run_key"])))
    assert [row["nll_sha256"] for row in rows.rows] == [on_disk["nll_sha256"]] * 2
    windows = [
        results(ResultsSettings(paths, Selection("windows", columns=["window", "nll_sum_nats"]))).rows
        for paths in (asked.paths, there.paths)
    ]
    assert windows[0] == windows[1]
    assert NAME not in names(folder_of(first.table)), "unlocked"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "m.gguf", "results", "t.txt"]


def test_documents_go_on_from_states_in_the_nodes_own_cache(
    s3: str,
    asked: PerplexitySettings,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUFmamb" + bytes(9000))  # attention's context would be too short
    carried = replace(asked, protocol=ProtocolSettings("carry", 32))
    on_disk = evaluate(carried).summary
    assert evaluate(at(carried, s3)).summary["nll_sha256"] == on_disk["nll_sha256"]
    assert "read again from its start" not in caplog.text
    assert not [path for path in (tmp_path / "cache/states").rglob("*") if path.is_file()]


DRIVER = """
import sys
from pathlib import Path
import pytest
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
from fake_engine import install
install(pytest.MonkeyPatch())
from pipeline import evaluate
from pipeline.worker import EvalWorker
from tests.pipeline.test_object_store import settings_of
real, done = EvalWorker.run, []
def run(self, shard):
    if len(done) == 2:
        print("in the middle", flush=True)
        sys.stdin.read()
    done.append(real(self, shard))
    return done[-1]
EvalWorker.run = run
evaluate(settings_of(Path(sys.argv[2]), sys.argv[3]))
"""


@pytest.mark.slow
def test_a_driver_killed_in_the_middle_loses_no_finished_shard(
    s3: str,
    asked: PerplexitySettings,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(ROOT), str(tmp_path), s3],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert driver.stdout is not None
    assert driver.stdout.readline() == "in the middle\n"
    with pytest.raises(RefusedError, match=f":{driver.pid} computes this run"):
        evaluate(at(asked, s3))
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
    resumed = evaluate(at(asked, s3)).summary
    assert (resumed["shards_reused"], resumed["ok"]) == (2, True)
    assert resumed["nll_sha256"] == evaluate(asked).summary["nll_sha256"]
    assert f":{driver.pid} was stale (its process is gone) and is taken over" in caplog.text


def test_a_lease_beats_and_one_that_does_not_is_taken_over(
    s3: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(run_lock, "BEAT_S", 0.05)
    monkeypatch.setattr(run_lock, "_WATCH_S", 0.05)
    folder = folder_of(s3)
    lock = folder / NAME
    with RunLocks() as locks:
        locks.take(folder)
        with pytest.MonkeyPatch.context() as elsewhere, RunLocks() as others:
            elsewhere.setattr(run_lock, "_kernel", lambda: "another")  # as seen from another host
            with pytest.raises(RefusedError, match=f":{os.getpid()} computes this run"):
                others.take(folder)
    assert not lock.exists()
    lock.put(json.dumps({"host": "far", "pid": 7, "kernel": "a third"}).encode())
    monkeypatch.setattr(run_lock, "STALE_S", 0.2)
    with RunLocks() as locks:
        assert locks.take(folder)
        assert "far:7 was stale (no heartbeat in" in caplog.text
        while lock.put(b"a fourth's", lock.etag()) is None:  # it beats
            pass
        wait_until(lambda: "another driver took this run over" in caplog.text)
    assert lock.read_bytes() == b"a fourth's", "what is another driver's is left alone"


def test_of_drivers_that_find_a_stale_lease_at_once_one_wins(s3: str) -> None:
    folder = folder_of(s3)
    lock = folder / NAME
    lock.put(json.dumps({"host": "here", "pid": 0, "kernel": run_lock._kernel()}).encode())
    barrier, taken, no = threading.Barrier(4), [], []

    def take() -> None:
        mine = RunLocks()
        barrier.wait()
        try:
            taken.append((mine, mine.take(folder)))
        except RefusedError:
            no.append(1)

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ([was_taken_over for _, was_taken_over in taken], len(no)) == ([True], 3)
    taken[0][0].close()
    assert not lock.exists()


def refused(settings: PerplexitySettings) -> StoreError:
    with pytest.raises(StoreError) as caught:
        evaluate(settings)
    assert caught.value.exit_code == 2
    return caught.value


def test_what_cannot_be_written_is_refused_before_work_and_no_secret_is_told(
    s3: str,
    s3_url: str,
    asked: PerplexitySettings,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    missing = refused(at(asked, "s3://bucket-that-is-not/x"))
    assert "paths.results: cannot write to s3://bucket-that-is-not/x: there is no bucket" in str(missing)
    assert "AWS_ENDPOINT_URL" in missing.hint
    request_credentials(s3_url, required=True)
    try:
        wrong = refused(at(asked, s3))
    finally:
        request_credentials(s3_url, required=False)
    assert "The AWS Access Key Id you provided does not exist" in str(wrong)
    assert "AWS_PROFILE" in wrong.hint
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    forget_clients()
    nobody = refused(at(asked, s3))
    assert "redentials" in str(nobody)
    forget_clients()
    ours = "".join(record.getMessage() for record in caplog.records if not record.name.startswith("moto"))
    said = ours + str(wrong) + wrong.hint + str(nobody)
    assert not [value for value in (ENVIRONMENT["AWS_SECRET_ACCESS_KEY"], "Signature=") if value in said]


def test_a_store_that_overwrites_is_refused(
    s3: str,
    asked: PerplexitySettings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = ObjectPath._request

    def deaf(self: ObjectPath, what: str, **arguments: Any) -> dict[str, Any]:
        arguments.pop("IfNoneMatch", None)
        return real(self, what, **arguments)

    monkeypatch.setattr(ObjectPath, "_request", deaf)
    assert "a store that overwrites: it does not know If-None-Match" in str(refused(at(asked, s3)))


def test_without_s3fs_it_says_what_to_install(
    asked: PerplexitySettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent() -> Any:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(folders, "_system", absent)
    assert "need the package s3fs: pip install 'pagemill[s3]'" in str(refused(at(asked, "s3://bucket/x")))


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("gs://bucket/x", r"gs://bucket/x is no place for results; expected a folder or s3://BUCKET/PREFIX"),
        ("s3:///x", "is no place for results"),
        ("s3://me:secret@bucket/x", r"s3://bucket/x has credentials or a query in it"),
        ("s3://bucket/x?versionId=1", "has credentials or a query in it"),
    ],
)
def test_other_urls_are_refused_without_telling_what_is_in_them(
    where: str, said: str, asked: PerplexitySettings
) -> None:
    with pytest.raises((SettingsError, StoreError), match=said) as caught:
        evaluate(at(asked, where))
    assert "secret" not in str(caught.value) + caught.value.hint


def test_a_store_that_goes_away_ends_the_run_incomplete(
    s3: str,
    asked: PerplexitySettings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = ObjectPath._request

    def gone(self: ObjectPath, what: str, **arguments: Any) -> dict[str, Any]:
        if self.name == "shard-00000004.parquet" and what == "put_object":
            raise OSError(5, "Could not connect to the endpoint")
        return real(self, what, **arguments)

    monkeypatch.setattr(ObjectPath, "_request", gone)
    summary = evaluate(at(asked, s3)).summary
    assert (summary["exit_code"], summary["error"]["type"]) == (3, StorageFailure.__name__)
    assert "shard-00000004.parquet: cannot be written: Could not connect" in summary["error"]["message"]
    monkeypatch.setattr(ObjectPath, "_request", real)
    assert evaluate(at(asked, s3)).summary["shards_reused"] == 1


def test_what_is_no_object_of_ours_is_no_path_of_the_machine(s3: str) -> None:
    path = folder_of(s3) / "x"
    with pytest.raises(TypeError, match="is no path of this machine"):
        path.open()
    with pytest.raises(FileNotFoundError, match="no such object"):
        path.read_bytes()
    assert (path.put(b"2", '"no such thing"'), path.exists()) == (None, False)


def test_mlflows_database_is_in_the_cache(tmp_path: Path) -> None:
    paths = PathsSettings("s3://bucket/x", str(tmp_path))
    assert folders.tracking_folder(paths) == tmp_path / "tracking"
    assert folders.tracking_folder(PathsSettings("results")) == Path("results")
    settings = replace(settings_of(tmp_path, "s3://bucket/x"), tracking=TrackingSettings("local"))
    assert any("tracking=local keeps MLflow's database" in warning for warning in settings.validate())
    with pytest.raises(SettingsError, match=r"paths\.results=s3://bucket/x: `throughput` needs a folder"):
        folders.require_local("s3://bucket/x", "throughput")
