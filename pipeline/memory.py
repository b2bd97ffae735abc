"""What one process really costs: its share of a mapped file, and the memory that is its own.

Every worker maps the whole model, so resident set sizes count the shared pages once per worker. The
proportional set size (PSS) divides each page by the number of processes that map it: summed over all mappers
it is the file's resident bytes. A process's own memory is `Anonymous` of `smaps_rollup`; `Private_Clean`
would not do, because with a single mapper the kernel counts the file's pages there.
"""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

_HEADER = re.compile(r"[0-9a-f]+-[0-9a-f]+ [rwxsp-]{4} [0-9a-f]+ ([0-9a-f]+):([0-9a-f]+) (\d+)")
_FIELDS = {
    "Pss:": "pss_bytes",
    "Rss:": "rss_bytes",
    "Private_Clean:": "private_clean_bytes",
    "Private_Dirty:": "private_dirty_bytes",
    "Shared_Clean:": "shared_clean_bytes",
    "Shared_Dirty:": "shared_dirty_bytes",
    "Locked:": "locked_bytes",
}


def process_memory(*model_paths: str | os.PathLike[str], pid: int | None = None) -> dict[str, int | str]:
    """Memory of the calling process, or of another one on this host, in bytes.

    Args:
        model_paths: the files whose mappings are summed, all parts of a split model; matched by device and
            inode: any of a file's names will do.
        pid: the other process, one of this user's.

    Returns:
        `host`, `pid`; `anonymous_bytes` of the whole process; and over all mappings of the files
        `mapped_bytes` (their length), `rss_bytes`, `pss_bytes`, `private_clean_bytes`, `private_dirty_bytes`,
        `shared_clean_bytes`, `shared_dirty_bytes`, `locked_bytes` (this process's share, like `pss_bytes`).

    Raises:
        FileNotFoundError: there is no such file, or no such process.
    """
    process = Path("/proc", "self" if pid is None else str(pid))
    wanted = {
        (os.major(status.st_dev), os.minor(status.st_dev), status.st_ino)
        for status in (Path(path).stat() for path in model_paths)
    }
    total = dict.fromkeys(("mapped_bytes", *_FIELDS.values()), 0)
    inside = False
    with (process / "smaps").open() as lines:
        for line in lines:
            if not line[0].isupper():  # a field's name; thousands of lines are skipped by one look
                header = _HEADER.match(line)
                major, minor, inode = header.groups() if header else ("0", "0", "0")
                inside = (int(major, 16), int(minor, 16), int(inode)) in wanted
            elif inside:
                name, *values = line.split()
                if name == "Size:":
                    total["mapped_bytes"] += int(values[0]) * 1024
                elif name in _FIELDS:
                    total[_FIELDS[name]] += int(values[0]) * 1024
    return {
        "host": socket.gethostname(),
        "pid": os.getpid() if pid is None else pid,
        "anonymous_bytes": _anonymous_bytes(process),
        **total,
    }


def _anonymous_bytes(process: Path) -> int:
    """Pages of a process that no file backs."""
    for line in (process / "smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/smaps_rollup has no line 'Anonymous:'; Linux 4.14 or later is needed")
