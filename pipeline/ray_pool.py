"""Shards over Ray actors that may die: one loop on `ray.wait`, and one worker in each actor.

Lessons of Ray 2.60 made it. A dying actor is first seen as "unavailable", so an error of that family says
only that the call was lost: the actor is sent a probe, which alone Ray may repeat through restarts, and gets
work again when the probe answers; calls to an actor that is restarting fail at once and would use up a
shard's attempts. Work itself is never repeated by Ray (`max_task_retries=0`): `pipeline.attempts` counts.

A model by URL is brought to a node in a call of its own, before the one that opens it: however long that
takes, nobody hangs and no start has failed.

Every few seconds the pool compares itself with the cluster: places without an actor get one, on nodes that
joined as well, on each node one before the others; actors of nodes that are gone are lost, whatever Ray still
promises of them; a place where actors never become ready is given up. When the head is gone, a driver has a
minute before Ray ends its process without a word (`gcs_rpc_server_reconnect_timeout_s`), and any call that
needs the head hangs until then: it is asked first, by a connection, and the run ended in good time.

`ray` is handed in, connected, by `pipeline.cluster`.
"""

from __future__ import annotations

import logging
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipeline import events
from pipeline.attempts import Attempt, Attempts
from pipeline.errors import ClusterUnreachable, IncompleteError
from pipeline.executor import OnResult, ShardFailure, Task, describe
from pipeline.hosted import Hosted, is_out_of_memory
from pipeline.ray_actor import Actor, Ended, LetGo

if TYPE_CHECKING:
    from pipeline.placement import Place
    from pipeline.worker import WorkerSpec

MAX_RESTARTS = 3  # of one actor, by Ray
MAX_BARREN = 2  # actors in a row, each restarted that often, that never became ready: their place is given up
START_TIMEOUT_S = 900.0  # for the first worker that fetches nothing; a first compilation takes minutes
START_GRACE_S = 60.0  # for the others after it; later ones join the run when they are ready
NOBODY_TIMEOUT_S = 120.0  # without any node that could take a worker
LOOK_S = 2.0  # between two looks at the cluster
HEAD_TIMEOUT_S = 15.0  # without an answer of the head; see above, and closing takes up to 25 s then
MEMORY_TIMEOUT_S = 30.0
REPLACED_TIMEOUT_S = 5.0  # for workers that are just being replaced when memory is measured
WORKER_BACK, NODE_LOST = "worker_back", "node_lost"

log = logging.getLogger(__name__)

PlacesFor = Callable[[Sequence[Mapping[str, Any]]], Sequence["Place"]]
"""Where workers are to be, given the entries of `ray.nodes()` that are alive; must not wait for anything."""


