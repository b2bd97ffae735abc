"""Models and data by URL: once per node, whole, checked, evicted when nobody uses them; no secret told."""

import fcntl
import logging
import mmap
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline import cache_room, fetch, node_cache
from pipeline.errors import DataError, ModelError, StoreError
from pipeline.node_cache import Wanted, local_copy, model_copy
from pipeline.settings import (
    logged,
    shown,
)
from tests.pipeline.model_server import MODEL, digest, put

ROOT = Path(__file__).parents[3]


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
