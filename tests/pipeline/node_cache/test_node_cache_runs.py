"""Runs of models by URL: the same as by path, fetched by every node, the next one of a sweep ahead."""

import fcntl
import json
import logging
import time
from dataclasses import replace

import pyarrow.parquet as pq
import pytest

from pipeline import cache_room, capacity, evaluate, evaluate_all, node_cache
from pipeline.errors import ModelError, SettingsError
from pipeline.node_cache import Wanted
from pipeline.provenance import model_sha256
from pipeline.settings import (
    ClusterSettings,
    DataSettings,
    ModelSettings,
    PathsSettings,
    PerplexitySettings,
    ProtocolSettings,
    TrackingSettings,
)
from pipeline.sweep import Point
from pipeline.worker import EvalWorker
from tests.fake_engine import FakeFile, install
from tests.pipeline.model_server import MODEL, digest, put


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Settings of a small inline run with the fake engine."""
    install(monkeypatch)
    (tmp_path / "t.txt").write_text("a text of some words " * 40)

    def settings(path="", **groups):
        return PerplexitySettings(
            **{
                "model": ModelSettings(path),
                "data": DataSettings(path=str(tmp_path / "t.txt")),
                "protocol": ProtocolSettings(window=32),
                "cluster": ClusterSettings("inline"),
                "tracking": TrackingSettings("none"),
                "paths": PathsSettings(str(tmp_path / "results"), str(tmp_path / "cache")),
                **groups,
            }
        )

    return settings


def test_a_model_by_url_is_the_same_run_as_by_path_and_tells_no_secret(make, server, tmp_path, capfd, caplog):
    caplog.set_level(logging.DEBUG)
    (tmp_path / "m.gguf").write_bytes(MODEL)
    server.files["/t.txt"] = (tmp_path / "t.txt").read_bytes()
    query = "?X-Amz-Signature=s3cret"
    given = make(
        server.url("/m.gguf" + query, user="me:s3cret@"),
        data=DataSettings(path=server.url("/t.txt" + query)),
        tracking=TrackingSettings("none", uri="http://me:s3cret@h"),
    )
    by_url = evaluate(given).summary
    files = sorted((tmp_path / "results").rglob("*.parquet"))
    for f in files:
        assert "s3cret" not in json.dumps(pq.read_table(f).to_pylist(), default=str)
    assert all(b"s3cret" not in f.read_bytes() for f in tmp_path.rglob("*.json"))
    [row] = pq.read_table(next((tmp_path / "results").rglob("run-*.parquet"))).to_pylist()
    assert row["model_path"] == server.url()
    assert "s3cret" not in json.dumps(by_url) + "".join(capfd.readouterr()) + caplog.text
    by_path = evaluate(make(str(tmp_path / "m.gguf"))).summary
    assert by_path["run_key"] == by_url["run_key"]
    assert by_path["shards_reused"] == by_path["n_shards"]
    assert len(server.gets()) == 1


def test_a_pinned_model_must_have_that_digest(make, server, tmp_path):
    (tmp_path / "m.gguf").write_bytes(MODEL)
    for path in (server.url(), str(tmp_path / "m.gguf")):
        assert evaluate(make(model=ModelSettings(path, digest(MODEL).upper()))).exit_code == 0
        with pytest.raises(ModelError, match="expected 0000"):
            evaluate(make(model=ModelSettings(path, "0" * 64)))
    with pytest.raises(SettingsError, match=r"model\.sha256=abc is not a SHA-256"):
        evaluate(make(model=ModelSettings("m.gguf", "abc")))
    for size in ("lots", "-1", "GB", "1.GB"):
        with pytest.raises(SettingsError, match=r"paths\.cache_limit=.* is no size"):
            evaluate(make("m.gguf", paths=PathsSettings(str(tmp_path), str(tmp_path), size)))


def test_what_is_no_model_names_the_url_that_it_came_from(make, server):
    server.files["/m.gguf"] = b"<html>sign in</html>"
    with pytest.raises(ModelError, match="expected b'GGUF'") as caught:
        evaluate(make(server.url()))
    assert f"fetched from {server.url()}" in caught.value.hint


def test_a_dry_run_says_what_would_be_fetched_and_fetches_nothing(make, server):
    s = evaluate(make(server.url(), dry_run=True)).summary
    assert (s["ok"], s["dry_run"], s["fetch_bytes"], s["ppl"]) == (True, True, len(MODEL), None)
    assert f"{len(MODEL):,} bytes to fetch" in s["warnings"][0]
    points = [
        Point({"model.path": path}, make(server.url(path), dry_run=True)) for path in ("/m.gguf", "/n.gguf")
    ]
    s = evaluate_all(points).summary
    assert s["fetch_bytes"] == 2 * len(MODEL)
    assert [point["fetch_bytes"] for point in s["points"]] == [len(MODEL)] * 2
    assert not server.asked
    assert evaluate(make(server.url())).exit_code == 0
    s = evaluate(make(server.url(), dry_run=True)).summary
    assert (s["fetch_bytes"], s["n_windows"] > 0) == (0, True)
    with pytest.raises(ModelError, match="no such file"):
        evaluate(make(server.url("/none"), dry_run=True))


def spec_of(make, monkeypatch, model):
    specs = []
    real = EvalWorker.__init__
    with monkeypatch.context() as patch:
        patch.setattr(EvalWorker, "__init__", lambda self, spec: (specs.append(spec), real(self, spec))[1])
        evaluate(make(model))
    return specs[0]


def test_a_node_fetches_for_itself_and_holds_the_file_while_it_is_open(make, server, tmp_path, monkeypatch):
    spec = replace(spec_of(make, monkeypatch, server.url()), cache_dir=str(tmp_path / "node"))
    worker = EvalWorker(spec)
    [path] = node_cache.kept(server.url(), tmp_path / "node")
    assert len(server.gets()) == 2
    assert worker.memory()["mapped_bytes"] > 0
    assert worker.ready()["model_path"] == server.url()
    cache_room.evict(cache_room.Home(path.parent, 0, 0), set())
    assert path.exists()
    worker.close()
    assert worker.memory()["mapped_bytes"] == 0
    cache_room.evict(cache_room.Home(path.parent, 0, 0), set())
    assert not path.exists()
    server.files["/m.gguf"] = b"GGUF" + MODEL
    with pytest.raises(ModelError, match=f"expected {digest(MODEL)}") as caught:
        EvalWorker(spec)
    assert worker.host in str(caught.value)
    del server.files["/m.gguf"]
    with pytest.raises(ModelError, match=f"on {worker.host}: .*no such file"):
        EvalWorker(spec)


def test_a_node_without_the_file_is_named(make, tmp_path, monkeypatch):
    (tmp_path / "m.gguf").write_bytes(MODEL)
    spec = spec_of(make, monkeypatch, str(tmp_path / "m.gguf"))
    (tmp_path / "m.gguf").unlink()
    with pytest.raises(ModelError, match=r"no such file on ") as caught:
        EvalWorker(spec)
    assert (caught.value.exit_code, "as a URL" in caught.value.hint) == (2, True)


def test_the_next_model_of_a_sweep_is_prefetched_on_the_nodes(make, server, tmp_path, monkeypatch):
    wanted = []
    monkeypatch.setattr(node_cache, "prefetch", lambda w, *_: wanted.append(w.name))
    points = [Point({"model.path": path}, make(server.url(path))) for path in ("/m.gguf", "/n.gguf")]
    server.files["/n.gguf"] = b"GGUF" + MODEL
    assert evaluate_all(points).exit_code == 0
    assert wanted == [server.url("/n.gguf")]


def test_a_worker_prefetches_while_its_own_model_is_open(make, server, tmp_path, monkeypatch):
    spec = replace(spec_of(make, monkeypatch, server.url()), cache_dir=str(tmp_path / "node"))
    worker = EvalWorker(replace(spec, following=Wanted(server.url("/n.gguf"), digest(MODEL[::-1]))))
    deadline = time.monotonic() + 10
    while not node_cache.kept(server.url("/n.gguf"), tmp_path / "node") and time.monotonic() < deadline:
        time.sleep(0.01)
    [path] = node_cache.kept(server.url("/n.gguf"), tmp_path / "node")
    assert (path.read_bytes(), worker.file is not None) == (MODEL[::-1], True)
    worker.close()


def test_the_next_model_of_a_sweep_by_path_is_read_ahead_while_one_is_mapped(make, tmp_path, monkeypatch):
    """A worker finishes one model before it maps the next, whose pages are on their way by then."""
    opened, read = [], []
    for name in "mn":
        (tmp_path / f"{name}.gguf").write_bytes(MODEL + name.encode())
    real = EvalWorker._open
    monkeypatch.setattr(
        EvalWorker, "_open", lambda self, spec: (opened.append(spec.model_path), real(self, spec))[1]
    )
    monkeypatch.setattr(node_cache, "_read_ahead", lambda *given: read.append((*given, len(opened))))
    paths = [str(tmp_path / f"{name}.gguf") for name in "mn"]
    points = [
        Point({"model.path": f"{window} {path}"}, make(path, protocol=ProtocolSettings(window=window)))
        for window in (16, 32)
        for path in paths
    ]
    assert evaluate_all(points).exit_code == 0
    assert opened == paths, "each once, one after the other"
    assert set(read) == {(paths[1], tmp_path / "cache", len(MODEL) + 1, 1)}


def test_a_file_is_read_ahead_where_there_is_room_beside_what_is_open(tmp_path, monkeypatch):
    install(monkeypatch)
    (tmp_path / "m.gguf").write_bytes(MODEL)
    path, locks = str(tmp_path / "m.gguf"), tmp_path / "locks"
    monkeypatch.setattr(FakeFile, "resident_bytes", lambda self: 0)
    monkeypatch.setattr(capacity, "available_bytes", lambda: len(MODEL) + 99)
    node_cache._read_ahead(path, tmp_path, 100)
    assert not locks.exists(), "no room"
    node_cache._read_ahead(path, tmp_path, 99)
    [lock] = locks.iterdir()
    with lock.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        node_cache._read_ahead(path, tmp_path, 99)  # another process of the host does: returns at once
    node_cache.prefetch(Wanted(str(tmp_path / "gone.gguf")), tmp_path).join(10)


def test_the_digest_of_a_fetched_model_is_the_models(server, tmp_path, monkeypatch):
    install(monkeypatch)
    assert model_sha256(put(server.url(), tmp_path), tmp_path) == digest(MODEL)