class Pool:
    """Actors on the nodes of a connected Ray.

    Args:
        ray: the module, connected.
        specs: see `pipeline.executor.Executor.start`.
        threads: CPUs of one worker.
        environment: variables that each worker's process is started with, None where they are inherited.
        places_for: asked every few seconds.
    """

    def __init__(
        self,
        ray: Any,
        factory: str,
        specs: Sequence[WorkerSpec],
        threads: int,
        environment: dict[str, str] | None,
        places_for: PlacesFor,
    ) -> None:
        self._ray, self._factory, self._places_for = ray, factory, places_for
        self._specs = list(specs)  # what a worker that gets ready may open, the first that it can
        self._options: dict[str, Any] = {"num_cpus": threads, "max_concurrency": 1}
        self._options |= {"max_restarts": MAX_RESTARTS, "max_task_retries": 0}
        if environment is not None:
            self._options["runtime_env"] = {"env_vars": environment}
        self._actors: dict[Actor, None] = {}
        self._idle: dict[Actor, None] = {}
        self._calls: dict[Any, Actor] = {}  # in flight
        self._ended: deque[Ended] = deque()  # by us: the worker hung, or its node is gone
        self._warm: set[str] = set()  # nodes where a worker has been ready, so that the others may start
        self._closed: set[str] = set()  # nodes where no spec can be opened
        self._barren, self._given_up = Counter["Place"](), Counter["Place"]()
        self._oom_kills: dict[str, int] = {}  # of a node, when last heard of
        self._losses: dict[str, deque[float]] = {}  # of a node: of workers without a successor
        self._head = str(ray.get_runtime_context().gcs_address)
        self._head_answered = time.monotonic()
        self._next_look = 0.0
        self._last_loss: BaseException | None = None

    def start(self) -> list[dict[str, Any]]:
        """Start an actor for each place, on each node one before the others.

        Returns:
            What the workers that are ready say of themselves.

        Raises:
            ClusterUnreachable: none could be started in time.
            Exception: what the last of the workers raised, when none could open any spec.
        """
        self._await_workers()
        infos = [actor.info for actor in self._actors if actor.info is not None]
        if not infos:
            self._refuse()
        return infos

    def run(self, tasks: Sequence[Task], on_result: OnResult) -> list[ShardFailure]:
        """See `pipeline.executor.Executor.run`.

        Raises:
            IncompleteError: the cluster's head is gone.
        """
        work = Attempts(tasks)
        working = peopled = time.monotonic()
        while work:
            self._look(work)
            self._hand_out(work)
            now = time.monotonic()
            working = now if work.n_running or self._is_fetching else working
            peopled = now if self._actors else peopled
            patience = 0.0 if self._closed or self._given_up else NOBODY_TIMEOUT_S
            if now - peopled > patience or now - working > START_TIMEOUT_S:
                loss = self._last_loss
                work.abandon("no worker is ready" if loss is None else describe(loss))
                break
            results = []
            for ended in self._finished(timeout_s=1.0, work=work):
                work.tick()
                if ended.error is None and work.done(ended.attempt, ended.result):
                    ended.actor.known.add(ended.attempt.task.file)
                    results.append(ended)
                elif ended.is_ours:
                    work.failed(ended.attempt, ended.error or RuntimeError("unknown"))
                elif ended.error is not None:
                    self._count_loss(work, ended)
            self._hand_out(work)  # first: what the caller does with results is no worker's time
            for ended in results:
                work.report(ended.attempt.task, ended.result, on_result)
        for actor in [actor for actor in self._actors if actor.attempt is not None]:
            self._drop(actor)  # what it computes is there already
        return work.failures()

    def memory(self) -> list[dict[str, Any]]:
        """See `pipeline.executor.Executor.memory`; waits a little for workers that are being replaced."""
        deadline = time.monotonic() + REPLACED_TIMEOUT_S
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
        """End all actors, and let go of all that is Ray's.

        Numbers of actors and calls are the same in the next Ray of this process: a handle of this one that
        is collected then ends an actor of that one.
        """
        for actor in list(self._actors):
            self._drop(actor)
        self._ended.clear()
        self._last_loss = None

    def _hand_out(self, work: Attempts) -> None:
        """A task for every actor that is ready and has none, of the file that it has open if possible."""
        while work.has_next and self._idle:
            actor = next(iter(self._idle))
            self._send(actor, *work.take(actor.node, actor.name, actor.file, actor.known))
        self._specs = work.specs() or self._specs

    @property
    def _is_fetching(self) -> bool:
        """Whether a model is on its way to a node."""
        return any(actor.then is not None for actor in self._actors)

    def _look(self, work: Attempts | None) -> None:
        """From time to time: follow the cluster, end workers that hang, help those that are slow."""
        now = time.monotonic()
        if work is not None:
            work.tick()
        if now < self._next_look:
            return
        self._next_look = now + LOOK_S
        if self._head_is_there():
            self._reconcile()
        if work is None:
            return
        hanging = dict(work.overdue())
        for actor in list(self._actors):
            if actor.attempt in hanging:
                self._end(actor, LetGo(f"no answer for {hanging[actor.attempt]:.0f} s"))
        for attempt in work.late() if self._idle else ():
            if self._idle:
                actor = self._helper(attempt)
                self._send(actor, *work.again(attempt, actor.node, actor.name, actor.file, actor.known))

    def _helper(self, attempt: Attempt) -> Actor:
        """An idle actor for a slow one's shard: of another node, with the file open, if possible."""
        return min(self._idle, key=lambda a: (a.node == attempt.node, a.file != attempt.task.file))

    def _head_is_there(self) -> bool:
        """Whether the head answers; IncompleteError when it has not for `HEAD_TIMEOUT_S`."""
        host, _, port = self._head.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=LOOK_S).close()
        except OSError as error:
            silent_s = time.monotonic() - self._head_answered
            if silent_s > HEAD_TIMEOUT_S:
                raise IncompleteError(
                    f"the cluster's head at {self._head} has not answered for {silent_s:.0f} s: {error}",
                    "finished shards are kept: start the cluster, or take cluster=local, "
                    "and run the same command again",
                    kind="HeadLost",
                ) from error
            log.warning("the cluster's head at %s does not answer: %s", self._head, error)
            return False
        self._head_answered = time.monotonic()
        return True

    def _reconcile(self) -> None:
        """Actors of nodes that are gone are lost, places without an actor get one."""
        nodes = [node for node in self._ray.nodes() if node["Alive"]]
        alive = {node["NodeID"] for node in nodes}
        gone = [actor for actor in self._actors if actor.node not in alive]
        for node, n in Counter(actor.node for actor in gone).items():
            fields: dict[str, events.Value] = {"node": node[:8], "workers": n}
            events.tell(NODE_LOST, f"node {node[:8]} is gone", fields, level=logging.WARNING)
            self._losses.pop(node, None)
        for actor in gone:
            self._end(actor, LetGo(f"node {actor.node[:8]} is gone"))
        wanted = Counter(self._places_for(nodes)) - self._given_up
        have, begun = Counter(a.place for a in self._actors), {a.node for a in self._actors}
        room = wanted.total() - have.total()
        for place in (wanted - have).elements():
            node = place.node_id
            if room > 0 and node not in self._closed and (node in self._warm or node not in begun):
                self._launch(place)
                begun.add(node)
                room -= 1

    def _launch(self, place: Place) -> None:
        """Start an actor in its place and probe it."""
        strategies = self._ray.util.scheduling_strategies
        strategy = strategies.NodeAffinitySchedulingStrategy(place.node_id, soft=False)
        hosted = self._ray.remote(Hosted).options(scheduling_strategy=strategy, **self._options)
        actor = Actor(place, hosted.remote(self._factory, place))
        self._actors[actor] = None
        self._probe(actor)

    def _probe(self, actor: Actor) -> None:
        actor.is_ready, actor.file, actor.known = False, None, set()
        specs, lasting = self._specs, {"max_task_retries": -1}
        if not any(_is_remote(spec) for spec in specs):
            self._call(actor, actor.handle.ready.options(**lasting).remote(specs), None)
            return
        self._call(actor, actor.handle.fetch.options(**lasting).remote(specs), None)
        actor.then = lambda: actor.handle.ready.options(**lasting).remote(specs)

    def _send(self, actor: Actor, attempt: Attempt, task: Task) -> None:
        actor.file = task.file
        if not (attempt.is_turn and _is_remote(task.spec)):
            self._call(actor, actor.handle.run.remote(task), attempt)
            return
        attempt.is_fetching = True
        self._call(actor, actor.handle.fetch.remote([task.spec], is_turn=True), attempt)
        actor.then = lambda: actor.handle.run.remote(task)

    def _call(self, actor: Actor, ref: Any, attempt: Attempt | None) -> None:
        self._idle.pop(actor, None)
        actor.call, actor.attempt, actor.then, self._calls[ref] = ref, attempt, None, actor

    def _await_workers(self) -> None:
        """Wait for all workers, but not for ever for the last of them."""
        begun = started = told = time.monotonic()
        first: float | None = None
        while True:
            self._look(None)
            if not self._calls and self._next_look:
                return
            list(self._finished(timeout_s=1.0))
            now, n_ready = time.monotonic(), sum(actor.is_ready for actor in self._actors)
            if self._is_fetching:
                started = now
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
                what = "; nodes fetch models" if self._is_fetching else ""
                log.info("waiting for workers: %d are ready after %.0f s%s", n_ready, now - begun, what)

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

    def _finished(self, timeout_s: float, work: Attempts | None = None) -> Iterator[Ended]:
        """Wait until a call ends; see to the actors of all that ended, and hand on those that were work."""
        errors = self._ray.exceptions
        for ref in self._wait(0.0 if self._ended else timeout_s):
            actor = self._calls.pop(ref)
            attempt, actor.call, actor.attempt = actor.attempt, None, None
            then, actor.then = actor.then, None
            result: Any = None
            error: BaseException | None = None
            is_ours = False
            try:
                result = self._ray.get(ref)
            except errors.RayTaskError as raised:
                error, is_ours = raised.cause or raised.with_traceback(None), True
            except errors.RayError as raised:
                error = raised.with_traceback(None)  # else it and this frame hold each other, and references
            if error is not None and not is_ours:
                self._lost(actor, error)
            elif then is not None and self._goes_on(attempt, error, work):
                self._call(actor, then(), attempt)
                continue
            elif attempt is not None:
                self._idle[actor] = None
                actor.file = actor.file if then is None else None  # it has nothing open
            elif error is None:
                self._welcome(actor, result, work)
            else:  # it can open no spec: another process could not either
                self._closed.add(actor.node)
                self._drop(actor, error)
            if attempt is not None:
                yield Ended(actor, attempt, result, error, is_ours)
        while self._ended:
            yield self._ended.popleft()

    def _goes_on(self, attempt: Attempt | None, error: BaseException | None, work: Attempts | None) -> bool:
        """Whether the call follows that a model was fetched for; a probe finds out what it can open."""
        if attempt is None:
            return True
        if error is not None or attempt.is_stale or work is None:
            return False
        work.fetched(attempt)
        return True

    def _wait(self, timeout_s: float) -> list[Any]:
        """References of calls that ended."""
        if not self._calls:
            time.sleep(timeout_s)
            return []
        ended, rest = self._ray.wait(list(self._calls), num_returns=1, timeout=timeout_s)
        if ended and rest:
            ended += self._ray.wait(rest, num_returns=len(rest), timeout=0)[0]
        return list(ended)

    def _welcome(self, actor: Actor, info: dict[str, Any], work: Attempts | None) -> None:
        """A probe answered: the actor may work, and the rest of its node may start."""
        node = actor.node
        actor.is_ready, actor.info, actor.file = True, info, info.get("model_path")
        self._idle[actor] = None
        self._barren.pop(actor.place, None)
        if node not in self._warm:
            self._warm.add(node)
            self._next_look = 0.0
        if lost := self._losses.get(node):
            recovery_s = time.monotonic() - lost.popleft()
            fields: dict[str, events.Value] = {"node": node[:8], "recovery_s": round(recovery_s, 3)}
            events.tell(WORKER_BACK, f"node {node[:8]} has a worker back after {recovery_s:.1f} s", fields)
        n_kills = int(info.get("oom_kills", 0))
        if work is not None:
            work.learned(node, is_oom=n_kills > self._oom_kills.get(node, n_kills))
        self._oom_kills[node] = n_kills
        events.worker_ready(info, node)

    def _count_loss(self, work: Attempts, ended: Ended) -> None:
        """A worker ended with a task in its hands."""
        error = ended.error
        assert error is not None
        if isinstance(error, LetGo):
            work.lost(ended.attempt, str(error), is_oom=False)
        else:
            work.lost(ended.attempt, describe(error), is_oom=True if is_out_of_memory(error) else None)

    def _lost(self, actor: Actor, error: BaseException) -> None:
        """A call was lost: probe an actor that Ray restarts, let go of one that it gave up."""
        errors = self._ray.exceptions
        self._note_loss(actor, describe(error))
        if not isinstance(error, (errors.ActorDiedError, errors.ActorUnschedulableError)):
            self._probe(actor)
            return
        if actor.info is None:
            self._barren[actor.place] += 1
            if self._barren[actor.place] >= MAX_BARREN:
                del self._barren[actor.place]
                self._given_up[actor.place] += 1
                log.warning("no worker starts on node %s any more: %s", actor.node[:8], describe(error))
        self._drop(actor, error)

    def _end(self, actor: Actor, why: LetGo) -> None:
        """Make an end of an actor whose worker hangs or whose node is gone; its task, if any, is lost."""
        self._note_loss(actor, str(why))
        if actor.attempt is not None:
            self._ended.append(Ended(actor, actor.attempt, error=why))
        self._drop(actor, why)

    def _note_loss(self, actor: Actor, why: str) -> None:
        if actor.is_ready:
            events.worker_lost(actor.info, why, actor.node)
            self._losses.setdefault(actor.node, deque()).append(time.monotonic())

    def _drop(self, actor: Actor, error: BaseException | None = None) -> None:
        """Let an actor go; the next look at the cluster is at once, and finds its place without one."""
        del self._actors[actor]
        self._idle.pop(actor, None)
        if actor.call is not None:
            del self._calls[actor.call]
            actor.call = actor.attempt = actor.then = None
        self._ray.kill(actor.handle, no_restart=True)
        actor.handle = None
        self._last_loss = error or self._last_loss
        self._next_look = 0.0


def _is_remote(spec: WorkerSpec) -> bool:
    """Whether a run's model is fetched by each node."""
    return getattr(spec, "wanted", None) is not None
