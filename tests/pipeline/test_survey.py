"""Which nodes get workers while they answer, are silent, join and go: mostly with a Ray of Python objects."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from make_gguf import tiny_llama

from pipeline import evaluate
from pipeline.errors import ClusterUnreachable, SettingsError
from pipeline.numa import Keeper
from pipeline.placement import Need, Place
from pipeline.settings import (
    ClusterSettings,
    DataSettings,
    ModelSettings,
    PathsSettings,
    PerplexitySettings,
    ProtocolSettings,
    TrackingSettings,
)
from pipeline.survey import Survey
from pipeline.topology import ModelFile, NodeInfo, usable_cores
from tests.pipeline.sys_trees import GB, host


class RayError(Exception):
    pass


class TaskFailed(RayError):
    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


class FakeRay:
    """Answers at once: what `says` has of a node, raised when it is an error; a node it lacks is silent."""

    exceptions = SimpleNamespace(RayTaskError=TaskFailed, RayError=RayError)
    util = SimpleNamespace(
        scheduling_strategies=SimpleNamespace(NodeAffinitySchedulingStrategy=lambda node, soft: (node, soft))
    )

    def __init__(self, says: dict[str, Any], copies: dict[str, Any] | None = None) -> None:
        self.says, self.copies = says, copies or {}
        self.asked: list[str] = []
        self.killed: list[str] = []
        self.timeouts: list[float] = []

    def remote(self, what: Any) -> Any:
        return SimpleNamespace(options=lambda **options: SimpleNamespace(remote=self._starter(what, options)))

    def _starter(self, what: Any, options: dict[str, Any]) -> Callable[..., Any]:
        node, soft = options["scheduling_strategy"]
        assert (options["num_cpus"], soft) == (0, False)
        if what is Keeper:
            return lambda: SimpleNamespace(
                node=node,
                copy=SimpleNamespace(remote=lambda *given: ("copy", node, *given)),
                close=SimpleNamespace(remote=lambda: ("close", node)),
            )
        self.asked.append(node)
        return lambda *given: ("look", node, *given)

    def _found(self, ref: Sequence[Any]) -> dict[str, Any]:
        return {"look": self.says, "copy": self.copies, "close": {ref[1]: None}}[ref[0]]

    def wait(self, refs: list[Any], num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        self.timeouts.append(timeout)
        ready = [ref for ref in refs if ref[1] in self._found(ref)]
        return ready[:num_returns], [ref for ref in refs if ref not in ready[:num_returns]]

    def get(self, ref: Any, timeout: float | None = None) -> Any:
        if ref[1] not in self._found(ref):
            raise RayError("timed out")
        value = self._found(ref)[ref[1]]
        if isinstance(value, Exception):
            raise value
        return value

    def kill(self, actor: Any, no_restart: bool) -> None:
        assert no_restart
        self.killed.append(actor.node)


def entries(*names: str, cpus: float = 4.0) -> list[dict[str, Any]]:
    return [
        {"NodeID": name, "NodeManagerHostname": f"host-{name}", "Resources": {"CPU": cpus}} for name in names
    ]


def there(*names: str, **rest: Any) -> dict[str, NodeInfo]:
    return {name: host(name=name, node_id="", **rest) for name in names}


def on(places: list[Place]) -> dict[str, int]:
    return {node: sum(place.node_id == node for place in places) for node in {p.node_id for p in places}}


NEED = Need(1, GB, (ModelFile("/m.gguf", GB),), cache="/cache")


def test_all_nodes_are_asked_at_once_and_a_silent_one_is_left_out_until_it_answers() -> None:
    ray = FakeRay(there("a", "b"))
    survey = Survey(ray, NEED)
    made = survey.plan(entries("a", "b", "c"), timeout_s=7)
    assert (ray.asked, ray.timeouts[0]) == (["a", "b", "c"], 7)
    assert on(made.places) == {"a": 4, "b": 4}
    assert made.remarks == ("host-c (c): does not answer within 7 s, left out until it does",)
    before = survey.places_for(entries("a", "b", "c"))
    assert on(before) == {"a": 4, "b": 4}
    ray.says |= there("c")
    after = survey.places_for(entries("a", "b", "c"))
    assert on(after) == {"a": 4, "b": 4, "c": 4}
    assert set(before) < set(after), "places of a node stay what they are"
    assert ray.asked == ["a", "b", "c"]


def test_rays_cpus_limit_a_node() -> None:
    assert on(Survey(FakeRay(there("a")), NEED).plan(entries("a", cpus=2.5)).places) == {"a": 2}


def test_nodes_come_and_go() -> None:
    ray = FakeRay(there("a", "b"))
    survey = Survey(ray, NEED)
    survey.plan(entries("a"))
    assert on(survey.places_for(entries("a", "b"))) == {"a": 4, "b": 4}
    assert on(survey.places_for(entries("b"))) == {"b": 4}
    assert on(survey.places_for(entries("a", "b"))) == {"a": 4, "b": 4}
    assert ray.asked == ["a", "b", "a"], "a node that comes back is looked at again"


def test_a_number_of_workers_is_kept_when_nodes_join_and_kept_up_when_they_go() -> None:
    ray = FakeRay(there("a", "b", "c"))
    survey = Survey(ray, NEED, wanted=4)
    assert on(survey.plan(entries("a", "b")).places) == {"a": 2, "b": 2}
    assert on(survey.places_for(entries("a", "b", "c"))) == {"a": 2, "b": 2}
    assert on(survey.places_for(entries("b", "c"))) == {"b": 2, "c": 2}
    assert on(survey.places_for(entries("c"))) == {"c": 2}, "c was planned with two"


def test_who_cannot_be_looked_at_is_left_out_for_good_and_who_dies_is_asked_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ray = FakeRay({**there("a"), "b": TaskFailed(ModuleNotFoundError("pipeline")), "c": RayError("gone")})
    survey = Survey(ray, NEED)
    with caplog.at_level(logging.WARNING):
        made = survey.plan(entries("a", "b", "c"))
    assert made.remarks == ("host-b (b): cannot be looked at (pipeline)",)
    assert "host-c (c) was not looked at: RayError" in caplog.text
    for _ in range(2):
        survey.places_for(entries("a", "b", "c"))
    assert ray.asked.count("b") == 1
    ray.says |= there("c")
    survey.places_for(entries("a", "b", "c"))
    assert on(survey.places_for(entries("a", "b", "c"))) == {"a": 4, "c": 4}


def test_a_cluster_of_which_nobody_answers_is_refused_by_name() -> None:
    with pytest.raises(ClusterUnreachable, match=r"host-a \(a\): does not answer within 1 s"):
        Survey(FakeRay({}), NEED).plan(entries("a"), timeout_s=1)


def test_a_node_that_joins_without_the_model_or_memory_stops_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    survey = Survey(FakeRay({**there("a"), **there("b", left=1)}), NEED)
    survey.plan(entries("a"))
    with caplog.at_level(logging.WARNING):
        assert on(survey.places_for(entries("a", "b"))) == {"a": 4}
    assert "no worker is started on nodes that joined: no node has the memory" in caplog.text


def test_workers_wait_for_their_nodes_copies() -> None:
    two_sockets = there("a", "b", n_nodes=2, cores=2)
    ray = FakeRay(two_sockets, {"a": {0: "/c/0", 1: "/c/1"}})
    survey = Survey(ray, NEED, numa="mirror")
    survey.plan(entries("a"))
    survey.copy_models()
    mirrors = [place.mirror for place in survey.places_for(entries("a"))]
    assert mirrors == ["/c/0", "/c/0", "/c/1", "/c/1"]
    assert on(survey.places_for(entries("a", "b"))) == {"a": 4}, "b's are on their way"
    ray.copies["b"] = {0: "/d/0", 1: "/d/1"}
    assert {p.mirror for p in survey.places_for(entries("a", "b")) if p.node_id == "b"} == {"/d/0", "/d/1"}
    survey.close()
    survey.close()
    assert sorted(ray.killed) == ["a", "b"]


def test_copies_that_fail_refuse_a_run_and_not_a_node_that_joins(caplog: pytest.LogCaptureFixture) -> None:
    two_sockets = there("a", "b", n_nodes=2, cores=2)
    refused = TaskFailed(SettingsError("not here"))
    survey = Survey(FakeRay(two_sockets, {"a": refused}), NEED, numa="mirror")
    survey.plan(entries("a"))
    with pytest.raises(SettingsError, match="not here"):
        survey.copy_models()
    survey = Survey(FakeRay(two_sockets), NEED, numa="mirror")
    survey.plan(entries("a"))
    with pytest.raises(ClusterUnreachable, match=r"could not be copied on a \(a\): RayError"):
        survey.copy_models()
    survey = Survey(FakeRay(two_sockets, {"a": {0: "/c/0", 1: "/c/1"}, "b": refused}), NEED, numa="mirror")
    survey.plan(entries("a"))
    survey.copy_models()
    with caplog.at_level(logging.WARNING):
        places = survey.places_for(entries("a", "b"))
    assert {place.mirror for place in places if place.node_id == "b"} == {None}
    assert "b (b) has no copies of the model: not here" in caplog.text


def test_a_thousand_nodes_are_placed_in_less_than_it_takes_to_ask_one() -> None:
    names = [f"n{i}" for i in range(1000)]
    survey = Survey(FakeRay(there(*names)), NEED)
    started = time.perf_counter()
    assert len(survey.plan(entries(*names)).places) == 4000
    assert len(survey.places_for(entries(*names))) == 4000
    assert time.perf_counter() - started < 10


@pytest.fixture
def address() -> Iterator[str]:
    """Head of a cluster with two CPUs that is not ours."""
    temp_dir = tempfile.mkdtemp(prefix="pms", dir="/tmp")
    root = Path(__file__).parents[2]
    head = subprocess.Popen(
        [sys.executable, str(root / "tests/pipeline/ray_head.py"), temp_dir],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert head.stdout is not None
    yield head.stdout.readline().strip()
    head.communicate(timeout=30)
    shutil.rmtree(temp_dir, ignore_errors=True)


@pytest.mark.ray
def test_a_dry_run_asks_the_clusters_nodes_and_starts_no_worker(address: str, tmp_path: Path) -> None:
    tiny_llama(tmp_path / "m.gguf")
    (tmp_path / "t.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    settings = PerplexitySettings(
        model=ModelSettings(str(tmp_path / "m.gguf")),
        data=DataSettings(path=str(tmp_path / "t.txt")),
        protocol=ProtocolSettings(window=32),
        cluster=ClusterSettings("ray", address=address),
        tracking=TrackingSettings("none"),
        paths=PathsSettings(str(tmp_path / "results"), str(tmp_path / "cache")),
        dry_run=True,
    )
    s = evaluate(settings).summary
    (node,) = s["nodes"]
    assert node["host"] == socket.gethostname()
    assert len(node["node"]) == 56
    assert s["n_workers"] == node["n_workers"] == min(2, usable_cores())
    assert node["model_cached_bytes"] == (tmp_path / "m.gguf").stat().st_size
    assert (node["fetch_bytes"], node["reason"]) == (0, None)
    assert not Path(s["table"]).exists()
