"""Laws of tracking: a run can be found again, and nothing that goes wrong there costs a result."""

from __future__ import annotations

import math
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline import mlflow_process, run_index, tracking
from pipeline.errors import SettingsError, StoreError
from pipeline.mlflow_process import MlflowProcess
from pipeline.regression import record
from pipeline.regression.baselines import TAG, NoBaseline, find, promote
from pipeline.run_index import open_index
from pipeline.settings import TrackingSettings
from pipeline.tracking import DataInput, MlflowTracker, NoTracker, flattened, open_tracker
from tests.pipeline.recorded_runs import outcome, recorded

PARAMS = {"model": {"path": "m.gguf"}, "protocol": {"window": 512, "limit": None}}
DATA = DataInput("wikitext2", "/data/wiki.test.raw", "a" * 64)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One results folder for the module: a fresh SQLite schema takes seconds."""
    return tmp_path_factory.mktemp("a folder, x=1 (copy)")


@pytest.fixture(scope="module")
def run_id(results: Path) -> str:
    """A run that was logged beside one that a killed driver left RUNNING."""
    artifact = results / "row.parquet"
    artifact.write_bytes(b"PAR1")
    first = open_tracker(TrackingSettings(), results)
    first.prepare()
    assert first.log_run("killed", {}, {}, {"run_key": "k1"})
    with sqlite3.connect(results / "mlflow.db") as db:
        db.execute("update runs set status = 'RUNNING', end_time = null")
    db.close()
    tracker = open_tracker(TrackingSettings(), results)
    metrics: dict[str, Any] = {"ppl": 24.5, "word_ppl": None, "n": 3, "odd": math.inf}
    tags = {"run_key": "k1", "git_sha": None, "model_sha256": "b" * 64}
    logged = tracker.log_run("demo", PARAMS, metrics, tags, [artifact], DATA, started_s=1e9)
    assert tracker.warnings == []
    assert logged is not None
    return logged


@pytest.fixture(scope="module")
def process(results: Path, run_id: str) -> Iterator[MlflowProcess]:
    """One MLflow for several tests: each takes seconds to start."""
    uri = mlflow_process.local_uri(results)
    started = MlflowProcess(uri, TrackingSettings().experiment, results / "mlartifacts")
    yield started
    started.dismiss()


@pytest.fixture
def shared(process: MlflowProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that a test does is asked of that one, which it does not end."""
    monkeypatch.setattr(process, "dismiss", lambda: None)
    monkeypatch.setattr(process, "close", lambda: None)
    for module in (tracking, run_index):
        monkeypatch.setattr(module, "MlflowProcess", lambda *_: process)


def query(results: Path, text: str) -> list[tuple[Any, ...]]:
    db = sqlite3.connect(results / "mlflow.db")
    try:
        return sorted(db.execute(text).fetchall())
    finally:
        db.close()


def test_a_run_is_found_with_its_settings_numbers_and_data(results: Path, run_id: str) -> None:
    one = f"where run_uuid = '{run_id}'"
    assert query(results, f"select key, value from params {one}") == [
        ("model.path", "m.gguf"),
        ("protocol.limit", "null"),
        ("protocol.window", "512"),
    ]
    assert query(results, f"select key, value from metrics {one}") == [("n", 3.0), ("ppl", 24.5)]
    tags = dict(query(results, f"select key, value from tags {one}"))
    assert tags["run_key"] == "k1"
    assert tags["data.sha256"] == DATA.sha256
    assert "git_sha" not in tags
    assert query(results, "select name, digest from datasets") == [("wikitext2", "a" * 32)]
    assert query(results, f"select name, status, start_time from runs {one}") == [
        ("demo", "FINISHED", 10**12)
    ]


def test_artifacts_stay_in_the_results_folder(results: Path, run_id: str) -> None:
    (copy,) = (results / "mlartifacts").rglob("row.parquet")
    assert run_id in str(copy)
    assert copy.read_bytes() == b"PAR1"


def test_what_a_killed_driver_left_running_is_marked_killed(results: Path, run_id: str) -> None:
    assert query(results, "select name, status from runs") == [("demo", "FINISHED"), ("killed", "KILLED")]


def test_the_experiment_is_made_once(results: Path, run_id: str) -> None:
    names = [name for (name,) in query(results, "select name from experiments")]
    assert names.count("pagemill") == 1


