"""Models and data by URL: on every node once, under a lock, checked, and kept as long as there is room.

    <paths.cache>/downloads/.lock            held while room is made
    <paths.cache>/downloads/<key>/NAME       the file; of a split model (`-00001-of-00003.gguf`) all parts
                                  .lock      held alone by whoever fetches or evicts, shared by whoever uses
                                             the files; its time is that of the last use
                                  .NAME...   what is not whole (pipeline/fetch.py)

The key is of the URL, without what is a secret. What was fetched is used without asking the source again,
unless another digest is expected. The others of a node wait for the one process that fetches. Room is made
by pipeline/cache_room.py.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import re
import socket
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from pipeline import fetch
from pipeline.cache_room import alone, make_room, remove
from pipeline.errors import DataError, ModelError, PipelineError, StoreError
from pipeline.provenance import files_sha256
from pipeline.settings import is_url, shown

_BLOCK = 1 << 20
_SPLIT = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wanted:
    """A model that a node is to have; the URL may hold a secret, `name` does not.

    Attributes:
        sha256: as `provenance.model_sha256` says, None when any will do.
        limit_bytes: that the cache may grow to, None for no limit.
    """

    url: str = field(repr=False)
    sha256: str | None = None
    limit_bytes: int | None = None

    @property
    def name(self) -> str:
        """For messages."""
        return shown(self.url)


class Copy:
    """A fetched file that is not evicted until this is closed, or the process ends.

    Attributes:
        path: the file, or the first part of a split model.
    """

    def __init__(self, path: Path, lock: int | None) -> None:
        self.path = path
        self._lock = lock

    def close(self) -> None:
        """Let go of the file; may be called twice."""
        lock, self._lock = self._lock, None
        if lock is not None:
            with suppress(OSError):
                os.utime(lock)
            os.close(lock)

    def __enter__(self) -> Copy:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def local_copy(url: str, sha256: str | None, folder: Path, limit_bytes: int | None) -> Copy:
    """This node's copy of what a URL names, fetched unless it is there.

    Args:
        sha256: that it has to have, None when any will do.
        folder: `paths.cache`.
        limit_bytes: that all that was fetched may take, None for no limit.

    Raises:
        DataError: it cannot be fetched, or is another file.
        StoreError: the cache cannot be written, or has no room; names this host.
    """
    copy = _copy(url, sha256, folder, limit_bytes)
    assert copy is not None, "it was waited for"
    return copy


def model_copy(wanted: Wanted, folder: Path) -> Copy:
    """This node's copy of a model.

    Raises:
        ModelError: it cannot be fetched, or is another file; names this host.
        StoreError: the cache cannot be written, or has no room; names this host.
    """
    try:
        return local_copy(wanted.url, wanted.sha256, folder, wanted.limit_bytes)
    except DataError as error:
        host = socket.gethostname()
        where = "" if host in str(error) else f"on {host}: "
        raise ModelError(f"{where}{error}", error.hint) from error


def prefetch(wanted: Wanted, folder: Path, beside_bytes: int = 0) -> threading.Thread:
    """Bring a model nearer in the background, unless another process of the node does; failing is only told.

    What a URL names is fetched. A file is read into the page cache if that has room for it beside what is in
    use, `beside_bytes`; nothing of it is mapped.
    """

    def work() -> None:
        try:
            if not is_url(wanted.url):
                _read_ahead(wanted.url, folder, beside_bytes)
                return
            copy = _copy(wanted.url, wanted.sha256, folder, wanted.limit_bytes, wait=False)
            if copy is not None:
                copy.close()
        except Exception as error:  # who needs the file will fail by it, and say so
            what = error if isinstance(error, PipelineError) else type(error).__name__
            log.info("%s is not fetched ahead: %s", wanted.name, what)

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    return thread


def _read_ahead(path: str, folder: Path, beside_bytes: int) -> None:
    """Read all of a model's files once; not twice on one host at a time."""
    import engine
    from pipeline.capacity import available_bytes

    with engine.open(path) as file:
        parts, n_bytes = file.paths, file.n_bytes
        n_missing = n_bytes - file.resident_bytes()
    left = available_bytes()
    if n_missing <= 0 or (left is not None and left < n_bytes + beside_bytes):
        return
    name = hashlib.sha256(path.encode()).hexdigest()[:16]
    locks = folder / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    lock = os.open(
        locks / f"ahead.{name}.{socket.gethostname()}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
    )
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        block = bytearray(_BLOCK)
        for part in parts:
            with Path(part).open("rb", buffering=0) as raw:
                while raw.readinto(block):
                    pass
    except BlockingIOError:
        return
    finally:
        os.close(lock)


def kept(url: str, folder: Path) -> list[Path]:
    """The files of a URL that are here, in order; [] unless all are."""
    files = _files(url, folder)
    return files if _are_here(files) else []


def missing_bytes(url: str, folder: Path) -> int | None:
    """Bytes that fetching a URL would bring, 0 when all is here; None where the source does not say.

    Raises:
        DataError: as `fetch.describe`.
    """
    if kept(url, folder):
        return 0
    total = 0
    for part, file in zip(_parts(url), _files(url, folder), strict=True):
        if not file.exists():
            remote = fetch.describe(part)
            if remote.size is None:
                return None
            total += remote.size - fetch.arrived(remote, file)
    return total


