"""Models and data by URL: once per node, whole, checked, evicted when nobody uses them; no secret told."""

import fcntl
import hashlib
import http.server
import json
import logging
import mmap
import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pyarrow.parquet as pq
import pytest

from pipeline import cache_room, capacity, evaluate, evaluate_all, fetch, node_cache
from pipeline.errors import DataError, ModelError, SettingsError, StoreError
from pipeline.node_cache import Wanted, local_copy, model_copy
from pipeline.provenance import model_sha256
from pipeline.settings import (
    ClusterSettings,
    DataSettings,
    ModelSettings,
    PathsSettings,
    PerplexitySettings,
    ProtocolSettings,
    TrackingSettings,
    logged,
    shown,
)
from pipeline.sweep import Point
from pipeline.worker import EvalWorker
from tests.fake_engine import FakeFile, install

MODEL = b"GGUF" + bytes(range(256)) * 400
ROOT = Path(__file__).parents[2]


def digest(raw):
    return hashlib.sha256(raw).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves `files` by path; the first `n_deaths` transfers end half way, then comes `changed`."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.changed = {"/m.gguf": MODEL, "/n.gguf": MODEL[::-1]}, {}
        self.ranges, self.n_deaths, self.slow_s = True, 0, 0.0
        self.asked = []  # path and first byte of each GET

    def url(self, path="/m.gguf", user=""):
        return f"http://{user}127.0.0.1:{self.server_address[1]}{path}"

    def gets(self, path="/m.gguf"):
        return [first for asked, first in self.asked if asked == path]


