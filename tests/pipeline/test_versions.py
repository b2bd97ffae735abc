"""Laws of the version check: driver and nodes run the same, or the run is refused and the node is named."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import engine
from pipeline.errors import ClusterUnreachable
from pipeline.versions import VersionCheck, differences, here

ONE, TWO = (
    {"NodeID": letter * 56, "NodeManagerHostname": f"host-{letter}", "NodeManagerAddress": "10.0.0.1"}
    for letter in "ab"
)


class RayError(Exception):
    """Stands in for Ray's."""


class RayTaskError(RayError):
    def __init__(self, cause: Exception) -> None:
        super().__init__()
        self.cause = cause


class FakeRay:
    """Answers of nodes by id: versions, an exception, or None for none yet."""

    def __init__(self, answers: dict[str, Any]) -> None:
        self.answers, self.asked = answers, Counter[str]()
        self.exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)
        affinity = SimpleNamespace(NodeAffinitySchedulingStrategy=self._only_on)
        self.util = SimpleNamespace(scheduling_strategies=affinity)

    def _only_on(self, node: str, soft: bool) -> str:
        assert not soft, "the question would be answered by another node"
        return node

    def remote(self, function: Any) -> Any:
        assert function is here
        return self

    def options(self, num_cpus: int, max_retries: int, scheduling_strategy: str) -> Any:
        assert num_cpus == 0, "a cluster whose CPUs are taken could not answer"

        def ask() -> str:
            self.asked[scheduling_strategy] += 1
            return scheduling_strategy

        return SimpleNamespace(remote=ask)

    def wait(self, refs: list[str], num_returns: int, timeout: float) -> tuple[list[str], list[str]]:
        done = [ref for ref in refs if self.answers[ref] is not None]
        return done, [ref for ref in refs if ref not in done]

    def get(self, ref: str) -> Any:
        if isinstance(self.answers[ref], Exception):
            raise self.answers[ref]
        return self.answers[ref]


def test_this_process_says_what_can_change_a_bit() -> None:
    found = here()
    assert set(found) == {"python", "ray", "numba", "numpy", "pyarrow", "pagemill", "engine.NUMERICS"}
    assert re.fullmatch(r"3[.]\d+", found["python"]), "the patch level changes nothing"
    assert found["engine.NUMERICS"] == str(engine.NUMERICS)
    assert differences(found, found) == []


@pytest.mark.parametrize("name", sorted(here()))
def test_each_difference_is_refused_by_name_before_work(name: str) -> None:
    ray = FakeRay({ONE["NodeID"]: here(), TWO["NodeID"]: here() | {name: "0.9"}})
    with pytest.raises(ClusterUnreachable) as refused:
        VersionCheck(ray).require([ONE, TWO])
    assert refused.value.exit_code == 2
    assert refused.value.hint
    said = str(refused.value)
    assert (
        f"1 of 2 nodes do not run what the driver runs: node host-b (10.0.0.1, bbbbbbbb): {name} 0.9, "
        in said
    )
    assert f"expected {here()[name]}" in said
    assert "host-a" not in said


def test_nodes_that_agree_are_asked_once(caplog: pytest.LogCaptureFixture) -> None:
    ray = FakeRay({ONE["NodeID"]: here(), TWO["NodeID"]: here()})
    check = VersionCheck(ray)
    check.require([ONE, TWO])
    assert check.admits(ONE)
    assert check.admits(TWO)
    assert set(ray.asked.values()) == {1}
    assert not caplog.records


def test_a_node_without_pagemill_is_refused() -> None:
    error = RayTaskError(ModuleNotFoundError("No module named 'pipeline'"))
    with pytest.raises(ClusterUnreachable, match=r"does not run there [(]No module"):
        VersionCheck(FakeRay({ONE["NodeID"]: error})).require([ONE])


