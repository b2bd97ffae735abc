"""A URL -> a file; a transfer that breaks off goes on where it stopped, in this process or in a later one.

    <folder>/NAME             the whole file
    <folder>/.NAME.part       what has arrived of one that is not whole
    <folder>/.NAME.source     digest of URL, size, ETag and date, which the part belongs to; its size

fsspec opens it, so any file system that is installed works: http, ftp, memory, zip, and with their packages
s3, gcs, abfs. HTTP is resumed by `Range`, anything else by seeking. A source that has changed since the part
was begun, or does not serve ranges, is fetched from the start. pipeline/node_cache.py chooses the folder and
sees to it that one process does this at a time.

A URL may hold a password or be signed: messages name it as `settings.shown` does.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipeline.errors import DataError
from pipeline.provenance import key_of
from pipeline.settings import shown

ATTEMPTS = 5
"""Attempts in a row that bring no byte, before a source is given up."""
PAUSE_S = 0.5
"""Before the second attempt; doubled for each further one."""

_BLOCK = 1 << 18
_TELL_EVERY_S = 15.0
_IDENTITY = (
    *("size", "ETag", "etag", "Content-MD5", "Digest", "Last-Modified"),
    *("LastModified", "last_modified", "mtime", "created"),
)
_CACHES = ("filecache", "simplecache", "blockcache", "cached")
_IN_TEXT = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>]+")
_SIGNATURE = re.compile(r"x-(amz|goog)-.*|signature|expires|awsaccesskeyid|googleaccessid|key-pair-id|policy")
_AZURE = frozenset(("sig", "se", "st", "sp", "sv", "sr", "spr", "skoid", "sktid", "skt", "ske", "sks", "skv"))
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Remote:
    """A file at its source.

    Attributes:
        name: as messages call it.
        identity: digest of URL, size, ETag and date: another one is another file.
        size: bytes, None where the source does not say.
        etag: of HTTP, None where there is none that tells every byte.
    """

    name: str
    url: str
    system: Any
    path: str
    identity: str
    size: int | None
    etag: str | None


def describe(url: str) -> Remote:
    """Ask the source about a file.

    Raises:
        DataError: no such file, no package for this kind of URL, or a source that does not answer.
    """
    system, path = _open_system(url)
    info = _ask(lambda: system.info(path), url)
    if info.get("type") == "directory":
        raise DataError(f"{shown(url)}: is a folder, expected a file", "name the file in it")
    return _remote(url, system, path, info)


def file_name(url: str) -> str:
    """The URL's last part, so that a suffix stays; without what could lead out of a folder."""
    last = url.split("::")[0].split("?")[0].split("#")[0].rstrip("/").rpartition("/")[2]
    return re.sub(r"[^A-Za-z0-9._-]", "_", last)[-100:].lstrip(".") or "data"


def unsigned(url: str) -> str:
    """What tells a URL's file from others: without user and password, and without what is another one at
    each signing (S3, Google, CloudFront, Azure).
    """
    bare, query = shown(url), urlsplit(url).query
    if not query or "::" in url:
        return bare if "::" not in url else url
    words = {word.partition("=")[0].lower(): word for word in query.split("&")}
    azure = _AZURE if {"sig", "se"} <= words.keys() else frozenset()
    kept = [word for name, word in words.items() if not _SIGNATURE.fullmatch(name) and name not in azure]
    return f"{bare}?{'&'.join(kept)}" if kept else bare


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
            f"{shown(url)}: cannot be listed: {_reason(error)}", "name the files by data.files"
        ) from error
    if not found:
        raise DataError(
            f"{shown(url)}: matches no file", "check the pattern, or name the files by data.files"
        )
    return [str(name) for name in found]


def begin(remote: Remote, whole: Path) -> int:
    """Bytes that have arrived of this very file; what has arrived of another one is dropped.

    Raises:
        OSError: the folder cannot be written.
    """
    n = arrived(remote, whole)
    if not n:
        part_of(whole).unlink(missing_ok=True)
        _source_of(whole).write_text(_record(remote))
    return n


def arrived(remote: Remote, whole: Path) -> int:
    """Bytes that have arrived of this very file."""
    source = _source_of(whole)
    return _size(part_of(whole)) if source.exists() and source.read_text() == _record(remote) else 0


def promised(whole: Path) -> int:
    """Bytes that a file whose part is there will have, 0 where that is not known."""
    with suppress(OSError, ValueError):
        return int(_source_of(whole).read_text().split()[1])
    return 0


def part_of(whole: Path) -> Path:
    """Where a file's bytes go until all are there."""
    return whole.with_name(f".{whole.name}.part")


def transfer(remote: Remote, whole: Path) -> None:
    """Bring what `begin` has not found; the file gets its name when it is whole.

    Raises:
        DataError: a source that keeps failing; what has arrived is kept.
        OSError: the disk's failure.
    """
    failures = 0
    while True:
        begun = begin(remote, whole)
        try:
            _append(remote, part_of(whole))
        except FileNotFoundError as error:
            raise _missing(remote.url) from error
        except _CannotWrite as error:
            raise error.cause from None
        except Exception as error:  # each file system has its own
            is_end, reason = False, _reason(error)
        else:
            is_end, reason = True, "the source closed the connection"
        n = _size(part_of(whole))
        if n == remote.size or (remote.size is None and is_end):
            part_of(whole).replace(whole)
            _source_of(whole).unlink(missing_ok=True)
            return
        failures = 0 if n > begun else failures + 1
        size, remote = remote.size, _again(remote)
        if failures >= ATTEMPTS or (size is not None and n > size == remote.size):
            of = "an unknown number of" if size is None else f"{size:,}"
            raise DataError(
                f"{remote.name}: {reason}; {n:,} of {of} bytes have arrived",
                "what has arrived is kept: run the same command again to go on",
            )
        log.warning("%s: %s at byte %s; going on from there", remote.name, reason, f"{n:,}")
        time.sleep(PAUSE_S * 2**failures)


