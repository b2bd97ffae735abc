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
}


def process_memory(model_path: str | os.PathLike[str]) -> dict[str, int | str]:
    """Memory of the calling process, in bytes.

    Args:
        model_path: the file whose mappings are summed; matched by device and inode: any of its names will do.

    Returns:
        `host`, `pid`; `anonymous_bytes` of the whole process; and over all mappings of the file
        `mapped_bytes` (their length), `rss_bytes`, `pss_bytes`, `private_clean_bytes`, `private_dirty_bytes`,
        `shared_clean_bytes`, `shared_dirty_bytes`.

    Raises:
        FileNotFoundError: there is no such file.
    """
    status = Path(model_path).stat()
    wanted = (os.major(status.st_dev), os.minor(status.st_dev), status.st_ino)
    total = dict.fromkeys(("mapped_bytes", *_FIELDS.values()), 0)
    inside = False
    with Path("/proc/self/smaps").open() as lines:
        for line in lines:
            name, *values = line.split()
            if header := _HEADER.match(line):
                major, minor, inode = header.groups()
                inside = (int(major, 16), int(minor, 16), int(inode)) == wanted
            elif inside and name == "Size:":
                total["mapped_bytes"] += int(values[0]) * 1024
            elif inside and name in _FIELDS:
                total[_FIELDS[name]] += int(values[0]) * 1024
    return {"host": socket.gethostname(), "pid": os.getpid(), "anonymous_bytes": _anonymous_bytes(), **total}


def _anonymous_bytes() -> int:
    """Pages of this process that no file backs."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/smaps_rollup has no line 'Anonymous:'; Linux 4.14 or later is needed")
