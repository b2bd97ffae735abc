"""Token streams on nodes whose cache is another folder: laid there before work starts, the same bits."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from make_gguf import tiny_llama

from pipeline import evaluate, token_copies
from pipeline.compare import compare
from pipeline.compare.settings import CompareSettings
from pipeline.errors import StoreError
from pipeline.imatrix import collect
from pipeline.imatrix.settings import ImatrixChoices, ImatrixSettings
from pipeline.settings import (
    ClusterSettings,
    DataSettings,
    ModelSettings,
    PathsSettings,
    PerplexitySettings,
    ProtocolSettings,
    TrackingSettings,
)
from pipeline.token_copies import CacheFile, content, files_of, lacking, lay
from pipeline.tokens import PIECE, TokenStream, open_stream


@pytest.fixture
def stream(tmp_path: Path) -> TokenStream:
    """Of ten tokens, in the driver's cache."""
    home = tmp_path / "driver" / "tokens"
    home.mkdir(parents=True)
    np.save(home / "k.tokens.npy", np.arange(10, dtype=np.int32))
    np.save(home / "k.counts.npy", np.zeros((3, 10), np.int32))
    np.save(home / "k.pieces.npy", np.zeros(1, PIECE))
    return open_stream(home / "k.tokens.npy", home / "k.counts.npy")


def moved(files: tuple[CacheFile, ...], tmp_path: Path) -> list[CacheFile]:
    """The same files where another node has its cache."""
    return [CacheFile(f.path.replace("driver", "node"), f.n_bytes, f.sha256) for f in files]


def test_a_node_lacks_what_is_not_there_or_not_the_same_and_gets_it(
    stream: TokenStream, tmp_path: Path
) -> None:
    cache = tmp_path / "node"
    files = files_of([stream, stream], tmp_path / "driver")
    assert [Path(file.path).name for file in files] == ["k.counts.npy", "k.pieces.npy", "k.tokens.npy"]
    assert lacking(files, tmp_path / "driver") == ()
    there = moved(files, tmp_path)
    assert lacking(there, cache) == tuple(file.path for file in there)
    contents = [content(file) for file in files]
    lay(there, *contents)
    assert lacking(there, cache) == ()
    node = open_stream(Path(there[2].path), Path(there[0].path))
    assert (node.sha256, node.counts.shape) == (stream.sha256, (3, 10))
    assert [path.name for path in (cache / "tokens").iterdir() if path.name.startswith(".")] == []
    counts = Path(there[0].path)
    other = bytearray(counts.read_bytes())
    other[-1] ^= 1
    counts.unlink()
    counts.write_bytes(other)  # as long, and of the same tokens
    assert lacking(there, cache) == (str(counts),)
    lay(there[:1], contents[0])
    assert lacking(there, cache) == ()


def test_a_cache_that_cannot_be_written_is_named_with_its_host(
    stream: TokenStream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = files_of([stream], tmp_path / "driver")
    there = moved(files, tmp_path)
    with pytest.raises(StoreError, match=f"what arrived on {os.uname().nodename} has SHA-256"):
        lay(there[:1], content(files[1]))
    (tmp_path / "node").write_text("a file")
    with pytest.raises(StoreError, match=f"on {os.uname().nodename}: cannot keep the token stream") as caught:
        lay(there, *(content(file) for file in files))
    assert "every node can write" in caught.value.hint
    (tmp_path / "node").unlink()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(token_copies.os, "fsync", full)
    with pytest.raises(StoreError, match="No space left"):
        lay(there, *(content(file) for file in files))
    assert list((tmp_path / "node" / "tokens").iterdir()) == []
    Path(stream.counts_path).unlink()
    with pytest.raises(StoreError, match=r"k\.counts\.npy: No such file"):
        files_of([stream], tmp_path / "driver")


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Address of a cluster of two nodes, each with a folder of its own as working directory, and the other's.

    A worker's working directory is that of the processes that its node was started with.
    """
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 80 << 20}
    driver, other = (tmp_path_factory.mktemp(name) for name in ("driver", "other"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(driver)
        cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
        patch.chdir(other)
        cluster.add_node(**node)
        patch.chdir(driver)
        yield cluster.address, other / "cache/tokens"
    cluster.shutdown()


@pytest.fixture
def given(two_nodes: tuple[str, Path], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """What settings of all jobs have in common; `paths.cache` is another folder on each node."""
    tiny_llama(tmp_path / "m.gguf", type_name="Q8_0")
    tiny_llama(tmp_path / "v.gguf", type_name="Q4_1")
    (tmp_path / "t.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)

    def given(results: str, kind: str, **more: Any) -> dict[str, Any]:
        address = two_nodes[0] if kind == "ray" else None
        return {
            "data": DataSettings(path=str(tmp_path / "t.txt")),
            "protocol": ProtocolSettings(window=32),
            "cluster": ClusterSettings(kind, windows_per_shard=1, address=address),
            "tracking": TrackingSettings("none"),
            "paths": PathsSettings(str(tmp_path / results), "/proc/self/cwd/cache"),
            **more,
        }

    return given


@pytest.mark.ray
def test_a_node_with_a_cache_of_its_own_is_sent_the_tokens_and_gives_the_same_bits(
    two_nodes: tuple[str, Path], given: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    model, sent = ModelSettings(str(tmp_path / "m.gguf")), two_nodes[1]
    dry = evaluate(PerplexitySettings(model=model, **given("r", "ray", dry_run=True))).summary
    n_bytes = sorted(node["sent_bytes"] for node in dry["nodes"])
    assert (n_bytes[0], n_bytes[1] > 0, sent.exists()) == (0, True, False)
    spread, inline = (
        evaluate(PerplexitySettings(model=model, **given(kind, kind))).summary for kind in ("ray", "inline")
    )
    assert (spread["ok"], spread["nll_sha256"]) == (True, inline["nll_sha256"])
    rows = [
        row
        for path in (tmp_path / "ray/v1/table=windows").rglob("shard-*.parquet")
        for row in pq.read_table(path, partitioning=None).to_pylist()
    ]
    assert len({row["worker"] for row in rows}) == 2, "both nodes worked"
    assert [path.name.split(".")[1] for path in sorted(sent.iterdir())] == ["counts", "pieces", "tokens"]
    assert sum(path.stat().st_size for path in sent.iterdir()) == n_bytes[1]


@pytest.mark.ray
@pytest.mark.slow
def test_comparisons_and_importance_matrices_find_their_tokens_too(
    two_nodes: tuple[str, Path], given: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    model, variants = ModelSettings(str(tmp_path / "m.gguf")), [str(tmp_path / "v.gguf")]
    compared = [
        compare(CompareSettings(base=model, variants=variants, **given(f"c{kind}", kind))).summary
        for kind in ("ray", "inline")
    ]
    assert compared[0]["n_workers"] == 2
    assert compared[0]["variants"][0]["kld_sha256"] == compared[1]["variants"][0]["kld_sha256"]
    written = {path.name: path.stat().st_ino for path in two_nodes[1].iterdir()}
    assert len(written) >= 3
    made = [
        collect(ImatrixSettings(model=model, imatrix=ImatrixChoices(str(tmp_path / k)), **given(k + "r", k)))
        for k in ("ray", "inline")
    ]
    assert made[0].summary["sha256"] == made[1].summary["sha256"]
    assert {path.name: path.stat().st_ino for path in two_nodes[1].iterdir()} == written, "sent once"
