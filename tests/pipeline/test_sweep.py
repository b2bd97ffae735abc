"""Laws of sweeps: the rows of one run after the other, whatever is killed, refused, named twice, resumed."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_engine import FakeModel, install
from make_gguf import tiny_llama

from pipeline import evaluate, evaluate_all
from pipeline.errors import ScoreError, SettingsError
from pipeline.settings import (
    ClusterSettings,
    DataSettings,
    ModelSettings,
    PathsSettings,
    PerplexitySettings,
    ProtocolSettings,
    TrackingSettings,
)
from pipeline.sweep import Point
from pipeline.worker import EvalWorker

ROOT = Path(__file__).parents[2]
WINDOWS = (16, 20, 24, 32, 48, 64)
ALIKE = [
    "window",
    "document",
    "n_scored",
    "nll_sum_nats",
    "nll_sq_sum",
    "n_bytes",
    "n_words",
    "n_tokens",
    "shard",
]
TEXTS = [
    f"{i}: the quick brown fox jumps over the lazy dog, and nobody asks why. " * (6 + i) for i in range(5)
]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Two models and five texts, as the fake engine reads them."""
    for i in range(2):
        (tmp_path / f"m{i}.gguf").write_bytes(b"GGUF" + bytes(9000 + i))
    for i, text in enumerate(TEXTS):
        (tmp_path / f"t{i}.txt").write_text(text)
    return tmp_path


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeModel]:
    return install(monkeypatch)


def point(
    folder: Path, model: str, data: str, window: int = 32, results: str = "results", **rest: Any
) -> Point:
    axes = {"model.path": model, "data.path": data, "protocol.window": window}
    settings = PerplexitySettings(
        model=ModelSettings(str(folder / model)),
        data=DataSettings(path=str(folder / data)),
        protocol=ProtocolSettings(window=window),
        cluster=ClusterSettings("inline", windows_per_shard=8),
        tracking=TrackingSettings("none"),
        paths=PathsSettings(str(folder / results), str(folder / "cache")),
        **rest,
    )
    return Point(axes, settings)


def grid(
    folder: Path, models: int = 2, texts: int = 2, windows: tuple[int, ...] = (16, 32), **rest: Any
) -> list[Point]:
    return [
        point(folder, f"m{m}.gguf", f"t{t}.txt", window, **rest)
        for t, m, window in itertools.product(range(texts), range(models), windows)
    ]


def rows(results: Path) -> list[dict[str, Any]]:
    """Every window of every run: its run, and what must not depend on how it was computed."""
    found = []
    for path in sorted((results / "v1/table=windows").glob("run_key=*/shard-*.parquet")):
        table: pa.Table = pq.read_table(path, partitioning=None).select(ALIKE)
        found += [{"run": path.parent.name, **row} for row in table.to_pylist()]
    return found


def runs(results: Path) -> list[dict[str, Any]]:
    files = sorted((results / "v1/table=runs").glob("run_key=*/run-*.parquet"))
    return [pq.read_table(path, partitioning=None).to_pylist()[0] for path in files]


def test_a_sweep_is_its_points_run_one_by_one(files: Path, fake: type[FakeModel]) -> None:
    swept = evaluate_all(grid(files))
    alone = [evaluate(p.settings).summary for p in grid(files, results="alone")]
    for told in swept.summary["points"]:
        assert told.keys() >= alone[0].keys()
        assert told["point"].keys() == {"model.path", "data.path", "protocol.window"}
    same = ("run_key", "measure_key", "nll_sha256", "ppl", "ppl_stderr_clustered", "n_windows", "n_scored")
    by_key = {single["run_key"]: single for single in alone}
    for told in swept.summary["points"]:
        assert {key: told[key] for key in same} == {key: by_key[told["run_key"]][key] for key in same}
    assert rows(files / "results") == rows(files / "alone")
    assert (swept.exit_code, swept.summary["ok"], swept.summary["n_points_done"]) == (0, True, 8)
    keys = {row["sweep_key"] for row in runs(files / "results")}
    assert keys == {swept.summary["sweep_key"]}
    assert len(runs(files / "results")) == 8
    assert {row["sweep_key"] for row in runs(files / "alone")} == {None}
    json.dumps(swept.summary, allow_nan=False)


