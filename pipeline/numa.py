"""A model's own copy in the memory of each NUMA node: what `cluster.numa=mirror` is made of.

All workers of a host map one file, whose pages lie where they were first read: on a machine of two sockets
half of the workers, or all but a few, read every weight through the link between them. Here the file is
copied once for each NUMA node, into memory of that node alone, and each worker maps its node's copy: the same
bytes, so the same scores.

A copy is a file of memory (memfd: tmpfs without a mount, a size limit or a name) that a thread bound to the
NUMA node (`set_mempolicy`) has written; where its pages came to lie is read back from
`/proc/self/numa_maps`. A `Keeper` holds the copies of a host and lends them through `/proc`: they are gone
with the last process that maps one, however it ended. What is left behind by a kill is a folder of links,
which the next one removes: whoever lives has a lock in its own.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import logging
import mmap
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import product
from pathlib import Path

from pipeline.errors import ClusterUnreachable
from pipeline.node_cache import Wanted, model_copy

_CALLS = {  # numbers of the system calls; C libraries have no functions for them
    "x86_64": {"set_mempolicy": 238, "get_mempolicy": 239},
    "aarch64": {"set_mempolicy": 237, "get_mempolicy": 236},
}
_MPOL_DEFAULT, _MPOL_BIND = 0, 2
_MASK_BITS = 1024  # the most NUMA nodes that kernels are built for
_CHUNK_BYTES = 64 << 20
_LEFT_OUT = 0.001  # of a copy's pages may lie elsewhere, such as those of a file's last huge page
_PAGES = re.compile(r"N(\d+)=(\d+)")
_PREFIX, _LOCK = "pagemill-numa-", ".lock"

log = logging.getLogger(__name__)
_lent: Path | None = None  # folder of the copies that this process is to use


class Keeper:
    """Holds copies of models in memory, for one host; an actor of Ray that takes no CPU."""

    def __init__(self) -> None:
        remove_left_behind()
        self._files: list[int] = []
        self._folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
        self._lock = os.open(self._folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def fetch(self, models: Sequence[str | Wanted], cache: str) -> None:
        """Have those models here that are to be fetched, which may take any time; as `copy`."""
        for model in models:
            if not isinstance(model, str):
                model_copy(model, Path(cache)).close()

    def copy(
        self,
        models: Sequence[str | Wanted],
        numa_nodes: Sequence[int],
        cache: str | None = None,
    ) -> dict[int, str]:
        """Copy each model, all parts of a split one, for each NUMA node.

        Args:
            models: files, or what is to be fetched into `cache`.

        Returns:
            a folder for each NUMA node, for `use`.

        Raises:
            ClusterUnreachable: memory cannot be bound here, or pages came to lie elsewhere.
            EngineError, ModelError: a file is no model, or cannot be fetched.
            OSError: a file cannot be read, or there is no memory for its copy.
        """
        import engine

        folders = {node: self._folder / str(node) for node in numa_nodes}
        for model in models:
            with ExitStack() as held:
                path = model
                if not isinstance(path, str):
                    path = str(held.enter_context(model_copy(path, Path(cache or "."))).path)
                parts = held.enter_context(engine.open(path)).paths
            for node, part in product(numa_nodes, parts):
                self._files.append(copy_to(part, node))
                link = _lent_path(folders[node], part)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(f"/proc/{os.getpid()}/fd/{self._files[-1]}")
        return {node: str(folder) for node, folder in folders.items()}

    def close(self) -> None:
        """Let the copies go: their memory is free when no worker maps them; may be called twice."""
        files, self._files = self._files, []
        for file in files:
            os.close(file)
        shutil.rmtree(self._folder, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def remove_left_behind() -> None:
    """Remove this user's folders of links whose keepers were killed.

    A folder counts as left behind when its lock can be taken, whatever became of the process's number; one
    without a lock is just being made, or not ours.
    """
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        try:
            if folder.is_symlink() or folder.stat().st_uid != os.geteuid():
                continue
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        else:
            log.info("%s: of a process that was killed, removed", folder)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(lock)


def use(folder: str | None) -> None:
    """From now on `own_copy` finds copies in that folder, one of `Keeper.copy`; None for none."""
    global _lent
    _lent = None if folder is None else Path(folder)


def own_copy(path: str) -> str:
    """Path of this process's copy of a model; the same path where there is none, or none any more."""
    if _lent is None:
        return path
    lent = _lent_path(_lent, path)
    if lent.exists():
        return str(lent)
    log.warning("%s: this NUMA node's copy is gone; the file itself is used", path)
    return path


