"""Shards over Ray actors that may die: one loop on `ray.wait`, and one worker in each actor.

Three lessons of Ray 2.60 made it. A dying actor is first seen as "unavailable", so an error of that family
says only that the call was lost: the actor is sent a probe, which alone Ray may repeat through restarts, and
gets work again when the probe answers; calls to an actor that is restarting fail at once and would use up a
shard's attempts. Work itself is never repeated by Ray (`max_task_retries=0`): the driver counts. An actor
that Ray gave up is replaced, as often as shards can end processes, but a place where actors never become
ready is given up.

`ray` is handed in, connected, by `pipeline.cluster`.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.errors import ClusterUnreachable
from pipeline.executor import MAX_KILLS, Host, OnResult, Queue, ShardFailure, Task, describe, set_aside
from pipeline.runtime import setup_logging

if TYPE_CHECKING:
    from pipeline.worker import WorkerSpec

MAX_RESTARTS = 3  # of one actor, by Ray
MAX_BARREN = 2  # actors in a row, each restarted that often, that never became ready: their place is given up
START_TIMEOUT_S = 900.0  # for the first worker; a first compilation takes minutes on a slow machine
START_GRACE_S = 60.0  # for the others after it; later ones join the run when they are ready
MEMORY_TIMEOUT_S = 30.0

log = logging.getLogger(__name__)


def spread(capacity: Mapping[str, int], wanted: int | None) -> list[str]:
    """Node of each worker: round after round over the nodes that have room, at most `wanted` in all.

    Args:
        capacity: workers that fit on each node.
    """
    rounds = range(max(capacity.values(), default=0))
    places = [node for turn in rounds for node in capacity if capacity[node] > turn]
    return places if wanted is None else places[:wanted]


class Hosted(Host):
    """What an actor holds. A probe makes the worker, so that its errors arrive as ordinary ones."""

    def __init__(self, factory: str) -> None:
        setup_logging()
        super().__init__(factory)


@dataclass(eq=False)
class Actor:
    """An actor in its place: `barren` ones before it never became ready; `info` is what it said of itself.

    `file` is the one that its last shard had open.
    """

    node: str
    handle: Any
    barren: int
    is_ready: bool = False
    info: dict[str, Any] | None = None
    file: str | None = None


@dataclass(frozen=True)
class Ended:
    """A task's call that ended: its result, or why there is none."""

    task: Task
    result: Any = None
    error: BaseException | None = None
    is_ours: bool = False