class Handler(http.server.BaseHTTPRequestHandler):
    """As much of HTTP as an object store needs."""

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self._answer(with_body=False)

    def do_GET(self):
        self._answer(with_body=True)

    def _answer(self, with_body):
        server, path = self.server, self.path.partition("?")[0]
        raw = server.files.get(path)
        if raw is None:
            self.send_error(403 if "private" in path else 404)
            return
        etag = f'"{digest(raw)}"'
        match = re.match(r"bytes=(\d+)-", self.headers.get("Range") or "") if server.ranges else None
        if match and self.headers.get("If-Range", etag) != etag:
            match = None
        first = int(match[1]) if match else 0
        self.send_response(206 if match else 200)
        self.send_header("ETag", etag)
        if match:
            self.send_header("Content-Range", f"bytes {first}-{len(raw) - 1}/{len(raw)}")
        self.send_header("Content-Length", str(len(raw) - first))
        self.end_headers()
        if not with_body:
            return
        server.asked.append((path, first))
        threading.Event().wait(server.slow_s)
        if server.n_deaths > 0:
            server.n_deaths -= 1
            server.files |= server.changed
            self.wfile.write(raw[first : (first + len(raw)) // 2])
            self.wfile.flush()
            threading.Event().wait(0.1)  # what was sent should be read before the connection breaks
            self.close_connection = True
            self.connection.close()
            return
        self.wfile.write(raw[first:])


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(fetch, "PAUSE_S", 0.01)
    made = Server()
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield made
    made.shutdown()
    made.server_close()
    thread.join()


@pytest.fixture
def memory():
    """fsspec's file system in memory, empty again afterwards."""
    system = fsspec.filesystem("memory")
    yield system
    system.rm("/", recursive=True)


def put(url, cache, limit=None, sha256=None):
    """Fetch and let go; the path."""
    with local_copy(url, sha256, cache, limit) as copy:
        return copy.path


def aged(path, days):
    """As if last used so long ago."""
    past = time.time() - days * 86400
    os.utime(path.parent / ".lock", (past, past))
    return path


# Fetching -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranges", [True, False])
def test_a_transfer_that_dies_is_finished_with_or_without_ranges(server, tmp_path, ranges):
    server.ranges, server.n_deaths = ranges, 2
    assert put(server.url(), tmp_path, sha256=digest(MODEL)).read_bytes() == MODEL
    gets = server.gets()
    assert len(gets) == 3
    assert (gets[1] > 0) is ranges or not ranges
    if ranges:
        assert 0 < gets[1] < gets[2]


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("size", ["same", "other"])
def test_a_file_that_changes_during_a_transfer_is_never_mixed(server, tmp_path, ranges, size):
    new = MODEL[::-1] if size == "same" else MODEL[::-1] * 2
    server.ranges, server.n_deaths, server.changed = ranges, 1, {"/m.gguf": new}
    assert put(server.url(), tmp_path).read_bytes() == new
    assert not list(tmp_path.rglob("*.part"))


def test_a_broken_part_is_noticed_by_the_digest_and_fetched_anew(server, tmp_path, monkeypatch):
    server.n_deaths = 1
    monkeypatch.setattr(fetch.time, "sleep", lambda seconds: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        put(server.url(), tmp_path)
    monkeypatch.undo()
    part = next(tmp_path.rglob("*.part"))
    part.write_bytes(bytes(part.stat().st_size))
    assert put(server.url(), tmp_path, sha256=digest(MODEL)).read_bytes() == MODEL


def test_another_digest_than_expected_is_refused_and_not_kept(server, tmp_path):
    with pytest.raises(ModelError, match=r"SHA-256 of what the source has on .* expected 0000") as caught:
        model_copy(Wanted(server.url(), "0" * 64), tmp_path)
    assert node_cache.socket.gethostname() in str(caught.value)
    assert not list(tmp_path.rglob("*.gguf"))
    old = put(server.url(), tmp_path)
    server.files["/m.gguf"] = MODEL[::-1]
    assert put(server.url(), tmp_path) == old, "nothing is asked while any will do"
    assert old.read_bytes() == MODEL
    assert put(server.url(), tmp_path, sha256=digest(MODEL[::-1])).read_bytes() == MODEL[::-1]


def test_a_file_in_use_is_not_replaced(server, tmp_path):
    with (
        local_copy(server.url(), None, tmp_path, None),
        pytest.raises(DataError, match=r"which is in use, on .* expected 0000"),
    ):
        local_copy(server.url(), "0" * 64, tmp_path, None)
    assert len(server.gets()) == 1


def test_a_split_model_is_fetched_whole(server, tmp_path):
    names = [f"/deep/s-{i:05d}-of-00003.gguf" for i in (1, 2, 3)]
    server.files |= {name: MODEL + bytes([i]) for i, name in enumerate(names)}
    first = put(server.url(names[0] + "?token=t"), tmp_path)
    assert [file.name for file in sorted(first.parent.glob("*.gguf"))] == [
        n.rpartition("/")[2] for n in names
    ]
    assert first.name == "s-00001-of-00003.gguf"
    lines = "".join(digest(server.files[name]) + "\n" for name in names)
    first.with_name("s-00002-of-00003.gguf").unlink()
    assert node_cache.missing_bytes(server.url(names[0] + "?token=t"), tmp_path) == len(MODEL) + 1
    assert put(server.url(names[0] + "?token=t"), tmp_path, sha256=digest(lines.encode())) == first
    assert len(server.asked) == 4
    with pytest.raises(DataError, match="part 2 of 3 of a model"):
        put(server.url(names[1]), tmp_path)
    del server.files[names[2]]
    with pytest.raises(DataError, match=r"s-00003-of-00003\.gguf: no such file"):
        put(server.url(names[0]), tmp_path)


def test_other_file_systems_serve_models_too(memory, tmp_path):
    memory.pipe({"/a/m.gguf": MODEL})
    (tmp_path / "l.gguf").write_bytes(MODEL)
    for url in ("memory://a/m.gguf", f"file://{tmp_path}/l.gguf"):
        assert put(url, tmp_path / "cache").read_bytes() == MODEL
    with pytest.raises(DataError, match="is a folder"):
        put(f"file://{tmp_path}", tmp_path / "cache")
    with pytest.raises(DataError, match=r"simplecache://.* is not taken|simplecache.* is not taken"):
        put("simplecache::memory://a/m.gguf", tmp_path / "cache")


# One at a time ---------------------------------------------------------------------------------------------

CHILD = """
import logging, sys
from pathlib import Path
from pipeline.node_cache import local_copy
logging.basicConfig(level=logging.INFO, stream=sys.stderr)
with local_copy(sys.argv[1], None, Path(sys.argv[2]), None) as copy:
    print(len(copy.path.read_bytes()))
"""


def test_two_processes_fetch_once_and_the_second_says_that_it_waits(server, tmp_path):
    server.slow_s = 1.2
    command = [sys.executable, "-c", CHILD, server.url(), str(tmp_path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    children = [subprocess.Popen(command, **pipes) for _ in range(2)]
    told = [child.communicate(timeout=60) for child in children]
    assert [out for out, _ in told] == [f"{len(MODEL)}\n"] * 2
    assert len(server.gets()) == 1
    assert sum("waiting for that" in err for _, err in told) == 1


def test_a_prefetch_waits_for_nobody_and_its_failure_is_only_told(server, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    node_cache.prefetch(Wanted(server.url()), tmp_path).join(10)
    [path] = node_cache.kept(server.url(), tmp_path)
    path.unlink()
    lock = os.open(path.parent / ".lock", os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    node_cache.prefetch(Wanted(server.url()), tmp_path).join(10)
    os.close(lock)
    assert node_cache.kept(server.url(), tmp_path) == []
    node_cache.prefetch(Wanted(server.url("/none", user="me:secret@")), tmp_path).join(10)
    assert "is not fetched ahead" in caplog.text
    assert "secret" not in caplog.text


# Room ------------------------------------------------------------------------------------------------------


def filled(memory, cache, n, limit=None):
    """n files of 1000 bytes, the first used longest ago."""
    memory.pipe({f"/f{i}": bytes([i]) * 1000 for i in range(n)})
    return [aged(put(f"memory://f{i}", cache, limit), n - i) for i in range(n)]


def test_the_least_recently_used_file_goes_first(memory, tmp_path):
    paths = filled(memory, tmp_path, 3)
    put("memory://f0", tmp_path)  # used now
    memory.pipe({"/new": bytes(1000)})
    new = put("memory://new", tmp_path, 3000)
    assert [path.exists() for path in (*paths, new)] == [True, False, True, True]


def test_neither_mapped_nor_held_nor_arriving_files_are_evicted(memory, tmp_path):
    mapped, held, arriving, free = filled(memory, tmp_path, 4)
    with mapped.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    lock = os.open(arriving.parent / ".lock", os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    memory.pipe({"/new": bytes(1000), "/more": bytes(1500)})
    try:
        with local_copy("memory://f1", None, tmp_path, None):
            aged(held, 9)
            put("memory://new", tmp_path, 4000)
            assert [path.exists() for path in (mapped, held, arriving, free)] == [True, True, True, False]
            with pytest.raises(StoreError, match=r"1,500 bytes, and paths\.cache_limit on .* is 1,000"):
                put("memory://more", tmp_path, 1000)
            with pytest.raises(StoreError, match=r"1,500 bytes to fetch, .* on .* holds 3,000 .* is 4,000"):
                put("memory://more", tmp_path, 4000)
    finally:
        os.close(lock)
        mapping.close()
    assert put("memory://more", tmp_path, 4000).exists(), "nobody uses them any more"
    assert not mapped.exists()


def test_a_file_mapped_by_another_process_stays(memory, tmp_path):
    [path] = filled(memory, tmp_path, 1)
    code = (
        "import mmap,sys; f=open(sys.argv[1]); m=mmap.mmap(f.fileno(),0,prot=1); print(flush=True); input()"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(path)], stdin=-1, stdout=-1, text=True)
    try:
        child.stdout.readline()
        memory.pipe({"/new": bytes(1000)})
        with pytest.raises(StoreError, match="in use"):
            put("memory://new", tmp_path, 1500)
        assert path.exists()
    finally:
        child.communicate("\n", timeout=10)
    assert put("memory://new", tmp_path, 1500).exists()


def test_what_is_still_to_come_of_a_broken_transfer_counts(memory, tmp_path, server, monkeypatch):
    server.n_deaths = 1
    monkeypatch.setattr(fetch.time, "sleep", lambda seconds: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        put(server.url(), tmp_path)
    monkeypatch.undo()
    [part] = tmp_path.rglob("*.part")
    lock = os.open(part.parent / ".lock", os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)  # as if it went on
    memory.pipe({"/new": bytes(1000)})
    with pytest.raises(StoreError, match=f"holds {len(MODEL):,}"):
        put("memory://new", tmp_path, len(MODEL))
    os.close(lock)
    assert put("memory://new", tmp_path, len(MODEL)).exists(), "an abandoned part is evicted like a file"
    assert not part.exists()


def test_a_disk_without_room_is_refused_before_anything_is_sent(server, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_room.shutil, "disk_usage", lambda path: SimpleNamespace(free=50))
    with pytest.raises(StoreError, match=rf"{len(MODEL):,} bytes to fetch, and the disk .* has 50 left"):
        put(server.url(), tmp_path)
    assert not server.asked


def test_a_source_without_a_size_cannot_outgrow_the_limit(memory, tmp_path, monkeypatch):
    memory.pipe({"/f": bytes(1000)})
    monkeypatch.setattr(fetch, "describe", lambda url, real=fetch.describe: sizeless(real(url)))
    with pytest.raises(StoreError, match="cache_limit"):
        put("memory://f", tmp_path, 500)
    assert not list(tmp_path.rglob("f"))
    assert node_cache.missing_bytes("memory://f", tmp_path) is None
    assert put("memory://f", tmp_path, 1000).stat().st_size == 1000


def sizeless(remote):
    return replace(remote, size=None)


# Places ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "..",
        ".",
        "...",
        "%2e%2e",
        "..%2f..%2fetc",
        "a/../../../b",
        "-\n-",
        ".lock",
        "\\..\\x",
        "x" * 400,
        "~",
        "",
    ],
)
def test_names_never_leave_the_cache(memory, tmp_path, name):
    for url in (f"memory://h/{name}", f"https://h/{name}", f"zip://{name}::https://h/a.zip"):
        for file in node_cache._files(url, tmp_path):
            assert file.parent.parent == tmp_path / "downloads"
            assert re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}", file.name)


def test_a_cache_that_can_only_be_read_serves_what_it_has(server, tmp_path, monkeypatch):
    path, real = put(server.url(), tmp_path), os.open

    def read_only(name, flags, *rest, **more):
        if flags & (os.O_RDWR | os.O_WRONLY) and str(name).startswith(str(tmp_path)):
            raise OSError(30, "Read-only file system", str(name))
        return real(name, flags, *rest, **more)

    monkeypatch.setattr(node_cache.os, "open", read_only)
    assert put(server.url(), tmp_path) == path
    with pytest.raises(DataError, match="which cannot be replaced"):
        put(server.url(), tmp_path, sha256="0" * 64)
    with pytest.raises(StoreError, match=r"on .*: cannot keep what was fetched: Read-only") as caught:
        put(server.url("/n.gguf"), tmp_path)
    assert node_cache.socket.gethostname() in str(caught.value)


# Secrets ---------------------------------------------------------------------------------------------------


def test_a_url_is_shown_without_its_secrets():
    assert shown("https://me:pw@h/a/m.gguf?X-Amz-Signature=s#f") == "https://h/a/m.gguf"
    assert shown("zip://a.txt::https://me@h/x.zip?sig=s") == "zip://a.txt::https://h/x.zip"
    assert shown("https://h/a?k=s, https://me:pw@h/b") == "https://h/a, https://h/b"
    assert shown("/a?b/c@d#e, f") == "/a?b/c@d#e, f"
    assert logged({"a": ["s3://k:s@b/c"], "n": 1}) == {"a": ["s3://b/c"], "n": 1}


def test_a_signature_is_no_part_of_a_files_identity(tmp_path):
    def key(url):
        return node_cache._files(url, tmp_path)[0].parent.name

    plain = key("https://h/m.gguf")
    assert key("https://h/m.gguf?X-Amz-Date=1&X-Amz-Signature=a") == plain
    assert key("https://me:pw@h/m.gguf") == plain
    assert key("https://h/m.gguf?sv=1&se=2&sig=3") == plain
    assert key("https://h/m.gguf?Signature=a&file=2") == key("https://h/m.gguf?file=2") != plain
    assert key("https://h/m.gguf?sp=2") != plain, "only a signature makes it Azure's"


@pytest.mark.parametrize("path", ["/private", "/none"])
def test_errors_name_no_secret(server, tmp_path, path, monkeypatch):
    monkeypatch.setattr(fetch, "ATTEMPTS", 1)
    with pytest.raises(ModelError, match=path) as caught:
        model_copy(Wanted(server.url(path + "?X-Amz-Signature=s3cret", user="me:s3cret@")), tmp_path)
    assert "s3cret" not in str(caught.value) + caught.value.hint
    assert "s3cret" not in repr(Wanted("https://h/?s3cret"))


# Runs ------------------------------------------------------------------------------------------------------


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
