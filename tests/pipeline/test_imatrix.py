"""Importance matrices of whole runs on the real engine: float64, one file for any way there, resuming."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from make_gguf import tiny_llama
from make_mamba_gguf import tiny_mamba
from reference.llama import ReferenceLlama
from reference.mamba import ReferenceMamba

import engine
from pipeline import cluster, evaluate, perplexity
from pipeline.capacity import RAY_BYTES
from pipeline.errors import (
    ClusterUnreachable,
    DataError,
    ScoreError,
    SettingsError,
    StorageFailure,
    StoreError,
)
from pipeline.imatrix import collect
from pipeline.imatrix.settings import ImatrixChoices, ImatrixSettings
from pipeline.imatrix.sums import merged
from pipeline.quantize.imatrix_file import read_imatrix
from pipeline.settings import (
    ClusterSettings,
    DataSettings,
    EngineSettings,
    ModelSettings,
    PathsSettings,
    ProtocolSettings,
    TrackingSettings,
)
from pipeline.tracking import NoTracker
from tests.pipeline.sys_trees import host

ROOT = Path(__file__).parents[2]
TEXT = "The quick brown fox jumps over the lazy dog, and — as ever — nobody asks why. " * 5
WINDOW = 32
OWN_KEYS = (
    "job ok exit_code error run_key measure_key table mlflow_run_id wall_s compile_s load_s version numerics "
    "warnings out n_windows n_tensors sha256"
).split()


@pytest.fixture
def make(tmp_path):
    """Settings of a small inline run on a tiny llama that adds a BOS; groups can be replaced."""
    (tmp_path / "t.txt").write_text(TEXT)
    tiny_llama(tmp_path / "llama.gguf", **{"tokenizer.ggml.add_bos_token": True})

    def settings(results="results", path="llama.gguf", out=None, per_shard=3, dry_run=False, **groups):
        given = {
            "model": ModelSettings(str(tmp_path / path)),
            "data": DataSettings(name="fox", path=str(tmp_path / "t.txt")),
            "imatrix": ImatrixChoices(str(tmp_path / (out or f"{results}.imatrix"))),
            "protocol": ProtocolSettings(window=WINDOW),
            "cluster": ClusterSettings("inline", windows_per_shard=per_shard),
            "tracking": TrackingSettings("none"),
            "paths": PathsSettings(str(tmp_path / results), str(tmp_path / "cache")),
        }
        return ImatrixSettings(**{**given, **groups}, dry_run=dry_run)

    return settings


class Watched:
    """A weight matrix of a reference that sums up the squares of what it multiplies, in float64."""

    __array_ufunc__ = None  # `x @ matrix.T` comes to __rmatmul__

    def __init__(self, values):
        self.T, self.values, self.squares, self.n_tokens = self, values, 0.0, 0

    def __rmatmul__(self, x):
        self.squares, self.n_tokens = self.squares + (x**2).sum(axis=0), self.n_tokens + len(x)
        return x @ self.values.T


def watched(reference, *kinds):
    """Puts watches in the place of a reference's matrices of these kinds."""
    names = [f"blk.{i}.{kind}.weight" for i in range(reference.n_layers) for kind in kinds]
    found = {name: Watched(reference.w[name]) for name in names}
    reference.w |= found
    return found


