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
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from make_gguf import tiny_llama

from pipeline import evaluate
from pipeline.errors import ClusterUnreachable, SettingsError, StoreError
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
from pipeline.token_copies import CacheFile, lay
from pipeline.topology import ModelFile, NodeInfo, usable_cores
from tests.pipeline.sys_trees import GB, host


class RayError(Exception):
    pass


class TaskFailed(RayError):
    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


class FakeRay:
    """Answers at once: what `says` has of a node, raised when it is an error; a node it lacks is silent.

    `copies` are what keepers answer, `laid` what nodes answer that are sent something; `fetches` are waits
    until models by URL are there.
    """

    exceptions = SimpleNamespace(RayTaskError=TaskFailed, RayError=RayError)
    util = SimpleNamespace(
        scheduling_strategies=SimpleNamespace(NodeAffinitySchedulingStrategy=lambda node, soft: (node, soft))
    )

    def __init__(self, says: dict[str, Any], copies: dict[str, Any] | None = None) -> None:
        self.says, self.copies = says, copies or {}
        self.asked: list[str] = []
        self.killed: list[str] = []
        self.timeouts: list[float] = []
        self.laid: dict[str, Any] = {}
        self.sent: list[tuple[str, list[str], list[Any]]] = []  # node, paths, what was put
        self.n_puts, self.fetches = 0, 0

    def put(self, value: Any) -> Any:
        self.n_puts += 1
        return ("put", self.n_puts, bytes(value))

    def remote(self, what: Any) -> Any:
        return SimpleNamespace(options=lambda **options: SimpleNamespace(remote=self._starter(what, options)))

    def _starter(self, what: Any, options: dict[str, Any]) -> Callable[..., Any]:
        node, soft = options["scheduling_strategy"]
        assert (options["num_cpus"], soft) == (0, False)
        if what is Keeper:
            return lambda: SimpleNamespace(
                node=node,
                fetch=SimpleNamespace(remote=lambda *given: ("fetch", node)),
                copy=SimpleNamespace(remote=lambda *given: ("copy", node, *given)),
                close=SimpleNamespace(remote=lambda: ("close", node)),
            )
        if what is lay:
            return lambda files, *puts: (
                self.sent.append((node, [file.path for file in files], [put[2] for put in puts]))
                or ("lay", node)
            )
        self.asked.append(node)
        return lambda *given: ("look", node, *given)

    def _found(self, ref: Sequence[Any]) -> dict[str, Any]:
        if ref[0] == "fetch":
            return {ref[1]: None} if self.fetches <= 0 else {}
        known = {"look": self.says, "copy": self.copies, "lay": self.laid, "close": {ref[1]: None}}
        return known[ref[0]]

    def wait(self, refs: list[Any], num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        self.timeouts.append(timeout)
        self.fetches -= any(ref[0] == "fetch" for ref in refs)
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


def test_models_by_url_are_fetched_however_long_that_takes_before_they_are_copied(
    caplog: pytest.LogCaptureFixture,
) -> None:
    need = replace(NEED, models=(ModelFile("https://h/m.gguf", GB), ModelFile("/n.gguf", GB)))
    ray = FakeRay(there("a", n_nodes=2, cores=2), {"a": {0: "/c/0", 1: "/c/1"}})
    ray.fetches = 3
    survey = Survey(ray, need, numa="mirror")
    survey.plan(entries("a"))
    with caplog.at_level(logging.INFO):
        survey.copy_models()
    assert caplog.text.count("waiting for models: 1 nodes fetch them") == 2
    assert on(survey.places_for(entries("a"))) == {"a": 4}


@pytest.fixture
def cached(tmp_path: Path) -> CacheFile:
    (tmp_path / "k.tokens.npy").write_bytes(b"tokens")
    return CacheFile(str(tmp_path / "k.tokens.npy"), 6, "ab" * 32)


def test_a_node_that_lacks_tokens_is_sent_them_before_it_gets_workers(cached: CacheFile) -> None:
    """Two at the start, one that joins; what they get is put into the object store once for both."""
    ray = FakeRay({**there("a"), **there("b", "c", "d", lacking=(cached.path,))})
    ray.laid = {"b": None, "c": None}
    survey = Survey(ray, replace(NEED, cached=(cached,)))
    made = survey.plan(entries("a", "b", "c"))
    assert [node["sent_bytes"] for node in made.told()] == [0, 6, 6]
    assert "0.0 MB of tokens to send" in made.lines()[1]
    survey.send_cached()
    assert (ray.sent, ray.n_puts) == ([(name, [cached.path], [b"tokens"]) for name in "bc"], 1)
    assert on(survey.places_for(entries("a", "b", "c"))) == {"a": 4, "b": 4, "c": 4}
    assert on(survey.places_for(entries("a", "b", "c", "d"))) == {"a": 4, "b": 4, "c": 4}
    assert (ray.sent[2:], ray.n_puts) == ([("d", [cached.path], [b"tokens"])], 2)
    ray.laid["d"] = None
    assert on(survey.places_for(entries("a", "b", "c", "d"))) == {"a": 4, "b": 4, "c": 4, "d": 4}
    survey.places_for(entries("a", "b", "c", "d"))
    assert len(ray.sent) == 3, "once"
    survey.close()


def test_a_node_that_cannot_keep_tokens_gets_no_worker_and_is_refused_when_it_is_alone(
    cached: CacheFile, caplog: pytest.LogCaptureFixture
) -> None:
    need = replace(NEED, cached=(cached,))
    read_only = TaskFailed(StoreError("/cache/tokens on b: cannot keep the token stream: Read-only"))
    ray = FakeRay({**there("a"), **there("b", lacking=(cached.path,))})
    ray.laid = {"b": read_only}
    survey = Survey(ray, need, wanted=6)
    survey.plan(entries("a", "b"))
    with caplog.at_level(logging.WARNING):
        survey.send_cached()
    assert "on b: cannot keep the token stream: Read-only; no worker is started there" in caplog.text
    for _ in range(2):
        assert on(survey.places_for(entries("a", "b"))) == {"a": 3}
    alone = Survey(ray, need)
    alone.plan(entries("b"))
    with pytest.raises(ClusterUnreachable, match=r"can take a worker: b \(b\): .*Read-only") as caught:
        alone.send_cached()
    assert (caught.value.exit_code, "every node can write" in caught.value.hint) == (2, True)


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
