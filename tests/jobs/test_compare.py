"""`pagemill compare` as a command: its JSON line, its exit codes, and its bits whatever dies on the way.

Models are tiny and windows short; shards hold one window, so that there is a middle to be killed in.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.make_gguf import tiny_llama

pytestmark = pytest.mark.timeout(300)

N_WINDOWS = 24
SIZES = {"n_layers": 4, "width": 256, "ff": 512, "context": 512}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A folder with a base, two variants of it and a text."""
    folder = tmp_path_factory.mktemp("models")
    for name, type_name in {"base": "F32", "q8": "Q8_0", "q4": "Q4_0"}.items():
        tiny_llama(folder / f"{name}.gguf", type_name=type_name, **SIZES)
    (folder / "t.txt").write_text("The quick brown fox jumps over the lazy dog. " * 400)
    return folder


def words(models: Path, results: Path, *more: str) -> list[str]:
    return [
        "compare", f"base.path={models}/base.gguf", f"variants=[{models}/q8.gguf,{models}/q4.gguf]",
        f"data.path={models}/t.txt", "protocol.window=256", f"protocol.limit={N_WINDOWS}", "tracking=none",
        f"paths.results={results}", f"paths.cache={models}/cache", "cluster.windows_per_shard=1", *more,
    ]  # fmt: skip


def command(*given: str) -> list[str]:
    return [sys.executable, "-m", f"jobs.{given[0]}", *given[1:]]


def compare(models: Path, results: Path, *more: str) -> dict:
    run = subprocess.run(command(*words(models, results, *more)), capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


def bits(line: dict) -> list[tuple[str, ...]]:
    return [(v["name"], v["nll_sha256"], v["kld_sha256"], v["dp_rms"]) for v in line["variants"]]


def shards(results: Path) -> list[Path]:
    return sorted(results.glob("v1/table=tokens/run_key=*/shard-*.parquet"))


@pytest.fixture(scope="module")
def whole(models, tmp_path_factory) -> dict:
    """The undisturbed comparison: one worker, no Ray, all windows in one shard."""
    return compare(
        models, tmp_path_factory.mktemp("whole"), "cluster=inline", f"cluster.windows_per_shard={N_WINDOWS}"
    )


def test_the_line_has_the_figures_and_the_terminal_a_table(pagemill, models, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(
        "pipeline.compare.report.write", lambda summary, pairs, folder, tokenizer: folder / "report.html"
    )
    given = words(models, tmp_path, "cluster=inline", "cluster.windows_per_shard=4")
    answer = pagemill(*given, "protocol.limit=4", "limits={kld_mean: 1, same_top: 0.1}")
    assert answer.exit_code == 0, answer.stderr
    assert [v["name"] for v in answer.line["variants"]] == ["q8", "q4"]
    assert answer.line["variants"][1]["kld_mean"] > answer.line["variants"][0]["kld_mean"] > 0
    assert answer.line["job"] == "compare"
    assert answer.stdout.count("\n") == 1
    assert "q4" in answer.stderr
    assert "KLD" in answer.stderr

    broken = pagemill(*given, "protocol.limit=4", "limits={kld_mean: 1e-9}")
    assert (broken.exit_code, broken.line["ok"]) == (1, False)
    assert broken.line["error"]["type"] == "LimitBroken"
    assert "q4: kld_mean is" in broken.stderr
    assert broken.line["n_workers"] == 0, "the figures were there"


@pytest.mark.parametrize(
    ("more", "kind", "message"),
    [
        (["limits={kld_men: 1}"], "SettingsError", "kld_mean"),
        (["variants=[Q4_K_X]"], "SettingsError", "Q4_K_X"),
        (["variants=[]"], "SettingsError", "variants is empty"),
        (["stop=decide"], "ConfigError", "stop=decide"),
        (["keep_token=false"], "ConfigError", "keep_token"),
    ],
)
def test_what_cannot_run_is_refused_with_2(pagemill, models, tmp_path, more, kind, message) -> None:
    answer = pagemill(*words(models, tmp_path / "results", *more))
    assert answer.exit_code == 2
    assert answer.line["error"]["type"] == kind
    assert message in f"{answer.line['error']['message']} {answer.line['error']['hint']}"
    assert not (tmp_path / "results").exists()


def test_variants_may_have_any_path(pagemill, models, tmp_path) -> None:
    odd = tmp_path / "a b=(1)"
    odd.mkdir()
    (odd / "q$4.gguf").write_bytes((models / "q4.gguf").read_bytes())
    given = [word for word in words(models, tmp_path / "results", "dry_run=true") if "variants" not in word]
    answer = pagemill(*given, f"variants=[{odd}/q$4.gguf, {models}/q8.gguf]")
    assert answer.exit_code == 0, answer.stderr
    assert [v["name"] for v in answer.line["variants"]] == ["q8", "q$4"]


def wait_for_shards(results: Path, run: subprocess.Popen[str], n: int) -> None:
    while len(shards(results)) < n:
        assert run.poll() is None, "the run ended before it could be disturbed"
        time.sleep(0.01)


def engine_workers(run: subprocess.Popen[str], model: Path) -> list[psutil.Process]:
    """The run's processes that map the model, without the driver."""
    found = []
    for process in psutil.Process(run.pid).children(recursive=True):
        try:
            if any(m.path == str(model) for m in process.memory_maps()):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.mark.ray
def test_bits_of_two_workers_survive_the_kill_of_one(models, whole, tmp_path) -> None:
    given = command(*words(models, tmp_path, "cluster=local", "cluster.workers=2"))
    run = subprocess.Popen(given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_shards(tmp_path, run, 1)
    engine_workers(run, models / "q4.gguf")[0].kill()
    at_the_kill = len(shards(tmp_path))
    stdout, stderr = run.communicate()
    assert 1 <= at_the_kill < 2 * N_WINDOWS, "the kill came too late to prove anything"
    assert run.returncode == 0, stderr[-3000:]
    seen = json.loads(stdout.splitlines()[-1])
    assert bits(seen) == bits(whole)
    assert len(shards(tmp_path)) == 2 * N_WINDOWS


@pytest.mark.parametrize(
    "cluster", ["inline", pytest.param("local", marks=[pytest.mark.ray, pytest.mark.slow])]
)
def test_bits_survive_the_kill_of_the_driver_and_nothing_is_computed_twice(
    pagemill, models, whole, tmp_path, cluster
) -> None:
    given = command(*words(models, tmp_path, f"cluster={cluster}", "cluster.workers=2"))
    run = subprocess.Popen(given, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True)
    wait_for_shards(tmp_path, run, 1)
    workers = engine_workers(run, models / "q4.gguf")  # none inline
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive, "workers outlived their driver by half a minute"
    before = {path: path.stat().st_ino for path in shards(tmp_path)}
    assert 1 <= len(before) < 2 * N_WINDOWS, "the kill came too late to prove anything"
    answer = pagemill(*words(models, tmp_path, "cluster=inline"))
    assert answer.exit_code == 0, answer.stderr
    assert bits(answer.line) == bits(whole)
    assert answer.line["shards_reused"] == len(before)
    assert {path: path.stat().st_ino for path in before} == before
