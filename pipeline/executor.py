"""What runs shards: the interface that a run knows, and the executor that is a for-loop.

The rules, whatever the executor. Shards of several runs share the workers: they stand in one queue, each with
the spec of its run, and no worker waits at a run's end. A worker has one model open and is handed shards of
that file while there are any. One call in flight per worker. An exception of ours sets its shard aside at
once and is never retried. A process that dies takes its shard back to the end of the file's shards; a shard
that ended `MAX_KILLS` processes is set aside. A shard that goes on from another one's state is handed out
when that one is done, before others; when that one is set aside, so is it. When nobody is left to work, the
rest of the shards is handed back, not waited for. Once a shard could not be stored, no other is handed out.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, cast

from pipeline import events
from pipeline.errors import IncompleteError, StorageFailure

if TYPE_CHECKING:
    from pipeline.shards import Shard
    from pipeline.worker import ShardResult, WorkerSpec

WORKER = "pipeline.worker:EvalWorker"
_NAMED_AT_MOST = 5
NOT_STORED = "not stored"
MAX_KILLS = 3  # processes that a shard may end before it is set aside

log = logging.getLogger(__name__)


class Worker(Protocol):
    """What runs shards; `EvalWorker` is the real one."""

    def ready(self) -> dict[str, Any]: ...
    def turn_to(self, spec: WorkerSpec) -> None: ...
    def run(self, shard: Shard) -> ShardResult: ...
    def memory(self) -> dict[str, Any]: ...
    def close(self) -> None: ...


@dataclass(frozen=True, eq=False, slots=True)
class Task:
    """A shard, all that a worker must be told of its run, and the file that it needs open."""

    spec: WorkerSpec
    shard: Shard
    file: str = ""


OnResult = Callable[[Task, "ShardResult"], bool | None]
"""Called after each task; True says that the tasks not yet handed out are not needed any more.

A StorageFailure that it raises sets the task aside; the others that are in work are still reported.
"""


@dataclass(frozen=True)
class ShardFailure:
    """A shard that was set aside.

    `kind` is "error" (an exception of ours), "killed" (it ended `attempts` processes), "not reached" (the
    shard that it goes on from was set aside), "not stored" (there was no room for it, or it could not be
    written for another reason) or "no worker" (nobody was left).
    """

    task: Task
    kind: str
    cause: str
    attempts: int

    @property
    def shard(self) -> Shard:
        """The task's."""
        return self.task.shard


class Executor(Protocol):
    """Starts workers, has them run shards, stops them."""

    n_workers: int

    def start(self, specs: Sequence[WorkerSpec]) -> list[dict[str, Any]]:
        """Start workers and wait until they can work; returns what each says of itself.

        On every host one worker warms up alone before the others start there.

        Args:
            specs: of runs to come, in their order; a worker begins with the first one that it can open.

        Raises:
            ClusterUnreachable: no worker could be started.
            Exception: what every worker raised while it got ready, of the first spec.
        """
        ...

    def run(self, tasks: Sequence[Task], on_result: OnResult) -> list[ShardFailure]:
        """Run tasks in any order, calling `on_result` here after each; returns those set aside, in order.

        Tasks that were in work when `on_result` returned True are finished and reported like the others.
        """
        ...

    def memory(self) -> list[dict[str, Any]]:
        """Memory of each worker that is alive, as `pipeline.memory` measures it."""
        ...

    def close(self) -> None:
        """Stop the workers; may be called twice, and after an interrupt."""
        ...


def publishing(on_result: OnResult) -> OnResult:
    """The same, called when the tables that a shard's worker sent are published.

    The function that it makes raises StorageFailure when one cannot be.
    """

    def take(task: Task, result: ShardResult) -> bool | None:
        for table in getattr(result, "unpublished", ()):
            table.commit()
        return on_result(task, result)

    return take


