"""Copies of models in the memory of a NUMA node: made for real on the nodes that this machine has."""

from __future__ import annotations

import logging
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from make_gguf import split_gguf, tiny_llama

import engine
from pipeline import evaluate, numa, placement
from pipeline.errors import ClusterUnreachable
from pipeline.memory import process_memory
from pipeline.node_cache import Wanted
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
from pipeline.topology import look


@pytest.fixture(autouse=True)
def unlent():
    yield
    numa.use(None)


@pytest.fixture
def node() -> int:
    """A NUMA node of this machine that has memory, and whose policy we may set."""
    number = look().here
    try:
        with numa.bound_to(number):
            pass
    except ClusterUnreachable as error:
        pytest.skip(f"memory cannot be bound to a NUMA node here: {error}")
    if not Path("/proc/self/numa_maps").exists():
        pytest.skip("this kernel does not say where pages lie")
    return number


@pytest.fixture
def keeper():
    keeper = numa.Keeper()
    yield keeper
    keeper.close()


def scores(path: str) -> bytes:
    with engine.open(path) as file:
        model = engine.load_model(file, batch_tokens=32)
        batch = engine.Batch(np.arange(32), np.arange(32), targets=np.arange(1, 33))
        found = model.nll(batch, model.new_cache(1, 32)).tobytes()
        del model
    return found


def test_a_copy_is_in_the_nodes_memory_and_gives_the_same_bits(tmp_path: Path, keeper, node: int) -> None:
    path = str(tmp_path / "a model, (x).gguf")
    tiny_llama(path, type_name="Q4_1")
    numa.use(keeper.copy([path], [node])[node])
    copy = numa.own_copy(path)
    assert copy != path
    assert Path(copy).name == Path(path).name
    assert Path(copy).read_bytes() == Path(path).read_bytes()
    with open(copy, "rb") as file:  # noqa: PTH123
        pages = numa.pages_by_node(file.fileno())
    assert set(pages) == {node}
    assert sum(pages.values()) >= Path(path).stat().st_size // os.sysconf("SC_PAGESIZE")
    assert scores(copy) == scores(path)
    with engine.open(copy) as file:
        mapped = process_memory(*file.paths)["mapped_bytes"]
        assert mapped >= file.n_bytes
        assert process_memory(path)["mapped_bytes"] == 0, "the file itself is not mapped"


def test_all_parts_of_a_split_model_are_copied(tmp_path: Path, keeper, node: int) -> None:
    tiny_llama(tmp_path / "m.gguf")
    (tmp_path / "parts").mkdir()
    first = str(split_gguf(tmp_path / "m.gguf", tmp_path / "parts", 3)[0])
    numa.use(keeper.copy([first], [node])[node])
    with engine.open(numa.own_copy(first)) as file:
        assert len(file.paths) == 3
        assert all(not path.startswith(str(tmp_path)) for path in file.paths)
    assert scores(numa.own_copy(first)) == scores(first)


def test_models_of_one_name_do_not_get_into_each_others_way(tmp_path: Path, keeper, node: int) -> None:
    paths = [str(tmp_path / folder / "m.gguf") for folder in "ab"]
    for seed, path in enumerate(paths):
        Path(path).parent.mkdir()
        tiny_llama(path, seed=seed)
    numa.use(keeper.copy(paths, [node])[node])
    assert [Path(numa.own_copy(path)).read_bytes() for path in paths] == [Path(p).read_bytes() for p in paths]


def test_a_model_by_url_is_fetched_first(tmp_path: Path, keeper, node: int) -> None:
    tiny_llama(tmp_path / "m.gguf")
    cache = tmp_path / "cache"
    folder = keeper.copy([Wanted(f"file://{tmp_path}/m.gguf")], [node], str(cache))[node]
    (copy,) = (path for path in Path(folder).rglob("*") if path.is_symlink())
    assert copy.read_bytes() == (tmp_path / "m.gguf").read_bytes()


def test_the_copies_are_gone_with_their_keeper_and_the_file_is_used_again(
    tmp_path: Path, node: int, caplog: pytest.LogCaptureFixture
) -> None:
    path = str(tmp_path / "m.gguf")
    tiny_llama(path)
    keeper = numa.Keeper()
    folder = keeper.copy([path], [node])[node]
    numa.use(folder)
    with engine.open(numa.own_copy(path)) as file:
        n_bytes = file.n_bytes
        keeper.close()
        keeper.close()
        assert file.resident_bytes() >= n_bytes, "who maps it keeps it"
    assert not Path(folder).parent.exists()
    with caplog.at_level(logging.WARNING):
        assert numa.own_copy(path) == path
    assert "copy is gone" in caplog.text
    assert numa.own_copy(str(tmp_path / "other.gguf")) == str(tmp_path / "other.gguf")


