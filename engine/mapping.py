"""How a model file's bytes come into memory: five ways, the same bytes and the same scores.

    mmap      mapped; a page is read when it is first touched
    populate  mapped; every page is read and entered into the page table by `open`
    mlock     mapped; pages are read by `open`, and stay in memory
    copy      read into memory of this process by `open`
    prefetch  mapped; a thread asks the kernel to read all of it

Mapped pages are the page cache's: once for all processes of a machine, and (but for `mlock`) given back when
memory is short. A copy is one more for each process. If a mapped file's disk fails, its readers die of SIGBUS
on first touch; `populate`, `mlock` and `copy` raise OSError while opening, and a copy needs the disk no more.

Tried and left out, Linux 6.18: MAP_POPULATE reads as fast as MADV_POPULATE_READ but before the header is
checked, and keeps I/O errors to itself. One MADV_WILLNEED over a whole file reads its first read-ahead
window only (mm/readahead.c, force_page_cache_ra), so `prefetch` asks window by window.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import resource
import stat
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from engine.errors import CapacityError, GGUFFormatError

LOAD_MODES = ("mmap", "populate", "mlock", "copy", "prefetch")

COPY_BYTES = 1 << 20  # of one read; longer ones overlap less with the kernel's read-ahead
MADV_POPULATE_READ = 22  # Linux 5.14; the mmap module has no name for it
READ_AHEAD_BYTES = 256 << 10  # where the device does not tell: what disks take in one request at least
_BDI = Path("/sys/class/bdi")  # of each device, and of each network mount


class Region:
    """A file's bytes in memory, read-only.

    Attributes:
        map: the mapping of the file, or the memory that holds its copy.
        whole: (n_bytes,) uint8, a read-only view on `map`.
    """

    def __init__(self, path: str, *, copy: bool = False) -> None:
        """Maps or copies the whole of `path`.

        Raises:
            GGUFFormatError: not a regular file, empty, or cut short while it was copied.
            OSError: it cannot be opened or read.
        """
        self.path = path
        self.map = _copied(path) if copy else _mapped(path)
        self.whole: NDArray[np.uint8] = np.frombuffer(memoryview(self.map).toreadonly(), np.uint8)

    def populate(self) -> None:
        """Reads every page and enters it into the page table.

        Raises:
            OSError: a page cannot be read.
        """
        try:
            self.map.madvise(MADV_POPULATE_READ)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise OSError(error.errno, error.strerror, self.path) from None
            self.whole[:: mmap.PAGESIZE].max()  # an older kernel: touch each page

    def release(self, first: int, n_bytes: int) -> None:
        """Gives the whole pages among some bytes of a mapped file back; never to be called on a copy."""
        begin = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (first + n_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if begin < end:
            self.map.madvise(mmap.MADV_DONTNEED, begin, end - begin)

    def lock(self) -> None:
        """Reads every page and keeps it in memory until the region is closed.

        Raises:
            OSError: the kernel refuses.
        """
        _call("mlock", self.path, self.whole.ctypes.data, self.whole.size)

    def resident_bytes(self) -> int:
        """Bytes in memory, in whole pages (mincore).

        The kernel calls every page of a mapped file resident for a process that neither owns the file nor may
        write it.
        """
        pages = np.empty(-(-self.whole.size // mmap.PAGESIZE), np.uint8)
        _call("mincore", self.path, self.whole.ctypes.data, self.whole.size, pages.ctypes.data)
        return int(np.count_nonzero(pages & 1)) * mmap.PAGESIZE

    def close(self) -> None:
        """Gives the memory back; views still in use keep it until they are gone, and stay valid."""
        self.whole = np.empty(0, np.uint8)
        with contextlib.suppress(BufferError):  # a view is in use somewhere
            self.map.close()


class Prefetch:
    """A thread that asks the kernel to read files, front to back; advice, so that nothing can fail.

    A request may wait for the device's queue, hence the thread. Ends when all is asked for, or by `stop`.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = tuple(paths)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Asks for no more, and waits for the request that is under way."""
        self._stopped.set()
        self._thread.join()

    def wait(self) -> None:
        """Waits until all is asked for."""
        self._thread.join()

    def _run(self) -> None:
        for path in self._paths:
            with contextlib.suppress(OSError), Path(path).open("rb") as file:
                status = os.fstat(file.fileno())
                step = read_ahead_bytes(status.st_dev)
                for at in range(0, status.st_size, step):
                    if self._stopped.is_set():
                        return
                    os.posix_fadvise(file.fileno(), at, step, os.POSIX_FADV_WILLNEED)


