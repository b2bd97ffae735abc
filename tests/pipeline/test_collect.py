"""`cluster.collect`: the driver writes what workers send it, and the files are the same to the byte."""

from __future__ import annotations

import os
import pickle
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_comparison
import pyarrow.parquet as pq
import pytest
from fake_engine import install
from make_gguf import tiny_llama

from pipeline import evaluate, perplexity, store
from pipeline.cluster import RayExecutor
from pipeline.compare import analysis, compare
from pipeline.compare.settings import CompareSettings
from pipeline.errors import StorageFailure, StoreError
from pipeline.executor import InlineExecutor, Task, publishing
from pipeline.folders import folder_of
from pipeline.imatrix import collect
from pipeline.imatrix.settings import ImatrixChoices, ImatrixSettings
from pipeline.settings import ClusterSettings, PathsSettings, PerplexitySettings, ProtocolSettings
from pipeline.shards import Shard
from pipeline.worker import EvalWorker, ShardResult
from tests.pipeline.slow_workers import prepare, slow_executor
from tests.pipeline.slow_workers import settings_of as slow_settings_of
from tests.pipeline.test_object_store import settings_of
from tests.pipeline.test_store import rows

COLLECTED = ClusterSettings("inline", windows_per_shard=4, collect=True)


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PerplexitySettings:
    """An inline run of the fake engine."""
    install(monkeypatch)
    return settings_of(tmp_path, str(tmp_path / "results"))


def collected(settings: PerplexitySettings) -> PerplexitySettings:
    """The same, its shards sent to the driver of another results folder."""
    return replace(
        settings, cluster=COLLECTED, paths=replace(settings.paths, results=settings.paths.results + "2")
    )


def shards_of(table: str) -> dict[str, Any]:
    """Scores of the files of a run, and what the files say of themselves, by name."""
    columns = ["window", "nll_sum_nats", "nll_sq_sum", "n_scored", "measure_key"]
    found = {path.name: pq.read_table(path, partitioning=None) for path in Path(table).glob("shard-*")}
    return {name: (table.schema, table.select(columns).to_pylist()) for name, table in found.items()}


def test_a_table_that_travels_makes_the_same_file(tmp_path: Path) -> None:
    shard, meta = Shard(2, 2), {"run_key": "k", "first_window": 2, "n_windows": 2}
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    there, here = tmp_path / "a" / shard.file_name, tmp_path / "b" / shard.file_name
    sent = pickle.loads(pickle.dumps(store.unpublished(rows(shard), str(here), meta)))
    assert store.commit(rows(shard), there, meta)
    assert sent.commit()
    assert not sent.commit(), "the first one stays"
    assert there.read_bytes() == here.read_bytes()
    assert len(sent.rows) < 64_000, "a few KB and the schema"


