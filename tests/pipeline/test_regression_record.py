"""Laws of a regression run's record: what is read is what was written, to the bit, or it is refused."""

from __future__ import annotations

import dataclasses
import json
import struct
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from pipeline import tables
from pipeline.errors import StorageFailure, StoreError
from pipeline.regression import record
from pipeline.regression.outcome import Baseline, Measured, WindowSums
from pipeline.results import ResultsSettings, Selection, results
from pipeline.settings import PathsSettings
from tests.pipeline.recorded_runs import KEY, WHEN, measured, outcome, recorded, speed, windows

NAMES = st.text(max_size=9)
FLOATS = st.floats(width=64)  # NaNs of any payload, both zeros, subnormal ones
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | NAMES,
    lambda part: st.lists(part, max_size=3) | st.dictionaries(NAMES, part, max_size=3),
    max_leaves=5,
)


def several(values: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(NAMES, values, max_size=3)


@st.composite
def window_sums(draw: st.DrawFn) -> WindowSums:
    n = draw(st.integers(0, 4))
    whole = [draw(arrays.arrays(np.int64, n)) for _ in range(4)]
    sums = draw(arrays.arrays(np.float64, n, elements=FLOATS))
    return WindowSums(*whole, sums, draw(st.none() | arrays.arrays(np.float64, n, elements=FLOATS)))


MEASURED = st.builds(
    Measured,
    check=NAMES, job=NAMES, variant=NAMES, data=NAMES, measure=several(JSON), subject=several(JSON),
    metrics=several(FLOATS), bits=several(NAMES), samples=several(st.lists(FLOATS, max_size=3)),
    windows=st.none() | window_sums(), tensors=several(NAMES),
    layers=st.dictionaries(st.integers(0, 2**40), several(NAMES), max_size=2),
)  # fmt: skip


def bits(value: Any) -> Any:
    """Something that is equal only where every bit is, and the order of keys."""
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, float):
        return struct.pack("<d", value)
    if dataclasses.is_dataclass(value):
        return {at.name: bits(getattr(value, at.name)) for at in dataclasses.fields(value)}
    if isinstance(value, dict):
        return [(key, bits(item)) for key, item in value.items()]
    return [bits(item) for item in value] if isinstance(value, (list, tuple)) else value


def by_key(one: Measured) -> Measured:
    """Measure and subject in the order of their JSON, which means nothing."""
    told = {
        name: json.loads(json.dumps(getattr(one, name), sort_keys=True)) for name in ("measure", "subject")
    }
    return dataclasses.replace(one, **told)