class Pool:
    """Actors on the nodes of a connected Ray.

    Args:
        ray: the module, connected.
        specs: see `pipeline.executor.Executor.start`.
        threads: CPUs of one worker.
        environment: variables that each worker's process is started with, None where they are inherited.
    """

    def __init__(
        self,
        ray: Any,
        factory: str,
        specs: Sequence[WorkerSpec],
        threads: int,
        environment: dict[str, str] | None,
    ) -> None:
        self._ray, self._factory = ray, factory
        self._specs = list(specs)  # what a worker that gets ready may open, the first that it can
        self._options: dict[str, Any] = {
            "num_cpus": threads,
            "max_restarts": MAX_RESTARTS,
            "max_task_retries": 0,
            "max_concurrency": 1,
        }
        if environment is not None:
            self._options["runtime_env"] = {"env_vars": environment}
        self._actors: list[Actor] = []
        self._calls: dict[Any, tuple[Actor, Task | None]] = {}  # in flight; no task marks a probe
        self._later: Counter[str] = Counter()  # workers of a node that wait for its first one's warm-up
        self._last_loss: BaseException | None = None

    def start(self, places: Sequence[str]) -> list[dict[str, Any]]:
        """Start an actor for each place (a node's id), on each node one before the others.

        Returns:
            What the workers that are ready say of themselves.

        Raises:
            ClusterUnreachable: none could be started in time.
            Exception: what the last of the workers raised, when none could open any spec.
        """
        self._later = Counter(places)
        self._later.subtract(self._later.keys())
        for node in dict.fromkeys(places):
            self._launch(node)
        self._await_workers()
        infos = [actor.info for actor in self._actors if actor.info is not None]
        if not infos:
            self._refuse()
        return infos

    def run(self, tasks: Sequence[Task], on_result: OnResult) -> list[ShardFailure]:
        """See `pipeline.executor.Executor.run`."""
        todo, kills, failures = Queue(tasks), Counter[Task](), []
        rank = {task: i for i, task in enumerate(tasks)}
        working = time.monotonic()
        self._hand_out(todo)
        while todo or self._n_running():
            if self._n_running():
                working = time.monotonic()
            if not self._calls or time.monotonic() - working > START_TIMEOUT_S:
                break
            results = []
            for ended in self._finished(timeout_s=1.0):
                task, error = ended.task, ended.error
                if error is None:
                    results.append(ended)
                    todo.done(task)
                elif ended.is_ours:
                    failures.append(set_aside(task, "error", describe(error), kills[task] + 1))
                    failures += todo.failed(task)
                else:
                    kills[task] += 1
                    if kills[task] >= MAX_KILLS:
                        cause = f"its worker's process ended, {kills[task]} times ({type(error).__name__})"
                        failures.append(set_aside(task, "killed", cause, kills[task]))
                        failures += todo.failed(task)
                    else:
                        log.warning(
                            "shard %d lost its worker, attempt %d", task.shard.first_window, kills[task]
                        )
                        todo.put(task)
            self._hand_out(todo)  # first: what the caller does with results is no worker's time
            for ended in results:
                on_result(ended.task, ended.result)
        loss = "no worker is ready" if self._last_loss is None else describe(self._last_loss)
        failures += [set_aside(task, "no worker", loss, kills[task]) for task in todo.tasks()]
        return sorted(failures, key=lambda failure: rank[failure.task])

    def memory(self) -> list[dict[str, Any]]:
        """See `pipeline.executor.Executor.memory`; waits for workers that are just being replaced."""
        deadline = time.monotonic() + MEMORY_TIMEOUT_S
        while self._calls and time.monotonic() < deadline:
            list(self._finished(timeout_s=1.0))
        refs = [actor.handle.memory.remote() for actor in self._actors if actor.is_ready]
        measured = []
        for ref in self._ray.wait(refs, num_returns=len(refs), timeout=MEMORY_TIMEOUT_S)[0] if refs else []:
            try:
                measured.append(self._ray.get(ref))
            except self._ray.exceptions.RayError as error:
                log.warning("a worker's memory is not known: %s", describe(error))
        return measured

    def kill(self) -> None:
        """End all actors."""
        for actor in self._actors:
            self._ray.kill(actor.handle, no_restart=True)
        self._actors, self._calls = [], {}

    def _n_running(self) -> int:
        return sum(task is not None for _, task in self._calls.values())

    def _hand_out(self, todo: Queue) -> None:
        """A task for every actor that is ready and has none, of the file that it has open if possible."""
        busy = {id(actor) for actor, _ in self._calls.values()}
        for actor in self._actors:
            if todo and actor.is_ready and id(actor) not in busy:
                task = todo.take(actor.file)
                actor.file = task.file
                self._calls[actor.handle.run.remote(task)] = (actor, task)
        self._specs = todo.specs() or self._specs

    def _launch(self, node: str, barren: int = 0) -> None:
        """Start an actor on a node and probe it."""
        strategy = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node, soft=False)
        hosted = self._ray.remote(Hosted).options(scheduling_strategy=strategy, **self._options)
        actor = Actor(node, hosted.remote(self._factory), barren)
        self._actors.append(actor)
        self._probe(actor)

    def _probe(self, actor: Actor) -> None:
        actor.is_ready, actor.file = False, None
        self._calls[actor.handle.ready.options(max_task_retries=-1).remote(self._specs)] = (actor, None)

    def _await_workers(self) -> None:
        """Wait for all workers, but not for ever for the last of them."""
        started = told = time.monotonic()
        first: float | None = None
        while self._calls:
            list(self._finished(timeout_s=1.0))
            now, n_ready = time.monotonic(), sum(actor.is_ready for actor in self._actors)
            if n_ready and first is None:
                first = now
            if first is not None and now - first > START_GRACE_S:
                log.warning(
                    "%d workers are ready; the others join when the cluster has room for them", n_ready
                )
                return
            if first is None and now - started > START_TIMEOUT_S:
                return
            if now - told > START_GRACE_S / 2:
                told = now
                log.info("waiting for workers: %d are ready after %.0f s", n_ready, now - started)

    def _refuse(self) -> None:
        """Raise why there is no worker."""
        if self._last_loss is None:
            raise ClusterUnreachable(
                f"no worker was ready after {START_TIMEOUT_S:.0f} s",
                "are the cluster's CPUs all taken? see `ray status`",
            )
        if isinstance(self._last_loss, self._ray.exceptions.RayError):
            raise ClusterUnreachable(
                f"no worker could be started: {describe(self._last_loss)}",
                "its process died while it opened the model; is there enough memory?",
            )
        raise self._last_loss

    def _finished(self, timeout_s: float) -> Iterator[Ended]:
        """Wait until a call ends; see to the actors of all that ended, and hand on those that were work."""
        errors = self._ray.exceptions
        ended, rest = self._ray.wait(list(self._calls), num_returns=1, timeout=timeout_s)
        if ended and rest:
            ended += self._ray.wait(rest, num_returns=len(rest), timeout=0)[0]
        for ref in ended:
            actor, task = self._calls.pop(ref)
            result, error, is_ours = None, None, False
            try:
                result = self._ray.get(ref)
            except errors.RayTaskError as raised:
                error, is_ours = raised.cause or raised, True
            except errors.RayError as raised:
                error = raised
            if error is not None and not is_ours:
                self._lost(actor, error)
            elif task is None and error is None:
                self._welcome(actor, result)
            elif task is None and error is not None:  # it can open no spec: another process could not either
                self._drop(actor, error)
                self._later.pop(actor.node, None)
            if task is not None:
                yield Ended(task, result, error, is_ours)

    def _welcome(self, actor: Actor, info: Any) -> None:
        """A probe answered: the actor may work, and the rest of its node may start."""
        actor.is_ready, actor.barren, actor.info = True, 0, info
        for _ in range(self._later.pop(actor.node, 0)):
            self._launch(actor.node)

    def _lost(self, actor: Actor, error: BaseException) -> None:
        """A call was lost: probe an actor that Ray restarts, replace one that it gave up."""
        errors = self._ray.exceptions
        if not isinstance(error, (errors.ActorDiedError, errors.ActorUnschedulableError)):
            self._probe(actor)
            return
        barren = 0 if actor.is_ready else actor.barren + 1
        self._drop(actor, error)
        if barren >= MAX_BARREN:
            self._later.pop(actor.node, None)
            log.warning("no worker starts on node %s any more: %s", actor.node[:8], describe(error))
            return
        alive = [node["NodeID"] for node in self._ray.nodes() if node["Alive"]]
        load = Counter(other.node for other in self._actors)
        if alive:
            self._launch(
                actor.node if actor.node in alive else min(alive, key=lambda node: load[node]), barren
            )

    def _drop(self, actor: Actor, error: BaseException) -> None:
        self._actors.remove(actor)
        self._ray.kill(actor.handle, no_restart=True)
        self._last_loss = error