def bring_in(regions: Sequence[Region], load: str) -> Prefetch | None:
    """Does for mapped files what `load` promises; `mmap` and `copy` ask for nothing more.

    Raises:
        CapacityError: more is to be locked than the process may lock.
        OSError: a page cannot be read.
    """
    if load == "prefetch":
        return Prefetch([region.path for region in regions])
    for region in regions:
        if load == "populate":
            region.populate()
        elif load == "mlock":
            try:
                region.lock()
            except OSError as error:
                raise _not_locked(regions, error) from error
    return None


def read_ahead_bytes(device: int) -> int:
    """How much the kernel reads ahead at once on a device (`st_dev`); more is not read in one request."""
    try:
        told = int((_BDI / f"{os.major(device)}:{os.minor(device)}" / "read_ahead_kb").read_text())
    except (OSError, ValueError):  # a partition, or a file system that hides its device
        return READ_AHEAD_BYTES
    return max(READ_AHEAD_BYTES, told << 10)


def _mapped(path: str) -> mmap.mmap:
    """The whole file, shared and read-only."""
    with _regular(path) as file:
        return mmap.mmap(file.fileno(), 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)


def _copied(path: str) -> mmap.mmap:
    """The whole file in memory of this process, which is made read-only afterwards. Costs the file's size."""
    with _regular(path) as file:
        n_bytes = os.fstat(file.fileno()).st_size
        private = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        try:
            with contextlib.suppress(
                OSError
            ):  # a kernel without huge pages; they halve the time of a warm copy
                private.madvise(mmap.MADV_HUGEPAGE)
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
            with memoryview(private) as view:
                read_into(file, view, path)
            address = np.frombuffer(private, np.uint8).ctypes.data
            _call("mprotect", path, address, n_bytes, mmap.PROT_READ)
        except BaseException:
            private.close()
            raise
        return private


def read_into(file: BinaryIO, view: memoryview, path: str) -> None:
    """Fills `view` from the file, `COPY_BYTES` at a time.

    Raises:
        GGUFFormatError: the file ends before.
    """
    at = 0
    while at < len(view):
        with view[at : at + COPY_BYTES] as piece:
            n_read = file.readinto(piece)  # type: ignore[attr-defined]
        if not n_read:
            raise GGUFFormatError(
                f"{path}: ended at byte {at:,} while it was read, expected {len(view):,}; "
                "replace models by renaming"
            )
        at += n_read


def _regular(path: str) -> BinaryIO:
    """The file, opened; refused if it is none, or empty."""
    mode = Path(path).stat().st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "is a directory; name the .gguf file in it", path)
    if not stat.S_ISREG(mode):  # opening a pipe would block
        raise GGUFFormatError(f"{path}: not a regular file, which a mapping needs; copy it to one")
    file = Path(path).open("rb", buffering=0)
    if os.fstat(file.fileno()).st_size == 0:
        file.close()
        raise GGUFFormatError(f"{path}: the file is empty; is the download complete?")
    return file


def _not_locked(regions: Sequence[Region], error: OSError) -> CapacityError:
    """What to say when `mlock` fails."""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    told = "unlimited" if limit == resource.RLIM_INFINITY else f"{limit:,} bytes"
    n_bytes = sum(region.whole.size for region in regions)
    return CapacityError(
        f"{regions[0].path}: {n_bytes:,} bytes cannot be locked ({error.strerror}); the process may lock "
        f"{told}: raise the limit by `ulimit -l unlimited`, systemd's LimitMEMLOCK=infinity or a container's "
        "`--ulimit memlock=-1`, or load by `populate`"
    )


def _call(name: str, path: str, address: int, n_bytes: int, *more: int) -> None:
    """A function of libc over a range of memory."""
    function = getattr(ctypes.CDLL(None, use_errno=True), name)
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_void_p] * len(more))
    if function(address, n_bytes, *more):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), path)
