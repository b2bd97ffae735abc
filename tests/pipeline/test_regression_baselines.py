"""Laws of baselines: found by tag, run or file, moved by promoting; what is none is refused, saying why."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline import store
from pipeline.errors import RefusedError, SettingsError, StorageFailure, StoreError
from pipeline.mlflow_process import MlflowProcess, Unanswered
from pipeline.regression import baselines, record
from pipeline.regression.baselines import TAG, NoBaseline, find, promote
from pipeline.run_index import LoggedRun, ServerDown
from pipeline.settings import TrackingSettings
from tests.pipeline.recorded_runs import KEY, outcome, recorded

LOCAL, NONE = TrackingSettings(), TrackingSettings("none")


class FakeMlflow:
    """Runs and their artifacts in memory, as index and as tracker."""

    where = "here"

    def __init__(self) -> None:
        self.runs: dict[str, LoggedRun] = {}
        self.files: dict[tuple[str, str], bytes] = {}
        self.warnings: list[str] = []
        self.changed: list[tuple[str, str | None]] = []

    def __enter__(self) -> FakeMlflow:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def tagged(self, key: str, value: str | None = None) -> list[LoggedRun]:
        there = [run for run in self.runs.values() if key in run.tags and not run.deleted]
        return [run for run in there if value in (None, run.tags[key])]

    def run(self, run_id: str) -> LoggedRun | None:
        return self.runs.get(run_id)

    def fetch(self, run_id: str, artifact: str, folder: Path) -> Path:
        if (run_id, artifact) not in self.files:
            raise StoreError(f"MLflow run {run_id}: its {artifact} cannot be had")
        (folder / artifact).write_bytes(self.files[run_id, artifact])
        return folder / artifact

    def set_tag(self, run_id: str, key: str, value: str | None) -> None:
        run = self.runs[run_id]
        kept = {name: text for name, text in run.tags.items() if name != key}
        self.runs[run_id] = replace(run, tags=kept | ({} if value is None else {key: value}))
        self.changed.append((run_id, value))

    def log_run(self, name: str, params: Any, metrics: Any, tags: Any, artifacts: Any, **rest: Any) -> str:
        run_id = f"{len(self.runs) + 1:032x}"
        known = {key: str(value) for key, value in tags.items() if value is not None}
        self.runs[run_id] = LoggedRun(run_id, name, "FINISHED", 0, False, known)
        self.files |= {(run_id, path.name): path.read_bytes() for path in artifacts}
        return run_id

    def close(self) -> None:
        pass


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> FakeMlflow:
    fake = FakeMlflow()
    monkeypatch.setattr(baselines, "open_index", lambda *_: fake)
    monkeypatch.setattr(baselines, "open_tracker", lambda *_: fake)
    return fake


def logged(mlflow: FakeMlflow, results: Path, minute: int = 4, **changed: Any) -> str:
    run = outcome(minute=minute, **changed)
    run_id = record.track(mlflow, run, [recorded(results, run)], 1.0)
    assert run_id is not None
    return run_id


def test_the_tag_moves_from_run_to_run(mlflow: FakeMlflow, results: Path) -> None:
    first, second = (logged(mlflow, results, minute) for minute in (4, 5))
    assert promote(first, None, "smoke", LOCAL, results).startswith(
        "baseline smoke of suite smoke is MLflow run"
    )
    base = find(None, "smoke", LOCAL, results)
    assert (base.name, base.run, base.provenance["finished_at"].minute) == ("smoke", first, 4)
    assert [one.id for one in base.measured] == [one.id for one in outcome().measured]
    assert promote(second, None, "", LOCAL, results).endswith(f"{second} now, in place of {first}")
    assert find("smoke", "smoke", LOCAL, results).run == second
    assert TAG not in mlflow.runs[first].tags
    assert mlflow.changed[-2:] == [(second, "smoke"), (first, None)], "never without a baseline in between"


def test_a_run_keeps_the_other_tags_it_has(mlflow: FakeMlflow, results: Path) -> None:
    first, second = (logged(mlflow, results, minute) for minute in (4, 5))
    for tag in ("smoke", "v1.0", "v1.0"):
        promote(first, tag, "smoke", LOCAL, results)
    assert mlflow.runs[first].tags[TAG] == "smoke, v1.0"
    promote(second, "smoke", "smoke", LOCAL, results)
    assert find("v1.0", "smoke", LOCAL, results).run == first
    assert find(None, "smoke", LOCAL, results).run == second
    assert find(first, "smoke", LOCAL, results).run == first, "by its id, with a tag or without"


def test_without_a_baseline_the_command_that_makes_one_is_told(mlflow: FakeMlflow, results: Path) -> None:
    with pytest.raises(NoBaseline, match="suite smoke has no baseline smoke in MLflow at here") as none:
        find(None, "smoke", LOCAL, results)
    assert none.value.hint == (
        f"make one: pagemill regression suite=smoke action=promote paths.results={results}"
    )
    promote(logged(mlflow, results), "release-1.0", "smoke", LOCAL, results)
    promote(logged(mlflow, results, 5, suite="nightly"), "night", "nightly", LOCAL, results)
    server = TrackingSettings("server", "http://me:secret@host:5000", "mine")
    with pytest.raises(NoBaseline, match=r"did you mean release-1\.0\? \(known: release-1\.0\)") as none:
        find("relase-1.0", "smoke", server, Path("results").absolute())
    assert none.value.hint.endswith(
        "action=promote baseline=relase-1.0 tracking=server tracking.uri=http://host:5000"
        " tracking.experiment=mine"
    )
    assert none.value.exit_code == 2
    with pytest.raises(NoBaseline, match="is of suite nightly, expected smoke"):
        find("night", "smoke", LOCAL, results)


def test_two_runs_with_one_tag_are_not_chosen_between(mlflow: FakeMlflow, results: Path) -> None:
    runs = [logged(mlflow, results, minute) for minute in (4, 5)]
    for run in runs:
        mlflow.set_tag(run, TAG, "smoke")
    with pytest.raises(NoBaseline, match=f"2 runs .* have that tag: {runs[0]}, {runs[1]}") as two:
        find(None, "smoke", LOCAL, results)
    assert two.value.hint.endswith(f"action=promote paths.results={results} run={runs[0]}")
    promote(runs[0], None, "smoke", LOCAL, results)
    assert find(None, "smoke", LOCAL, results).run == runs[0]


def test_what_can_be_no_baseline_is_refused(mlflow: FakeMlflow, results: Path) -> None:
    good, other = logged(mlflow, results), logged(mlflow, results, 5, suite="nightly")
    half = logged(mlflow, results, 6, verdict="incomplete")
    gone, trash = logged(mlflow, results, 7), logged(mlflow, results, 8)
    mlflow.files.clear()
    for run in (good, other, half):
        name = mlflow.runs[run].tags["record"]
        mlflow.files[run, name] = (store.regressions_folder(results, KEY) / name).read_bytes()
    mlflow.runs[trash] = replace(mlflow.runs[trash], deleted=True)
    foreign = "f" * 32
    mlflow.runs[foreign] = LoggedRun(foreign, "demo", "FINISHED", 0, False, {"job": "perplexity"})
    cases = [
        (half, NoBaseline, "is incomplete: not all its checks were measured"),
        (other, NoBaseline, "is of suite nightly, expected smoke"),
        (trash, NoBaseline, "is deleted"),
        ("0" * 32, NoBaseline, "has no run 0000"),
        (foreign, NoBaseline, r"\(demo\) at here is no run of a suite"),
        (gone, StoreError, "the tables of a baseline are gone"),
    ]
    for run, kind, said in cases:
        with pytest.raises(kind, match=said) as found:
            find(run, "smoke", LOCAL, results)
        with pytest.raises(kind, match=said) as promoted:
            promote(run, None, "smoke", LOCAL, results)
        for refused in (found.value, promoted.value):
            assert refused.exit_code == 2
            assert "action=promote" in refused.hint
    assert mlflow.changed == []
    for name in ("baselines/smoke", "a, b", " "):
        with pytest.raises(SettingsError, match="can be no tag"):
            find(name, "smoke", LOCAL, results)
        with pytest.raises(SettingsError, match="can be no tag"):
            promote(good, name, "smoke", LOCAL, results)
    with pytest.raises(SettingsError, match="is a run's id, expected a tag"):
        promote(good, "0" * 32, "smoke", LOCAL, results)
    with pytest.raises(NoBaseline, match="has no run 123"):
        promote("123", None, "smoke", LOCAL, results)


def test_a_tag_is_not_taken_from_another_suite(mlflow: FakeMlflow, results: Path) -> None:
    promote(logged(mlflow, results, suite="nightly"), "main", "nightly", LOCAL, results)
    with pytest.raises(SettingsError, match="baseline=main is a tag of suite nightly"):
        promote(logged(mlflow, results, 5), "main", "smoke", LOCAL, results)


def test_a_record_that_came_back_broken_names_its_run(mlflow: FakeMlflow, results: Path) -> None:
    run = logged(mlflow, results)
    promote(run, None, "smoke", LOCAL, results)
    mlflow.files = dict.fromkeys(mlflow.files, b"PAR1 cut")
    with pytest.raises(
        StoreError, match=f"gone: MLflow run {run} at here: run-.*: is no record, or broken"
    ) as broken:
        find(None, "smoke", LOCAL, results)
    assert "tmp" not in str(broken.value)


def test_a_record_becomes_the_baseline_by_its_path(mlflow: FakeMlflow, results: Path, tmp_path: Path) -> None:
    run = logged(mlflow, results)
    path = shutil.copy(next(results.rglob("run-*.parquet")), tmp_path / "mine.parquet")
    assert run in promote(str(path), "main", "smoke", LOCAL, results)
    unlogged = recorded(tmp_path / "elsewhere", outcome(minute=9))
    promote(str(unlogged), "main", "smoke", LOCAL, results)
    base = find("main", "smoke", LOCAL, results)
    assert base.run not in (run, None), "it was logged first"
    assert base.provenance["record"] == unlogged.name


def test_a_file_is_a_baseline_without_mlflow(results: Path, tmp_path: Path) -> None:
    path, file = recorded(results), tmp_path / "in a repository" / "smoke.parquet"
    said = promote(str(path), str(file), "smoke", NONE, results)
    assert said == f"baseline {file} is the run of suite smoke that ended 2026-01-02 03:04 UTC"
    assert find(str(file), "smoke", NONE, results).provenance["record"] == path.name
    promote(str(recorded(results, outcome(minute=9))), str(file), "", NONE, results)
    base = find(str(file), "smoke", NONE, results)
    assert (base.run, base.source, base.provenance["finished_at"].minute) == (None, str(file), 9)
    promote(str(file), str(file), "smoke", NONE, results)
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_run_is_put_into_a_file(mlflow: FakeMlflow, results: Path, tmp_path: Path) -> None:
    promote(logged(mlflow, results), str(tmp_path / "smoke.parquet"), "smoke", LOCAL, results)
    assert find(str(tmp_path / "smoke.parquet"), "smoke", NONE, results).measured


def test_files_that_are_no_baseline_are_refused_and_left_alone(results: Path, tmp_path: Path) -> None:
    good, other = recorded(results), recorded(results, outcome("nightly", minute=5))
    half = recorded(results, outcome(verdict="incomplete", minute=6))
    mine = tmp_path / "mine.parquet"
    mine.write_text("mine")
    (tmp_path / "folder.parquet").mkdir()
    cases: list[tuple[str, str, type[Exception], str]] = [
        (str(good), str(mine), StoreError, "is no record, or broken .*; it is not replaced"),
        (str(good), str(other), SettingsError, "is of suite nightly, not smoke; it is not replaced"),
        (str(half), str(tmp_path / "x.parquet"), NoBaseline, "is incomplete"),
        (str(other), str(tmp_path / "x.parquet"), NoBaseline, "is of suite nightly, expected smoke"),
        (str(good), str(mine / "x.parquet"), StorageFailure, "cannot be written"),
        (str(tmp_path / "no.parquet"), str(tmp_path / "x.parquet"), StoreError, "there is no such file"),
        (str(good), str(tmp_path / "folder.parquet"), StoreError, "is a folder"),
        (str(good), "smoke", SettingsError, "tracking=none"),
        ("0" * 32, str(tmp_path / "x.parquet"), SettingsError, "tracking=none"),
    ]
    for what, to, kind, said in cases:
        with pytest.raises(kind, match=said):
            promote(what, to, "smoke", NONE, results)
    assert mine.read_text() == "mine"
    assert not (tmp_path / "x.parquet").exists()
    for name, said in [
        ("min.parquet", "no such file; did you mean .*mine.parquet"),
        ("smoke", "tracking=none"),
    ]:
        with pytest.raises(NoBaseline, match=said) as none:
            find(name if name == "smoke" else str(tmp_path / name), "smoke", NONE, results)
        assert "pagemill regression suite=smoke action=promote baseline=" in none.value.hint
        assert "tracking=none" in none.value.hint
    with pytest.raises(NoBaseline, match="is incomplete"):
        find(str(half), "smoke", NONE, results)


def test_mlflow_that_is_down_is_told_from_a_baseline_that_is_not_there(results: Path) -> None:
    server, path = TrackingSettings("server", "http://127.0.0.1:9"), str(recorded(results))
    for ask in (
        lambda: find(None, "smoke", server, results),
        lambda: promote("0" * 32, None, "smoke", server, results),
        lambda: promote(path, None, "smoke", server, results),
    ):
        with pytest.raises(ServerDown, match=r"MLflow at http://127\.0\.0\.1:9: not reachable") as down:
            ask()
        assert (down.value.exit_code, isinstance(down.value, RefusedError)) == (2, True)
    with pytest.raises(NoBaseline, match="has no baseline smoke"):
        find(None, "smoke", LOCAL, results)
    assert not (results / "mlflow.db").exists(), "no database is made to say that there are no runs"


def test_a_database_that_cannot_be_used_is_down(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*_: object) -> None:
        raise Unanswered("file is not a database")

    (results / "mlflow.db").touch()
    monkeypatch.setattr(MlflowProcess, "ask", ask)
    with pytest.raises(ServerDown, match=r"mlflow\.db: file is not a database"):
        find(None, "smoke", LOCAL, results)
    monkeypatch.setattr(MlflowProcess, "ask", lambda *_: {"error": "MlflowException: odd"})
    with pytest.raises(ServerDown, match="odd"):
        find(None, "smoke", LOCAL, results)
    (results / "mlflow.db").unlink()
    with pytest.raises(ServerDown, match=r"not logged\. Later: run the same command again"):
        promote(str(recorded(results)), None, "smoke", LOCAL, results)
