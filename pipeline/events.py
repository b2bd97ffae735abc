"""One line for each event that matters, and a word to whoever listens.

    shard 12 is done event=shard_done run=0f5e... shard=12 worker=host:4711 node=9c41f2aa tokens=2048

A sentence for people, then `key=value` for machines; values with spaces or quotes are JSON strings. With
`PAGEMILL_LOG=json` every record of the log is a JSON object on a line, an event's fields among its keys. The
progress display and the cluster's metrics listen to the same events; nothing else is told of them.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.redact import redacted

if TYPE_CHECKING:
    from pipeline.executor import Task
    from pipeline.worker import ShardResult

RUN_BEGUN, RUN_ENDED = "run_begun", "run_ended"
WORKER_READY, WORKER_LOST = "worker_ready", "worker_lost"
SHARD_DONE, SHARD_RETRIED, SHARD_SET_ASIDE = "shard_done", "shard_retried", "shard_set_aside"

Value = str | int | float | bool | None
_PLAIN = re.compile(r"[^\s\"'=]+")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Event:
    """What happened, and to what: `run` (key), `shard` (first window), `worker` (HOST:PID), `node`, ..."""

    name: str
    fields: Mapping[str, Value]


Listener = Callable[[Event], None]
_listeners: list[Listener] = []


def tell(name: str, sentence: str, fields: Mapping[str, Value], *, level: int = logging.INFO) -> None:
    """Log an event, secrets in URLs left out, and tell those who listen; fields that are None are left out.

    Must be called by the thread that runs the executor: listeners are not locked.
    """
    known = {key: redacted(value) for key, value in fields.items() if value is not None}
    said = redacted(sentence)
    if log.isEnabledFor(level):
        pairs = " ".join(f"{key}={_text(value)}" for key, value in {"event": name, **known}.items())
        log.log(level, "%s %s", said, pairs, extra={"event": name, "fields": known, "said": said})
    for listener in tuple(_listeners):
        listener(Event(name, known))


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Have a function told of each event meanwhile."""
    listen(listener)
    try:
        yield
    finally:
        stop_listening(listener)


def listen(listener: Listener) -> None:
    """Have a function told of each event from now on."""
    _listeners.append(listener)


def stop_listening(listener: Listener) -> None:
    """Tell it no more; nothing happens when it did not listen."""
    if listener in _listeners:
        _listeners.remove(listener)


def worker_ready(info: Mapping[str, Any], node: str | None = None) -> None:
    """A worker can work.

    Args:
        info: what it says of itself, `EvalWorker.ready`.
        node: Ray's id of its node.
    """
    worker = _worker_of(info)
    opened = {key: round(float(info[key]), 3) for key in ("load_s", "compile_s") if key in info}
    tell(WORKER_READY, f"worker {worker} is ready", {"worker": worker, "node": _short(node), **opened})


def worker_lost(info: Mapping[str, Any] | None, why: str, node: str | None = None) -> None:
    """A worker's process ended, or cannot be reached; `info` is None where it never became ready."""
    worker = None if info is None else _worker_of(info)
    who = "a worker that was not ready yet" if worker is None else f"worker {worker}"
    fields = {"worker": worker, "node": _short(node), "cause": why}
    tell(WORKER_LOST, f"{who} is lost", fields, level=logging.WARNING)


def shard_done(task: Task, result: ShardResult, node: str | None = None) -> None:
    """A shard's file is there."""
    seconds = getattr(result, "wall_s", None)
    fields = {
        "worker": getattr(result, "worker", None),
        "node": _short(node),
        "windows": getattr(result, "n_windows", None),
        "tokens": getattr(result, "n_tokens", None),
        "wall_s": None if seconds is None else round(seconds, 3),
        "published": getattr(result, "committed", None),
    }
    tell(SHARD_DONE, f"shard {task.shard.first_window} is done", _of(task) | fields)


def shard_retried(task: Task, attempt: int, why: str, worker: str | None = None) -> None:
    """A shard goes back into the queue: the attempt with that number, from 1 on, failed."""
    sentence = f"shard {task.shard.first_window} lost its worker, attempt {attempt}"
    fields = {"worker": worker, "attempt": attempt, "cause": why}
    tell(SHARD_RETRIED, sentence, _of(task) | fields, level=logging.WARNING)


def shard_set_aside(task: Task, kind: str, cause: str, attempts: int) -> None:
    """A shard will not be finished by this invocation; see `pipeline.executor.ShardFailure`."""
    sentence = f"shard {task.shard.first_window} is set aside ({kind}): {cause}"
    tell(SHARD_SET_ASIDE, sentence, _of(task) | {"kind": kind, "attempts": attempts}, level=logging.ERROR)


@contextmanager
def of_runs(tasks: Sequence[Task]) -> Iterator[None]:
    """Tell when the runs that tasks belong to begin and end, and what of them was done meanwhile."""
    asked = Counter(getattr(task.spec, "run_key", None) for task in tasks)
    done, aside = Counter[Value](), Counter[Value]()

    def count(event: Event) -> None:
        if event.name in (SHARD_DONE, SHARD_SET_ASIDE):
            (done if event.name == SHARD_DONE else aside)[event.fields.get("run")] += 1

    began = time.monotonic()
    for run, n in asked.items():
        tell(RUN_BEGUN, f"{n} shards to compute", {"run": run, "shards": n})
    with listening(count):
        try:
            yield
        finally:
            for run, n in asked.items():
                counts = {"shards": n, "done": done[run], "set_aside": aside[run]}
                wall_s = round(time.monotonic() - began, 3)
                tell(
                    RUN_ENDED, f"{done[run]} of {n} shards are done", {"run": run, **counts, "wall_s": wall_s}
                )


class JsonLines(logging.Formatter):
    """Every record as a JSON object on one line: `time` (UTC), `level`, `logger`, `message`, fields."""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        entry: dict[str, Any] = {
            "time": f"{moment}.{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": getattr(record, "said", None) or redacted(record.getMessage()),
        }
        if hasattr(record, "event"):
            entry |= {"event": record.event, **getattr(record, "fields", {})}
        if record.exc_info:
            entry["exception"] = redacted(self.formatException(record.exc_info))
        return json.dumps(entry, default=str)


class Redacting(logging.Formatter):
    """Lines for people, secrets in URLs left out."""

    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))


def host_of(worker: str) -> str:
    """HOST of a worker's name HOST:PID."""
    return worker.rpartition(":")[0]


def wants_json() -> bool:
    """Whether `PAGEMILL_LOG=json` asks for JSON lines."""
    return os.environ.get("PAGEMILL_LOG", "").lower() == "json"


def is_for_lines(record: logging.LogRecord) -> bool:
    """A filter for terminals with a live bar, which shows finished shards itself."""
    return getattr(record, "event", None) != SHARD_DONE


def _of(task: Task) -> dict[str, Value]:
    run = getattr(task.spec, "run_key", None)
    return {"run": run, "shard": task.shard.first_window}


def _worker_of(info: Mapping[str, Any]) -> str:
    return f"{info.get('host', '?')}:{info.get('pid', '?')}"


def _short(node: str | None) -> str | None:
    """The first digits of a node's id, as `ray status` and the pool's messages show it."""
    return None if node is None else node[:8]


def _text(value: Value) -> str:
    if isinstance(value, str) and _PLAIN.fullmatch(value):
        return value
    return json.dumps(value)
