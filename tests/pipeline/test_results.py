"""Laws of reading the store back: what is chosen, in which order, in which form, and what is left alone."""

from __future__ import annotations

import csv
import datetime
import io
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline import store, tables
from pipeline.errors import SettingsError, StorageFailure, StoreError
from pipeline.results import COLUMNS, ResultsSettings, Selection, results, select
from pipeline.settings import PathsSettings

KEYS = ["a" * 16, "b" * 16, "1234567890123456"]


def row(name: str, window: int, ppl: float | None, minute: int, **rest: Any) -> dict[str, Any]:
    when = datetime.datetime(2026, 1, 2, 3, minute, tzinfo=datetime.UTC)
    ok = {"ok": ppl is not None, "ppl": ppl, "finished_at": when, "protocol_window": window}
    return {**ok, "model_path": f"/models/{name}.gguf", "data_name": "pydoc", "n_workers": 2, **rest}


def commit(folder: Path, key: str, row: dict[str, Any], columns: int | None = None) -> None:
    run = store.runs_folder(folder, key)
    run.mkdir(parents=True, exist_ok=True)
    table = tables.table([row], tables.RUNS_SCHEMA)
    table = table if columns is None else table.select([*table.column_names[:columns], "protocol_window"])
    store.commit(table, run / f"run-{len(list(run.iterdir()))}.parquet", {})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three runs, one of them with three rows, beside plans and what a killed process left."""
    commit(tmp_path, KEYS[0], row("small", 512, 30.123456789012345, 1, tok_per_s=100.0, host="here"))
    commit(tmp_path, KEYS[0], row("small", 512, 30.123456789012345, 2, warnings=["a|b", "c, d"]))
    commit(tmp_path, KEYS[0], row("small", 512, None, 3))
    commit(tmp_path, KEYS[1], row("large", 512, 12.5, 4), columns=20)
    commit(tmp_path, KEYS[2], row("large", 2048, 11.5, 5))
    windows = store.windows_folder(tmp_path, KEYS[0])
    windows.mkdir(parents=True)
    shard = [{"window": i, "nll_sum_nats": 1.5 * i} for i in range(3)]
    store.commit(tables.table(shard, tables.WINDOWS_SCHEMA), windows / "shard-00000000.parquet", {})
    (windows / "plan.json").write_text("{}")
    (store.runs_folder(tmp_path, KEYS[0]) / "plan.json").write_text("{}")
    (windows / ".shard-00000003.parquet.1.tmp").write_text("half")
    return tmp_path


def ask(folder: Path, **options: Any) -> Any:
    return results(ResultsSettings(PathsSettings(str(folder)), Selection(**options)))


def names(found: Any) -> list[str]:
    return [f"{row['model']} {row['protocol_window']}" for row in found.rows]


def test_of_each_run_the_last_complete_row_is_shown_newest_first(folder: Path) -> None:
    found = ask(folder)
    assert found.columns == list(COLUMNS)
    assert names(found) == ["large 2048", "large 512", "small 512"]
    assert found.rows[2]["finished_at"] == datetime.datetime(2026, 1, 2, 3, 2), "UTC"
    assert [row["run_key"] for row in found.rows] == KEYS[::-1], "text, digits too"
    assert len(ask(folder, latest=False).rows) == 5


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"filter": {"protocol_window": 512}}, ["large 512", "small 512"]),
        ({"filter": {"model": "sm*"}}, ["small 512"]),
        ({"filter": {"model": ["small", "la*"], "protocol_window": [2048, 1]}}, ["large 2048"]),
        ({"filter": {"host": None, "ppl": 12.5}}, ["large 512"]),
        ({"filter": {"model": []}}, []),
        ({"where": "ppl < 12 or model = 'small' -- mine"}, ["large 2048", "small 512"]),
        ({"sort": "ppl"}, ["large 2048", "large 512", "small 512"]),
        ({"sort": "-ppl", "limit": 1}, ["small 512"]),
        ({"sort": "tok_per_s"}, ["large 2048", "small 512", "large 512"]),
    ],
)
def test_rows_are_chosen_and_sorted_as_asked(
    folder: Path, options: dict[str, Any], expected: list[str]
) -> None:
    found = names(ask(folder, **options))
    assert sorted(found) == sorted(expected) if options.get("sort") == "tok_per_s" else found == expected


def test_csv_and_json_keep_every_digit(folder: Path) -> None:
    options = {"columns": ["model", "ppl", "ok", "warnings", "finished_at"], "sort": "-ppl", "limit": 1}
    (line,) = csv.DictReader(io.StringIO(ask(folder, format="csv", **options).text))
    assert float(line["ppl"]) == 30.123456789012345
    assert (line["ok"], line["finished_at"]) == ("true", "2026-01-02T03:02:00")
    assert json.loads(line["warnings"]) == ["a|b", "c, d"]
    (plain,) = json.loads(ask(folder, format="json", **options).text)
    assert plain["ppl"] == 30.123456789012345
    assert plain["warnings"] == ["a|b", "c, d"]


def test_what_json_cannot_say_is_null(tmp_path: Path) -> None:
    commit(tmp_path, KEYS[0], row("m", 512, math.nan, 1))
    assert json.loads(ask(tmp_path, format="json", columns=["ppl"]).text) == [{"ppl": None}]


def test_markdown_and_the_table_are_for_reading(folder: Path) -> None:
    lines = ask(folder, format="markdown", columns=["model", "ppl", "warnings"], sort="ppl").text.splitlines()
    assert lines[:3] == ["| model | ppl | warnings |", "| --- | ---: | --- |", "| large | 11.5 |  |"]
    assert "a\\|b" in lines[4]
    lines = ask(folder, columns=["model", "ppl"], sort="ppl").text.splitlines()
    assert lines == ["model     ppl", "large    11.5", "large    12.5", "small  30.123"]


def test_windows_are_read_by_their_own_names(folder: Path) -> None:
    found = ask(folder, table="windows", columns=["run_key", "window", "nll_sum_nats"])
    assert [tuple(row.values()) for row in found.rows] == [(KEYS[0], i, 1.5 * i) for i in range(3)]


def test_a_file_is_written_when_one_is_named(folder: Path) -> None:
    found = ask(folder, format="csv", out=str(folder / "x.csv"))
    assert Path(found.out).read_text() == found.text
    with pytest.raises(StorageFailure, match="cannot be written"):
        ask(folder, out=str(folder / "no/x.csv"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"table": "run"}, "results.table=run is not known; did you mean runs"),
        ({"format": "cvs"}, "results.format=cvs is not known; did you mean csv"),
        ({"limit": 0}, "results.limit=0"),
        ({"sort": "-pppl"}, "no column pppl in table=runs; did you mean ppl"),
        ({"columns": ["modell"]}, "no column modell"),
        ({"filter": {"windo": 1}}, "no column windo"),
        ({"where": "ppl <"}, "results.where=ppl <: Parser Error"),
        ({"where": "ppl < 'x'"}, "Conversion Error"),
        ({"where": "1 = (select count(*) from read_csv('/etc/passwd'))"}, "Permission Error"),
    ],
)
def test_what_cannot_be_asked_is_refused_with_what_is_near(
    folder: Path, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(SettingsError) as refused:
        ask(folder, **options)
    assert said in str(refused.value)
    assert refused.value.exit_code == 2


def test_a_folder_without_runs_and_a_broken_file_are_named(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(StoreError, match="has no table=runs yet"):
        ask(tmp_path / "none")
    assert select(tmp_path / "none", "select 1", {}) == []
    broken = store.runs_folder(folder, KEYS[1]) / "run-9.parquet"
    broken.write_bytes(b"PAR1 cut")
    with pytest.raises(StoreError, match=r"run-9\.parquet"):
        ask(folder)


def test_duckdb_is_imported_by_whoever_reads_only() -> None:
    code = "import sys, pipeline.results, jobs.results; sys.exit('duckdb' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
