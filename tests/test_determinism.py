"""One `nll_sha256`, whatever computes it and whatever dies on the way: the command line, the real engine, a
real model.

Windows are short (64 tokens) and shards hold one window, so that there is a middle to be killed in.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.engine.test_bits import AVX2
from tests.make_gguf import expand_to_f32

pytestmark = pytest.mark.timeout(300)

N_WINDOWS = 12


def words(model: Path, results: Path, *more: str) -> list[str]:
    return [
        "perplexity", f"model.path={model}", "data=pydoc", "protocol.window=64",
        f"protocol.limit={N_WINDOWS}", "cluster.windows_per_shard=1", "tracking=none",
        f"paths.results={results}", *more,
    ]  # fmt: skip


def command(*given: str) -> list[str]:
    return [sys.executable, "-m", f"jobs.{given[0]}", *given[1:]]


def perplexity(model: Path, results: Path, *more: str, environment: dict[str, str] | None = None) -> dict:
    """The JSON line of a process of its own."""
    run = subprocess.run(
        command(*words(model, results, *more)),
        env=os.environ | (environment or {}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def whole(smollm2, tmp_path_factory) -> dict:
    """The undisturbed run: in this process's child, one worker, no Ray."""
    return perplexity(smollm2, tmp_path_factory.mktemp("whole"), "cluster=inline")


def shards(results: Path) -> list[Path]:
    return sorted(results.glob("v1/table=windows/run_key=*/shard-*.parquet"))


def wait_for_first_shard(results: Path, run: subprocess.Popen[str]) -> int:
    """Returns how many shards are there when there is one at least; the run must not be over."""
    while not shards(results):
        assert run.poll() is None, "the run ended before its first shard"
        time.sleep(0.01)
    return len(shards(results))


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


def assert_same(seen: dict, whole: dict) -> None:
    assert seen["nll_sha256"] == whole["nll_sha256"]
    assert seen["run_key"] == whole["run_key"]
    assert seen["ppl"] == whole["ppl"]


@pytest.mark.parametrize(
    "more",
    [
        ["engine.batch_tokens=4096", "cluster.windows_per_shard=12"],
        ["engine.threads=2", "cluster.windows_per_shard=8"],
        ["engine.batch_tokens=50"],
    ],
    ids=["batch-4096", "threads-2", "window-over-many-batches"],
)
def test_bits_do_not_depend_on_how_they_are_computed(pagemill, smollm2, whole, tmp_path, more):
    answer = pagemill(*words(smollm2, tmp_path / "results", "cluster=inline", *more))
    assert answer.exit_code == 0, answer.stderr
    assert_same(answer.line, whole)
    assert answer.line["shards_reused"] == 0


@pytest.mark.slow
def test_bits_do_not_depend_on_the_width_of_vectors(smollm2, whole, tmp_path):
    environment = AVX2 | {"NUMBA_CACHE_DIR": str(tmp_path / "kernels")}
    seen = perplexity(smollm2, tmp_path / "results", "cluster=inline", environment=environment)
    assert_same(seen, whole)
    assert seen["shards_reused"] == 0


@pytest.mark.ray
def test_bits_of_two_workers_survive_the_kill_of_one(smollm2, whole, tmp_path):
    model = shutil.copy(smollm2, tmp_path / "m.gguf")  # which nothing else on this machine maps
    given = command(*words(model, tmp_path, "cluster=local", "cluster.workers=2"))
    run = subprocess.Popen(given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_first_shard(tmp_path, run)
    engine_workers(run, model)[0].kill()
    at_the_kill = len(shards(tmp_path))
    stdout, stderr = run.communicate()
    assert 1 <= at_the_kill < N_WINDOWS, "the kill came too late to prove anything"
    assert run.returncode == 0, stderr[-3000:]
    seen = json.loads(stdout.splitlines()[-1])
    assert seen["nll_sha256"] == whole["nll_sha256"]
    assert len(shards(tmp_path)) == N_WINDOWS
    # one copy of the file, whoever maps it: shares summed over all processes are the resident bytes
    assert seen["model_pss_sum_bytes"] == pytest.approx(seen["model_resident_bytes"], rel=0.02)


@pytest.mark.parametrize(
    "cluster", ["inline", pytest.param("local", marks=[pytest.mark.ray, pytest.mark.slow])]
)
def test_bits_survive_the_kill_of_the_driver_and_nothing_is_computed_twice(
    pagemill, smollm2, whole, tmp_path, cluster
):
    """That workers die with their driver is seen by default in tests/pipeline/test_carry_mamba.py."""
    given = command(*words(smollm2, tmp_path, f"cluster={cluster}", "cluster.workers=2"))
    run = subprocess.Popen(given, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True)
    wait_for_first_shard(tmp_path, run)
    workers = engine_workers(run, smollm2)  # none inline
    run.send_signal(signal.SIGKILL)
    run.wait()
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive, "workers outlived their driver by half a minute"
    before = {path: path.stat().st_ino for path in shards(tmp_path)}
    assert 1 <= len(before) < N_WINDOWS, "the kill came too late to prove anything"
    answer = pagemill(*words(smollm2, tmp_path, "cluster=inline"))
    assert answer.exit_code == 0, answer.stderr
    assert answer.line["nll_sha256"] == whole["nll_sha256"]
    assert answer.line["shards_reused"] == len(before)
    assert {path: path.stat().st_ino for path in before} == before


@pytest.mark.ray
@pytest.mark.slow
def test_a_workers_own_memory_does_not_grow_with_the_file(smollm2, tmp_path):
    """98 MB of Q4_1 against the same weights as 540 MB of F32: same bits, same anonymous memory."""
    large = expand_to_f32(smollm2, tmp_path / "f32.gguf")
    a, b = (perplexity(path, tmp_path, "cluster=local", "cluster.workers=2") for path in (smollm2, large))
    assert a["nll_sha256"] == b["nll_sha256"]
    assert b["model_resident_bytes"] > 5 * a["model_resident_bytes"]
    assert abs(a["anonymous_bytes_max"] - b["anonymous_bytes_max"]) < 20e6
    assert b["model_pss_sum_bytes"] == pytest.approx(b["model_resident_bytes"], rel=0.02)
