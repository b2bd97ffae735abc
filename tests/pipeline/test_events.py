"""Laws of events: a line for each that matters, fields that machines can read, no secret in any of them."""

from __future__ import annotations

import ast
import io
import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline import events, progress, runtime
from pipeline.executor import InlineExecutor, Task
from pipeline.progress import Hosts, LineProgress
from pipeline.ray_metrics import ClusterMetrics
from pipeline.redact import redacted
from pipeline.shards import plan
from pipeline.tables import RUNS_SCHEMA, table
from tests.pipeline.fake_workers import FakeWorker

ROOT = Path(__file__).parents[2]
FAKE = f"{FakeWorker.__module__}:FakeWorker"


class Spec(dict[str, Any]):
    """A fake worker's spec that belongs to a run."""

    run_key = "0123456789abcdef"


def heard(spec: dict[str, Any], n: int) -> list[events.Event]:
    """Events of an inline run of n shards."""
    seen: list[events.Event] = []
    with events.listening(seen.append):
        executor = InlineExecutor(FAKE)
        executor.start([spec])  # type: ignore[list-item]
        executor.run([Task(spec, shard) for shard in plan(n, 1)], lambda *_: None)  # type: ignore[arg-type]
        executor.close()
    return seen


def test_a_run_tells_of_its_beginning_its_worker_each_shard_and_its_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    seen = heard(Spec(folder=str(tmp_path), faulty=[1]), 3)
    assert [event.name for event in seen] == [
        "worker_ready", "run_begun", "shard_done", "shard_set_aside", "shard_done", "run_ended",
    ]  # fmt: skip
    assert {event.fields.get("run") for event in seen[1:]} == {Spec.run_key}
    assert [event.fields.get("shard") for event in seen[2:5]] == [0, 1, 2]
    ended = dict(seen[-1].fields)
    assert (ended["shards"], ended["done"], ended["set_aside"]) == (3, 2, 1)
    lines = [record.getMessage() for record in caplog.records if record.name == "pipeline.events"]
    assert len(lines) == len(seen), "one line an event"
    assert lines[3].startswith(
        "shard 1 is set aside (error): ValueError: window 1 is wrong event=shard_set_aside "
    )
    assert f"run={Spec.run_key} shard=1 kind=error attempts=1" in lines[3]


def test_the_end_is_told_after_an_interrupt_too_and_listeners_are_let_go(tmp_path: Path) -> None:
    seen: list[events.Event] = []
    with pytest.raises(KeyboardInterrupt), events.listening(seen.append):
        with events.of_runs([Task(Spec(), shard) for shard in plan(2, 1)]):  # type: ignore[arg-type]
            raise KeyboardInterrupt
    assert [event.name for event in seen] == ["run_begun", "run_ended"]
    events.tell("unheard", "nobody listens", {})
    assert len(seen) == 2


def record(capture: pytest.LogCaptureFixture, *, json_lines: bool) -> str:
    formatter: logging.Formatter = events.JsonLines() if json_lines else events.Redacting(runtime.LOG_FORMAT)
    return "\n".join(map(formatter.format, capture.records))


