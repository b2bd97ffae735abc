"""What a Ray actor's process holds: a worker in its place; and what is known of memory that ran out.

Ray imports this module before a worker's environment is set, so nothing here may import engine, Numba or
Arrow.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import numa
from pipeline.executor import Host
from pipeline.runtime import setup_logging

if TYPE_CHECKING:
    from pipeline.placement import Place
    from pipeline.worker import WorkerSpec

VMSTAT = Path("/proc/vmstat")


class Hosted(Host):
    """What an actor holds. A probe makes the worker, so that its errors arrive as ordinary ones.

    The process is bound to its place's CPUs before anything imports Numba, which counts them.
    """

    def __init__(self, factory: str, place: Place) -> None:
        if place.cpus:
            os.sched_setaffinity(0, place.cpus)
        numa.use(place.mirror)
        setup_logging()
        super().__init__(factory)

    def ready(self, specs: Sequence[WorkerSpec]) -> dict[str, Any]:
        """See `Host.ready`; `oom_kills` are processes that this host ended for want of memory."""
        return {**super().ready(specs), "oom_kills": oom_kills()}


def oom_kills() -> int:
    """Processes that this host's kernel ended for want of memory since it started."""
    try:
        fields = dict(line.split() for line in VMSTAT.read_text().splitlines())
    except (OSError, ValueError):
        return 0
    return int(fields.get("oom_kill", 0))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Ray's memory monitor ended the worker."""
    return type(error).__name__ == "OutOfMemoryError" or "running low on memory" in str(error)
