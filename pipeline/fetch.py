"""A URL -> a file under `paths.cache`, fetched once; a transfer that breaks off goes on where it stopped.

    <cache>/downloads/<key>/NAME             the whole file
    <cache>/downloads/<key>/.NAME.part       what has arrived of one that is not whole
    <cache>/downloads/<key>/.source          digest of URL, size, ETag and date, which the part belongs to

The key is of the URL. fsspec opens it, so any file system that is installed works: http, ftp, memory, zip,
and with their packages s3, gcs, abfs. HTTP is resumed by `Range`, anything else by seeking. A source that has
changed since the part was begun, or does not serve ranges, is fetched from the start. What was fetched is
used without asking again; `data.sha256` pins it.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from pipeline.errors import DataError, StoreError
from pipeline.provenance import key_of

ATTEMPTS = 5
"""Attempts in a row that bring no byte, before a source is given up."""
PAUSE_S = 0.5
"""Before the second attempt; doubled for each further one."""

_BLOCK = 1 << 18
_IDENTITY = ("size", "ETag", "etag", "LastModified", "last_modified", "mtime", "created")
log = logging.getLogger(__name__)


def fetch(url: str, cache: Path) -> Path:
    """The file that a URL names, from the cache when it is there.

    Raises:
        DataError: no such file, no package for this kind of URL, or a source that keeps failing; what has
            arrived is kept.
        StoreError: the cache cannot be written.
    """
    folder = cache / "downloads" / hashlib.sha256(url.encode()).hexdigest()[:16]
    whole = folder / _file_name(url)
    if whole.exists():
        return whole
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder / ".lock"):
            if not whole.exists():  # another process may have fetched it while this one waited
                _fetch(url, whole)
    except OSError as error:
        raise StoreError(
            f"{folder}: cannot keep what was fetched: {error.strerror or error}", "check paths.cache"
        ) from error
    return whole


def matches(url: str) -> list[str]:
    """URLs that a pattern with `*` matches, sorted.

    Raises:
        DataError: none, or the source cannot be listed.
    """
    system, path = _open_system(url)
    try:
        found = sorted(system.unstrip_protocol(name) for name in system.glob(path))
    except Exception as error:  # each file system has its own
        raise DataError(
            f"{url}: cannot be listed: {_reason(error)}", "name the files by data.files"
        ) from error
    if not found:
        raise DataError(f"{url}: matches no file", "check the pattern, or name the files by data.files")
    return [str(name) for name in found]


def _fetch(url: str, whole: Path) -> None:
    system, path = _open_system(url)
    part, source = whole.with_name(f".{whole.name}.part"), whole.with_name(".source")
    info = _ask(lambda: system.info(path), url)
    identity = {name: str(info[name]) for name in _IDENTITY if info.get(name) is not None}
    record = key_of({"url": url, **identity})  # a URL may hold a secret
    if not source.exists() or source.read_text() != record:
        part.unlink(missing_ok=True)
        source.write_text(record)
    size = None if info.get("size") is None else int(info["size"])
    failures = 0
    while True:
        begun = part.stat().st_size if part.exists() else 0
        try:
            _append(system, path, part, size)
        except FileNotFoundError as error:
            raise _missing(url) from error
        except _CannotWrite as error:
            raise error.cause from None
        except Exception as error:  # each file system has its own
            reason = _reason(error)
        else:
            reason = "the source closed the connection"
        arrived = part.stat().st_size if part.exists() else 0
        if size == arrived or (size is None and reason.startswith("the source")):
            part.replace(whole)
            return
        failures = 0 if arrived > begun else failures + 1
        if failures >= ATTEMPTS or (size is not None and arrived > size):
            of = "an unknown number of" if size is None else f"{size:,}"
            raise DataError(
                f"{url}: {reason}; {arrived:,} of {of} bytes have arrived",
                "what has arrived is kept: run the same command again to go on",
            )
        log.warning("%s: %s at byte %s; going on from there", url, reason, f"{arrived:,}")
        time.sleep(PAUSE_S * 2**failures)


def _append(system: Any, path: str, part: Path, size: int | None) -> None:
    """Everything from the part's end on; whatever arrives before a failure is in the file."""
    done = part.stat().st_size if part.exists() else 0
    if size is not None and done >= size:
        return
    with closing(_open_at(system, path, done)) as stream:
        start = done if done == 0 or _is_at(stream, done) else 0
        try:
            file = part.open("r+b" if start else "wb")
        except OSError as error:
            raise _CannotWrite(error) from error
        with file:
            file.seek(start)
            while block := stream.read(_BLOCK):
                try:
                    file.write(block)
                except OSError as error:
                    raise _CannotWrite(error) from error