def read_windows(path, reference, window=WINDOW, text=TEXT, limit=None):
    """Has a reference read windows as llama-imatrix does: every token, BOS in place of the first."""
    with engine.open(path) as file:
        tokenizer = engine.Tokenizer(file)
        tokens = tokenizer.encode(text)
        bos = tokenizer.bos_id if tokenizer.add_bos else None
    windows = [tokens[at : at + window].copy() for at in range(0, tokens.size // window * window, window)]
    for read in windows[:limit]:
        if bos is not None:
            read[0] = bos
        reference.logits(read)
    return len(windows[:limit])


def assert_same(path, found, rtol):
    """That the file holds the sums of these matrices, and no others."""
    entries = read_imatrix(path).entries
    assert entries.keys() == found.keys()
    for name, (sums, counts) in entries.items():
        assert counts.tolist() == [found[name].n_tokens]
        squares = found[name].squares
        floor = 1e-8 * squares.max()  # columns of values a thousand times smaller round as the large ones do
        np.testing.assert_allclose(sums[0], squares, rtol=rtol, atol=floor, err_msg=name)


LLAMA = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
MAMBA = ("ssm_in", "ssm_x", "ssm_dt", "ssm_out")


def test_the_sums_of_a_llama_equal_float64(make, tmp_path):
    """rtol: activations are float32; the largest difference is 1.2e-6, in ffn_down."""
    result = collect(make())
    reference = ReferenceLlama(tmp_path / "llama.gguf")
    found = watched(reference, *LLAMA)
    n_windows = read_windows(tmp_path / "llama.gguf", reference)
    assert len(found) == result.summary["n_tensors"] == 14
    assert_same(result.summary["out"], found, rtol=5e-6)
    assert result.summary["n_windows"] == n_windows
    assert result.summary["n_tokens"] == n_windows * WINDOW


def test_the_sums_of_a_mamba_equal_float64(make, tmp_path):
    """rtol: the largest difference is 1.3e-6, in ssm_out."""
    tiny_mamba(tmp_path / "mamba.gguf")
    result = collect(make(path="mamba.gguf"))
    reference = ReferenceMamba.open(tmp_path / "mamba.gguf")
    found = watched(reference, *MAMBA)
    read_windows(tmp_path / "mamba.gguf", reference)
    assert_same(result.summary["out"], found, rtol=5e-6)


@pytest.mark.slow
def test_the_sums_of_smollm2_equal_float64(make, tmp_path, smollm2, shared_data):
    """rtol: after thirty layers the largest difference is 1e-5, in ffn_down."""
    wikitext = shared_data / "data/wiki.test.raw"
    data, protocol = DataSettings(path=str(wikitext)), ProtocolSettings(window=128, limit=2)
    result = collect(make(path=str(smollm2), data=data, protocol=protocol))
    reference = ReferenceLlama(smollm2)
    found = watched(reference, *LLAMA)
    text = wikitext.read_text()[:20_000]
    assert read_windows(smollm2, reference, 128, text, limit=2) == 2
    assert_same(result.summary["out"], found, rtol=5e-5)
    assert result.summary["n_tensors"] == 210


def test_the_file_says_what_it_is_and_the_line_has_every_key(make, tmp_path):
    result = collect(make())
    s, found = result.summary, read_imatrix(result.summary["out"])
    assert set(OWN_KEYS) <= s.keys()
    assert (s["job"], s["ok"], s["exit_code"], result.exit_code, s["error"]) == ("imatrix", True, 0, 0, None)
    assert s["sha256"] == hashlib.sha256(Path(s["out"]).read_bytes()).hexdigest()
    assert (found.datasets, found.chunk_count, found.chunk_size) == (("fox",), s["n_windows"], WINDOW)
    assert s["table"] == str(tmp_path / f"results/v1/table=imatrix/run_key={s['run_key']}")
    assert not (tmp_path / "results/v1/table=runs").exists(), "it is no perplexity"
    json.dumps(s, allow_nan=False)


def test_a_limit_keeps_the_first_windows(make):
    s = collect(make(protocol=ProtocolSettings(window=WINDOW, limit=2))).summary
    assert (s["n_windows"], s["n_tokens"]) == (2, 2 * WINDOW)
    assert read_imatrix(s["out"]).entries["blk.0.attn_q.weight"].counts.tolist() == [2 * WINDOW]
    assert s["run_key"] != collect(make("b")).summary["run_key"]


@pytest.mark.parametrize("model", ["llama", "mamba"])
def test_one_file_for_any_shards_batches_and_threads(make, tmp_path, model):
    if model == "mamba":
        tiny_mamba(tmp_path / "mamba.gguf")
    runs = [
        make("a", f"{model}.gguf", per_shard=1),
        make("b", f"{model}.gguf", per_shard=4),
        make("c", f"{model}.gguf", engine=EngineSettings(batch_tokens=13)),
        make("d", f"{model}.gguf", engine=EngineSettings(batch_tokens=65, threads=2)),
    ]
    found = [collect(settings).summary for settings in runs]
    assert [s["ok"] for s in found] == [True] * 4
    assert len({s["sha256"] for s in found}) == 1
    assert len({s["run_key"] for s in found}) == 1
    assert len({Path(s["out"]).read_bytes() for s in found}) == 1


@pytest.mark.ray
def test_one_file_for_any_number_of_workers(make):
    alone = collect(make("a", per_shard=1)).summary
    s = collect(make("b", cluster=ClusterSettings("local", workers=2, windows_per_shard=2))).summary
    assert (s["n_workers"], s["shards_done"], s["shards_reused"]) == (2, s["n_shards"], 0)
    assert (s["sha256"], s["run_key"]) == (alone["sha256"], alone["run_key"])


def test_finished_shards_are_reused_and_broken_ones_computed_again(make, tmp_path):
    first = collect(make()).summary
    shards = sorted(Path(first["table"]).glob("*.parquet"))
    shards[0].unlink()
    shards[1].write_bytes(shards[1].read_bytes()[:-100])
    before = shards[2].stat()
    s = collect(make(out="again")).summary
    assert (s["shards_done"], s["shards_reused"]) == (len(shards), len(shards) - 2)
    assert s["sha256"] == first["sha256"]
    assert shards[2].stat() == before
    assert any("is broken" in warning for warning in s["warnings"])
    again = collect(make(out="third")).summary
    assert (again["shards_reused"], again["n_workers"], again["sha256"]) == (len(shards), 0, first["sha256"])


def test_a_shard_whose_limbs_are_not_those_of_its_columns_is_not_counted(make):
    first = collect(make()).summary
    path = min(Path(first["table"]).glob("*.parquet"))
    table = pq.read_table(path, partitioning=None)
    for wrong in (table.slice(0, 0), with_column(table, "limbs", [[1, 2, 3]] * table.num_rows)):
        path.unlink()
        pq.write_table(wrong, path)
        s = collect(make(out=f"again{wrong.num_rows}")).summary
        assert (s["shards_reused"], s["sha256"]) == (s["n_shards"] - 1, first["sha256"])


def with_column(table, name, values):
    at = table.schema.get_field_index(name)
    return table.set_column(at, table.schema.field(at), pa.array(values, table.schema.field(at).type))


def test_a_killed_driver_loses_no_finished_shard(make, tmp_path):
    """Killed in the middle of its shards; the same settings go on and make the same file."""
    whole = collect(make("whole", per_shard=1)).summary
    script = (
        "import sys, pickle, time\n"
        "from pipeline import store\n"
        "from pipeline.imatrix import collect\n"
        "commit = store.commit\n"
        "def slowly(*args):\n"
        "    time.sleep(0.3)\n"
        "    return commit(*args)\n"
        "store.commit = slowly\n"
        "collect(pickle.load(sys.stdin.buffer))\n"
    )
    settings = make("killed", per_shard=1)
    going = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    table = tmp_path / "killed/v1/table=imatrix"
    deadline = time.monotonic() + 100
    try:
        assert going.stdin is not None
        going.stdin.write(pickle.dumps(settings))
        going.stdin.close()
        while len(list(table.glob("*/shard-*.parquet"))) < 2:
            assert going.poll() is None, "the run ended too early to be killed"
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        going.kill()
        going.wait()
    assert not Path(settings.imatrix.out).exists()
    before = len(list(table.glob("*/shard-*.parquet")))
    assert before < whole["n_shards"], "the kill came too late to prove anything"
    s = collect(settings).summary
    assert (s["shards_reused"], s["sha256"]) == (before, whole["sha256"])


def test_inputs_that_overflow_end_incomplete_and_name_the_matrix(make, tmp_path):
    """Norm weights of 1e7 make inputs beyond 2^22; finished shards of other windows would be kept."""
    huge = {"blk.1.ffn_norm.weight": np.full(64, 1e7, np.float32)}
    tiny_llama(tmp_path / "huge.gguf", extra=huge)
    result = collect(make(path="huge.gguf"))
    s = result.summary
    assert (result.exit_code, s["exit_code"], s["ok"]) == (3, 3, False)
    assert (s["sha256"], s["n_tensors"]) == (None, None)
    assert "ScoreError: windows 0 to 2: " in s["error"]["message"]
    assert "blk.1.ffn_gate.weight" in s["error"]["message"]
    assert not Path(s["out"]).exists()


def test_sums_that_do_not_add_up_are_told(make, tmp_path):
    s = collect(make()).summary
    shards = sorted(Path(s["table"]).glob("*.parquet"))
    assert merged(shards)["blk.0.attn_q.weight"].n_tokens == s["n_tokens"]
    table = pq.read_table(shards[1], partitioning=None)
    for broken, error, said in (
        (with_column(table, "names", [["other"]] * table.num_rows), StorageFailure, "other matrices"),
        (
            with_column(table, "limbs", [[2**63 - 1, 0, 0] * n for n in table["columns"].to_pylist()]),
            ScoreError,
            "blk.0.attn_q.weight",
        ),
    ):
        pq.write_table(broken, tmp_path / "broken.parquet")
        with pytest.raises(error, match=said):
            merged([shards[0], tmp_path / "broken.parquet"])
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(StorageFailure, match="cannot be read back"):
        merged([tmp_path / "broken.parquet"])


def test_a_dry_run_says_the_plan_and_writes_nothing(make, tmp_path):
    s = collect(make(dry_run=True)).summary
    assert (s["dry_run"], s["shards_todo"], s["n_shards"], s["sha256"]) == (True, 4, 4, None)
    assert (s["n_windows"], s["n_tokens"]) == (10, 10 * WINDOW)
    assert not Path(s["out"]).exists()
    assert list((tmp_path / "results").iterdir()) == []
    (node,) = s["nodes"]
    assert (s["n_workers"], node["n_workers"], s["fetch_bytes"]) == (1, 1, 0)
    assert s["estimated_s"] > 0
    assert "no earlier run of this model here" in s["estimated_from"][0]
    url = ModelSettings(f"file://{tmp_path}/llama.gguf")
    s = collect(make(model=url, dry_run=True)).summary
    assert (s["job"], s["fetch_bytes"]) == ("imatrix", (tmp_path / "llama.gguf").stat().st_size)


def test_the_memory_of_workers_and_their_sums_decides_how_many_there_are(make, monkeypatch):
    def machine(left):
        monkeypatch.setattr(cluster, "look", lambda: host(cores=8, node_id="", left=left))

    monkeypatch.setattr(perplexity, "usable_cores", lambda: 8)
    local = ClusterSettings("local", windows_per_shard=1)
    machine(10**12)
    [node] = collect(make(dry_run=True, cluster=local)).summary["nodes"]
    worker = node["memory_bytes"] // 8
    [scoring] = evaluate(make(dry_run=True, cluster=local).reading).summary["nodes"]
    with engine.open(make().model.path) as file:
        sums = engine.sum_inputs(engine.load_model(file))
        assert worker - scoring["memory_bytes"] // 8 >= sums.nbytes
        del sums
    machine(RAY_BYTES + 2 * worker)
    assert collect(make(dry_run=True, cluster=local)).summary["n_workers"] == 2
    machine(RAY_BYTES + worker - 1)
    with pytest.raises(SettingsError, match="no node has the memory of one worker"):
        collect(make(cluster=local))
    monkeypatch.setattr(cluster, "look", lambda: host(slots=0, node_id=""))
    with pytest.raises(ClusterUnreachable, match="Ray has 0 CPUs there"):
        collect(make(cluster=local))


def test_a_run_is_logged_with_its_file(make, tmp_path, monkeypatch):
    logged = []

    class Tracker(NoTracker):
        def log_run(self, *arguments, **more):
            logged.append((arguments, more))
            return "an id"

    monkeypatch.setattr("pipeline.imatrix.run.open_tracker", lambda *_: Tracker("a remark"))
    s = collect(make()).summary
    (((name, params, metrics, tags, artifacts, data), more),) = logged
    assert (s["mlflow_run_id"], s["warnings"], name) == ("an id", ["a remark"], "imatrix of llama on fox")
    assert [path.name for path in artifacts] == ["plan.json", "results.imatrix"]
    assert (tags["sha256"], tags["run_key"], metrics["n_tensors"]) == (s["sha256"], s["run_key"], 14)
    assert (params["imatrix"]["out"], data.sha256, more["complete"]) == (s["out"], s["data_sha256"], True)
    tiny_llama(tmp_path / "huge.gguf", extra={"blk.0.attn_norm.weight": np.full(64, 1e7, np.float32)})
    assert not collect(make(path="huge.gguf", out="huge")).summary["ok"]
    assert [path.name for path in logged[1][0][4]] == ["plan.json"]
    assert logged[1][1]["complete"] is False


@pytest.mark.slow
def test_mlflow_keeps_the_file(make, tmp_path):
    s = collect(make(tracking=TrackingSettings("local"))).summary
    assert s["mlflow_run_id"]
    artifacts = {path.name for path in (tmp_path / "results/mlartifacts").rglob("*") if path.is_file()}
    assert artifacts == {"results.imatrix", "plan.json"}
    with sqlite3.connect(tmp_path / "results/mlflow.db") as db:
        tags = dict(db.execute("select key, value from tags").fetchall())
        metrics = dict(db.execute("select key, value from metrics").fetchall())
    assert (tags["job"], tags["sha256"], metrics["n_tensors"]) == ("imatrix", s["sha256"], 14)


def test_places_that_cannot_be_used_are_refused(make, tmp_path):
    collect(make())
    with pytest.raises(StoreError, match=r"imatrix\.out: .*results\.imatrix exists") as caught:
        collect(make())
    assert "imatrix.overwrite=true" in caught.value.hint
    choices = ImatrixChoices(str(tmp_path / "results.imatrix"), overwrite=True)
    assert collect(make(imatrix=choices)).summary["ok"]
    with pytest.raises(StoreError, match="there is no folder"):
        collect(make(out="none/i.gguf"))
    (tmp_path / "folder").mkdir()
    with pytest.raises(StoreError, match="exists"):
        collect(make(imatrix=ImatrixChoices(str(tmp_path / "folder"), overwrite=True)))


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        ({"cluster": ClusterSettings(numa="mirrors")}, "cluster.numa=mirrors is not known; did you mean"),
        ({"cluster": ClusterSettings(workers=0)}, "cluster.workers=0 is too small"),
        ({"protocol": ProtocolSettings("carry", 32)}, "protocol.name=carry is not of this job"),
        ({"protocol": ProtocolSettings("strided", 32)}, "expected windows"),
        ({"imatrix": ImatrixChoices()}, "imatrix.out is not set"),
        ({"data": DataSettings(path="d", format="jsonl", weight="w", documents="apart")}, "data.weight=w"),
        ({"engine": EngineSettings(batch_tokens=0)}, "engine.batch_tokens=0 is too small"),
        ({"model": ModelSettings()}, "model.path is not set"),
    ],
)
def test_settings_that_cannot_be_run_are_refused(make, groups, said):
    with pytest.raises(SettingsError) as caught:
        collect(make(**groups))
    assert said in str(caught.value)
    assert caught.value.exit_code == 2


def test_several_wrong_settings_are_told_at_once(make):
    with pytest.raises(SettingsError, match="2 settings cannot be used"):
        collect(make(protocol=ProtocolSettings("carry", 32), imatrix=ImatrixChoices()))


def test_a_text_that_is_too_short_is_refused(make, tmp_path):
    (tmp_path / "t.txt").write_text("Too short.")
    with pytest.raises(DataError, match="expected at least 64, two windows"):
        collect(make())
