"""Laws of what becomes of tasks whose workers die, hang or crawl; no process, and a clock of ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import attempts, hosted
from pipeline.attempts import Attempt, Attempts, smaller
from pipeline.errors import StorageFailure
from pipeline.executor import Task, shards_missing
from pipeline.hosted import is_out_of_memory, oom_kills
from pipeline.settings import EngineSettings
from pipeline.shards import Shard, plan

Advance = Callable[[float], None]


@dataclass(frozen=True)
class Spec:
    """All of a worker's spec that attempts look at."""

    engine: EngineSettings
    run_key: str = "k"


@dataclass(frozen=True)
class Result:
    load_s: float = 0.0
    compile_s: float = 0.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    now = {"s": 100.0}
    monkeypatch.setattr(attempts.time, "monotonic", lambda: now["s"])
    return now


def make(n: int, spec: Any = None, per_shard: int = 1) -> tuple[list[Task], Attempts]:
    tasks = [Task(spec, shard, "f") for shard in plan(n, per_shard)]
    return tasks, Attempts(tasks)


def take(work: Attempts, node: str = "n", *, known: bool = True, file: str | None = "f") -> Attempt:
    return work.take(node, "host:1", file, {"f"} if known else set())[0]


def wait(work: Attempts, clock: dict[str, float], seconds: float) -> None:
    """Let time pass, with ticks that are short enough to count."""
    for _ in range(round(seconds * 2)):
        clock["s"] += 0.5
        work.tick()


def finish(work: Attempts, clock: dict[str, float], n: int, seconds: float) -> None:
    """Have tasks done, each in that time."""
    for _ in range(n):
        attempt = take(work)
        wait(work, clock, seconds)
        assert work.done(attempt, Result())  # type: ignore[arg-type]


def test_a_worker_is_said_to_hang_by_what_shards_have_taken(clock: dict[str, float]) -> None:
    _, work = make(9, per_shard=3)  # three shards of three windows
    attempt = take(work)
    wait(work, clock, 5000)
    assert work.overdue() == [], "nothing has been measured yet"
    assert work.done(attempt, Result())  # type: ignore[arg-type]

    _, work = make(9, per_shard=3)
    finish(work, clock, 1, 30)
    attempt = take(work)
    wait(work, clock, 299)
    assert work.overdue() == []
    wait(work, clock, 2)
    assert work.overdue() == [(attempt, 301.0)]


def test_no_worker_is_said_to_hang_soon_and_the_first_shard_and_another_attempt_have_longer(
    clock: dict[str, float],
) -> None:
    tasks, work = make(3)
    finish(work, clock, 1, 0.5)
    for known, patience in [(True, 60), (False, 600)]:
        attempt = take(work, known=known)
        wait(work, clock, patience - 1)
        assert work.overdue() == []
        wait(work, clock, 2)
        assert [late for late, _ in work.overdue()] == [attempt]
        work.lost(attempt, "gone", is_oom=False)
    attempt = take(work)
    assert attempt.task is tasks[1], "what comes back is done last"
    wait(work, clock, 119)
    assert work.overdue() == []
    wait(work, clock, 2)
    assert [late for late, _ in work.overdue()] == [attempt]


def test_a_driver_that_sleeps_makes_no_worker_late(clock: dict[str, float]) -> None:
    _, work = make(2)
    finish(work, clock, 1, 1)
    take(work)
    clock["s"] += 86400
    work.tick()
    assert work.overdue() == []


def test_opening_a_file_is_no_hanging(clock: dict[str, float]) -> None:
    _, work = make(3)
    attempt = take(work, file=None)
    wait(work, clock, 40)
    assert work.done(attempt, Result(load_s=20.0, compile_s=10.0))  # type: ignore[arg-type]
    finish(work, clock, 1, 1)
    attempt = take(work, file="another")
    wait(work, clock, 309)
    assert work.overdue() == []
    wait(work, clock, 2)
    assert [late for late, _ in work.overdue()] == [attempt]


