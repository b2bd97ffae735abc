"""What a comparison asks of nodes: all its models at once, the same ones; and what its dry run says."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_comparison import install, write_model

from pipeline import cluster, node_cache, numa, perplexity
from pipeline.capacity import RAY_BYTES
from pipeline.compare import compare, plan
from pipeline.compare.needs import need_of
from pipeline.compare.settings import CompareSettings, StopSettings
from pipeline.compare.worker import CompareWorker
from pipeline.errors import ClusterUnreachable, ModelError, SettingsError
from pipeline.placement import Need
from pipeline.placement import plan as places
from pipeline.preflight import Preflight
from pipeline.settings import (
    ClusterSettings,
    DataSettings,
    EngineSettings,
    ModelSettings,
    PathsSettings,
    ProtocolSettings,
    TrackingSettings,
)
from pipeline.survey import Survey
from pipeline.topology import look
from tests.pipeline.sys_trees import host
from tests.pipeline.test_survey import FakeRay, entries

LOCAL = ClusterSettings("local", windows_per_shard=2)


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., CompareSettings]:
    """Settings of a base of 9,000 bytes and two variants of 5,000 and 4,000."""
    install(monkeypatch)
    for name, level, n_bytes in (("base", 0, 9000), ("high", 1, 5000), ("low", 16, 4000)):
        write_model(tmp_path / f"{name}.gguf", level, n_bytes)
    (tmp_path / "t.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)

    def settings(**groups: Any) -> CompareSettings:
        given = {
            "base": ModelSettings(str(tmp_path / "base.gguf")),
            "variants": [str(tmp_path / f"{name}.gguf") for name in ("high", "low")],
            "data": DataSettings(path=str(tmp_path / "t.txt")),
            "protocol": ProtocolSettings(window=32, limit=24),
            "cluster": LOCAL,
            "tracking": TrackingSettings("none"),
            "paths": PathsSettings(str(tmp_path / "results"), str(tmp_path / "cache")),
        }
        return CompareSettings(**{**given, **groups})

    return settings


@pytest.fixture
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """This machine is another one."""

    def become(**given: Any) -> None:
        monkeypatch.setattr(cluster, "look", lambda: host(node_id="", **{"cores": 8, **given}))
        monkeypatch.setattr(perplexity, "usable_cores", lambda: 8)

    become()
    return become


def needed(settings: CompareSettings) -> Need:
    with ExitStack() as files, Preflight() as preflight:
        return need_of(plan.planned(plan.check(settings, preflight, files)))


def test_all_models_are_asked_for_and_opened_at_once(make: Any, tmp_path: Path) -> None:
    need = needed(make(cluster=replace(LOCAL, kind="ray", address="h:1")))
    assert [Path(model.path).name for model in need.models] == ["base.gguf", "high.gguf", "low.gguf"]
    assert (need.model_bytes, need.at_once, need.files) == (18_000, True, ())
    assert [Path(file.path).name.split(".")[1] for file in need.cached] == ["counts", "pieces", "tokens"]
    assert needed(make()).cached == (), "this host has the driver's cache"
    copied = needed(make(engine=EngineSettings(load="copy")))
    assert copied.own_bytes == need.own_bytes + 18_000
    made = places([host(2, 2)], need, numa="mirror")
    assert made.nodes[0].bytes == 2 * 18_000 + 4 * need.own_bytes, "a copy of each model for a NUMA node"
    compare(make(variants=[str(tmp_path / "low.gguf")], cluster=ClusterSettings("inline")))
    left = needed(make(cluster=ClusterSettings("inline", windows_per_shard=4))).models
    assert [Path(model.path).name for model in left] == ["base.gguf", "high.gguf"], "low is finished"


@pytest.mark.parametrize("there", ["missing", "another"])
def test_a_node_that_lacks_a_variant_or_has_another_one_is_named(
    make: Any, there: str, tmp_path: Path
) -> None:
    need = needed(make(cluster=replace(LOCAL, kind="ray", address="h:1")))
    variant = tmp_path / "low.gguf"
    if there == "missing":
        variant.unlink()
    else:
        write_model(variant, 17, 4000)
        node_cache.files_sha256([variant], tmp_path / "cache")  # the node has read it before
    info = replace(look([model.path for model in need.models], need.cache), host="b")
    with pytest.raises(ClusterUnreachable, match=r"b \(b\): .*low\.gguf.*(No such file|expected )") as caught:
        Survey(FakeRay({"b": info}), need).plan(entries("b"))
    assert caught.value.exit_code == 2


def test_a_worker_without_the_variant_names_it_and_its_host(make: Any, tmp_path: Path) -> None:
    with ExitStack() as files, Preflight() as preflight:
        task, *_ = plan.tasks(plan.planned(plan.check(make(), preflight, files)))
    (tmp_path / "low.gguf").unlink()
    with pytest.raises(ModelError, match=rf"low\.gguf: there is no such file on {socket.gethostname()}"):
        CompareWorker(task.spec)  # type: ignore[arg-type]


def test_workers_map_their_numa_nodes_copies_of_all_models(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = tmp_path / "copies"
    shutil.copytree(tmp_path, copies, ignore=lambda _, names: [n for n in names if not n.endswith(".gguf")])
    monkeypatch.setattr(numa, "own_copy", lambda path: str(copies / Path(path).name))
    with ExitStack() as files, Preflight() as preflight:
        task, *_ = plan.tasks(plan.planned(plan.check(make(), preflight, files)))
    worker = CompareWorker(task.spec)  # type: ignore[arg-type]
    assert {Path(file.path) for file in worker._files.values()} == set(copies.iterdir())
    worker.close()


def test_a_dry_run_shows_nodes_memory_and_duration(make: Any, eight_cores: Any) -> None:
    s = compare(make(dry_run=True)).summary
    (node,) = s["nodes"]
    assert (s["n_workers"], node["n_workers"], node["cpus"]) == (8, 8, list("01234567"))
    assert s["memory_bytes"] == node["memory_bytes"] + 18_000
    assert (s["fetch_bytes"], node["fetch_bytes"], s["n_windows"], s["shards_todo"]) == (0, 0, 24, 24)
    assert [how.split(":")[0] for how in s["estimated_from"]] == ["high", "low", "base"]
    assert s["estimated_s"] > 0
    s = compare(make(dry_run=True, stop=StopSettings("decided"))).summary
    assert s["estimated_from"][-1] == "stop=decided may end it earlier"
    compare(make(cluster=ClusterSettings("inline", windows_per_shard=2)))
    s = compare(make(dry_run=True)).summary
    assert (s["n_workers"], s["nodes"], s["estimated_s"], s["shards_todo"]) == (0, [], 0.0, 0)


def test_memory_decides_how_many_workers_and_none_is_refused(make: Any, eight_cores: Any) -> None:
    worker = needed(make()).own_bytes
    eight_cores(left=RAY_BYTES + 3 * worker + 1)
    s = compare(make(dry_run=True)).summary
    assert (s["n_workers"], "are left" in s["nodes"][0]["reason"]) == (3, True)
    eight_cores(left=RAY_BYTES + worker - 1)
    with pytest.raises(SettingsError, match="no node has the memory of one worker") as caught:
        compare(make())
    assert caught.value.exit_code == 2
    eight_cores(slots=0)
    with pytest.raises(ClusterUnreachable, match="Ray has 0 CPUs there, a worker wants 1"):
        compare(make(dry_run=True))


def test_a_base_by_url_is_wanted_by_every_node_and_fetched_by_no_dry_run(make: Any, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/base.gguf"
    s = compare(make(base=ModelSettings(url), dry_run=True)).summary
    assert (s["job"], s["fetch_bytes"], s["exit_code"]) == ("compare", 9000, 0)
    need = needed(make(base=ModelSettings(url)))
    assert (need.models[0].path, need.models[0].n_bytes) == (url, 9000)
    with ExitStack() as files, Preflight() as preflight:
        task, *_ = plan.tasks(plan.planned(plan.check(make(base=ModelSettings(url)), preflight, files)))
        node = replace(task.spec, cache_dir=str(tmp_path / "node"))
        worker = CompareWorker(node)  # type: ignore[arg-type]
    (held,) = node_cache.kept(url, tmp_path / "node")
    assert worker.file is not None
    assert worker.file.path == str(held)
    worker.close()