def test_folders_of_killed_keepers_are_removed_and_those_of_living_ones_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    living = numa.Keeper()
    made = subprocess.run(
        [sys.executable, "-c", "import os; from pipeline.numa import Keeper; Keeper(); os._exit(9)"],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        check=False,
    )
    assert made.returncode == 9
    (dead,) = set(tmp_path.iterdir()) - {living._folder}
    (dead / "0").mkdir()
    (dead / "0" / "m.gguf").symlink_to(tmp_path / "precious")
    (tmp_path / "precious").write_text("kept")
    (tmp_path / "pagemill-numa-unlocked").mkdir()  # just being made
    (tmp_path / "pagemill-numa-link").symlink_to(dead)
    other = numa.Keeper()
    assert {path.name for path in tmp_path.iterdir()} == {
        *(living._folder.name, other._folder.name),
        *("precious", "pagemill-numa-unlocked", "pagemill-numa-link"),
    }
    for keeper in (living, other):
        keeper.close()
        keeper.close()
        assert not keeper._folder.exists()


def test_the_threads_own_policy_comes_back(node: int) -> None:
    before = numa._policy()
    with numa.bound_to(node):
        mode, mask = numa._policy()
        assert (mode, list(mask)) == (2, list(numa._mask(node)))
    assert (numa._policy()[0], list(numa._policy()[1])) == (before[0], list(before[1]))


def test_what_cannot_be_bound_or_lies_elsewhere_is_refused(
    tmp_path: Path, keeper, node: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "m.gguf")
    tiny_llama(path)
    with pytest.raises(ClusterUnreachable, match="set_mempolicy: Invalid argument") as caught:
        keeper.copy([path], [1000])
    assert "numa=distribute" in caught.value.hint
    monkeypatch.setattr(numa, "pages_by_node", lambda _: {node: 990, node + 1: 10})
    with pytest.raises(ClusterUnreachable, match=rf"copy for NUMA node {node} lie on .*{node + 1}: 10"):
        keeper.copy([path], [node])
    monkeypatch.setattr(platform, "machine", lambda: "pdp11")
    with pytest.raises(ClusterUnreachable, match="get_mempolicy is not known on pdp11"):
        keeper.copy([path], [node])


def test_an_empty_file_lies_nowhere(tmp_path: Path) -> None:
    with (tmp_path / "empty").open("w+b") as file:
        assert numa.pages_by_node(file.fileno()) == {}


class Watch:
    """A run's progress that looks at what the workers map."""

    def __init__(self, name: str) -> None:
        self.name, self.seen = name, set[str]()

    def start(self, *_: object, **__: object) -> None:
        import psutil

        for child in psutil.Process().children(recursive=True):
            maps = Path(f"/proc/{child.pid}/maps").read_text()
            self.seen |= {line.split(None, 5)[5] for line in maps.splitlines() if self.name in line}

    def note(self, *_: object) -> None: ...
    def advance(self, *_: object) -> None: ...
    def stop(self) -> None: ...


@pytest.mark.ray
def test_workers_map_their_nodes_copy_and_score_the_same(
    tmp_path: Path, node: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine of several NUMA nodes, with as many as there are; without that it falls back."""
    tiny_llama(tmp_path / "m.gguf", type_name="Q4_1")
    (tmp_path / "t.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)

    def settings(results: str, cluster: ClusterSettings) -> PerplexitySettings:
        return PerplexitySettings(
            model=ModelSettings(str(tmp_path / "m.gguf")),
            data=DataSettings(path=str(tmp_path / "t.txt")),
            protocol=ProtocolSettings(window=32),
            engine=EngineSettings(),
            cluster=cluster,
            tracking=TrackingSettings("none"),
            paths=PathsSettings(str(tmp_path / results), str(tmp_path / "cache")),
        )

    plain = evaluate(settings("a", ClusterSettings("inline"))).summary
    monkeypatch.setattr(placement, "_copies", lambda info, _: tuple(placement.groups_of(info, "mirror")))
    watch = Watch("m.gguf")
    mirrored = evaluate(settings("b", ClusterSettings(workers=1, numa="mirror")), watch).summary
    assert mirrored["nll_sha256"] == plain["nll_sha256"]
    assert watch.seen == {"/memfd:pagemill-m.gguf (deleted)"}
