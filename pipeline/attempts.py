"""What becomes of tasks in the hands of workers that die, hang or crawl. Knows of no Ray, and starts nothing.

A task is in the queue, with one worker, with two, or held back until it is known what ended its worker.

- The first result counts. Another worker may still compute the same shard; its file is refused by the store,
  which keeps the first one, and what it says is not passed on.
- A worker that dies gives its task back, and is counted against it; after `MAX_KILLS` the task is set aside.
- A worker that takes much longer than any shard of the run has taken is said to hang (`overdue`).
- When nothing is left to hand out, a shard that takes several times what its like take is given to an idle
  worker as well (`late`).
- A worker that ran out of memory was given too many tokens at once: the task's next attempt, and the node
  from then on, get half of them. The size of a batch changes no bit of a score.
- Once a shard could not be stored, nothing more is handed out: it would be computed for nothing. What is in
  work goes on, for the file of one shard may find room where another's did not.

Durations are of a clock that ticks when it is told to, and by a few seconds at most: a driver that was
stopped, or a machine that slept, does not make workers late.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import TYPE_CHECKING, Any

from pipeline import events
from pipeline.errors import StorageFailure
from pipeline.executor import (
    MAX_KILLS,
    NOT_STORED,
    OnResult,
    Queue,
    ShardFailure,
    Task,
    describe,
    set_aside,
)

if TYPE_CHECKING:
    from pipeline.worker import ShardResult, WorkerSpec

HANG_S = 60.0  # no worker is said to hang earlier
HANG_TIMES = 10.0  # of what the run's slowest shard took, by windows
FIRST_TIMES = 10.0  # as patient with a worker's first shard of a file, which may come from a slow disk
SLOW_S = 5.0  # no shard is handed out twice earlier
SLOW_TIMES = 3.0  # of the run's median, by windows
CAUSE_S = 10.0  # a task is held back for so long until it is known why its worker ended
MIN_BATCH_TOKENS = 32
SHARD_DOUBLED, OUT_OF_MEMORY = "shard_doubled", "out_of_memory"
_LONGEST_TICK_S = 5.0
_RECENT = 101  # shards that the median is of


@dataclass(eq=False)
class Attempt:
    """A task in a worker's hands.

    Attributes:
        worker: who, for people; HOST:PID.
        is_first: of this worker with this file.
        is_turn: the worker has to open the file first.
        is_stale: another worker was faster, so this one's result does not count.
        is_fetching: the worker brings the model to its node, which may take any time.
    """

    task: Task
    node: str
    worker: str | None
    began: float
    is_first: bool
    is_turn: bool
    is_stale: bool = False
    is_fetching: bool = False


@dataclass
class _Pace:
    """How long shards of a run take, seconds per window, and opening its file, seconds."""

    slowest: float = 0.0
    opening: float = 0.0
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT))


class Attempts:
    """The tasks of one `Executor.run`; true while there is something to do or to wait for."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self._tasks, self._queue = tasks, Queue(tasks)
        self._open: dict[Task, list[Attempt]] = {}  # tasks in work
        self._stale: list[Attempt] = []
        self._held: list[tuple[Task, str, float]] = []  # with the node, and until when
        self._kills = Counter[Task]()
        self._halvings = Counter[Task | str]()  # of batches, by task and by node
        self._smaller: dict[tuple[int, int], WorkerSpec] = {}
        self._paces: dict[int, _Pace] = {}  # by the identity of a run's spec
        self._failures: list[ShardFailure] = []
        self._is_stopped = False
        self._ticked, self._now = time.monotonic(), 0.0

    def __bool__(self) -> bool:
        return bool(self._queue or self._open or self._held)

    @property
    def n_running(self) -> int:
        """Tasks in work."""
        return len(self._open)

    @property
    def has_next(self) -> bool:
        """Whether a task can be handed out."""
        return bool(self._queue)

    def tick(self) -> None:
        """Let time pass; give back what was held long enough."""
        now = time.monotonic()
        self._now += min(now - self._ticked, _LONGEST_TICK_S)
        self._ticked = now
        for entry in [entry for entry in self._held if entry[2] <= self._now]:
            self._held.remove(entry)
            self._queue.put(entry[0])

    def take(self, node: str, worker: str | None, file: str | None, known: set[str]) -> tuple[Attempt, Task]:
        """Hand the next task to an idle worker.

        Args:
            file: that the worker has open.
            known: files that it has finished a shard of.

        Returns:
            the attempt, and the task as it is to be sent.
        """
        return self._begin(self._queue.take(file), node, worker, file, known)

    def again(
        self, attempt: Attempt, node: str, worker: str | None, file: str | None, known: set[str]
    ) -> tuple[Attempt, Task]:
        """Hand a task to one more worker; as `take`."""
        elapsed = self._now - attempt.began
        sentence = f"shard {attempt.task.shard.first_window} is slow, {worker} computes it too"
        fields: dict[str, events.Value] = {
            "run": getattr(attempt.task.spec, "run_key", None),
            "shard": attempt.task.shard.first_window,
            "worker": attempt.worker,
            "second": worker,
            "elapsed_s": round(elapsed, 3),
        }
        events.tell(SHARD_DOUBLED, sentence, fields, level=logging.WARNING)
        return self._begin(attempt.task, node, worker, file, known)

    def fetched(self, attempt: Attempt) -> None:
        """The worker's node has the model now: what it takes from here on counts."""
        attempt.is_fetching, attempt.began = False, self._now

    def done(self, attempt: Attempt, result: ShardResult) -> bool:
        """A worker finished a shard; False when another one was faster and it does not count."""
        if attempt.is_stale:
            self._stale.remove(attempt)
            return False
        task = attempt.task
        for other in self._open.pop(task):
            if other is not attempt:
                other.is_stale = True
                self._stale.append(other)
        pace = self._paces.setdefault(id(task.spec), _Pace())
        pace.opening = max(pace.opening, getattr(result, "load_s", 0.0) + getattr(result, "compile_s", 0.0))
        if not attempt.is_turn:
            seconds = (self._now - attempt.began) / task.shard.n_windows
            pace.slowest = max(pace.slowest, seconds)
            pace.recent.append(seconds)
        events.shard_done(task, result, attempt.node)
        self._queue.done(task)
        return True

    def report(self, task: Task, result: ShardResult, on_result: OnResult) -> None:
        """Tell the caller of a shard that is done; it may need no more, or be unable to store it."""
        try:
            if on_result(task, result):
                self.drop()
        except StorageFailure as error:
            self._not_stored(task, error)

    def failed(self, attempt: Attempt, error: BaseException) -> None:
        """An exception of ours: the task is set aside, unless another worker is still at it."""
        if not self._close(attempt):
            return
        task = attempt.task
        if isinstance(error, StorageFailure):
            self._not_stored(task, error)
        else:
            self._set_aside(task, "error", describe(error), self._kills[task] + 1)

    def lost(self, attempt: Attempt, cause: str, *, is_oom: bool | None) -> None:
        """A worker ended while it had a task, which is given back or set aside.

        Args:
            is_oom: whether it ran out of memory, None when that is to be learned (`learned`).
        """
        if attempt.is_stale:
            self._stale.remove(attempt)
            return
        task, is_last = attempt.task, self._close(attempt)
        self._kills[task] += 1
        n = self._kills[task]
        if is_oom:
            self._halve([task], attempt.node)
        if not is_last:
            return
        if n >= MAX_KILLS:
            self._set_aside(task, "killed", f"its worker's process ended, {n} times ({cause})", n)
            return
        if self._is_stopped:
            self._set_aside(task, "killed", f"its worker's process ended ({cause})", n)
            return
        events.shard_retried(task, n, cause, attempt.worker)
        if is_oom is None:
            self._held.append((task, attempt.node, self._now + CAUSE_S))
        else:
            self._queue.put(task)

    def learned(self, node: str, *, is_oom: bool) -> None:
        """It is known what ended the workers of a node."""
        known = [entry for entry in self._held if entry[1] == node]
        if is_oom:
            self._halve([entry[0] for entry in known], node)
        for entry in known:
            self._held.remove(entry)
            self._queue.put(entry[0])

    def drop(self) -> None:
        """Forget all that is not in work."""
        self._queue.drop()
        self._held.clear()

    def overdue(self) -> list[tuple[Attempt, float]]:
        """Attempts that must be said to hang, and the seconds that they have taken."""
        running = [*self._stale, *(attempt for attempts in self._open.values() for attempt in attempts)]
        found = []
        for attempt in running:
            elapsed, allowed = self._now - attempt.began, self._allowed(attempt)
            if allowed is not None and elapsed > allowed and not attempt.is_fetching:
                found.append((attempt, elapsed))
        return found

    def late(self) -> list[Attempt]:
        """Attempts that one more worker should be put to, the latest first; none while the queue has any."""
        if self._queue or self._is_stopped:
            return []
        found = []
        for attempts in self._open.values():
            attempt = attempts[0]
            pace = self._paces.get(id(attempt.task.spec))
            if len(attempts) > 1 or pace is None or not pace.recent:
                continue
            usual = median(pace.recent) * attempt.task.shard.n_windows
            usual += pace.opening if attempt.is_turn else 0.0
            elapsed = self._now - attempt.began
            if elapsed > max(SLOW_S, SLOW_TIMES * usual):
                found.append((elapsed / max(usual, 1e-9), attempt))
        return [attempt for _, attempt in sorted(found, key=lambda entry: -entry[0])]

    def specs(self) -> list[WorkerSpec]:
        """The first spec of each file that has tasks left."""
        return self._queue.specs()

    def abandon(self, cause: str) -> None:
        """Set aside what is left: there is nobody to do it."""
        for task in [*self._queue.tasks(), *(entry[0] for entry in self._held)]:
            self._failures.append(set_aside(task, "no worker", cause, self._kills[task]))
        self.drop()

    def failures(self) -> list[ShardFailure]:
        """What was set aside, in the order of the tasks."""
        if not self._failures:
            return []
        rank = {task: i for i, task in enumerate(self._tasks)}
        return sorted(self._failures, key=lambda failure: rank[failure.task])

    def _begin(
        self, task: Task, node: str, worker: str | None, file: str | None, known: set[str]
    ) -> tuple[Attempt, Task]:
        attempt = Attempt(task, node, worker, self._now, task.file not in known, task.file != file)
        self._open.setdefault(task, []).append(attempt)
        n = max(self._halvings[task], self._halvings[node]) if self._halvings else 0
        if not n:
            return attempt, task
        key = id(task.spec), n
        if key not in self._smaller:
            self._smaller[key] = smaller(task.spec, n)
        return attempt, replace(task, spec=self._smaller[key])

    def _close(self, attempt: Attempt) -> bool:
        """Forget an attempt; False when it did not count, or another one of its task goes on."""
        if attempt.is_stale:
            self._stale.remove(attempt)
            return False
        attempts = self._open[attempt.task]
        attempts.remove(attempt)
        if not attempts:
            del self._open[attempt.task]
        return not attempts

    def _not_stored(self, task: Task, error: StorageFailure) -> None:
        self._is_stopped = True
        self.drop()
        self._set_aside(task, NOT_STORED, describe(error), self._kills[task] + 1)

    def _set_aside(self, task: Task, kind: str, cause: str, attempts: int) -> None:
        self._failures += [set_aside(task, kind, cause, attempts), *self._queue.failed(task)]

    def _halve(self, tasks: Sequence[Task], node: str) -> None:
        """Have these tasks, and all of a node, run with half the batch from now on."""
        if not tasks:
            return
        n = 1 + max(self._halvings[node], *(self._halvings[task] for task in tasks))
        self._halvings[node] = n
        for task in tasks:
            self._halvings[task] = n
        fields: dict[str, events.Value] = {
            "run": getattr(tasks[0].spec, "run_key", None),
            "shard": tasks[0].shard.first_window,
            "node": node[:8],
            "batch_part": f"1/{2**n}",
        }
        sentence = f"a worker ran out of memory; its shard and its node get 1/{2**n} of the tokens at once"
        events.tell(OUT_OF_MEMORY, sentence, fields, level=logging.WARNING)

    def _allowed(self, attempt: Attempt) -> float | None:
        """Seconds after which an attempt is said to hang; None before there is anything to judge by."""
        task = attempt.task
        pace = self._paces.get(id(task.spec))
        if pace is None or not pace.recent:
            return None
        # Should the state that it goes on from be lost, it reads its document again, at worst all windows.
        n_windows = task.shard.end if task.shard.resumes else task.shard.n_windows
        usual = pace.slowest * n_windows + (pace.opening if attempt.is_turn else 0.0)
        patience = (FIRST_TIMES if attempt.is_first else 1.0) * 2.0 ** self._kills[task]
        return patience * max(HANG_S, HANG_TIMES * usual)


def smaller(spec: Any, n_halvings: int) -> Any:
    """A worker's spec with smaller batches; the same where a spec has no batches."""
    engine = getattr(spec, "engine", None)
    if engine is None:
        return spec
    tokens = max(engine.batch_tokens >> n_halvings, min(MIN_BATCH_TOKENS, engine.batch_tokens))
    return replace(spec, engine=replace(engine, batch_tokens=tokens))