def test_a_node_that_joins_late_is_waited_for_without_blocking_and_left_out_when_it_differs(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ray = FakeRay({ONE["NodeID"]: here(), TWO["NodeID"]: None})
    check = VersionCheck(ray)
    check.require([ONE])
    assert not check.admits(TWO)
    ray.answers[TWO["NodeID"]] = here() | {"numba": "0.1"}
    assert not check.admits(TWO)
    assert not check.admits(TWO)
    assert ray.asked[TWO["NodeID"]] == 1
    (said,) = caplog.messages
    assert "host-b" in said
    assert "numba 0.1, expected" in said
    assert "no worker is started there" in said


def test_a_node_that_is_lost_while_it_is_asked_is_asked_again(caplog: pytest.LogCaptureFixture) -> None:
    ray = FakeRay({ONE["NodeID"]: here(), TWO["NodeID"]: RayError("gone")})
    check = VersionCheck(ray)
    check.require([ONE, TWO])
    assert "did not say what it runs" in caplog.text
    ray.answers[TWO["NodeID"]] = here()
    assert check.admits(TWO)


def test_a_cluster_that_does_not_answer_is_refused_and_one_that_answers_in_part_is_used(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ray = FakeRay({ONE["NodeID"]: None, TWO["NodeID"]: None})
    with pytest.raises(ClusterUnreachable, match="no node said within 60 s"):
        VersionCheck(ray).require([ONE, TWO])
    ray.answers[ONE["NodeID"]] = here()
    check = VersionCheck(ray)
    check.require([ONE, TWO])
    assert "host-b" in caplog.text
    assert "its workers wait" in caplog.text
    assert (check.admits(ONE), check.admits(TWO)) == (True, False)


def test_many_nodes_that_differ_are_counted() -> None:
    nodes = [{"NodeID": f"{i:056}"} for i in range(9)]
    wrong = here() | {"ray": "1.0", "numba": "0.1"}
    with pytest.raises(ClusterUnreachable, match="9 of 9 nodes") as refused:
        VersionCheck(FakeRay({node["NodeID"]: wrong for node in nodes})).require(nodes)
    assert "and 4 more" in str(refused.value)
    assert "ray 1.0, expected" in str(refused.value)


ROOT = Path(__file__).parents[2]
ANOTHER_NUMBA = """
import importlib.metadata
version = importlib.metadata.version
importlib.metadata.version = lambda name: "0.1" if name == "numba" else version(name)
"""


@pytest.mark.slow
@pytest.mark.ray
def test_a_command_on_a_cluster_with_another_numba_is_refused(tmp_path: Path) -> None:
    """The node's processes, and no other ones, see the other version."""
    (tmp_path / "sitecustomize.py").write_text(ANOTHER_NUMBA)
    temp_dir = tempfile.mkdtemp(prefix="pmv", dir="/tmp")
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "0" * 40,
    }
    head = subprocess.Popen(
        [sys.executable, str(ROOT / "tests/pipeline/ray_head.py"), temp_dir],
        env={**environment, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert head.stdout is not None
        address = head.stdout.readline().strip()
        command = [
            sys.executable, "-m", "jobs.perplexity", "cluster=ray", f"cluster.address={address}",
            "data=pydoc", "tracking=none", f"model.path={ROOT}/tests/data/mamba-tiny-q8_0.gguf",
            "protocol.limit=8", f"paths.results={tmp_path}/results", f"paths.cache={tmp_path}/cache",
        ]  # fmt: skip
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    finally:
        head.communicate(timeout=30)
        shutil.rmtree(temp_dir, ignore_errors=True)
    assert done.returncode == 2, done.stderr
    error = json.loads(done.stdout.splitlines()[-1])["error"]
    assert error["type"] == "ClusterUnreachable"
    said = (
        r"1 of 1 nodes do not run what the driver runs: node .* [(]127[.]0[.]0[.]1, .*numba 0[.]1, expected"
    )
    assert re.search(said, error["message"])
    assert not list((tmp_path / "results").rglob("shard-*.parquet"))
