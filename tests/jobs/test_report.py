"""The table after a run: right on any width, and with whatever is unknown left out."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from jobs import report

SUMMARY = {
    "ppl": 24.497366,
    "ppl_stderr": 0.8,
    "ppl_stderr_clustered": 0.9,
    "n_windows": 6,
    "n_scored": 1530,
    "n_tokens": 3072,
    "tok_per_s": 245.7,
    "n_workers": 2,
    "shards_done": 6,
    "shards_reused": 4,
    "model_resident_bytes": 98_000_000,
    "model_pss_sum_bytes": 98_100_000,
    "anonymous_bytes_max": 150_000_000,
    "wall_s": 12.0,
    "compile_s": None,
    "load_s": 0.5,
    "table": "/a/results with spaces/v1/table=windows/run_key=0123456789abcdef",
    "mlflow_run_id": "abc",
    "warnings": ["the window is longer than [trained]"],
}


def shown(summary: dict, width: int, results: Path | None = None) -> str:
    text = io.StringIO()
    report.show(summary, results, Console(file=text, width=width, highlight=False))
    return text.getvalue()


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_every_width_shows_every_figure(width: int) -> None:
    text = shown(SUMMARY, width)
    together = "".join(text.split())
    for figure in ("24.4974", "0.8000", "0.9000", "1,530", "245.7", "98.0MB", "150.0MB", "12.0s"):
        assert figure in together
    table = text[: text.index("Parquet:")]
    assert all(len(line.rstrip()) <= width for line in table.splitlines())
    assert SUMMARY["table"] in text, "a path is never wrapped"
    assert "[trained]" in text, "brackets are text, not markup"


def test_what_is_unknown_is_left_out() -> None:
    text = shown({"ppl": None, "tok_per_s": float("nan"), "wall_s": 1.0}, 80)
    assert "perplexity" not in text
    assert "None" not in text
    assert "nan" not in text
    assert shown({}, 80) == ""


def test_a_results_folder_elsewhere_is_named_to_make() -> None:
    assert "make mlflow, then" in shown(SUMMARY, 80, Path("results"))
    assert "make mlflow RESULTS='/a b', then" in shown(SUMMARY, 80, Path("/a b"))


def point(window: int, **rest: object) -> dict:
    return {"point": {"model.path": "/a/m.gguf", "protocol.window": window}, "ok": True, **rest}


def test_a_sweep_is_a_table_of_its_points_in_their_order() -> None:
    points = [point(512, ppl=2.5, n_windows=1000, wall_s=1.0), point(64, ppl=None)]
    points.append({"point": {"model.path": "/a/m.gguf", "protocol.window": 9}, "ok": False, "error": {}})
    lines = shown({"points": points, "n_points": 3, "n_runs": 3, "n_points_done": 2}, 80).splitlines()
    assert lines[0].split()[:2] == ["window", "perplexity"], "what is the same in all points has no column"
    assert lines[1].split() == ["512", "2.5000", "-", "1,000", "-", "1.0"]
    assert lines[2].split() == ["64", "-", "-", "-", "-", "-"]
    assert lines[3].split() == ["9", "failed"]
    assert lines[4].split() == ["points", "2", "of", "3", "done"]


def test_a_sweeps_plan_says_where_its_estimate_comes_from() -> None:
    plan = {"n_windows": 8, "n_tokens": 4096, "shards_todo": 2, "model_bytes": 98e6, "worker_bytes": 2e8}
    summary = {"dry_run": True, "points": [point(512, estimated_s=20.5, **plan)], "n_workers": 2}
    summary |= {"estimated_s": 20.5, "estimated_from": ["3 earlier runs"], "memory_bytes": 498e6}
    text = shown(summary, 100)
    for figure in ("4,096", "98.0", "200.0", "20.5", "3 earlier runs", "498.0 MB", "start of 2 workers"):
        assert figure in text