def test_each_model_is_opened_once_and_each_text_is_read_once_for_it(
    files: Path, fake: type[FakeModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline import preflight

    opened: list[str] = []
    read: list[str] = []
    real_open, real_load = EvalWorker._open, preflight.load_text
    monkeypatch.setattr(
        EvalWorker, "_open", lambda self, spec: (opened.append(spec.model_path), real_open(self, spec))[1]
    )
    monkeypatch.setattr(
        preflight,
        "load_text",
        lambda data, *rest, **more: (read.append(data.path), real_load(data, *rest))[1],
    )
    assert evaluate_all(grid(files)).exit_code == 0
    assert [Path(path).name for path in opened] == ["m0.gguf", "m1.gguf"]
    assert [Path(path).name for path in read] == ["t0.txt", "t1.txt"] * 2


def test_a_sweep_is_resumed_as_a_whole(
    files: Path, fake: type[FakeModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, n = EvalWorker.run, 0

    def interrupted(self: EvalWorker, shard: Any) -> Any:
        nonlocal n
        n += 1
        if n == 7:
            raise KeyboardInterrupt
        return real(self, shard)

    with monkeypatch.context() as patch:
        patch.setattr(EvalWorker, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            evaluate_all(grid(files))
    kept = len(rows(files / "results"))
    assert kept
    n_rows_before = len(runs(files / "results"))
    assert n_rows_before, "points that were finished have their rows already"
    resumed = evaluate_all(grid(files))
    assert sum(told["shards_reused"] for told in resumed.summary["points"]) == 6
    evaluate_all(grid(files, results="whole"))
    assert rows(files / "results") == rows(files / "whole")
    calls = fake.calls
    again = evaluate_all(grid(files))
    assert fake.calls == calls, "nothing is computed twice"
    assert all(told["shards_reused"] == told["shards_done"] for told in again.summary["points"])


def test_the_same_point_twice_is_run_once_and_said(files: Path, fake: type[FakeModel]) -> None:
    (files / "copy.txt").write_bytes((files / "t0.txt").read_bytes())
    points = [point(files, "m0.gguf", name) for name in ("t0.txt", "copy.txt", "t0.txt")]
    result = evaluate_all(points)
    (told,) = result.summary["points"]
    assert (result.exit_code, result.summary["n_points"], result.summary["n_runs"]) == (0, 3, 1)
    assert [axes["data.path"] for axes in told["also"]] == ["t0.txt", "copy.txt"]
    said = [warning for warning in result.warnings if "run once" in warning]
    assert len(said) == 2
    assert told["run_key"] in said[0]
    assert len(runs(files / "results")) == 1


def test_points_that_cannot_run_refuse_the_sweep_before_any_starts(
    files: Path, fake: type[FakeModel]
) -> None:
    (files / "bad.gguf").write_bytes(b"PK\x03\x04")
    points = [*grid(files), point(files, "bad.gguf", "t0.txt"), point(files, "bad.gguf", "t1.txt")]
    points += [
        point(files, "m0.gguf", "t0.txt", 4000),
        Point({"data": "nope"}, None, SettingsError("no nope")),
    ]
    with pytest.raises(SettingsError, match="4 of 12 points cannot run") as refused:
        evaluate_all(points)
    text = str(refused.value)
    assert "model.path=bad.gguf data.path=t0.txt protocol.window=32 and 1 more: " in text
    assert "protocol.window=4000" in text
    assert "data=nope: no nope" in text
    assert "on_bad_point=skip" in refused.value.hint
    assert refused.value.exit_code == 2
    assert fake.calls == 0
    assert not list((files / "results").rglob("*.parquet"))
    assert not list((files / "results").rglob("plan.json"))


def test_on_request_points_that_cannot_run_are_skipped_and_the_sweep_is_incomplete(
    files: Path, fake: type[FakeModel]
) -> None:
    points = [point(files, "none.gguf", "t0.txt", on_bad_point="skip"), *grid(files, on_bad_point="skip")]
    result = evaluate_all(points)
    assert (result.exit_code, result.summary["ok"], result.summary["n_points_done"]) == (3, False, 8)
    (bad,) = [told for told in result.summary["points"] if not told["ok"]]
    assert (bad["exit_code"], bad["error"]["type"]) == (2, "FileNotFoundError")
    assert "1 of 9 points have no result" in result.summary["error"]["message"]
    with pytest.raises(SettingsError, match="1 of 1 points cannot run"):
        evaluate_all(points[:1])


def test_a_point_that_fails_stops_no_other(
    files: Path, fake: type[FakeModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    real_open, real_run = EvalWorker._open, EvalWorker.run

    def breaks_open(self: EvalWorker, spec: Any) -> None:
        if spec.model_path.endswith("m0.gguf"):
            raise ScoreError("changed under way")
        real_open(self, spec)

    def breaks_run(self: EvalWorker, shard: Any) -> Any:
        if self.spec.protocol.window == 16 and shard.first_window == 8:
            raise ScoreError("window 9 is no number")
        return real_run(self, shard)

    with monkeypatch.context() as patch:
        patch.setattr(EvalWorker, "_open", breaks_open)
        patch.setattr(EvalWorker, "run", breaks_run)
        result = evaluate_all(grid(files))
    done = [
        (p["point"]["model.path"], p["point"]["protocol.window"]) for p in result.summary["points"] if p["ok"]
    ]
    assert done == [("m1.gguf", 32)] * 2
    assert result.exit_code == 3
    assert all(p["ppl"] is None for p in result.summary["points"] if not p["ok"])
    assert "changed under way" in result.summary["error"]["message"]
    assert len(runs(files / "results")) == 8, "a row for each point, incomplete ones too"
    assert evaluate_all(grid(files)).exit_code == 0, "once the cause is gone the rest is computed"


def test_the_table_is_sorted_as_asked(files: Path, fake: type[FakeModel]) -> None:
    def order(sort: str | None) -> list[dict[str, Any]]:
        return list(evaluate_all(grid(files, sort=sort)).summary["points"])

    ppl = [told["ppl"] for told in order("ppl")]
    assert ppl == sorted(ppl)
    assert [told["ppl"] for told in order("-ppl")] == ppl[::-1]
    windows = [told["point"]["protocol.window"] for told in order("-protocol.window")]
    assert windows == [32] * 4 + [16] * 4
    calls = fake.calls
    with pytest.raises(SettingsError, match="sort=pl is no key of a point; did you mean ppl"):
        evaluate_all(grid(files, sort="pl", results="other"))
    assert fake.calls == calls


def test_without_points_there_is_nothing_to_run() -> None:
    with pytest.raises(SettingsError, match="0 of 0 points"):
        evaluate_all([])


def test_tracking_gets_a_parent_and_a_child_for_each_point(
    files: Path, fake: type[FakeModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline import sweep

    logged: list[tuple[str, dict[str, Any]]] = []

    class Tracker:
        warnings = ()

        def prepare(self) -> None: ...
        def close(self) -> None: ...

        def log_run(self, name: str, *_: Any, **rest: Any) -> str:
            logged.append((name, rest))
            return f"id {len(logged)}"

        def end_run(self, run_id: str, metrics: dict[str, Any], *, complete: bool) -> None:
            logged.append((run_id, {"ended": metrics, "complete": complete}))

    monkeypatch.setattr(sweep, "open_tracker", lambda *_: Tracker())
    result = evaluate_all(grid(files))
    (_, parent), *children, (ended, last) = logged
    assert parent["stays_open"]
    assert {rest["parent"] for _, rest in children} == {"id 1"} == {ended}
    assert len(children) == 8
    assert children[0][0] == "model.path=m0.gguf data.path=t0.txt protocol.window=16"
    assert last == {"ended": {"n_points": 8, "n_points_done": 8}, "complete": True}
    assert result.summary["mlflow_run_id"] == "id 1"
    assert [told["mlflow_run_id"] for told in result.summary["points"]] == [f"id {i}" for i in range(2, 10)]


def real_files(folder: Path) -> Path:
    for i in range(2):
        tiny_llama(folder / f"m{i}.gguf", seed=i, n_layers=1, vocab=300)
    for i, text in enumerate(TEXTS):
        (folder / f"t{i}.txt").write_text(text)
    return folder


def test_a_dry_run_tells_windows_memory_and_time_and_how_it_was_estimated(tmp_path: Path) -> None:
    real_files(tmp_path)
    result = evaluate_all(grid(tmp_path, dry_run=True))
    s = result.summary
    assert (s["dry_run"], len(s["points"])) == (True, 8)
    for told in s["points"]:
        assert told["n_tokens"] == told["n_windows"] * told["point"]["protocol.window"]
        assert told["model_bytes"] == (tmp_path / told["point"]["model.path"]).stat().st_size
        assert told["worker_bytes"] > 1e8
        assert told["estimated_s"] > 0
        assert "no earlier run of this model here" in told["estimated_from"]
    assert s["estimated_s"] == pytest.approx(sum(told["estimated_s"] for told in s["points"]))
    assert s["memory_bytes"] == max(told["model_bytes"] + told["worker_bytes"] for told in s["points"])
    assert not list((tmp_path / "results").rglob("*.parquet"))

    evaluate_all(grid(tmp_path, texts=1, windows=(16,)))
    rates = {row["model_path"]: row["tok_per_s"] for row in runs(tmp_path / "results")}
    for told in evaluate_all(grid(tmp_path, dry_run=True)).summary["points"]:
        alike = told["point"]["protocol.window"] == 16
        assert told["estimated_from"].startswith(
            f"an earlier run of this model {'and window' if alike else 'with other windows'} on this host"
        )
        rate = rates[str(tmp_path / told["point"]["model.path"])]
        left = 0 if not told["shards_todo"] else told["n_tokens"]
        assert told["estimated_s"] == pytest.approx(left / rate)


@pytest.mark.ray
def test_sixty_points_with_a_worker_killed_give_the_same_rows_to_the_bit(tmp_path: Path) -> None:
    """2 models x 5 texts x 6 windows on two workers against an undisturbed loop; and what a point costs."""
    real_files(tmp_path)
    points = grid(tmp_path, texts=5, windows=WINDOWS)
    assert len(points) == 60
    undisturbed = evaluate_all(points)
    assert undisturbed.exit_code == 0

    axes = {
        "model.path": [f"m{i}.gguf" for i in range(2)],
        "data.path": [f"t{i}.txt" for i in range(5)],
        "protocol.window": list(WINDOWS),
    }
    sweep = ",".join(f"{key}:[{','.join(map(str, values))}]" for key, values in axes.items())
    words = [f"sweep={{{sweep}}}", "cluster=local", "cluster.workers=2", "cluster.windows_per_shard=8"]
    words += ["tracking=none", "paths.results=killed", "paths.cache=cache"]
    command = [sys.executable, "-m", "jobs.perplexity", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    driver = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    killed = kill_a_worker(tmp_path / "killed", driver, after=15)
    out, log = driver.communicate(timeout=100)
    assert driver.returncode == 0, log
    assert "lost its worker" in log
    line = json.loads(out.splitlines()[-1])
    assert (line["ok"], line["n_points"], len(line["points"])) == (True, 60, 60)

    assert rows(tmp_path / "killed") == rows(tmp_path / "results")
    digests = {told["run_key"]: told["nll_sha256"] for told in undisturbed.summary["points"]}
    assert {told["run_key"]: told["nll_sha256"] for told in line["points"]} == digests
    scored_by = {row["worker"] for row in windows_of(tmp_path / "killed")}
    assert len(scored_by) >= 2  # a third where the killed one's successor was ready before the end
    assert any(worker.endswith(f":{killed}") for worker in scored_by)

    for results in ("results", "killed"):
        ended = sorted(row["finished_at"].timestamp() for row in runs(tmp_path / results))
        per_point = (ended[-1] - ended[0]) / (len(ended) - 1)
        print(f"{results}: {per_point:.3f} s a point after the first")  # noqa: T201
        assert per_point < 2 * 0.3, "under 0.3 s is the promise; twice that, since CI's two cores may be busy"


def windows_of(results: Path) -> list[dict[str, Any]]:
    files = (results / "v1/table=windows").glob("run_key=*/shard-*.parquet")
    return [row for path in files for row in pq.read_table(path, partitioning=None).to_pylist()]


def kill_a_worker(results: Path, driver: subprocess.Popen[str], after: int) -> int:
    """SIGKILL to a worker that has finished a shard, once so many are finished."""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and driver.poll() is None:
        found = list((results / "v1/table=windows").glob("run_key=*/shard-*.parquet"))
        if len(found) >= after:
            newest = max(found, key=lambda path: path.stat().st_mtime_ns)
            pid = int(pq.read_table(newest, partitioning=None).column("worker")[0].as_py().rpartition(":")[2])
            os.kill(pid, signal.SIGKILL)
            return pid
        time.sleep(0.01)
    raise AssertionError("the sweep ended before a worker could be killed")
