"""Room among fetched files: what was used longest ago goes, when `paths.cache_limit` or the disk wants it.

Nothing goes that is being fetched, that a process holds (pipeline/node_cache.py: both have its lock), or that
a process of this user has mapped, whether it holds it or not. What is still to come of a file that is being
fetched counts as if it were there.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import shutil
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pipeline import fetch
from pipeline.errors import StoreError

_MAPPING = re.compile(r"\S+ \S+ \S+ \S+ (\d+) +(/.*)")
log = logging.getLogger(__name__)


@dataclass
class Home:
    """A folder of fetched files: bytes, those to come of a file that is being fetched too."""

    path: Path
    n_bytes: int
    used_at: float

    @property
    def files(self) -> list[Path]:
        return [file for file in self.path.iterdir() if file.name != ".lock"]


def make_room(name: str, need: int, own: Path, limit_bytes: int | None) -> None:
    """Evict what was used longest ago until `need` more bytes fit, on the disk as well.

    Args:
        name: of what they are, for messages.
        own: the folder that they go to, beside all others; nothing in it is evicted.
        limit_bytes: that all may take; None evicts nothing.

    Raises:
        StoreError: they do not.
    """
    host, downloads = socket.gethostname(), own.parent
    homes = sorted(_homes(downloads), key=lambda home: home.used_at)
    free = shutil.disk_usage(downloads).free
    mine = sum(file.stat().st_size for file in own.iterdir() if _counts(file.name))
    if limit_bytes is not None and mine + need > limit_bytes:
        raise StoreError(
            f"{name}: {mine + need:,} bytes, and paths.cache_limit on {host} is {limit_bytes:,}",
            "a larger paths.cache_limit, or none",
        )
    used = mine + sum(home.n_bytes for home in homes if home.path != own)
    mapped: set[tuple[str, str]] | None = None
    for home in homes if limit_bytes is not None else []:
        if used + need <= (limit_bytes or 0) and need <= free:
            break
        if home.path == own:
            continue
        mapped = _mapped() if mapped is None else mapped
        freed = evict(home, mapped)
        if freed:
            log.info("%s on %s: evicted, %s MB", home.path, host, f"{freed / 1e6:,.0f}")
            used, free = used - home.n_bytes, shutil.disk_usage(downloads).free
    if limit_bytes is not None and used + need > limit_bytes:
        raise StoreError(
            f"{name}: {need:,} bytes to fetch, and {downloads} on {host} holds {used:,} that are in "
            f"use; paths.cache_limit is {limit_bytes:,} bytes",
            "a larger paths.cache_limit, or none",
        )
    if need > free:
        raise StoreError(
            f"{name}: {need:,} bytes to fetch, and the disk of {downloads} on {host} has {free:,} left",
            "make room, choose another paths.cache, or set paths.cache_limit to have old files evicted",
        )


def _homes(downloads: Path) -> Iterator[Home]:
    """What is in the cache."""
    for entry in os.scandir(downloads):
        if not entry.is_dir(follow_symlinks=False):
            continue
        home = Home(Path(entry.path), 0, entry.stat().st_mtime)
        for file in os.scandir(entry.path):
            try:
                status = file.stat(follow_symlinks=False)
            except FileNotFoundError:  # just evicted, or got its name
                continue
            if file.name == ".lock":
                home.used_at = status.st_mtime
            if not _counts(file.name):
                continue
            to_come = 0
            if file.name.startswith(".") and file.name.endswith(".part"):
                to_come = fetch.promised(Path(entry.path, file.name[1:].removesuffix(".part")))
            home.n_bytes += max(status.st_size, to_come)
        if home.n_bytes:
            yield home


def _counts(name: str) -> bool:
    """Whether a file is what was fetched, or a part of it."""
    return not name.startswith(".") or name.endswith(".part")


def evict(home: Home, mapped: set[tuple[str, str]]) -> int:
    """Remove a home's files unless they are in use; bytes that were removed."""
    lock = os.open(home.path / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return 0
        files = home.files
        found = {file: file.stat(follow_symlinks=False) for file in files}
        folder = str(home.path.resolve())
        if any({(file.name, folder), (file.name, str(s.st_ino))} & mapped for file, s in found.items()):
            return 0
        remove(files)
        return sum(status.st_size for status in found.values())
    finally:
        os.close(lock)


def _mapped() -> set[tuple[str, str]]:
    """Of every file that a process has mapped, as far as this user may know: its name with its folder, and
    its name with its inode.

    Devices are not compared: on layered file systems the kernel prints others than `stat` says. There inodes
    differ too, and in another container folders do.
    """
    mapped: set[tuple[str, str]] = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):  # another user's, or gone
            for line in maps.read_text(errors="surrogateescape").splitlines():
                found = _MAPPING.match(line)
                if found:
                    folder, _, name = found[2].rpartition("/")
                    mapped |= {(name, folder), (name.removesuffix(" (deleted)"), found[1])}
    return mapped


def remove(files: Sequence[Path]) -> None:
    """Remove files, those of them that are there."""
    for file in files:
        file.unlink(missing_ok=True)


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """One process at a time; the lock goes with the process."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
