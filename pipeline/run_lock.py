"""One driver for each run: a second one that is started on it is refused, naming the first.

    <run folder>/.driver.lock    who computes the run, as JSON; its modification time is a heartbeat

Nothing but time depends on this: should two drivers get past it, the store keeps the first file of each
shard, and both files hold the same bits. A lock whose driver ended without a word is stale and is taken over.
On the driver's own host the kernel knows whether the process is there. Elsewhere, on a shared file system, a
heartbeat that does not change while it is watched for `STALE_S` is taken for none; clocks of two hosts are
never compared. Locks are made and put away by one driver at a time, where the folder can be locked.

In an object store the lock is a lease: an object that its driver stores anew with every heartbeat, each time
over the very one that it stored before (`If-Match`), and that another driver takes over in the same way when
it has seen no heartbeat for `STALE_S`. Of several that find it stale, one gets it. A store without `If-Match`
would let two drivers go on, and first-writer-wins is what protects there.
"""

from __future__ import annotations

import datetime
import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from pipeline import store
from pipeline.errors import RefusedError, StorageFailure
from pipeline.folders import ObjectPath

NAME = ".driver.lock"
BEAT_S = 5.0
STALE_S = 30.0
_WATCH_S = 0.5
_BOOT, _NAMESPACE = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
_START_OF_STAT = 19  # field 22, counted behind the command's closing parenthesis

log = logging.getLogger(__name__)


class RunLocks:
    """The runs that this driver computes, each locked until this is closed."""

    def __init__(self) -> None:
        self._held: dict[Path, int | str] = {}  # lock -> its inode; the ETag of an object
        self._stop = threading.Event()
        self._beating: threading.Thread | None = None

    def __enter__(self) -> RunLocks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def take(self, folder: Path) -> bool:
        """Lock a run; True when another driver's stale lock was taken over.

        Args:
            folder: of the run's shards; it exists.

        Raises:
            RefusedError: another driver computes it (exit 2).
            StorageFailure: the lock cannot be written.
        """
        lock, was_taken_over = folder / NAME, False
        try:
            while not self._publish(lock):
                if (stale := _stale(lock)) is None:
                    continue  # it went by itself
                is_ours = self._replace(lock, stale)
                was_taken_over = is_ours or was_taken_over
                if is_ours and isinstance(lock, ObjectPath):
                    break  # replaced in one step
        except OSError as error:
            raise StorageFailure(f"{lock}: cannot be written: {error.strerror}", "make room there") from error
        if self._beating is None:
            self._beating = threading.Thread(target=self._beat, name="run locks", daemon=True)
            self._beating.start()
        return was_taken_over

    def _publish(self, lock: Path) -> bool:
        if isinstance(lock, ObjectPath):
            return self._store(lock, None)
        with _alone(lock.parent):
            if not store.publish(lock, lambda file: file.write(_own().encode())):
                return False
            self._held[lock] = lock.stat().st_ino
        return True

    def _replace(self, lock: Path, stale: _Seen) -> bool:
        """Put a stale lock out of the way; False when a third driver was faster, and there is its lock."""
        if isinstance(lock, ObjectPath):
            if not self._store(lock, str(stale.mark)):
                return False
        else:
            with _alone(lock.parent):
                try:
                    if _mark(lock) != stale.mark:
                        return False
                except FileNotFoundError:
                    return False
                lock.unlink()
        log.warning(
            "%s: the lock of driver %s was stale (%s) and is taken over", lock, stale.owner, stale.how
        )
        return True

    def _store(self, lock: ObjectPath, over: str | None) -> bool:
        """Store the lock as this driver's, over the one with an ETag; False where there is another one."""
        text = _own().encode()
        etag = lock.put(text, over)
        if etag is None:  # an answer that was lost is asked for again, and then it is there already
            with suppress(FileNotFoundError):
                found, found_etag = lock.fetch()
                etag = found_etag if found == text else None
        if etag is not None:
            self._held[lock] = etag
        return etag is not None

    def close(self) -> None:
        """Unlock all; may be called twice."""
        self._stop.set()
        if self._beating is not None:
            self._beating.join()
            self._beating = None
        for lock, mark in self._held.items():
            with suppress(OSError):
                if mark == (lock.etag() if isinstance(lock, ObjectPath) else lock.stat().st_ino):
                    lock.unlink()
        self._held.clear()

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_S):
            for lock, mark in list(self._held.items()):
                try:
                    if isinstance(lock, ObjectPath):
                        if self._store(lock, str(mark)):
                            continue
                    elif lock.stat().st_ino == mark:
                        os.utime(lock)
                        continue
                except OSError as error:
                    log.debug("%s: no heartbeat: %s", lock, error)
                    continue
                log.warning("%s: another driver took this run over; both go on, and none loses a shard", lock)
                self._held.pop(lock, None)


