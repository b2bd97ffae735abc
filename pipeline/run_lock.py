"""One driver for each run: a second one that is started on it is refused, naming the first.

    <run folder>/.driver.lock    who computes the run, as JSON; its modification time is a heartbeat

Nothing but time depends on this: should two drivers get past it, the store keeps the first file of each
shard, and both files hold the same bits. A lock whose driver ended without a word is stale and is taken over.
On the driver's own host the kernel knows whether the process is there. Elsewhere, on a shared file system, a
heartbeat that does not change while it is watched for `STALE_S` is taken for none; clocks of two hosts are
never compared. Locks are made and put away by one driver at a time, where the folder can be locked.
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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from pipeline import store
from pipeline.errors import RefusedError, StorageFailure

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
        self._held: dict[Path, int] = {}  # lock -> its inode
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
                was_taken_over = _take_over(lock) or was_taken_over
        except OSError as error:
            raise StorageFailure(f"{lock}: cannot be written: {error.strerror}", "make room there") from error
        if self._beating is None:
            self._beating = threading.Thread(target=self._beat, name="run locks", daemon=True)
            self._beating.start()
        return was_taken_over

    def _publish(self, lock: Path) -> bool:
        with _alone(lock.parent):
            if not store.publish(lock, lambda file: file.write(_own().encode())):
                return False
            self._held[lock] = lock.stat().st_ino
        return True

    def close(self) -> None:
        """Unlock all; may be called twice."""
        self._stop.set()
        if self._beating is not None:
            self._beating.join()
            self._beating = None
        for lock, inode in self._held.items():
            with suppress(OSError):
                if lock.stat().st_ino == inode:
                    lock.unlink()
        self._held.clear()

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_S):
            for lock, inode in list(self._held.items()):
                try:
                    if lock.stat().st_ino == inode:
                        os.utime(lock)
                        continue
                except OSError as error:
                    log.debug("%s: no heartbeat: %s", lock, error)
                    continue
                log.warning("%s: another driver took this run over; both go on, and none loses a shard", lock)
                self._held.pop(lock, None)


def _take_over(lock: Path) -> bool:
    """Put a stale lock out of the way; False when it went by itself.

    Raises:
        RefusedError: it is not stale.
    """
    try:
        seen, text = lock.stat(), lock.read_text()
    except FileNotFoundError:
        return False
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
    with _alone(lock.parent):
        try:
            now = lock.stat()
        except FileNotFoundError:
            return False
        if (now.st_ino, now.st_mtime_ns) != (seen.st_ino, seen.st_mtime_ns):
            return False  # a third driver was faster, and this is its lock
        lock.unlink()
    log.warning("%s: the lock of driver %s was stale (%s) and is taken over", lock, who, how)
    return True


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


def _beats(lock: Path, seen: os.stat_result) -> bool:
    """Whether a lock's heartbeat changes while it is watched; one that goes away does not."""
    deadline = time.monotonic() + STALE_S
    while time.monotonic() < deadline:
        time.sleep(_WATCH_S)
        try:
            with lock.open("rb") as file:  # opened: network file systems ask the server then
                now = os.fstat(file.fileno())
        except FileNotFoundError:
            return False
        if (now.st_ino, now.st_mtime_ns) != (seen.st_ino, seen.st_mtime_ns):
            return True
    return False


def _own() -> str:
    """What a lock says of this process."""
    entry: dict[str, Any] = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "began": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M:%S} UTC",
        "kernel": _kernel(),
        "started_ticks": _started(os.getpid()),
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
