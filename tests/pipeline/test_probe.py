"""Nodes that write where the driver does not see it, or nowhere, are named; with a Ray of Python objects."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline import probe
from pipeline.errors import StoreError
from pipeline.folders import folder_of
from pipeline.probe import Left, Probes, leave


class RayError(Exception):
    cause: Exception | None = None


class FakeRay:
    """Runs each node's task when its answer is asked for; `nodes` says what becomes of it there."""

    exceptions = SimpleNamespace(RayTaskError=type("RayTaskError", (RayError,), {}), RayError=RayError)
    util = SimpleNamespace(
        scheduling_strategies=SimpleNamespace(NodeAffinitySchedulingStrategy=lambda node, soft: (node, soft))
    )

    def __init__(self, **nodes: Callable[..., Left] | None) -> None:
        self.nodes, self.asked = nodes, []

    def remote(self, what: Any) -> Any:
        assert what is leave
        return SimpleNamespace(options=self._with)

    def _with(self, *, num_cpus: int, max_retries: int, scheduling_strategy: tuple[str, bool]) -> Any:
        assert (num_cpus, max_retries, scheduling_strategy[1]) == (0, 0, False)
        node = scheduling_strategy[0]
        self.asked.append(node)
        return SimpleNamespace(remote=lambda *given: (node, given))

    def wait(self, refs: Sequence[Any], num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        done = [ref for ref in refs if self.nodes[ref[0]] is not None][:num_returns]
        return done, [ref for ref in refs if ref not in done]

    def get(self, ref: Any) -> Left:
        there = self.nodes[ref[0]]
        assert there is not None
        return there(*ref[1])


def entries(*names: str) -> list[dict[str, Any]]:
    return [{"NodeID": name, "NodeManagerHostname": f"host-{name}"} for name in names]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of the run's shards, as the driver has it."""
    monkeypatch.setattr(probe, "SEEN_WITHIN_S", 0.3)
    folder = tmp_path / "results/v1"
    folder.mkdir(parents=True)
    return folder


def of(ray: FakeRay, folder: Path | str | None, tmp_path: Path) -> Probes:
    return Probes(ray, None if folder is None else str(folder), str(tmp_path / "cache"))


def elsewhere(folder: str | None, name: str, cache: str) -> Left:
    """A node whose own disk is under that path."""
    own = Path(cache) / "own disk"
    own.mkdir(parents=True)
    return leave(str(own), name, cache)


def test_nodes_that_share_the_folder_are_used_and_leave_nothing(folder: Path, tmp_path: Path) -> None:
    ray = FakeRay(a=leave, b=leave)
    probes = of(ray, folder, tmp_path)
    probes.require(entries("a", "b"))
    assert [probes.admits(node) for node in entries("a", "b")] == [True, True]
    assert ray.asked == ["a", "b"], "each once"
    assert list(folder.iterdir()) == []


def test_all_nodes_that_cannot_be_used_are_named_with_their_reasons(folder: Path, tmp_path: Path) -> None:
    def nowhere(_: str, name: str, cache: str) -> Left:
        return leave(str(folder / "not there"), name, cache)

    def no_cache(path: str, name: str, cache: str) -> Left:
        (tmp_path / "file").write_text("")
        return leave(path, name, str(tmp_path / "file"))

    def broken(*_: str) -> Left:
        error = FakeRay.exceptions.RayTaskError()
        error.cause = ModuleNotFoundError("No module named 's3fs'")
        raise error

    probes = of(FakeRay(a=leave, b=elsewhere, c=nowhere, d=no_cache, e=broken), folder, tmp_path)
    with pytest.raises(StoreError, match="4 of 5 nodes cannot be used") as caught:
        probes.require(entries("a", "b", "c", "d", "e"))
    said = str(caught.value)
    assert caught.value.exit_code == 2
    assert "cluster.collect=true" in caught.value.hint
    assert "host-a" not in said
    assert f"host-b (?, b): what it wrote to {folder} is not seen by the driver on" in said
    assert f"host-c (?, c): cannot write to {folder / 'not there'}: No such file or directory" in said
    assert f"host-d (?, d): paths.cache: cannot write to {tmp_path / 'file'}" in said
    assert "host-e (?, e): cannot try where it can write (No module named 's3fs')" in said


def test_a_file_that_is_seen_late_is_waited_for(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "SEEN_WITHIN_S", 5.0)

    def late(path: str, name: str, cache: str) -> Left:
        threading.Timer(0.2, leave, (path, name, cache)).start()
        return Left("late", time.time())

    of(FakeRay(a=late), folder, tmp_path).require(entries("a"))


def test_where_the_driver_writes_only_the_cache_is_tried(folder: Path, tmp_path: Path) -> None:
    def no_folder(path: str | None, name: str, cache: str) -> Left:
        assert path is None
        return leave(path, name, cache)

    of(FakeRay(a=no_folder), None, tmp_path).require(entries("a"))
    read_only = Probes(FakeRay(a=no_folder), None, "/proc/self/pagemill")
    with pytest.raises(StoreError, match=r"host-a .*paths\.cache: cannot write to /proc/self/pagemill"):
        read_only.require(entries("a"))


def test_nodes_that_join_are_asked_and_nobody_waits(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ray = FakeRay(a=leave, b=None, c=elsewhere)
    probes = of(ray, folder, tmp_path)
    probes.require(entries("a", "b"), timeout_s=0.05)
    assert "host-b (?, b) has not tried yet" in caplog.text
    a, b, c = entries("a", "b", "c")
    assert (probes.admits(a), probes.admits(b), probes.admits(c)) == (True, False, False)
    ray.nodes["b"] = leave
    assert probes.admits(b)
    time.sleep(0.35)
    assert not probes.admits(c)
    assert "host-c (?, c): what it wrote to" in caplog.text
    assert "no worker is started there" in caplog.text


@pytest.mark.parametrize(("off_s", "said"), [(30.0, "ahead of"), (-3600.0, "behind"), (1.0, None)])
def test_a_clock_that_is_off_is_told(
    off_s: float,
    said: str | None,
    folder: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(probe.time, "time", lambda: 1.7e9)  # an answer takes no time, on a busy machine too

    def skewed(*given: Any) -> Left:
        left = leave(*given)
        return replace(left, clock_s=left.clock_s + off_s)

    of(FakeRay(a=skewed), folder, tmp_path).require(entries("a"))
    if said is None:
        assert "clock" not in caplog.text
    else:
        assert f"host-a (?, a): its clock is {abs(off_s):.1f} s {said} the driver's" in caplog.text


def test_a_node_that_goes_is_asked_again_if_it_stays(folder: Path, tmp_path: Path) -> None:
    answers = [RayError("the node died"), None]

    def going(*given: Any) -> Left:
        if (error := answers.pop(0)) is not None:
            raise error
        return leave(*given)

    probes = of(FakeRay(a=going), folder, tmp_path)
    probes.require(entries("a"))
    assert probes.admits(entries("a")[0])


def test_a_store_is_tried_like_a_folder(s3: str, tmp_path: Path) -> None:
    def no_bucket(_: str, name: str, cache: str) -> Left:
        return leave("s3://not-a-bucket/x", name, cache)

    of(FakeRay(a=leave), s3, tmp_path).require(entries("a"))
    assert list(folder_of(s3).iterdir()) == []
    with pytest.raises(StoreError, match="there is no bucket not-a-bucket"):
        of(FakeRay(a=no_bucket), s3, tmp_path).require(entries("a"))
