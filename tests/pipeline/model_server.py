"""Models over HTTP on loopback, from a server that can be slow, break off, or change its mind."""

import hashlib
import http.server
import re
import threading

from pipeline.node_cache import local_copy

MODEL = b"GGUF" + bytes(range(256)) * 400


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


def put(url, cache, limit=None, sha256=None):
    """Fetch and let go; the path."""
    with local_copy(url, sha256, cache, limit) as copy:
        return copy.path
