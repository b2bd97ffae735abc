"""What a Ray actor's process holds: a worker in its place; and what is known of memory that ran out.

Ray imports this module before a worker's environment is set, so nothing here may import engine, Numba or
Arrow.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import numa
from pipeline.errors import PipelineError
from pipeline.executor import Host, Task, describe
from pipeline.node_cache import Copy, model_copy
from pipeline.runtime import setup_logging

if TYPE_CHECKING:
    from pipeline.placement import Place
    from pipeline.worker import ShardResult, WorkerSpec

VMSTAT = Path("/proc/vmstat")
log = logging.getLogger(__name__)


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
        self._held: Copy | None = None

    def ready(self, specs: Sequence[WorkerSpec]) -> dict[str, Any]:
        """See `Host.ready`; `oom_kills` are processes that this host ended for want of memory."""
        try:
            return {**super().ready(specs), "oom_kills": oom_kills()}
        finally:
            self._let_go()

    def run(self, task: Task) -> ShardResult:
        """See `Host.run`."""
        try:
            return super().run(task)
        finally:
            self._let_go()

    def fetch(self, specs: Sequence[WorkerSpec], is_turn: bool = False) -> None:
        """Bring the model of the first of these runs that can be had to this node, where it is not.

        It stays until the next call, in which the worker opens it. A worker that has another one open lets
        it go first: the cache may have room for one only.

        Args:
            is_turn: what a worker has open is done with; else it is kept, and nothing is fetched.

        Raises:
            ModelError, StoreError: what the first one raised when none can be had.
        """
        if self._worker is not None:
            is_open = self._spec is not None and self._spec.wanted == specs[0].wanted
            if is_open or not is_turn:
                return
            self._worker.close()
            self._spec = None
        first: Exception | None = None
        for spec in specs:
            if spec.wanted is None:
                return
            try:
                self._let_go()
                self._held = model_copy(spec.wanted, Path(spec.cache_dir))
                return
            except PipelineError as error:
                log.warning("a model is not fetched: %s", describe(error))
                first = first or error
        if first is not None:
            raise first

    def _let_go(self) -> None:
        held, self._held = self._held, None
        if held is not None:
            held.close()


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