@dataclass(frozen=True)
class _Seen:
    """A lock that is stale: whose it was, how that is known, and what tells this state of it from others."""

    mark: object
    owner: str
    how: str


def _stale(lock: Path) -> _Seen | None:
    """What is known of a stale lock; None when it went by itself.

    Raises:
        RefusedError: it is not stale.
    """
    try:
        seen, text = _read(lock)
    except FileNotFoundError:
        return None
    try:
        owner = dict(json.loads(text))
    except (ValueError, TypeError):
        owner = {}
    who = f"{owner.get('host', 'an unknown host')}:{owner.get('pid', '?')}"
    if owner.get("kernel") == _kernel():
        started = _started(owner.get("pid"))
        alive, how = started is not None and started == owner.get("started_ticks"), "its process is gone"
    else:
        log.info("%s: held by a driver on another host, %s; waiting for its heartbeat", lock, who)
        alive, how = _beats(lock, seen), f"no heartbeat in {STALE_S:.0f} s"
    if alive:
        raise RefusedError(
            f"{lock.parent}: the driver {who} computes this run, since {owner.get('began', 'a while')}",
            "wait until it ends, or end it; the same command then goes on from the shards that are finished",
            kind="RunBusy",
        )
    return _Seen(seen, who, how)


def _read(lock: Path) -> tuple[object, str]:
    """What tells a lock's state from others, and what it says."""
    if isinstance(lock, ObjectPath):
        data, etag = lock.fetch()
        return etag, data.decode(errors="replace")
    mark = _mark(lock)
    return mark, lock.read_text()


def _mark(lock: Path) -> object:
    """What is another with each heartbeat."""
    if isinstance(lock, ObjectPath):
        return lock.etag()
    with lock.open("rb") as file:  # opened: network file systems ask the server then
        now = os.fstat(file.fileno())
    return now.st_ino, now.st_mtime_ns


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One driver at a time is in here; all are, on a file system that locks no folders."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _beats(lock: Path, seen: object) -> bool:
    """Whether a lock's heartbeat changes while it is watched; one that goes away does not."""
    deadline = time.monotonic() + STALE_S
    while time.monotonic() < deadline:
        time.sleep(_WATCH_S)
        try:
            if _mark(lock) != seen:
                return True
        except FileNotFoundError:
            return False
    return False


def _own() -> str:
    """What a lock says of this process."""
    entry: dict[str, Any] = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "began": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M:%S} UTC",
        "kernel": _kernel(),
        "started_ticks": _started(os.getpid()),
        "beat": uuid.uuid4().hex,
    }
    return json.dumps(entry) + "\n"


def _kernel() -> str:
    """Where a process's number means that process: this boot of this machine, this namespace of numbers."""
    return f"{_BOOT.read_text().strip()} {_NAMESPACE.readlink().name}"


def _started(pid: int | None) -> int | None:
    """When a process started, in ticks since boot, for numbers are used again; None when it is not there."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[_START_OF_STAT])
