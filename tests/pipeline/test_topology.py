"""What a host has, by fake trees of /sys and by the machine that the tests run on."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from make_gguf import split_gguf, tiny_llama

from pipeline import provenance, topology
from pipeline.cpu_sets import listed
from pipeline.runtime import available_cores
from pipeline.topology import Core, look, parse_cpus
from tests.pipeline import sys_trees


@pytest.fixture
def allowed(monkeypatch: pytest.MonkeyPatch):
    """Sets the CPUs that the process may use; no control group limits them."""
    monkeypatch.setattr(topology, "_OWN_CGROUPS", Path("/nowhere"))
    return lambda cpus: monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(parse_cpus(cpus)))


@given(st.sets(st.integers(0, 300)))
def test_lists_of_cpus_read_as_they_are_written(cpus: set[int]) -> None:
    assert parse_cpus(listed(cpus)) == tuple(sorted(cpus))


def test_a_list_of_cpus_is_the_kernels() -> None:
    assert parse_cpus("0-2,8,10-11\n") == (0, 1, 2, 8, 10, 11)
    assert parse_cpus("\n") == ()
    with pytest.raises(ValueError, match="invalid literal"):
        parse_cpus("0-x")


def test_two_sockets_with_two_threads_a_core(tmp_path: Path, allowed) -> None:
    pairs = [f"{i},{i + 8}" for i in range(8)]
    root = sys_trees.machine(tmp_path, {0: "0-3,8-11", 1: "4-7,12-15"}, pairs, online="0-15")
    allowed("0-15")
    node = look(sys_root=root)
    assert node.cores == tuple(Core((i, i + 8), i // 4) for i in range(8))
    assert (node.n_cores, node.n_cpus, node.quota) == (8, 16, None)
    assert [(n.id, listed(n.cpus)) for n in node.numa_nodes] == [(0, "0-3,8-11"), (1, "4-7,12-15")]
    assert {n.free_bytes for n in node.numa_nodes} == {1_000_024 * 1024}


def test_cpus_that_are_offline_or_not_ours_do_not_count(tmp_path: Path, allowed) -> None:
    pairs = [f"{i},{i + 4}" for i in range(4)]
    root = sys_trees.machine(tmp_path, {0: "0-1,4-5", 1: "2-3,6-7"}, pairs, online="0-2,4-7")
    allowed("1-7")
    node = look(sys_root=root)
    assert node.cores == (Core((1, 5), 0), Core((2, 6), 1), Core((4,), 0), Core((7,), 1))
    assert (node.n_cores, node.n_cpus) == (4, 6)


def test_a_node_of_memory_alone_and_numbers_with_gaps(tmp_path: Path, allowed) -> None:
    """As with memory on a card, and POWER's numbering; the older name of the siblings' file."""
    root = sys_trees.machine(
        tmp_path, {0: "0-1", 8: "2-3", 2: ""}, ["0", "1", "2", "3"], name="thread_siblings_list", free_kb=None
    )
    sys_trees.write(root, {"devices/system/node/nodes_of_nothing/cpulist": "9"})
    allowed("0-3")
    node = look(sys_root=root)
    assert [n.id for n in node.numa_nodes] == [0, 2, 8]
    assert [core.numa_node for core in node.cores] == [0, 0, 8, 8]
    assert {n.free_bytes for n in node.numa_nodes} == {None}


@pytest.mark.parametrize(
    "files", [{}, {"devices/system/cpu/online": "what", "devices/system/node/node0/x": ""}]
)
def test_where_sys_is_silent_every_cpu_is_a_core_of_one_node(tmp_path: Path, allowed, files) -> None:
    allowed("2,5")
    node = look(sys_root=sys_trees.write(tmp_path, files))
    assert node.cores == (Core((2,)), Core((5,)))
    assert [(n.id, n.cpus, n.free_bytes) for n in node.numa_nodes] == [(0, (2, 5), None)]


def test_an_online_list_that_has_none_of_ours_is_not_believed(tmp_path: Path, allowed) -> None:
    allowed("3")
    assert look(sys_root=sys_trees.machine(tmp_path, {}, ["3"], online="0")).n_cores == 1


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),
        ({"cpu.max": "max 100000"}, None),
        ({"cpu.max": "250000 100000"}, 2.5),
        ({"a/b/cpu.max": "max 100000", "a/cpu.max": "50000 100000"}, 0.5),
        ({"cpu,cpuacct/d/cpu.cfs_quota_us": "-1", "cpu,cpuacct/d/cpu.cfs_period_us": "100000"}, None),
        ({"cpu,cpuacct/d/cpu.cfs_quota_us": "300000", "cpu,cpuacct/d/cpu.cfs_period_us": "100000"}, 3),
        ({"cpu.max": "400000 100000", "a/cpu.max": "150000 100000"}, 1.5),
        ({"c/cpu.max": "100000 100000"}, None),
        ({"cpu.max": "what"}, None),
    ],
)
def test_the_least_quota_of_the_groups_around_us_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files, quota
) -> None:
    (tmp_path / "own").write_text("0::/a/b\n4:cpu,cpuacct:/d\n5:memory:/c\n")
    monkeypatch.setattr(topology, "_OWN_CGROUPS", tmp_path / "own")
    assert topology.cpu_quota(sys_trees.write(tmp_path / "cgroup", files)) == quota


def test_a_quota_limits_workers_and_never_to_none(tmp_path: Path, allowed) -> None:
    root = sys_trees.machine(tmp_path, {0: "0-7"}, [str(i) for i in range(8)])
    allowed("0-7")
    for quota, n in {"250000": 2, "50000": 1, "9900000": 8}.items():
        sys_trees.write(root, {"fs/cgroup/cpu.max": f"{quota} 100000"})
        node = look(sys_root=root)
        assert (node.n_cores, node.n_cpus) == (n, n)


def test_this_machine_is_as_lscpu_sees_it() -> None:
    if shutil.which("lscpu") is None:
        pytest.skip("lscpu is not installed")
    said = subprocess.run(["lscpu", "-p=CPU,CORE,SOCKET,NODE"], capture_output=True, text=True, check=True)
    rows = [line.split(",") for line in said.stdout.splitlines() if line and line[0] != "#"]
    allowed = os.sched_getaffinity(0)
    cores: dict[tuple[str, str], list[int]] = {}
    for cpu, core, socket, _ in rows:
        if int(cpu) in allowed:
            cores.setdefault((socket, core), []).append(int(cpu))
    node = look()
    assert sorted(core.cpus for core in node.cores) == sorted(tuple(sorted(cpus)) for cpus in cores.values())
    on = {int(cpu): int(number or 0) for cpu, _, _, number in rows}
    assert all(core.numa_node == on[cpu] for core in node.cores for cpu in core.cpus)
    assert {n.id for n in node.numa_nodes} >= set(on.values())
    assert node.here in {n.id for n in node.numa_nodes}
    assert 1 <= topology.usable_cores() <= available_cores()
    assert node.left_bytes is not None
    assert all(n.free_bytes is not None and 0 < n.free_bytes < 1 << 50 for n in node.numa_nodes if n.cpus)


def test_models_are_told_with_what_is_in_the_page_cache_and_the_digest_that_was_kept(tmp_path: Path) -> None:
    path, cache = tmp_path / "m.gguf", tmp_path / "cache"
    tiny_llama(path)
    (tmp_path / "broken.gguf").write_bytes(b"what?" * 9)
    first, broken, missing, remote = look(
        [str(path), str(tmp_path / "broken.gguf"), str(tmp_path / "no.gguf"), "https://h/m.gguf?token=s"],
        str(cache),
    ).models
    assert (first.n_bytes, first.cached_bytes, first.sha256) == (
        path.stat().st_size,
        path.stat().st_size,
        None,
    )
    assert (broken.n_bytes, missing.n_bytes) == (None, None)
    assert "broken.gguf" in str(broken.problem)
    assert str(missing.problem).endswith("no.gguf: No such file or directory")
    assert (remote.n_bytes, remote.problem) == (None, None), "it can be fetched"
    digest = provenance.model_sha256(path, cache)
    assert look([str(path)], str(cache)).models[0].sha256 == digest
    assert look([str(path)]).models[0].sha256 is None


def test_a_split_model_is_one_with_one_digest(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "m.gguf")
    (tmp_path / "parts").mkdir()
    parts = split_gguf(tmp_path / "m.gguf", tmp_path / "parts", 3)
    cache = tmp_path / "cache"
    digest = provenance.model_sha256(parts[0], cache)
    (model,) = look([str(parts[0])], str(cache)).models
    assert (model.sha256, model.n_bytes) == (digest, sum(part.stat().st_size for part in parts))
    os.utime(parts[1], ns=(1, 1))
    assert look([str(parts[0])], str(cache)).models[0].sha256 is None, "a part that may have changed"