@settings(max_examples=12)
@given(st.lists(MEASURED, max_size=3))
def test_what_is_read_is_what_was_written_to_the_bit(rows: list[Measured]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        _, back = record.read(recorded(Path(folder), outcome(measured=rows)))
    assert bits(back) == bits([by_key(one) for one in rows])


def test_the_run_is_read_with_its_measurements_and_without_any(tmp_path: Path) -> None:
    base = Baseline("main", "MLflow run 1", "1", {}, [])
    for n, run in enumerate([outcome(baseline=base), outcome(measured=[], verdict="incomplete")]):
        told, back = record.read(recorded(tmp_path / str(n), run))
        assert {name: told[name] for name in run.provenance} == run.provenance
        assert (told["suite"], told["run_key"], told["verdict"]) == ("smoke", KEY, run.verdict)
        assert (told["checks"], told["warnings"]) == (run.checks, ["a warning"])
        assert told["record"] == "run-20260102T030405.678901Z.parquet"
        assert len(back) == len(run.measured)
    assert (
        record.read(recorded(tmp_path / "0", outcome(minute=5, baseline=base)))[0]["baseline"]["run"] == "1"
    )


def test_a_record_made_from_a_read_one_is_the_same(tmp_path: Path) -> None:
    told, back = record.read(recorded(tmp_path))
    again = outcome(measured=back, provenance=told | {"finished_at": told["finished_at"].isoformat()})
    path = record.write(tmp_path, again, "run-of-mine")
    assert path.name == "run-of-mine.parquet"
    assert record.read(path)[0] == told | {"record": "run-of-mine.parquet"}
    with pytest.raises(StorageFailure, match="is there already"):
        record.write(tmp_path, again, "run-of-mine")
    with pytest.raises(StorageFailure, match="cannot be made"):
        record.write(path / "folder", again)


def test_secrets_are_not_kept(tmp_path: Path) -> None:
    url = "https://me:pass@host/data.txt?token=s3cret"
    said = {"settings": {"pydoc": {"data.path": url, "note": f'"{url}"'}}}
    path = recorded(
        tmp_path, outcome(provenance=said, measured=[measured(measure={"path": url})], warnings=[url])
    )
    told, (back,) = record.read(path)
    text = repr((told, back, pq.read_table(path, partitioning=None).to_pylist()))
    assert "pass" not in text.replace("passed", "")
    assert "s3cret" not in text
    assert told["settings"]["pydoc"]["data.path"] == "https://***@host/data.txt?token=***"


def rewritten(path: Path, change: Any) -> None:
    table = change(pq.read_table(path, partitioning=None))
    path.unlink()
    pq.write_table(table, path)


def with_meta(**meta: str) -> Any:
    names = {name.replace("_", ".", 1).encode(): text.encode() for name, text in meta.items()}
    return lambda table: table.replace_schema_metadata(table.schema.metadata | names)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: path.unlink(), "there is no such file"),
        (lambda path: (path.unlink(), path.mkdir()), "is a folder"),
        (lambda path: path.write_bytes(b""), "is no record, or broken"),
        (lambda path: path.write_text("suite,check\nsmoke,pydoc\n"), "is no record, or broken"),
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "is no record, or broken"),
        (lambda path: rewritten(path, lambda t: tables.table([], tables.RUNS_SCHEMA)), "is no record of a"),
        (lambda path: rewritten(path, lambda t: t.drop_columns(["bits"])), "is no record of a regr"),
        (lambda path: rewritten(path, lambda t: t.slice(1)), "has another SHA-256"),
        (lambda path: rewritten(path, with_meta(pagemill_schema_version="2")), "schema version 2, expected"),
        (lambda path: rewritten(path, with_meta(pagemill_record="{}")), "has another SHA-256"),
        (lambda path: rewritten(path, with_meta(pagemill_schema_version="x")), "is no record, or broken"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_record_is_refused_by_name(tmp_path: Path, spoil: Any, said: str) -> None:
    path = recorded(tmp_path)
    spoil(path)
    with pytest.raises(StoreError) as refused:
        record.read(path)
    assert str(path) in str(refused.value)
    assert said in str(refused.value)
    assert refused.value.hint


def test_a_byte_that_changed_is_noticed(tmp_path: Path) -> None:
    whole = (path := recorded(tmp_path)).read_bytes()
    _, before = record.read(path)
    for at in range(4, len(whole), 211):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        try:
            _, after = record.read(path)
        except StoreError:
            continue
        assert bits(after) == bits(before), f"byte {at}: in a column that is not read, or in none"


def test_columns_that_were_added_since_do_not_matter(tmp_path: Path) -> None:
    path = recorded(tmp_path)
    _, before = record.read(path)
    rewritten(path, lambda t: t.append_column("new", pa.nulls(len(t))).drop_columns(["cpu"]))
    assert bits(record.read(path)[1]) == bits(before)


def test_the_results_job_shows_the_last_of_each_measurement(tmp_path: Path) -> None:
    recorded(tmp_path)
    recorded(tmp_path, outcome(minute=9, verdict="regression"))
    recorded(tmp_path, outcome(minute=10, verdict="incomplete"))

    def ask(**options: Any) -> Any:
        paths = PathsSettings(str(tmp_path))
        return results(ResultsSettings(paths, Selection(table="regressions", **options)))

    found = ask()
    assert [(row["check"], row["data"], row["verdict"]) for row in found.rows] == [
        ("pydoc", "pydoc", "regression"),
        ("speed", "ppl512", "regression"),
        ("speed", "tg64@8", "regression"),
    ]
    assert [(row["ppl"], row["fma_share"], row["broken"]) for row in found.rows][:2] == [
        (20.0, None, ["ppl"]),
        (None, 0.8, []),
    ]
    assert len(ask(latest=False).rows) == 9
    (row,) = ask(filter={"check": "pydoc"}, columns=["metrics", "nll_sum", "layers"]).rows
    assert row["metrics"] == {"ppl": 20.0, "n_windows": 2.0}
    (plain,) = json.loads(ask(filter={"check": "pydoc"}, columns=["metrics", "layers"], format="json").text)
    assert plain["metrics"]["ppl"] == 20.0
    assert plain["layers"]["0"]["blk.0"] == "2" * 64
    line = ask(filter={"check": "pydoc"}, columns=["metrics"], format="csv").text.splitlines()[1]
    assert json.loads(line[1:-1].replace('""', '"')) == plain["metrics"]


class Listener:
    """A tracker that keeps what it is told."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.told: dict[str, Any] = {}

    def log_run(self, name: str, params: Any, metrics: Any, tags: Any, artifacts: Any, **rest: Any) -> str:
        kept = [(path.name, path.stat().st_size > 0) for path in artifacts]
        self.told = {"name": name, "params": params, "metrics": metrics, "tags": tags, "kept": kept, **rest}
        return "1"


def test_a_run_is_logged_with_its_settings_figures_and_reports(tmp_path: Path) -> None:
    run = outcome(verdict="regression", baseline=Baseline("main", "MLflow run 9", "9", {}, []))
    files = [recorded(tmp_path, run), *(tmp_path / name for name in ("summary.md", "report.html"))]
    for file in files[1:]:
        file.write_text(f"# {file.name}")
    listener = Listener()
    assert record.track(listener, run, files, 12.5) == "1"
    told = listener.told
    assert told["name"] == "smoke: regression"
    assert told["params"] == {"suite": "smoke", "checks": run.provenance["settings"]}
    assert told["metrics"] == {
        "ppl/pydoc": 20.0,
        "n_windows/pydoc": 2,
        "fma_share/speed/ppl512": 0.8,
        "ratio/llama_cpp/speed/ppl512": 1.1,
        "fma_share/speed/tg64_8": 0.5,
        "ratio/llama_cpp/speed/tg64_8": 1.1,
        "n_gates": 2,
        "n_broken": 1,
    }
    tags = told["tags"]
    assert (tags["run_key"], tags["job"], tags["suite"]) == (KEY, "regression", "smoke")
    assert (tags["verdict"], tags["record"], tags["judged_against"]) == ("regression", files[0].name, "9")
    assert tags["mlflow.note.content"] == "# summary.md"
    assert told["kept"] == [(path.name, True) for path in files]
    assert (told["complete"], told["started_s"]) == (True, 12.5)
    assert record.track(listener, outcome(verdict="incomplete"), files, 1.0)
    assert listener.told["complete"] is False


def test_a_run_is_logged_from_its_record_alone_under_any_name(tmp_path: Path) -> None:
    path = recorded(tmp_path).rename(tmp_path / "smoke.parquet")
    listener = Listener()
    assert record.track_record(listener, path) == "1"
    assert listener.told["kept"] == [(listener.told["tags"]["record"], True)]
    assert listener.told["started_s"] == WHEN.timestamp()
    assert listener.told["metrics"]["ppl/pydoc"] == 20.0


def test_figures_of_a_ladder_are_told_apart_by_variant(tmp_path: Path) -> None:
    pairs = [measured("ladder", variant=name, windows=windows([1.0], [0.5])) for name in ("a", "b")]
    listener = Listener()
    record.track(listener, outcome(measured=[*pairs, speed("x", 0.1)]), [recorded(tmp_path)], 1.0)
    assert {"ppl/ladder/a", "ppl/ladder/b", "fma_share/speed"} < set(listener.told["metrics"])