class Queue:
    """Tasks that are left, by file in the order given: each file's are handed out before the next one's.

    Tasks of one spec whose shards follow each other are handed out one after the other, as `done` is told.
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        self._files: dict[str, deque[Task]] = {}
        begins = {(id(task.spec), task.shard.first_window): task for task in tasks if task.shard.resumes}
        ends = ((task, begins.get((id(task.spec), task.shard.end))) for task in tasks if begins)
        self._next = {task: follower for task, follower in ends if follower is not None}
        waiting = set(self._next.values())
        for task in tasks:
            self._files.setdefault(task.file, deque())
            if task not in waiting:
                self.put(task)

    def __len__(self) -> int:
        """Tasks that can be handed out now."""
        return sum(map(len, self._files.values()))

    def done(self, task: Task) -> None:
        """The task that goes on from this one can be handed out: first, for a document takes its time."""
        follower = self._next.pop(task, None)
        if follower is not None:
            self._files[follower.file].appendleft(follower)

    def failed(self, task: Task) -> list[ShardFailure]:
        """Set aside the tasks that go on from this one, which was set aside."""
        failures = []
        cause = f"it goes on from shard {task.shard.first_window}, which was set aside"
        follower = self._next.pop(task, None)
        while follower is not None:
            failures.append(set_aside(follower, "not reached", cause, 0))
            follower = self._next.pop(follower, None)
        return failures

    def drop(self) -> None:
        """Forget all that was not handed out."""
        self._files.clear()
        self._next.clear()

    def put(self, task: Task) -> None:
        """Add a task behind the others of its file."""
        self._files.setdefault(task.file, deque()).append(task)

    def take(self, file: str | None = None) -> Task:
        """The next task of that file, of the first one that has any when it has none."""
        tasks = self._files.get(file) if file is not None else None
        return (tasks or next(tasks for tasks in self._files.values() if tasks)).popleft()

    def tasks(self) -> list[Task]:
        """What is left, in order; then what was not to be handed out yet."""
        return [*(task for tasks in self._files.values() for task in tasks), *self._next.values()]

    def specs(self) -> list[WorkerSpec]:
        """The first spec of each file that has tasks left."""
        return [tasks[0].spec for tasks in self._files.values() if tasks]


def make_worker(factory: str, spec: WorkerSpec) -> Worker:
    """Import and call a worker factory."""
    module, _, name = factory.partition(":")
    return cast(Worker, getattr(import_module(module), name)(spec))


class Host:
    """Holds one worker, made on first use, and turns it to whatever run the next shard belongs to."""

    def __init__(self, factory: str) -> None:
        self._factory = factory
        self._worker: Worker | None = None
        self._spec: WorkerSpec | None = None

    def ready(self, specs: Sequence[WorkerSpec]) -> dict[str, Any]:
        """Have a worker, for the first spec that can be opened; raises what the first one raised if none."""
        first: Exception | None = None
        for spec in specs:
            try:
                return self._turned_to(spec).ready() if self._worker is None else self._worker.ready()
            except Exception as error:
                log.warning("a worker cannot open its run: %s", describe(error))
                first = first or error
        raise first or ValueError("no spec to begin with")

    def run(self, task: Task) -> ShardResult:
        """Run a task's shard."""
        return self._turned_to(task.spec).run(task.shard)

    def memory(self) -> dict[str, Any]:
        """See `Executor.memory`; the worker has one."""
        if self._worker is None:
            raise RuntimeError("memory() before there is a worker")
        return self._worker.memory()

    def close(self) -> None:
        """Let the worker go, if there is one."""
        worker, self._worker, self._spec = self._worker, None, None
        if worker is not None:
            worker.close()

    def _turned_to(self, spec: WorkerSpec) -> Worker:
        if self._worker is None:
            self._worker = make_worker(self._factory, spec)
        elif self._spec != spec:
            self._spec = None  # should the turn fail, the next task turns again
            self._worker.turn_to(spec)
        self._spec = spec
        return self._worker


class InlineExecutor:
    """A for-loop in this process: for debuggers, tests, and machines where Ray does not run."""

    n_workers = 1

    def __init__(self, factory: str = WORKER) -> None:
        self._factory = factory
        self._host: Host | None = None

    def start(self, specs: Sequence[WorkerSpec]) -> list[dict[str, Any]]:
        host = Host(self._factory)
        info = host.ready(specs)
        events.worker_ready(info)
        self._host = host
        return [info]

    def run(self, tasks: Sequence[Task], on_result: OnResult) -> list[ShardFailure]:
        if self._host is None:
            raise RuntimeError("run() before start()")
        todo, failures = Queue(tasks), []
        rank = {task: i for i, task in enumerate(tasks)}
        on_result = publishing(on_result)
        with events.of_runs(tasks):
            while todo:
                task = todo.take()
                try:
                    result = self._host.run(task)
                except StorageFailure as error:
                    todo.drop()
                    failures.append(set_aside(task, NOT_STORED, describe(error), 1))
                except Exception as error:
                    failures += [set_aside(task, "error", describe(error), 1), *todo.failed(task)]
                else:
                    events.shard_done(task, result)
                    todo.done(task)
                    try:
                        is_enough = on_result(task, result)
                    except StorageFailure as error:
                        is_enough = True
                        failures.append(set_aside(task, NOT_STORED, describe(error), 1))
                    if is_enough:
                        todo.drop()
        return sorted(failures, key=lambda failure: rank[failure.task])

    def memory(self) -> list[dict[str, Any]]:
        return [] if self._host is None else [self._host.memory()]

    def close(self) -> None:
        host, self._host = self._host, None
        if host is not None:
            host.close()


def set_aside(task: Task, kind: str, cause: str, attempts: int) -> ShardFailure:
    """Record and report a shard that will not be finished."""
    events.shard_set_aside(task, kind, cause, attempts)
    return ShardFailure(task, kind, cause, attempts)


def shards_missing(
    what: str, names: Mapping[Shard, str], failures: Sequence[ShardFailure]
) -> IncompleteError:
    """The error of a run that lacks shards.

    Args:
        what: the beginning of its message.
        names: of the shards, for the message.
    """
    causes = {failure.shard: failure for failure in failures}
    for stopped in failures:
        if stopped.kind == NOT_STORED:
            return StorageFailure(
                f"{what}, because results cannot be written any more: {stopped.cause}",
                "finished shards are kept: make room or repair the disk, and run the same command again",
            )
    told = []
    for shard, name in list(names.items())[:_NAMED_AT_MOST]:
        failure = causes.get(shard)
        why = "was not finished"
        if failure is not None:
            why = f"{failure.cause} ({failure.kind}, attempts: {failure.attempts})"
        told.append(f"{name}: {why}")
    if len(names) > _NAMED_AT_MOST:
        told.append(f"and {len(names) - _NAMED_AT_MOST} more")
    return IncompleteError(
        f"{what}: {'; '.join(told)}",
        "finished shards are kept: remove the cause and run the same command again",
    )


def describe(error: BaseException) -> str:
    """Type and message on one line, at most a few hundred characters: Ray's fill a page."""
    log.debug("%s", type(error).__name__, exc_info=error)
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:500]}"