def _copy(
    url: str, sha256: str | None, folder: Path, limit_bytes: int | None, *, wait: bool = True
) -> Copy | None:
    """See `local_copy`; None where another process has the lock and nobody waits."""
    files, host = _files(url, folder), socket.gethostname()
    home = files[0].parent
    try:
        lock = _open_lock(home, files)
        if lock is None:
            if not _is_right(files, sha256, folder):
                raise _mismatch(url, f"{files[0]}, which cannot be replaced,", files, sha256, folder)
            return Copy(files[0], None)
        try:
            is_ours = _settled(lock, url, sha256, files, folder, limit_bytes, wait)
        except BaseException:
            os.close(lock)
            raise
    except OSError as error:
        raise StoreError(
            f"{home} on {host}: cannot keep what was fetched: {error.strerror or error}", "check paths.cache"
        ) from error
    if is_ours:
        return Copy(files[0], lock)
    os.close(lock)
    return None


def _settled(
    lock: int,
    url: str,
    sha256: str | None,
    files: Sequence[Path],
    folder: Path,
    limit_bytes: int | None,
    wait: bool,
) -> bool:
    """Have the files here and the lock shared; False where another process has it and nobody waits."""
    while True:
        if not _locked(lock, fcntl.LOCK_SH, url, wait):
            return False
        os.utime(lock)
        if _is_right(files, sha256, folder):
            return True
        if _are_here(files):  # of an earlier time, or broken: replaced, unless another process uses it
            if not _locked(lock, fcntl.LOCK_EX, url, wait=False):
                if not _is_right(files, sha256, folder):
                    raise _mismatch(url, f"{files[0]}, which is in use,", files, sha256, folder)
                continue
        elif not _locked(lock, fcntl.LOCK_EX, url, wait):
            return False
        if not _is_right(files, sha256, folder):  # nobody has put that right meanwhile
            _replace(url, sha256, files, folder, limit_bytes)


def _replace(
    url: str, sha256: str | None, files: Sequence[Path], folder: Path, limit_bytes: int | None
) -> None:
    """Fetch the files; the lock is held alone."""
    if _are_here(files):
        log.warning("%s is not what it should be; it is fetched again", files[0])
        remove(files)
    while True:
        has_resumed = _fetch_all(url, files, folder, limit_bytes)
        if _is_right(files, sha256, folder):
            return
        error = _mismatch(url, "what the source has", files, sha256, folder)
        remove(files)
        if not has_resumed:
            raise error
        log.warning("%s: what went on from an earlier transfer is not right; fetching it anew", shown(url))


def _are_here(files: Sequence[Path]) -> bool:
    return all(file.exists() for file in files)


def _is_right(files: Sequence[Path], sha256: str | None, folder: Path) -> bool:
    return _are_here(files) and (sha256 is None or files_sha256(files, folder) == sha256)


def _mismatch(url: str, what: str, files: Sequence[Path], sha256: str | None, folder: Path) -> DataError:
    host, found = socket.gethostname(), files_sha256(files, folder)
    return DataError(
        f"{shown(url)}: SHA-256 of {what} on {host} is {found}, expected {sha256}",
        "is it another version? every node has the same one, and the one that model.sha256 says",
    )


def _fetch_all(url: str, files: Sequence[Path], folder: Path, limit_bytes: int | None) -> bool:
    """Bring the files that are not here; whether any of that had arrived earlier."""
    host = socket.gethostname()
    remotes = {
        file: fetch.describe(part) for part, file in zip(_parts(url), files, strict=True) if not file.exists()
    }
    total = sum(remote.size or 0 for remote in remotes.values())
    with alone(folder / "downloads" / ".lock"):
        done = sum(fetch.begin(remote, file) for file, remote in remotes.items())
        left = total - done
        make_room(shown(url), left, files[0].parent, limit_bytes)
    log.info("%s: fetching %s MB to %s", shown(url), f"{left / 1e6:,.0f}", host)
    for file, remote in remotes.items():
        fetch.transfer(remote, file)
    if any(remote.size is None for remote in remotes.values()):  # only now is it known
        with alone(folder / "downloads" / ".lock"):
            try:
                make_room(shown(url), 0, files[0].parent, limit_bytes)
            except StoreError:
                remove(files)
                raise
    return bool(done) or len(remotes) < len(files)


def _files(url: str, folder: Path) -> list[Path]:
    """Where the files of a URL are kept, whether they are there or not."""
    home = folder / "downloads" / hashlib.sha256(fetch.unsigned(url).encode()).hexdigest()[:16]
    names = [fetch.file_name(part) for part in _parts(url)]
    return [home / name for name in names]


def _parts(url: str) -> list[str]:
    """The URLs of a split model's parts, of which the first is given; the URL itself of anything else.

    Raises:
        DataError: another part than the first is given.
    """
    end = re.search(r"[?#]|::", url)
    path, rest = (url, "") if end is None else (url[: end.start()], url[end.start() :])
    split = _SPLIT.search(path)
    if split is None or int(split[2]) < 2:
        return [url]
    if int(split[1]) != 1:
        raise DataError(
            f"{shown(url)}: part {int(split[1]):,} of {int(split[2]):,} of a model", "give its first part"
        )
    stem = path[: split.start()]
    return [f"{stem}-{i:05d}-of-{split[2]}.gguf{rest}" for i in range(1, int(split[2]) + 1)]


def _open_lock(home: Path, files: Sequence[Path]) -> int | None:
    """The lock's descriptor; None in a cache that can only be read and has the files.

    Raises:
        OSError: there is no lock, and no file either.
    """
    try:
        home.mkdir(parents=True, exist_ok=True)
        return os.open(home / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno in _READ_ONLY and _are_here(files):
            return None
        raise


def _locked(lock: int, kind: int, url: str, wait: bool) -> bool:
    """Take the lock, or turn it to another kind; says so when that takes time. False when nobody waits."""
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        if not wait:
            return False
        host = socket.gethostname()
        log.info("%s: another process of %s is fetching it; waiting for that", shown(url), host)
        fcntl.flock(lock, kind)
    return True