def test_a_shard_that_goes_on_may_read_its_document_again(clock: dict[str, float]) -> None:
    tasks = [Task(None, shard, "f") for shard in plan(40, 1, np.array([0]))]  # type: ignore[arg-type]
    work = Attempts(tasks)
    finish(work, clock, 39, 10)
    take(work)
    wait(work, clock, 3900)
    assert work.overdue() == []
    wait(work, clock, 200)
    assert len(work.overdue()) == 1


def test_the_tail_is_handed_out_twice_and_the_first_result_counts(clock: dict[str, float]) -> None:
    tasks, work = make(6)
    finish(work, clock, 3, 4)
    slow = take(work, "slow")
    wait(work, clock, 20)
    assert work.late() == [], "there are others to hand out"
    finish(work, clock, 2, 4)
    assert work.late() == [slow]
    helper, sent = work.again(slow, "fast", "host:2", "f", {"f"})
    assert sent is tasks[3]
    assert work.late() == [], "one helper is enough"
    assert work.n_running == 1
    assert work.done(helper, Result())  # type: ignore[arg-type]
    assert not work, "the slow one is not waited for"
    assert not work.done(slow, Result()), "and what it says does not count"  # type: ignore[arg-type]


def test_a_shard_of_usual_length_is_handed_out_once(clock: dict[str, float]) -> None:
    _, work = make(4)
    finish(work, clock, 3, 4)
    take(work)
    wait(work, clock, 12)
    assert work.late() == []
    wait(work, clock, 1)
    assert len(work.late()) == 1


def test_two_attempts_of_one_shard_that_both_die_give_it_back_once(clock: dict[str, float]) -> None:
    tasks, work = make(2)
    finish(work, clock, 1, 2)
    first = take(work)
    second, _ = work.again(first, "n", "host:2", "f", {"f"})
    work.lost(first, "gone", is_oom=False)
    assert not work.has_next, "the other one is still at it"
    work.failed(second, ValueError("wrong"))
    assert [failure.kind for failure in work.failures()] == ["error"]
    assert not work

    tasks, work = make(2)
    finish(work, clock, 1, 2)
    first = take(work)
    second, _ = work.again(first, "n", "host:2", "f", {"f"})
    work.failed(first, OSError("only here"))
    work.lost(second, "gone", is_oom=False)
    assert take(work).task is tasks[1]
    assert work.failures() == []


def test_a_task_is_held_back_until_it_is_known_what_ended_its_worker(clock: dict[str, float]) -> None:
    spec = Spec(EngineSettings(batch_tokens=4096))
    tasks, work = make(3, spec)
    for _ in range(2):
        work.lost(take(work, "small"), "gone", is_oom=None)
    assert not work.n_running
    assert work.take("big", "host:2", "f", set())[1] is tasks[2]
    assert work, "two are held back"
    work.learned("another", is_oom=True)
    assert not work.has_next
    work.learned("small", is_oom=True)
    sent = [work.take("big", "host:2", "f", set())[1].spec.engine.batch_tokens for _ in range(2)]
    assert sent == [2048, 2048], "half the batch for the tasks, once, wherever they go"


def test_a_node_that_ran_out_of_memory_gets_smaller_batches_and_others_do_not(
    clock: dict[str, float],
) -> None:
    spec = Spec(EngineSettings(batch_tokens=100))
    _, work = make(9, spec)
    work.lost(take(work, "small"), "gone", is_oom=True)
    assert work.take("small", None, "f", set())[1].spec.engine.batch_tokens == 50
    assert work.take("big", None, "f", set())[1].spec is spec
    work.lost(take(work, "small"), "gone", is_oom=True)
    assert work.take("small", None, "f", set())[1].spec.engine.batch_tokens == 32, "not below the least"


