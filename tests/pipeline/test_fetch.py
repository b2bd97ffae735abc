"""URLs: fetched once, resumed where they broke off, refused with a reason; the server fails on purpose."""

import hashlib
import http.server
import re
import socket
import struct
import threading

import fsspec
import pytest

from pipeline import fetch as module
from pipeline.datasets import load_text
from pipeline.errors import DataError, StoreError
from pipeline.node_cache import local_copy
from pipeline.settings import DataSettings

RAW = b"".join(b"line %07d of a text that is fetched\n" % i for i in range(40_000))


def fetch(url, cache):
    with local_copy(url, None, cache, None) as copy:
        return copy.path


class Server(http.server.ThreadingHTTPServer):
    """Serves `raw`; the first `n_deaths` transfers end half way through what they were to send."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.raw, self.etag, self.n_deaths = RAW, "one", 0
        self.ranges, self.says_length, self.rude = True, True, False
        self.asked = []  # the Range of each GET, None without

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/folder/text.txt"


class Handler(http.server.BaseHTTPRequestHandler):
    """As much of HTTP as a file server needs."""

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self._answer(with_body=False)

    def do_GET(self):
        self._answer(with_body=True)

    def _answer(self, with_body):
        server, asked = self.server, self.headers.get("Range")
        if not self.path.endswith("text.txt"):
            self.send_error(404 if "none" in self.path else 403)
            return
        match = re.match(r"bytes=(\d+)-", asked or "")
        first = int(match[1]) if match and server.ranges else 0
        body = server.raw[first:]
        self.send_response(206 if match and server.ranges else 200)
        self.send_header("ETag", server.etag)
        if server.ranges:
            self.send_header("Accept-Ranges", "bytes")
        if match and server.ranges:
            self.send_header("Content-Range", f"bytes {first}-{len(server.raw) - 1}/{len(server.raw)}")
        if server.says_length:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if not with_body:
            return
        server.asked.append(asked)
        if server.n_deaths > 0:
            server.n_deaths -= 1
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            threading.Event().wait(0.2)  # what was sent should be read before the connection breaks
            if server.rude:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
            return
        self.wfile.write(body)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(module, "PAUSE_S", 0.01)
    made = Server()
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield made
    made.shutdown()
    made.server_close()
    thread.join()


def starts(server):
    """First bytes that were asked for, in order."""
    return [int(re.match(r"bytes=(\d+)-", asked)[1]) if asked else 0 for asked in server.asked]


def test_a_url_is_fetched_once(server, tmp_path):
    path = fetch(server.url, tmp_path)
    assert path.read_bytes() == RAW
    assert path.name == "text.txt"
    assert path.is_relative_to(tmp_path / "downloads")
    assert len(server.asked) == 1
    server.raw = b"changed since"
    assert fetch(server.url, tmp_path) == path
    assert path.read_bytes() == RAW
    assert len(server.asked) == 1, "asked no second time"
    assert fetch(server.url + "?part=2&x=text.txt", tmp_path) != path


@pytest.mark.parametrize("rude", [False, True])
def test_a_transfer_that_dies_is_resumed_by_range(server, tmp_path, rude):
    server.n_deaths, server.rude = 3, rude
    assert fetch(server.url, tmp_path).read_bytes() == RAW
    asked = starts(server)
    assert len(asked) == 4
    assert asked == sorted(asked)
    assert asked[0] == 0 < asked[-1], "what had arrived was not asked for again"


def test_a_transfer_is_resumed_by_another_process(server, tmp_path, monkeypatch):
    server.n_deaths = 1
    monkeypatch.setattr(module.time, "sleep", lambda seconds: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        fetch(server.url, tmp_path)
    monkeypatch.undo()
    part = next((tmp_path / "downloads").glob("*/.text.txt.part"))
    arrived = part.stat().st_size
    assert 0 < arrived < len(RAW)
    assert fetch(server.url, tmp_path).read_bytes() == RAW
    assert starts(server) == [0, arrived]
    assert not part.exists()


def test_a_source_that_changed_is_fetched_from_the_start(server, tmp_path, monkeypatch):
    server.n_deaths = 1
    monkeypatch.setattr(module.time, "sleep", lambda seconds: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        fetch(server.url, tmp_path)
    monkeypatch.undo()
    server.raw, server.etag = RAW.upper(), "two"
    assert fetch(server.url, tmp_path).read_bytes() == RAW.upper()
    assert starts(server) == [0, 0]


@pytest.mark.parametrize("says_length", [False, True])
def test_a_server_without_ranges_is_asked_from_the_start(server, tmp_path, says_length):
    server.ranges, server.says_length = False, says_length
    server.n_deaths = 2 if says_length else 0  # without a length nobody can tell a death from an end
    assert fetch(server.url, tmp_path).read_bytes() == RAW
    assert len(server.asked) == (3 if says_length else 2), "without a length, fsspec asks for it by GET"


def test_a_source_that_keeps_failing_is_refused_and_what_arrived_is_kept(server, tmp_path):
    server.raw, server.n_deaths = b"x" * 10, 10**6
    with pytest.raises(DataError, match=r"text\.txt: .* of 10 bytes have arrived") as caught:
        fetch(server.url, tmp_path)
    assert "again" in caught.value.hint
    assert len(server.asked) < 30
    server.n_deaths = 0
    assert fetch(server.url, tmp_path).read_bytes() == b"x" * 10


def test_what_cannot_be_opened_is_refused(server, tmp_path, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{closed.getsockname()[1]}/text.txt"
        monkeypatch.setattr(module, "ATTEMPTS", 2)
        for url, said in [
            (server.url.replace("text.txt", "none"), "none: no such file"),
            (server.url.replace("text.txt", "secret"), "secret: cannot be read: .*403"),
            (nobody, r"text\.txt: cannot be read: .*onnect"),
            ("unheard://of/text.txt", "cannot be opened: .*unheard"),
            ("memory://nothing/here.txt", "no such file"),
        ]:
            with pytest.raises(DataError, match=said) as caught:
                fetch(url, tmp_path)
            assert caught.value.exit_code == 2
            assert caught.value.hint
    assert not list((tmp_path / "downloads").glob("*/*.txt")), "nothing that looks whole is left"


def test_a_file_system_whose_package_is_missing_is_refused_by_name(tmp_path, monkeypatch):
    def missing(url, **options):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", missing)
    with pytest.raises(DataError, match="Install s3fs"):
        fetch("s3://bucket/text.txt", tmp_path)


def test_a_cache_that_cannot_be_written_is_refused(server, tmp_path):
    (tmp_path / "downloads").write_text("a file where a folder should be")
    with pytest.raises(StoreError, match="cannot keep what was fetched"):
        fetch(server.url, tmp_path)


@pytest.fixture
def memory():
    """fsspec's file system in memory, empty again afterwards."""
    system = fsspec.filesystem("memory")
    yield system
    system.rm("/", recursive=True)