def test_json_lines_hold_the_fields_and_one_line_each(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    fields = {"run": "r", "shard": 12, "worker": "host:1", "cause": 'a "b"\nc', "node": None}
    events.tell(events.SHARD_RETRIED, "two\nlines", fields, level=logging.WARNING)
    try:
        raise ValueError("of a library")
    except ValueError:
        logging.getLogger("other").exception("it %s", "failed")
    first, second = map(json.loads, record(caplog, json_lines=True).split("\n"))
    assert (first["event"], first["level"], first["message"]) == ("shard_retried", "warning", "two\nlines")
    assert {key: first[key] for key in ("run", "shard", "worker", "cause")} == {
        key: value for key, value in fields.items() if value is not None
    }
    assert "node" not in first
    assert first["time"].endswith("Z")
    assert second["message"] == "it failed"
    assert "ValueError: of a library" in second["exception"]
    assert 'cause="a \\"b\\"\\nc"' in caplog.records[0].getMessage(), "quoted, so that keys can be told apart"


@pytest.mark.parametrize(
    ("wanted", "is_terminal", "lines"), [("json", True, 2), ("", True, 1), ("", False, 2)]
)
def test_a_terminal_shows_finished_shards_by_its_bar_alone(
    wanted: str, is_terminal: bool, lines: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: is_terminal)
    monkeypatch.setenv("PAGEMILL_LOG", wanted)
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(sys, "stderr", stream)
    try:
        runtime.setup_logging()
        events.tell(events.SHARD_DONE, "shard 1 is done", {"shard": 1})
        events.tell(events.WORKER_LOST, "worker a:1 is lost", {"worker": "a:1"})
    finally:
        logging.captureWarnings(False)
        root.handlers[:] = before
        root.setLevel(level)
    assert len(stream.getvalue().splitlines()) == lines


SECRETS = {
    "https://me:pass@word@host/a.txt": "https://***@host/a.txt",
    "s3://key:secret@bucket/x?versionId=1&sig=ab%3D": "s3://***@bucket/x?versionId=***&sig=***",
    "zip://a.txt::https://t0ken@host/b.zip?token=x": "zip://a.txt::https://***@host/b.zip?token=***",
    '{"path":"http://u:p@h/?q=1","name":"me@home"}': '{"path":"http://***@h/?q=***","name":"me@home"}',
    "/data/a?b=c@d.txt": "/data/a?b=c@d.txt",
    "https://host/plain.txt": "https://host/plain.txt",
}


@pytest.mark.parametrize(("text", "shown"), SECRETS.items())
def test_a_url_keeps_no_login_and_no_query(text: str, shown: str) -> None:
    assert redacted(text) == shown
    assert redacted({"a": [text, 1, None], "b": (text,)}) == {"a": [shown, 1, None], "b": (shown,)}


def test_secrets_reach_no_log_no_event_and_no_row(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    secret, heard_of = "https://user:hunter2@host/x?sig=hunter2", []
    with events.listening(heard_of.append):
        events.tell("any", f"fetching {secret}", {"cause": secret})
    logging.getLogger("fsspec").warning("GET %s", secret)
    row = table([{"data_path": secret, "settings": json.dumps({"uri": secret})}], RUNS_SCHEMA)
    shown = [
        record(caplog, json_lines=True),
        record(caplog, json_lines=False),
        str(heard_of),
        str(row.to_pylist()),
    ]
    assert not [text for text in shown if "hunter2" in text]
    assert "***@host" in caplog.records[0].getMessage()


OWN_PIPE = "pipeline/bench/ready.py"  # reads what its own parent process writes to it


def test_nothing_is_unpickled_from_files_and_no_text_is_executed() -> None:
    """Models, data and results are read by parsers of their formats; a pickle could run anything."""
    loaders = ("pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "numpy", "np", "torch", "yaml")
    safe = {"np.load", "torch.load(weights_only=True)", "yaml.safe_load"}
    found = []
    for path in [path for part in ("engine", "pipeline", "jobs") for path in (ROOT / part).rglob("*.py")]:
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        for call in calls:
            module, _, name = ast.unparse(call.func).rpartition(".")
            safely = [f"{key.arg}={ast.unparse(key.value)}" for key in call.keywords]
            shown = f"{module}.{name}" + ("(weights_only=True)" if "weights_only=True" in safely else "")
            loads = module in loaders and ("load" in name or name == "Unpickler") and shown not in safe
            if loads or (not module and name in ("eval", "exec")) or "allow_pickle=True" in safely:
                found.append((str(path.relative_to(ROOT)), shown))
    assert found == [(OWN_PIPE, "pickle.load")]


class Metric:
    """Stands in for one of `ray.util.metrics`."""

    def __init__(self, name: str, *_: Any) -> None:
        self.name, self.told = name, []

    def tell(self, value: float, tags: dict[str, str] | None = None) -> None:
        self.told.append((value, tags))

    inc = observe = set = tell


class Metrics:
    """Stands in for the module."""

    def __init__(self) -> None:
        self.made: dict[str, Metric] = {}

    def make(self, name: str, *_: Any) -> Metric:
        return self.made.setdefault(name, Metric(name))

    Counter = Histogram = Gauge = make


def test_metrics_count_tokens_shards_and_workers() -> None:
    module = Metrics()
    with events.listening(ClusterMetrics(module)):
        told = {name: metric.told for name, metric in module.made.items()}
        for pid in (1, 2):
            events.worker_ready({"host": "a", "pid": pid})
        events.worker_lost({"host": "a", "pid": 1}, "it died")
        done = {"run": "r", "worker": "a:2", "tokens": 512, "wall_s": 1.5}
        events.tell(events.SHARD_DONE, "done", done)
        events.tell(events.SHARD_RETRIED, "again", {"run": "r"})
    tags = {"host": "a", "run": "r"}
    assert told == {
        "pagemill_tokens_total": [(512, tags)],
        "pagemill_shards_done_total": [(1, tags)],
        "pagemill_shards_retried_total": [(1, {"run": "r"})],
        "pagemill_shard_seconds": [(1.5, tags)],
        "pagemill_workers_ready": [(1, None), (2, None), (1, None)],
    }


def done_by(worker: str, tokens: int) -> None:
    events.tell(events.SHARD_DONE, "done", {"worker": worker, "tokens": tokens})


def test_hosts_are_shown_by_their_own_pace_the_slowest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    hosts = Hosts()
    with events.listening(hosts):
        now[0] += 10
        done_by("a:1", 500)
        assert hosts.shown(5) == [], "of one host the rate is the run's"
        done_by("a:2", 500)
        done_by("b:1", 200)
        assert hosts.shown(5) == ["b 20 tok/s", "a 100 tok/s"]
        assert hosts.shown(1) == ["b 20 tok/s", "and 1 more"]
        now[0] += 90
        assert hosts.shown(5) == ["b 2 tok/s", "a 10 tok/s"], "what stands still gets slower"
        for _ in range(progress.LATELY + 1):
            now[0] += 1
            done_by("b:1", 100)
    assert hosts.shown(5)[-1] == "b 100 tok/s", "and what was long ago is forgotten"


def test_lines_name_the_hosts_and_the_display_stops_listening(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    lines = LineProgress(every_s=0)
    for _ in range(2):
        lines.start(2)
    for worker in ("a:1", "b:1"):
        done_by(worker, 512)
        lines.advance(1, 10, 10.0, 512)
    assert "a " in caplog.messages[-1]
    assert caplog.messages[-1].count("tok/s") == 2
    lines.stop()
    assert not events._listeners
