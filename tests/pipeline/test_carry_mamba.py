"""Protocol `carry` on a Mamba that was trained: the float64 reference, one digest, kills, the demo."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

import engine
from pipeline import evaluate
from pipeline.convert import convert
from pipeline.datasets import WIKITEXT2_SHA256
from pipeline.settings import (
    ClusterSettings,
    ConvertChoices,
    ConvertSettings,
    DataSettings,
    EngineSettings,
    ModelSettings,
    PathsSettings,
    PerplexitySettings,
    ProtocolSettings,
    SourceSettings,
    TrackingSettings,
)

ROOT = Path(__file__).parents[2]
MAMBA = ROOT / "tests/data/mamba-tiny-q8_0.gguf"


@pytest.fixture
def run(tmp_path):
    """Summary of an inline run of the committed model over the documents of `texts`."""
    texts = documents(4000, 200, 1500)
    (tmp_path / "d.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))

    def done(results, per_shard=4, **groups):
        settings = PerplexitySettings(
            **{
                "model": ModelSettings(str(MAMBA)),
                "data": DataSettings(path=str(tmp_path / "d.jsonl"), format="jsonl"),
                "protocol": ProtocolSettings("carry", 128),
                "cluster": ClusterSettings("inline", windows_per_shard=per_shard),
                "tracking": TrackingSettings("none"),
                "paths": PathsSettings(str(tmp_path / results), str(tmp_path / "cache")),
                **groups,
            }
        )
        summary = evaluate(settings).summary
        assert summary["ok"], summary["error"]
        return summary

    return done


def documents(*lengths):
    """Texts of so many characters, cut out of a text that Python brings along."""
    from pydoc_data import topics

    text, found = "\n".join(topics.topics.values()), []
    for length in lengths:
        found.append(text[:length])
        text = text[length:]
    return found


@pytest.fixture(scope="module")
def exact(shared_data, tmp_path_factory):
    """The checkpoint that the reference was computed from, as float32."""
    out = tmp_path_factory.mktemp("mamba") / "mamba-tiny-f32.gguf"
    source = SourceSettings(str(shared_data / "models/mamba-tiny"))
    convert(ConvertSettings(source, ConvertChoices("f32", str(out))))
    return out


def test_each_target_is_the_float64_reference_s(exact, shared_data):
    oracle = np.load(shared_data / "oracle/mamba-tiny.npz")
    tokens = oracle["tokens"].reshape(-1)[:4096]
    with engine.open(str(exact)) as file:
        model = engine.load_model(file, batch_tokens=512)
        cache, found = model.new_cache(1, tokens.size), []
        for at in range(0, 4095, 512):
            read, targets = tokens[at : at + 512], tokens[at + 1 : at + 513]
            places = np.arange(at, at + targets.size)
            batch = engine.Batch(read[: targets.size], places, targets=targets)
            found.append(model.nll(batch, cache))
        del model
    difference = np.concatenate(found) - oracle["nll_carry_float64"]
    assert np.abs(difference).max() < 2e-4
    assert abs(difference.mean()) < 5e-6


def test_both_protocols_side_by_side_equal_the_reference(run, exact, shared_data):
    """PPL 111.34544 and 110.24355 carried, 110.26568 by windows, in ln within 5e-6."""
    oracle = np.load(shared_data / "oracle/mamba-tiny.npz")
    carried, windows = oracle["nll_carry_float64"].astype(np.float64), oracle["nll_windows_float64"][:8]
    common = {
        "model": ModelSettings(str(exact)),
        "data": DataSettings(path=str(shared_data / "data/wiki.test.raw"), sha256=WIKITEXT2_SHA256),
    }
    s = run("r", 3, protocol=ProtocolSettings("carry", 512, 8), **common)
    assert (s["n_scored"], s["half_n_scored"]) == (4095, 8 * 255)
    assert s["nll_mean_nats"] == pytest.approx(carried.mean(), abs=5e-6)
    assert s["ppl"] == pytest.approx(111.34544, rel=5e-6)
    halves = np.concatenate([carried[512 * i + 256 : 512 * i + 511] for i in range(8)])
    assert s["half_nll_mean_nats"] == pytest.approx(halves.mean(), abs=5e-6)
    assert s["half_ppl"] == pytest.approx(110.24355, rel=5e-6)
    other = run("r", protocol=ProtocolSettings("windows", 512, 8), **common)
    assert other["n_scored"] == s["half_n_scored"]
    assert other["nll_mean_nats"] == pytest.approx(windows.mean(dtype=np.float64), abs=5e-6)


def test_one_digest_for_any_batch_shard_and_threads(run):
    whole = run("whole", 1000)
    for at, (per_shard, batch_tokens, threads) in enumerate([(4, 512, 2), (1, 4096, 1), (3, 50, 1)]):
        s = run(f"r{at}", per_shard, engine=EngineSettings(batch_tokens=batch_tokens, threads=threads))
        assert (s["nll_sha256"], s["run_key"]) == (whole["nll_sha256"], whole["run_key"])
        assert s["n_tokens"] == s["n_scored"] == whole["n_tokens"]


def test_the_committed_file_is_the_one_that_its_readme_tells_of(shared_data, tmp_path):
    digest = hashlib.sha256(MAMBA.read_bytes()).hexdigest()
    assert digest in MAMBA.with_name("README.md").read_text()
    out = tmp_path / "mamba-tiny-q8_0.gguf"
    source = SourceSettings(str(shared_data / "models/mamba-tiny"))
    made = convert(ConvertSettings(source, ConvertChoices("q8_0", str(out))))
    assert made["sha256"] == digest


def words(results, *more):
    return ["tracking=none", f"paths.results={results}", *more]


def test_the_demo_carries_its_state_from_shard_to_shard(pagemill, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    answer = pagemill("perplexity", *words(tmp_path, "experiment=demo_mamba"))
    assert answer.exit_code == 0, answer.stderr
    s = answer.line
    assert (s["n_windows"], s["n_scored"], s["n_shards"]) == (40, 20_479, 5)
    assert s["half_n_scored"] == 40 * 255
    assert 50 < s["ppl"] < 5000
    assert not list(Path(s["table"]).glob(".*"))


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_a_worker_and_a_driver_killed_in_a_document_change_no_bit(tmp_path, run, caplog):
    """Two workers; one is killed, then the driver; the same command goes on inline."""
    texts = documents(10_000, 10_000, 300)
    data = tmp_path / "long.jsonl"
    data.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    given = [
        f"model.path={MAMBA}", "data=jsonl", f"data.path={data}", "protocol=carry", "protocol.window=128",
        "cluster.windows_per_shard=1", "cluster=local", "cluster.workers=2",
    ]  # fmt: skip
    there = DataSettings(path=str(data), format="jsonl")
    whole = run("whole", 1000, data=there)
    results = tmp_path / "killed"
    going = subprocess.Popen(
        [sys.executable, "-m", "jobs.perplexity", *words(results, *given)],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    wait_for(results, 3, going)
    mapping(going)[0].kill()
    wait_for(results, len(shards(results)) + 4, going)
    workers = mapping(going)
    going.kill()
    going.wait()
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive
    before = {path: path.stat().st_ino for path in shards(results)}
    assert len(before) < whole["n_windows"], "the kill came too late to prove anything"
    assert list(results.glob("v1/table=windows/run_key=*/.state-*")), "in the middle of a document"
    s = run("killed", data=there)
    assert (s["nll_sha256"], s["shards_reused"]) == (whole["nll_sha256"], len(before))
    assert {path: path.stat().st_ino for path in before} == before
    assert "read again from its start" not in caplog.text
    assert not list(Path(s["table"]).glob(".state-*"))


def shards(results):
    return sorted(results.glob("v1/table=windows/run_key=*/shard-*.parquet"))


def wait_for(results, n, going):
    while len(shards(results)) < n:
        assert going.poll() is None, "the run ended too early to be killed"
        time.sleep(0.01)


def mapping(going):
    """The run's processes that map the model, without the driver."""
    found = []
    for process in psutil.Process(going.pid).children(recursive=True):
        try:
            if any(Path(m.path).samefile(MAMBA) for m in process.memory_maps() if "gguf" in m.path):
                found.append(process)
        except psutil.Error:
            continue
    return found
