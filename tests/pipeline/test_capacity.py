"""What a host can hold is looked at first: more threads than cores and batches too large are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_engine import FakeFile, install

from pipeline import capacity, evaluate
from pipeline.errors import SettingsError
from pipeline.preflight import Preflight
from pipeline.runtime import available_cores
from pipeline.settings import (
    ClusterSettings,
    DataSettings,
    EngineSettings,
    ModelSettings,
    PathsSettings,
    PerplexitySettings,
    ProtocolSettings,
    TrackingSettings,
)

GB = 10**9


@pytest.fixture
def left(monkeypatch):
    """Sets the memory that is left."""
    return lambda n_bytes: monkeypatch.setattr(capacity, "available_bytes", lambda: n_bytes)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in place of /proc and /sys/fs/cgroup: 8 GB are left, no group has a limit."""
    (tmp_path / "meminfo").write_text("MemTotal: 16000000 kB\nMemAvailable: 8000000 kB\n")
    (tmp_path / "own").write_text("0::/a/b\n4:memory:/c\n3:cpuset:/d\n")
    monkeypatch.setattr(capacity, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(capacity, "_OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(capacity, "_CGROUPS", tmp_path / "cgroup")
    return tmp_path


def group(host: Path, name: str, limit: str, used: int, cache: str, *files: str) -> None:
    folder = host / "cgroup" / name
    folder.mkdir(parents=True, exist_ok=True)
    for file, text in zip(files, (limit, str(used), f"anon 5\n{cache}"), strict=True):
        (folder / file).write_text(f"{text}\n")


V2 = ("memory.max", "memory.current", "memory.stat")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat")


def test_what_is_left_is_the_least_of_machine_and_groups(host) -> None:
    assert capacity.available_bytes() == 8_000_000 * 1024
    group(host, "a/b", "max", 10, "file 1", *V2)
    assert capacity.available_bytes() == 8_000_000 * 1024, "no limit"
    group(host, "a", str(3 * GB), 2 * GB, f"file {GB // 2}", *V2)
    assert capacity.available_bytes() == 3 * GB // 2, "the page cache can be given back"
    group(host, "memory/c", str(GB), GB // 2, f"total_cache {GB // 4}", *V1)
    assert capacity.available_bytes() == 3 * GB // 4, "version 1 as well"


def test_a_kernel_that_says_nothing_limits_nothing(host, monkeypatch) -> None:
    (host / "meminfo").unlink()
    (host / "own").unlink()
    assert capacity.available_bytes() is None
    capacity.check_batch(lambda tokens: 10**30, 4096, 512, "1 worker wants")


def test_this_machine_says_what_it_has() -> None:
    left = capacity.available_bytes()
    assert left is not None
    assert 0 < left < 1 << 50


def test_threads_beyond_the_cores_are_refused() -> None:
    capacity.check_threads(available_cores())
    with pytest.raises(SettingsError, match=r"engine\.threads=4096 is more than the cores") as caught:
        capacity.check_threads(4096)
    assert f"engine.threads={available_cores()}" in caught.value.hint


@pytest.mark.parametrize("limit", [100, 101, 999, 1000, 5119, 5120, 5121, 40960])
def test_the_largest_batch_that_fits_is_named(limit: int, left) -> None:
    """Ten bytes a token; below a window of 512 tokens a cache of 1,000 more."""

    def need(tokens: int) -> int:
        return 10 * tokens + (1000 if tokens < 512 else 0)

    fitting = [tokens for tokens in range(1, 4097) if need(tokens) <= limit]
    left(limit)
    if 4096 in fitting:
        capacity.check_batch(need, 4096, 512, "1 worker wants")
        return
    with pytest.raises(SettingsError, match=r"engine\.batch_tokens=4096: 1 worker wants") as caught:
        capacity.check_batch(need, 4096, 512, "1 worker wants", " or less")
    if fitting:
        assert f"the largest that fits is engine.batch_tokens={max(fitting)}" in str(caught.value)
        assert caught.value.hint == f"engine.batch_tokens={max(fitting)} or less"
    else:
        assert "not even engine.batch_tokens=1 fits" in str(caught.value)


def test_weights_that_are_mapped_take_nothing() -> None:
    file = type("File", (), {"n_bytes": 7})()
    assert [capacity.loaded_bytes(file, load, 3) for load in ("mmap", "mlock", "copy")] == [0, 7, 21]


@pytest.fixture
def scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Settings of a small run on the fake engine, which wants 1,000 bytes for each token of a batch."""
    install(monkeypatch)
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + bytes(9000))
    (tmp_path / "t.txt").write_text("The quick brown fox jumps over the lazy dog. " * 10)

    def settings(**groups):
        return PerplexitySettings(
            **{
                "model": ModelSettings(str(tmp_path / "m.gguf")),
                "data": DataSettings(path=str(tmp_path / "t.txt")),
                "protocol": ProtocolSettings(window=32),
                "cluster": ClusterSettings("inline", windows_per_shard=4),
                "tracking": TrackingSettings("none"),
                "paths": PathsSettings(str(tmp_path / "results"), str(tmp_path / "cache")),
                **groups,
            }
        )

    return settings


def test_a_perplexity_with_more_threads_than_cores_is_refused(scored) -> None:
    too_many = available_cores() + 1
    with pytest.raises(SettingsError, match=rf"engine\.threads={too_many} is more than the cores"):
        evaluate(scored(engine=EngineSettings(threads=too_many)))
    with pytest.raises(SettingsError, match=rf"cluster\.threads_per_worker={too_many} is more than"):
        evaluate(scored(cluster=ClusterSettings("inline", threads_per_worker=too_many)))


def test_a_clusters_threads_are_not_this_machines(scored) -> None:
    with Preflight() as preflight:
        ready = preflight.check(
            scored(cluster=ClusterSettings("ray", address="h:1", threads_per_worker=available_cores() + 1))
        )
    assert ready.settings.engine.threads == available_cores() + 1


@pytest.mark.parametrize(("cluster", "n"), [(ClusterSettings("inline"), 1), (ClusterSettings(workers=3), 3)])
def test_a_perplexity_whose_batch_does_not_fit_is_refused_before_allocation(scored, left, cluster, n) -> None:
    left(n * (capacity.BASE_BYTES + 500_000 + 4) + (capacity.RAY_BYTES if cluster.kind == "local" else 0))
    with pytest.raises(SettingsError, match=r"the largest that fits is engine\.batch_tokens=500") as caught:
        evaluate(scored(cluster=cluster))
    assert f"{n} worker{'s want' if n > 1 else ' wants'}" in str(caught.value)
    assert "engine.kv=f16" in caught.value.hint
    assert (
        evaluate(scored(cluster=cluster, engine=EngineSettings(batch_tokens=500), dry_run=True)).exit_code
        == 0
    )


def test_workers_that_have_nothing_to_do_are_not_counted(scored, left) -> None:
    cluster = ClusterSettings(windows_per_shard=1000)  # one shard, so one worker, whatever the cores
    left(capacity.RAY_BYTES + capacity.BASE_BYTES + 5_000_000)
    assert evaluate(scored(cluster=cluster, dry_run=True)).exit_code == 0


def test_a_copy_of_the_weights_counts_for_each_worker(scored, left, monkeypatch) -> None:
    monkeypatch.setattr(FakeFile, "n_bytes", 9004, raising=False)
    left(capacity.BASE_BYTES + 4_096_001)
    with pytest.raises(SettingsError, match=r"the largest that fits is engine\.batch_tokens=4086"):
        evaluate(scored(engine=EngineSettings(load="copy")))


def test_a_run_that_is_finished_wants_no_memory(scored, left) -> None:
    first = evaluate(scored()).summary
    left(1)
    assert evaluate(scored()).summary["ppl"] == first["ppl"]