def test_any_fsspec_url_is_data(memory, tmp_path, server):
    memory.pipe({"/set/b.txt": b"two", "/set/a.txt": b"one", "/set/c.jsonl": b'{"text": "three"}\n'})
    assert load_text(DataSettings(path="memory://set/a.txt"), tmp_path).text == "one"
    assert load_text(DataSettings(path="memory://set/*.txt"), tmp_path).text == "one\n\ntwo"
    files = ["memory://set/b.txt", f"file://{tmp_path}/l.txt"]
    (tmp_path / "l.txt").write_text("local")
    assert load_text(DataSettings(path="", files=files), tmp_path).text == "two\n\nlocal"
    with pytest.raises(DataError, match="matches no file"):
        load_text(DataSettings(path="memory://set/*.gz"), tmp_path)
    text = load_text(DataSettings(path=server.url), tmp_path)
    assert text.text == RAW.decode().removesuffix("\n")
    assert text.sha256 == hashlib.sha256(RAW).hexdigest()


def test_a_fetched_file_with_another_digest_names_the_copy(server, tmp_path):
    load_text(DataSettings(path=server.url, sha256=hashlib.sha256(RAW).hexdigest()), tmp_path)
    with pytest.raises(DataError, match="SHA-256 is") as caught:
        load_text(DataSettings(path=server.url, sha256="0" * 64), tmp_path)
    assert str(next((tmp_path / "downloads").glob("*/text.txt"))) in caught.value.hint


def test_a_seekable_source_is_resumed_by_seeking(memory, tmp_path, monkeypatch):
    memory.pipe({"/text.txt": RAW})
    real, reads = module._open_at, []

    class Dying:
        def __init__(self, stream):
            self.stream = stream

        def read(self, size):
            if len(reads) == 1:
                reads.append(None)
                raise ConnectionResetError("gone")
            reads.append(self.stream.tell())
            return self.stream.read(size)

        def close(self):
            self.stream.close()

    monkeypatch.setattr(module, "_open_at", lambda *arguments: Dying(real(*arguments)))
    monkeypatch.setattr(module, "PAUSE_S", 0.0)
    assert fetch("memory://text.txt", tmp_path).read_bytes() == RAW
    assert reads[:3] == [0, None, 1 << 18], "on from where it broke off"