def test_what_is_held_back_is_given_back_in_the_end(clock: dict[str, float]) -> None:
    tasks, work = make(1)
    work.lost(take(work), "gone", is_oom=None)
    wait(work, clock, 9)
    assert not work.has_next
    wait(work, clock, 2)
    attempt = take(work)
    assert attempt.task is tasks[0]
    work.lost(attempt, "gone", is_oom=None)
    work.drop()
    assert not work, "nor is what was held back needed any more"


def test_poison_is_set_aside_and_what_nobody_is_left_for(clock: dict[str, float]) -> None:
    tasks, work = make(2)
    for _ in range(3):
        work.lost(take(work), "gone", is_oom=False)
        work.lost(take(work), "gone", is_oom=False)
    assert [(f.shard.first_window, f.kind, f.attempts) for f in work.failures()] == [
        (0, "killed", 3),
        (1, "killed", 3),
    ]
    tasks, work = make(3)
    work.lost(take(work), "gone", is_oom=None)
    work.abandon("no worker is ready")
    assert not work
    assert [(f.task, f.kind, f.attempts) for f in work.failures()] == [
        (task, "no worker", int(i == 0)) for i, task in enumerate(tasks)
    ]


def test_once_a_shard_is_not_stored_nothing_more_is_handed_out_and_what_is_in_work_goes_on(
    clock: dict[str, float],
) -> None:
    full = StorageFailure("/results: no space left on the device", "make room")
    tasks, work = make(9)
    held, *attempts = [take(work) for _ in range(5)]
    work.lost(held, "gone", is_oom=None)
    work.failed(attempts[0], full)
    assert not work.has_next
    assert work.n_running == 3
    assert work.done(attempts[1], Result())  # type: ignore[arg-type]
    work.failed(attempts[2], full)
    wait(work, clock, 100)
    assert work.late() == [], "nor is one of them handed out twice"
    work.lost(attempts[3], "gone", is_oom=False)
    assert not work, "what was held back, or comes back, is not begun again"
    assert [(f.task, f.kind) for f in work.failures()] == [
        (tasks[1], "not stored"),
        (tasks[3], "not stored"),
        (tasks[4], "killed"),
    ]


def test_what_the_driver_cannot_store_is_set_aside_and_ends_the_work(clock: dict[str, float]) -> None:
    tasks, work = make(4)

    def full(task: Task, result: Any) -> bool:
        raise StorageFailure("/results: no space left on the device", "make room")

    first, second = take(work), take(work)
    for attempt in (first, second):
        assert work.done(attempt, Result())  # type: ignore[arg-type]
        work.report(attempt.task, Result(), full)  # type: ignore[arg-type]
    assert not work
    assert [(f.task, f.kind) for f in work.failures()] == [(task, "not stored") for task in tasks[:2]]
    error = shards_missing("4 of 4", {task.shard: task.shard.file_name for task in tasks}, work.failures())
    assert isinstance(error, StorageFailure)
    assert "4 of 4, because results cannot be written any more: StorageFailure: /results: no" in str(error)
    assert "run the same command again" in error.hint


def test_what_ended_a_worker_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = type("OutOfMemoryError", (Exception,), {})("1 worker(s) were killed")
    assert is_out_of_memory(ours)
    assert is_out_of_memory(RuntimeError("killed due to the node running low on memory"))
    assert not is_out_of_memory(RuntimeError("Socket closed"))
    vmstat = tmp_path / "vmstat"
    monkeypatch.setattr(hosted, "VMSTAT", vmstat)
    assert oom_kills() == 0, "a kernel that does not say"
    vmstat.write_text("nr_free_pages 5\noom_kill 3\n")
    assert oom_kills() == 3


def test_smaller_batches_are_of_specs_that_have_any() -> None:
    assert smaller({"folder": "x"}, 1) == {"folder": "x"}
    spec = Spec(EngineSettings(batch_tokens=20))
    assert smaller(spec, 3) == spec, "one that is small already stays"
    assert Shard(0, 1).id == 0