def test_nothing_of_mlflow_reaches_the_driver_or_standard_output(
    results: Path, run_id: str, capfd: pytest.CaptureFixture[str]
) -> None:
    tracker = open_tracker(TrackingSettings(), results)
    tracker.prepare()
    assert tracker.log_run("again", {}, {}, {"run_key": "k2"}, complete=False)
    assert capfd.readouterr().out == ""
    assert query(results, "select status from runs where name = 'again'") == [("FAILED",)]


def test_points_of_a_sweep_are_children_of_a_parent_that_ends_with_it(results: Path, shared: None) -> None:
    tracker = open_tracker(TrackingSettings(), results)
    parent = tracker.log_run("sweep", {"axis": "a, b"}, {}, {"run_key": "s1"}, stays_open=True)
    assert parent is not None
    assert query(results, "select status from runs where name = 'sweep'") == [("RUNNING",)]
    children = [tracker.log_run(name, {}, {"ppl": 2.0}, {"run_key": name}, parent=parent) for name in "ab"]
    tracker.end_run(parent, {"n_points": 2})
    assert tracker.warnings == []
    tagged = query(results, "select run_uuid, value from tags where key = 'mlflow.parentRunId'")
    assert tagged == sorted((child, parent) for child in children)
    assert query(results, "select status from runs where name = 'sweep'") == [("FINISHED",)]
    assert query(results, f"select key, value from metrics where run_uuid = '{parent}'") == [
        ("n_points", 2.0)
    ]


def test_a_sweep_that_is_interrupted_is_marked_killed(results: Path, run_id: str) -> None:
    tracker = open_tracker(TrackingSettings(), results)
    assert tracker.log_run("cut short", {}, {}, {"run_key": "s2"}, stays_open=True)
    tracker.close()
    deadline = time.monotonic() + 30
    while query(results, "select status from runs where name = 'cut short'") != [("KILLED",)]:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_what_did_not_answer_once_is_not_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlflow_process, "TIMEOUT_S", 0.1)
    tracker = MlflowTracker(f"sqlite:///{tmp_path / 'mlflow.db'}", "x", tmp_path / "mlartifacts")
    for _ in range(3):
        assert tracker.log_run("x", {}, {}, {"run_key": "k"}, parent="p") is None
    assert len(tracker.warnings) == 1


def test_closing_without_a_run_logs_nothing(tmp_path: Path, results: Path, run_id: str) -> None:
    n_runs = query(results, "select count(*) from runs")
    tracker = open_tracker(TrackingSettings(), results)
    tracker.prepare()
    tracker.close()
    tracker.close()
    assert query(results, "select count(*) from runs") == n_runs


def test_without_tracking_nothing_is_written(tmp_path: Path) -> None:
    tracker = open_tracker(TrackingSettings(kind="none"), tmp_path)
    tracker.prepare()
    assert tracker.log_run("x", {}, {}, {"run_key": "k"}) is None
    assert tracker.warnings == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("uri", ["http://127.0.0.1:9", "http://mlflow.invalid:5000", "http://[broken", None])
def test_a_server_that_is_not_there_costs_a_message_on_how_to_log_later(
    uri: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    started = time.monotonic()
    tracker = open_tracker(TrackingSettings(kind="server", uri=uri), tmp_path)
    assert isinstance(tracker, NoTracker)
    assert "run the same command again" in tracker.warnings[0]
    assert tracker.log_run("x", {}, {}, {"run_key": "k"}) is None
    assert time.monotonic() - started < 6


def test_a_server_that_never_answers_is_not_waited_for(tmp_path: Path) -> None:
    started = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as server:
        uri = f"http://127.0.0.1:{server.getsockname()[1]}"
        tracker = open_tracker(TrackingSettings(kind="server", uri=uri), tmp_path)
    assert isinstance(tracker, NoTracker)
    assert uri in tracker.warnings[0]
    assert time.monotonic() - started < 6


def test_a_database_that_cannot_be_used_costs_a_warning(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"this is no database" * 100)
    tracker = open_tracker(TrackingSettings(), tmp_path)
    assert tracker.log_run("x", {}, {}, {"run_key": "k"}) is None
    assert "run the same command again" in tracker.warnings[0]


def test_a_results_folder_that_cannot_be_made_costs_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    tracker = open_tracker(TrackingSettings(), tmp_path / "file" / "results")
    assert tracker.log_run("x", {}, {}, {"run_key": "k"}) is None
    assert len(tracker.warnings) == 1


def test_logging_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlflow_process, "TIMEOUT_S", 0.1)
    tracker = MlflowTracker(f"sqlite:///{tmp_path / 'mlflow.db'}", "x", tmp_path / "mlartifacts")
    assert tracker.log_run("x", {}, {}, {"run_key": "k"}) is None
    assert "no answer" in tracker.warnings[0]