def copy_to(path: str, node: int) -> int:
    """A copy of a file in the memory of a NUMA node; its descriptor.

    Raises:
        ClusterUnreachable, OSError: see `Keeper.copy`.
    """
    copy = os.memfd_create(f"pagemill-{Path(path).name}"[:200], os.MFD_CLOEXEC)
    try:
        with Path(path).open("rb") as source, bound_to(node):
            n_left = os.fstat(source.fileno()).st_size
            while n_left:
                n = os.sendfile(copy, source.fileno(), None, min(n_left, _CHUNK_BYTES))
                if not n:
                    raise OSError(f"{path} became shorter while it was copied")
                n_left -= n
        pages = pages_by_node(copy)
        elsewhere = sum(pages.values()) - pages.get(node, 0)
        if elsewhere > _LEFT_OUT * sum(pages.values()):
            raise ClusterUnreachable(
                f"cluster.numa=mirror: pages of the copy for NUMA node {node} lie on {pages} (node: pages)",
                "the memory policy of this machine's tmpfs overrides ours; use cluster.numa=distribute",
            )
    except BaseException:
        os.close(copy)
        raise
    return copy


@contextmanager
def bound_to(node: int) -> Iterator[None]:
    """This thread's new pages come from a NUMA node, and from no other one.

    Raises:
        ClusterUnreachable: the kernel does not let us.
    """
    before = _policy()
    _set_policy(_MPOL_BIND, _mask(node))
    try:
        yield
    finally:
        _set_policy(*before)


def pages_by_node(file: int) -> dict[int, int]:
    """How many pages of an open file lie on each NUMA node, all brought into a mapping of this process.

    Raises:
        OSError: the kernel does not say, for it knows no NUMA nodes.
    """
    import numpy as np

    n_bytes = os.fstat(file).st_size
    if not n_bytes:
        return {}
    with mmap.mmap(file, n_bytes, mmap.MAP_SHARED | mmap.MAP_POPULATE, mmap.PROT_READ) as mapping:
        view = np.frombuffer(mapping, np.uint8)
        begin = f"{view.ctypes.data:x} "
        del view  # or the mapping could not be closed
        for line in Path("/proc/self/numa_maps").read_text().splitlines():
            if line.startswith(begin):
                return {int(node): int(n) for node, n in _PAGES.findall(line)}
    raise OSError("/proc/self/numa_maps does not list a mapping of this process")


def _lent_path(folder: Path, path: str) -> Path:
    """Of a file's copy: parts of a split model keep their names and lie in one folder."""
    digest = hashlib.sha256(str(Path(path).parent).encode()).hexdigest()[:16]
    return folder / digest / Path(path).name


def _mask(*nodes: int) -> ctypes.Array[ctypes.c_ulong]:
    bits = 8 * ctypes.sizeof(ctypes.c_ulong)
    mask = (ctypes.c_ulong * (_MASK_BITS // bits))()
    for node in nodes:
        mask[node // bits] |= 1 << node % bits
    return mask


def _policy() -> tuple[int, ctypes.Array[ctypes.c_ulong]]:
    """The memory policy of this thread, so that it can be put back."""
    mode, mask = ctypes.c_int(), _mask()
    _call("get_mempolicy", ctypes.byref(mode), mask, ctypes.c_ulong(_MASK_BITS), None, ctypes.c_ulong(0))
    return mode.value, mask


def _set_policy(mode: int, mask: ctypes.Array[ctypes.c_ulong]) -> None:
    if mode == _MPOL_DEFAULT:
        _call("set_mempolicy", ctypes.c_int(mode), None, ctypes.c_ulong(0))
    else:
        _call("set_mempolicy", ctypes.c_int(mode), mask, ctypes.c_ulong(_MASK_BITS))


def _call(name: str, *arguments: object) -> None:
    numbers = _CALLS.get(platform.machine())
    if numbers is None:
        raise ClusterUnreachable(
            f"cluster.numa=mirror: {name} is not known on {platform.machine()}", "use cluster.numa=distribute"
        )
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(ctypes.c_long(numbers[name]), *arguments) != 0:
        raise ClusterUnreachable(
            f"cluster.numa=mirror: memory cannot be bound to a NUMA node here: {name}: "
            f"{os.strerror(ctypes.get_errno())}",
            "has the machine that node, and does the container allow the call? use cluster.numa=distribute",
        )
