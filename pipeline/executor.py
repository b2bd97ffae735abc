"""What runs shards: the interface that a run knows, and the executor that is a for-loop.

The rules of a run, whatever the executor. One call in flight per worker. An exception of ours sets its shard
aside at once and is never retried. A process that dies takes its shard back to the queue's end; a shard that
ended `MAX_KILLS` processes is set aside. When nobody is left to work, the rest of the shards is handed back,
not waited for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    from pipeline.shards import Shard
    from pipeline.worker import ShardResult, WorkerSpec

WORKER = "pipeline.worker:EvalWorker"
MAX_KILLS = 3  # processes that a shard may end before it is set aside

log = logging.getLogger(__name__)

OnResult = Callable[["ShardResult"], None]


class Worker(Protocol):
    """What runs shards; `EvalWorker` is the real one."""

    def ready(self) -> dict[str, Any]: ...
    def run(self, shard: Shard) -> ShardResult: ...
    def memory(self) -> dict[str, Any]: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class ShardFailure:
    """A shard that was set aside.

    `kind` is "error" (an exception of ours), "killed" (it ended `attempts` processes) or "no worker" (nobody
    was left).
    """

    shard: Shard
    kind: str
    cause: str
    attempts: int


class Executor(Protocol):
    """Starts workers, has them run shards, stops them."""

    n_workers: int

    def start(self, spec: WorkerSpec) -> list[dict[str, Any]]:
        """Start workers and wait until they can work; returns what each says of itself.

        On every host one worker warms up alone before the others start there.

        Raises:
            ClusterUnreachable: no worker could be started.
            Exception: what every worker raised while it got ready.
        """
        ...

    def run(self, shards: Sequence[Shard], on_result: OnResult) -> list[ShardFailure]:
        """Run shards in any order, calling `on_result` here after each; returns those set aside, in order."""
        ...

    def memory(self) -> list[dict[str, Any]]:
        """Memory of each worker that is alive, as `pipeline.memory` measures it."""
        ...

    def close(self) -> None:
        """Stop the workers; may be called twice, and after an interrupt."""
        ...


def make_worker(factory: str, spec: WorkerSpec) -> Worker:
    """Import and call a worker factory."""
    module, _, name = factory.partition(":")
    return cast(Worker, getattr(import_module(module), name)(spec))


class InlineExecutor:
    """A for-loop in this process: for debuggers, tests, and machines where Ray does not run."""

    n_workers = 1

    def __init__(self, factory: str = WORKER) -> None:
        self._factory = factory
        self._worker: Worker | None = None

    def start(self, spec: WorkerSpec) -> list[dict[str, Any]]:
        self._worker = make_worker(self._factory, spec)
        return [self._worker.ready()]

    def run(self, shards: Sequence[Shard], on_result: OnResult) -> list[ShardFailure]:
        if self._worker is None:
            raise RuntimeError("run() before start()")
        failures = []
        for shard in shards:
            try:
                result = self._worker.run(shard)
            except Exception as error:
                failures.append(set_aside(shard, "error", describe(error), 1))
            else:
                on_result(result)
        return failures

    def memory(self) -> list[dict[str, Any]]:
        return [] if self._worker is None else [self._worker.memory()]

    def close(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.close()


def set_aside(shard: Shard, kind: str, cause: str, attempts: int) -> ShardFailure:
    """Record and report a shard that will not be finished."""
    log.error("shard %d is set aside (%s): %s", shard.first_window, kind, cause)
    return ShardFailure(shard, kind, cause, attempts)


def describe(error: BaseException) -> str:
    """Type and message on one line, at most a few hundred characters: Ray's fill a page."""
    log.debug("%s", type(error).__name__, exc_info=error)
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:500]}"