def test_settings_become_dotted_text() -> None:
    assert flattened(PARAMS) == {"model.path": "m.gguf", "protocol.window": "512", "protocol.limit": "null"}


def test_the_driver_never_imports_mlflow() -> None:
    code = "import sys, pipeline.tracking; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_runs_are_looked_up_tagged_and_their_artifacts_fetched(
    results: Path, run_id: str, shared: None, tmp_path: Path
) -> None:
    with open_index(TrackingSettings(), results) as index:
        index.set_tag(run_id, "a.key", "it's, here")
        (run,) = index.tagged("a.key")
        assert (run.id, run.name, run.status, run.started_ms) == (run_id, "demo", "FINISHED", 10**12)
        assert run.tags["a.key"] == "it's, here"
        assert index.run(run_id) == run
        index.set_tag(run_id, "a.key", None)
        assert index.tagged("a.key") == []
        assert [found.id for found in index.tagged("run_key", "k1")].count(run_id) == 1
        assert index.run("0" * 32) is None
        assert index.fetch(run_id, "row.parquet", tmp_path).read_bytes() == b"PAR1"
        with pytest.raises(
            StoreError, match=f"MLflow run {run_id} at sqlite:.*: its no.parquet cannot be had"
        ):
            index.fetch(run_id, "no.parquet", tmp_path)


def test_there_is_nothing_to_look_up_without_tracking(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="tracking=none"):
        open_index(TrackingSettings("none"), tmp_path)
    with open_index(TrackingSettings(), tmp_path) as index:
        assert index.tagged("run_key") == []
    assert list(tmp_path.iterdir()) == []


def test_a_baseline_goes_through_a_real_mlflow_and_back(results: Path, shared: None) -> None:
    runs = []
    for minute in (4, 5):
        run, tracker = outcome(minute=minute), open_tracker(TrackingSettings(), results)
        runs.append(record.track(tracker, run, [recorded(results, run)], 1e9))
        assert tracker.warnings == []
    first, second = (run for run in runs if run is not None)
    with pytest.raises(NoBaseline):
        find(None, "smoke", TrackingSettings(), results)
    promote(first, None, "smoke", TrackingSettings(), results)
    base = find(None, "smoke", TrackingSettings(), results)
    assert base.run == first
    assert base.provenance["finished_at"].minute == 4
    promote(str(recorded(results, outcome(minute=6))), None, "smoke", TrackingSettings(), results)
    third = find(None, "smoke", TrackingSettings(), results)
    assert third.run not in (first, second)
    assert third.provenance["finished_at"].minute == 6
    promote(second, None, "smoke", TrackingSettings(), results)
    assert find("smoke", "smoke", TrackingSettings(), results).run == second
    with open_index(TrackingSettings(), results) as index:
        assert [run.id for run in index.tagged(TAG)] == [second]
        assert index.run("0" * 32) is None
        (known,) = index.tagged("record", "run-20260102T030505.678901Z.parquet")
        assert (known.id, known.name, known.status) == (second, "smoke: passed", "FINISHED")
    for artifact in (results / "mlartifacts").rglob("run-*.parquet"):
        artifact.unlink()
    with pytest.raises(StoreError, match=f"the tables of a baseline are gone: MLflow run {second}"):
        find(None, "smoke", TrackingSettings(), results)
    with sqlite3.connect(results / "mlflow.db") as db:
        db.execute(f"update runs set lifecycle_stage = 'deleted' where run_uuid = '{first}'")
    db.close()
    with pytest.raises(NoBaseline, match="is deleted"):
        find(first, "smoke", TrackingSettings(), results)