def _again(remote: Remote) -> Remote:
    """What the source says of the file now, should it answer: it may have changed meanwhile."""
    try:
        remote.system.invalidate_cache()
        return _remote(remote.url, remote.system, remote.path, dict(remote.system.info(remote.path)))
    except Exception:  # each file system has its own; the next attempt finds out
        return remote


def _append(remote: Remote, part: Path) -> None:
    """Everything from the part's end on; whatever arrives before a failure is in the file."""
    done = _size(part)
    if remote.size is not None and done >= remote.size:
        return
    with closing(_open_at(remote, done)) as stream:
        start = done if done == 0 or _is_at(stream, done) else 0
        try:
            file = part.open("r+b" if start else "wb")
        except OSError as error:
            raise _CannotWrite(error) from error
        told = time.monotonic()
        with file:
            file.seek(start)
            while block := stream.read(_BLOCK):
                try:
                    file.write(block)
                except OSError as error:
                    raise _CannotWrite(error) from error
                if time.monotonic() - told > _TELL_EVERY_S:
                    told = time.monotonic()
                    of = "" if remote.size is None else f" of {remote.size / 1e9:.1f}"
                    log.info("%s: %.1f%s GB", remote.name, file.tell() / 1e9, of)


class _CannotWrite(Exception):
    """The disk's failure, not the source's."""

    def __init__(self, cause: OSError) -> None:
        super().__init__(str(cause))
        self.cause = cause


def _open_at(remote: Remote, start: int) -> Any:
    """A stream from byte `start` on. HTTP streams cannot seek; they are asked for a range."""
    if _is_http(remote.system):
        headers = {"Accept-Encoding": "identity"}  # a compressed transfer has other bytes at that place
        if start:
            headers["Range"] = f"bytes={start}-"
            if remote.etag is not None:
                headers["If-Range"] = remote.etag
        # Any size will do: none is asked for.
        return remote.system.open(remote.path, "rb", block_size=0, size=1, headers=headers)
    stream = remote.system.open(remote.path, "rb")
    stream.seek(start)
    return stream


def _is_at(stream: Any, start: int) -> bool:
    """Whether the stream begins at `start`: a server may ignore the range and send everything."""
    answer = getattr(stream, "r", None)
    if answer is None or not hasattr(answer, "status"):
        return True
    served = re.match(r"bytes (\d+)-", answer.headers.get("Content-Range", ""))
    return answer.status == 206 and served is not None and int(served[1]) == start


def _remote(url: str, system: Any, path: str, info: dict[str, Any]) -> Remote:
    identity = {name: str(info[name]) for name in _IDENTITY if info.get(name) is not None}
    size, etag = info.get("size"), info.get("ETag")
    return Remote(
        name=shown(url),
        url=url,
        system=system,
        path=path,
        identity=key_of({"url": unsigned(url), **identity}),
        size=None if size is None else int(size),
        etag=etag if isinstance(etag, str) and etag.startswith('"') else None,  # not W/"...": RFC 9110 13.1.5
    )


def _record(remote: Remote) -> str:
    return f"{remote.identity} {remote.size or 0}\n"


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _source_of(whole: Path) -> Path:
    return whole.with_name(f".{whole.name}.source")


def _open_system(url: str) -> tuple[Any, str]:
    """fsspec's file system for the URL, and the path in it."""
    caches = [part for part in url.split("::") if part.partition("://")[0] in _CACHES]
    if caches:  # beside keeping everything twice, they once unpickled what they find
        raise DataError(
            f"{shown(url)}: {caches[0]} is not taken", "leave it out: what is fetched is kept in paths.cache"
        )
    from fsspec.core import url_to_fs  # type: ignore[import-untyped]

    options = {}
    if url.startswith(("http://", "https://")):
        import aiohttp

        logging.getLogger("fsspec.http").setLevel(logging.INFO)  # below, it tells whole URLs
        # A transfer may take long, silence may not.
        options["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(None, sock_connect=30, sock_read=60)}
    try:
        system, path = url_to_fs(url, **options)
    except ImportError as error:
        raise DataError(
            f"{shown(url)}: cannot be opened: {_reason(error)}",
            "install the package into pagemill's environment",
        ) from error
    except (ValueError, FileNotFoundError, OSError) as error:
        raise DataError(
            f"{shown(url)}: cannot be opened: {_reason(error)}",
            "expected a path, or a URL that fsspec knows: https://, s3://, ...",
        ) from error
    return system, path


def _is_http(system: Any) -> bool:
    kinds = (system.protocol,) if isinstance(system.protocol, str) else system.protocol
    return bool({"http", "https"} & set(kinds))


def _ask(question: Callable[[], Any], url: str) -> dict[str, Any]:
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
    hint = "check the address and the connection"
    if getattr(cause, "status", None) in (401, 403):
        hint = "is it private, or has its signature expired?"
    raise DataError(f"{shown(url)}: cannot be read: {reason}", hint) from cause


def _missing(url: str) -> DataError:
    return DataError(f"{shown(url)}: no such file", "check the address")


def _reason(error: BaseException) -> str:
    """What an error says, URLs in it as they may be logged."""
    return _IN_TEXT.sub(lambda found: shown(found[0]), str(error)) or type(error).__name__
