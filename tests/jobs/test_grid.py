"""From the words of a sweep to the settings of its points."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline import RunResult
from pipeline.sweep import Point

GIVEN = ("perplexity", "data.path=t.txt", "paths.results=results", "tracking=none", "cluster=inline")


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Point]:
    """The points that the command line hands to the pipeline."""
    points: list[Point] = []

    def evaluate_all(given: list[Point], progress: object = None) -> RunResult:
        points.extend(given)
        return RunResult(
            {"exit_code": 0, "points": [{"point": p.axes, "ok": True} for p in given]}, [], "", 0
        )

    monkeypatch.setattr("pipeline.evaluate_all", evaluate_all)
    return points


def of(point: Point) -> tuple[Any, ...]:
    s = point.settings
    assert s is not None, point.error
    return s.model.path, s.data.name, s.data.path, s.protocol.window


def test_a_sweep_is_every_combination_in_the_order_of_its_axes(pagemill, seen) -> None:
    answer = pagemill(
        *GIVEN, "sweep={model.path:[a.gguf,b c.gguf],data:[text,pydoc],protocol.window:[512,2048]}"
    )
    assert answer.exit_code == 0, answer.stderr
    assert [of(point) for point in seen] == [
        (model, name, "t.txt", window)
        for model in ("a.gguf", "b c.gguf")
        for name in ("text", "pydoc")
        for window in (512, 2048)
    ]
    assert seen[0].axes == {"model.path": "a.gguf", "data": "text", "protocol.window": 512}
    assert {(p.settings.cluster.kind, p.settings.tracking.kind) for p in seen} == {("inline", "none")}
    assert all(p.settings.sweep == {} for p in seen)
    assert len(answer.line["points"]) == 8
    assert answer.line["job"] == "perplexity"


def test_a_choice_wins_over_the_same_one_on_the_command_line(pagemill, seen) -> None:
    words = ("perplexity", "model.path=m.gguf", "data=wikitext2", "sweep={data:[pydoc]}")
    assert pagemill(*words).exit_code == 0
    assert of(seen[0]) == ("m.gguf", "pydoc", "python:pydoc_data.topics", 512)


def test_an_experiment_may_be_a_sweep_and_the_command_line_add_an_axis(pagemill, seen) -> None:
    assert pagemill("perplexity", "experiment=windows").exit_code == 0
    assert [point.axes for point in seen] == [{"protocol.window": 256}, {"protocol.window": 512}]
    assert seen[0].settings.sort == "ppl"
    seen.clear()
    answer = pagemill("perplexity", "experiment=windows", "sweep={protocol.window:[64],protocol.limit:[1,2]}")
    assert answer.exit_code == 0, answer.stderr
    assert [p.axes for p in seen] == [{"protocol.window": 64, "protocol.limit": n} for n in (1, 2)]


def test_an_empty_mapping_is_no_sweep(pagemill, seen, pipeline) -> None:
    assert pagemill(*GIVEN, "model.path=m.gguf", "sweep={}").exit_code == 0
    assert not seen
    assert len(pipeline.seen) == 1


@pytest.mark.parametrize(
    ("sweep", "message", "hint"),
    [
        ("{protocol.window:[]}", "no values, so there are no points", "expected for example"),
        ("{protocol.window:512}", "is no list of values", "expected for example"),
        ("{protocol.windw:[1]}", "unknown key protocol.windw", "protocol.window"),
        ("{dta:[text]}", "unknown key dta", "data"),
        ("{cluster.workers:[1,2]}", "cluster.workers is one for all points", "--multirun"),
        ("{engine.threads:[1,2]}", "engine.threads is one for all points", "--multirun"),
        ("{tracking:[none,local]}", "tracking is one for all points", "--multirun"),
        ("{protocol.window:[abc]}", "protocol.window=abc: ", "another value"),
        ("{data:[1]}", "are not names of choices", "expected for example"),
    ],
)
def test_what_is_no_sweep_is_refused(sweep, message, hint, pagemill, seen) -> None:
    answer = pagemill(*GIVEN, "model.path=m.gguf", f"sweep={sweep}")
    assert answer.exit_code == 2
    assert message in answer.line["error"]["message"]
    assert hint in answer.line["error"]["hint"]
    assert not seen


def test_choices_that_do_not_exist_or_lack_a_key_are_bad_points(pagemill, seen) -> None:
    assert (
        pagemill("perplexity", "model.path=m.gguf", "sweep={data:[pydoc,wikitxt2,wikitext2]}").exit_code == 0
    )
    good, unknown, lacking = seen
    assert good.error is None
    assert "data=wikitxt2: there is no such choice" in str(unknown.error)
    assert "data=wikitext2" in unknown.error.hint
    assert str(lacking.error) == "data.path is not set"


def test_a_thousand_points_of_settings_take_no_time(pagemill, seen) -> None:
    windows = ",".join(str(n) for n in range(100, 1100))
    pagemill(*GIVEN, "model.path=m.gguf", "sweep={protocol.window:[100,101]}")
    began = time.monotonic()
    assert pagemill(*GIVEN, "model.path=m.gguf", f"sweep={{protocol.window:[{windows}]}}").exit_code == 0
    assert time.monotonic() - began < 10, "composing each would take minutes"
    assert len(seen) == 1002


def test_multirun_is_one_run_after_the_other(pagemill, pipeline) -> None:
    answer = pagemill(*GIVEN, "model.path=m.gguf", "--multirun", "protocol.window=64,128")
    assert answer.exit_code == 0
    assert [settings.protocol.window for settings in pipeline.seen] == [64, 128]
    assert len(answer.line["runs"]) == 2


def test_results_are_text_and_then_the_json_line(pagemill, tmp_path: Path) -> None:
    answer = pagemill("results", "paths.results=nowhere")
    assert (answer.exit_code, answer.line["error"]["type"]) == (2, "StoreError")
    from pipeline import store, tables

    folder = store.runs_folder(tmp_path / "results", "a" * 16)
    folder.mkdir(parents=True)
    row = {"ok": True, "ppl": 12.5, "model_path": "/m/x=1, y.gguf", "data_name": "pydoc"}
    store.commit(tables.table([row], tables.RUNS_SCHEMA), folder / "run-1.parquet", {})
    ask = ("results", "results.filter={data_name:py*}", "results.where=ppl < 13 and data_name = 'pydoc'")
    answer = pagemill(*ask, "results.format=csv", "results.columns=[model,ppl]")
    assert answer.exit_code == 0, answer.stderr
    text, line = answer.stdout.rsplit("\n", 2)[:2]
    assert text == 'model,ppl\n"x=1, y",12.5'
    assert json.loads(line)["n_rows"] == 1
    answer = pagemill(*ask, "results.format=json", "results.out=x y.json")
    assert answer.stdout.count("\n") == 1
    assert json.loads((tmp_path / "x y.json").read_text())[0]["ppl"] == 12.5