class _CannotWrite(Exception):
    """The disk's failure, not the source's."""

    def __init__(self, cause: OSError) -> None:
        super().__init__(str(cause))
        self.cause = cause


def _open_at(system: Any, path: str, start: int) -> Any:
    """A stream from byte `start` on. HTTP streams cannot seek; they are asked for a range."""
    if _is_http(system):
        # A compressed transfer would have other bytes at that place.
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
        return system.open(path, "rb", block_size=0, size=1, headers=headers)  # any size: none is asked for
    stream = system.open(path, "rb")
    stream.seek(start)
    return stream


def _is_at(stream: Any, start: int) -> bool:
    """Whether the stream begins at `start`: a server may ignore the range and send everything."""
    answer = getattr(stream, "r", None)
    if answer is None or not hasattr(answer, "status"):
        return True
    served = re.match(r"bytes (\d+)-", answer.headers.get("Content-Range", ""))
    return answer.status == 206 and served is not None and int(served[1]) == start


def _open_system(url: str) -> tuple[Any, str]:
    """fsspec's file system for the URL, and the path in it."""
    from fsspec.core import url_to_fs  # type: ignore[import-untyped]

    options = {}
    if url.startswith(("http://", "https://")):
        import aiohttp

        # A transfer may take long, silence may not.
        options["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(None, sock_connect=30, sock_read=60)}
    try:
        system, path = url_to_fs(url, **options)
    except ImportError as error:
        raise DataError(
            f"{url}: cannot be opened: {error}", "install the package into pagemill's environment"
        ) from error
    except (ValueError, FileNotFoundError, OSError) as error:
        raise DataError(
            f"{url}: cannot be opened: {_reason(error)}",
            "expected a path, or a URL that fsspec knows: https://, s3://, ...",
        ) from error
    return system, path


def _is_http(system: Any) -> bool:
    kinds = (system.protocol,) if isinstance(system.protocol, str) else system.protocol
    return bool({"http", "https"} & set(kinds))


def _ask(question: Any, url: str) -> dict[str, Any]:
    """The source's answer about the file, asked again when the connection fails."""
    for attempt in range(ATTEMPTS):
        try:
            return dict(question())
        except Exception as error:  # each file system has its own
            # fsspec's HTTP says FileNotFoundError for any failure, and what it was is the cause.
            behind = error.__cause__ if isinstance(error, FileNotFoundError) else error
            gone = isinstance(behind, FileNotFoundError)
            if behind is None or gone or getattr(behind, "status", None) in (404, 410):
                raise _missing(url) from error
            reason, cause = _reason(behind), behind
        if attempt + 1 < ATTEMPTS:
            time.sleep(PAUSE_S * 2**attempt)
    raise DataError(f"{url}: cannot be read: {reason}", "check the address and the connection") from cause


def _missing(url: str) -> DataError:
    return DataError(f"{url}: no such file", "check the address")


def _reason(error: BaseException) -> str:
    return str(error) or type(error).__name__


def _file_name(url: str) -> str:
    """The URL's last part, so that a suffix stays; without what a file system might object to."""
    last = url.split("::")[0].split("?")[0].split("#")[0].rstrip("/").rpartition("/")[2]
    return re.sub(r"[^A-Za-z0-9._-]", "_", last).lstrip(".")[-100:] or "data"


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process at a time; the lock goes with the process."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