def test_the_driver_alone_writes_and_files_and_figures_are_the_same(
    asked: PerplexitySettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = evaluate(asked)
    results: list[ShardResult] = []
    real = EvalWorker.run

    def run(self: EvalWorker, shard: Shard) -> ShardResult:
        n_before = len(list(Path(self.spec.run_dir).glob("shard-*")))
        results.append(real(self, shard))
        assert len(list(Path(self.spec.run_dir).glob("shard-*"))) == n_before, "the worker writes nothing"
        return results[-1]

    monkeypatch.setattr(EvalWorker, "run", run)
    sent = evaluate(collected(asked))
    assert sent.summary["nll_sha256"] == plain.summary["nll_sha256"]
    assert shards_of(sent.table) == shards_of(plain.table)
    assert [(result.committed, len(result.unpublished)) for result in results] == [(None, 1)] * 3
    again = evaluate(collected(asked)).summary
    assert (again["shards_reused"], len(results)) == (3, 3)


def test_documents_go_on_from_states_in_the_nodes_own_cache(
    asked: PerplexitySettings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUFmamb" + bytes(9000))
    carried = replace(asked, protocol=ProtocolSettings("carry", 32))
    plain = evaluate(carried).summary
    old = tmp_path / "cache/states/left by a run that was never ended"
    old.mkdir(parents=True)
    os.utime(old, (0, 0))
    assert evaluate(collected(carried)).summary["nll_sha256"] == plain["nll_sha256"]
    assert "read again from its start" not in caplog.text
    left = list((tmp_path / "cache/states").rglob("*"))
    assert not [path for path in left if path.is_file() or path == old]


def test_what_the_driver_cannot_write_ends_the_run_incomplete(
    asked: PerplexitySettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = store.commit

    def full(table: Any, final: Path, meta: Any) -> bool:
        if final.name == "shard-00000004.parquet":
            raise StorageFailure(f"{final}: no space left on the device", "make room")
        return real(table, final, meta)

    monkeypatch.setattr(store, "commit", full)
    summary = evaluate(collected(asked)).summary
    assert (summary["exit_code"], summary["shards_done"]) == (3, 1)
    assert "no space left on the device" in summary["error"]["message"]
    monkeypatch.setattr(store, "commit", real)
    assert evaluate(collected(asked)).summary["shards_reused"] == 1


def test_results_of_ray_workers_are_published_before_they_are_told_of(tmp_path: Path) -> None:
    shard = Shard(0, 2)
    file = tmp_path / shard.file_name
    result: Any = SimpleNamespace(unpublished=(store.unpublished(rows(shard), str(file), {}),))
    seen: list[bool] = []

    def run(tasks: Any, on_result: Any) -> list[Any]:
        on_result(tasks[0], result)
        return []

    executor = RayExecutor(ClusterSettings("ray", collect=True), 1)
    executor._pool = SimpleNamespace(run=run, kill=lambda: None)  # type: ignore[assignment]
    spec: Any = SimpleNamespace(run_key="k")
    executor.run([Task(spec, shard)], lambda *_: seen.append(file.exists()))
    assert seen == [True]
    assert publishing(lambda *_: True)(Task(spec, shard), SimpleNamespace()) is True  # type: ignore[arg-type]


def test_sums_of_inputs_are_collected_too(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "tiny.gguf")
    asked = settings_of(tmp_path, "unused")

    def made(name: str, cluster: ClusterSettings) -> dict[str, Any]:
        return collect(
            ImatrixSettings(
                model=replace(asked.model, path=str(tmp_path / "tiny.gguf")),
                data=asked.data,
                imatrix=ImatrixChoices(str(tmp_path / f"{name}.imatrix")),
                protocol=asked.protocol,
                cluster=cluster,
                tracking=asked.tracking,
                paths=PathsSettings(str(tmp_path / name), asked.paths.cache),
            )
        ).summary

    plain, sent = made("plain", asked.cluster), made("sent", COLLECTED)
    assert plain["sha256"] == sent["sha256"] is not None
    assert sent["shards_done"] == plain["shards_done"]


def test_comparisons_are_the_same_collected_and_in_a_store(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_comparison.install(monkeypatch)
    monkeypatch.chdir(tmp_path)
    asked, folders = settings_of(tmp_path, "unused"), []

    def page(summary: Any, pairs: Any, folder: Path, tokenizer: Any) -> Path:
        folders.append(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.md").write_text("page")
        return folder / "report.md"

    monkeypatch.setattr("pipeline.compare.report.write", page)
    for name, level in (("base", 0), ("high", 1)):
        path = fake_comparison.write_model(tmp_path / f"{name}.gguf", level, 5000)
        path.write_bytes(path.read_bytes().replace(b"GGUF\0\0\0\0", b"GGUFmamb"))

    def made(results: str, cluster: ClusterSettings) -> dict[str, Any]:
        return compare(
            CompareSettings(
                base=replace(asked.model, path=str(tmp_path / "base.gguf")),
                variants=[str(tmp_path / "high.gguf")],
                data=asked.data,
                protocol=ProtocolSettings("carry", 32),
                cluster=cluster,
                tracking=asked.tracking,
                paths=PathsSettings(results, str(tmp_path / "cache")),
            )
        ).summary

    plain = made(str(tmp_path / "plain"), asked.cluster)
    stored = made(s3, COLLECTED)
    assert [(v["nll_sha256"], v["kld_sha256"]) for v in stored["variants"]] == [
        (v["nll_sha256"], v["kld_sha256"]) for v in plain["variants"]
    ]
    assert folders == [Path(plain["table"]), tmp_path / "cache/reports" / f"run_key={plain['run_key']}"]
    (folder_of(stored["variants"][0]["table"]) / "shard-00000000.parquet").unlink()
    assert made(s3, asked.cluster)["shards_reused"] == stored["n_shards"] - 1
    found = analysis.read(s3)
    assert found.windows(found.variants[0]).num_rows == plain["n_windows"]
    assert not Path("/", *folder_of(s3).parts[1:2]).exists(), "nothing was taken for a path of the machine"
    assert not list((tmp_path / "cache/states").rglob(".state-*"))


@pytest.mark.parametrize("key", ["results", "cache"])
def test_a_folder_that_cannot_be_written_is_refused_before_work(asked: PerplexitySettings, key: str) -> None:
    paths = replace(asked.paths, **{key: "/proc/self/pagemill"})
    started: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InlineExecutor, "start", lambda self, specs: started.append(specs))
        with pytest.raises(StoreError, match=rf"paths\.{key}: cannot write to /proc/self/pagemill") as no:
            evaluate(replace(asked, paths=paths))
    assert (no.value.exit_code, started) == (2, [])
    assert f"as paths.{key}" in no.value.hint


@pytest.mark.slow
@pytest.mark.ray
def test_killed_workers_lose_and_double_nothing(
    tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_llama(tmp_path / "tiny.gguf", type_name="Q4_1")
    (tmp_path / "t.txt").write_text("The quick brown fox jumps over the lazy dog. " * 10)
    inline = slow_settings_of(tmp_path, "plain", ClusterSettings("inline", windows_per_shard=1))
    plain = evaluate(inline)
    prepare(tmp_path, seconds=0.3)
    monkeypatch.setattr(perplexity, "open_executor", slow_executor)
    killed: list[int] = []

    def kill_the_first_to_begin() -> None:
        while not (marks := list((tmp_path / "cache/marks").iterdir())):
            time.sleep(0.05)
        killed.append(int(marks[0].suffix[1:]))
        os.kill(killed[0], signal.SIGKILL)

    threading.Thread(target=kill_the_first_to_begin, daemon=True).start()
    cluster = ClusterSettings("ray", windows_per_shard=1, threads_per_worker=1, address=address, collect=True)
    sent = evaluate(slow_settings_of(tmp_path, "sent", cluster))
    assert killed
    assert sent.summary["nll_sha256"] == plain.summary["nll_sha256"]
    assert {name: rows for name, (_, rows) in shards_of(sent.table).items()} == {
        name: rows for name, (_, rows) in shards_of(plain.table).items()
    }
