"""The MLflow index of runs. The one door to MLflow.

Parquet is the truth; MLflow is where runs are found and compared, so nothing here may cost a result: a server
that does not answer costs a message. Importing MLflow takes seconds and a fresh SQLite schema several more,
so a process of its own does it while the workers compute (`Tracker.prepare`), and waits for runs on its
standard input, one message a line, one answer each. That process also keeps MLflow's memory, its prints and
its time-outs out of the driver; it is the only one that writes.

A sweep is a parent run that stays open while its points are logged as children (tag `mlflow.parentRunId`).
Should the driver die, its process sees the end of its input and marks the parent KILLED.
"""

from __future__ import annotations

import json
import logging
import math
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

from pipeline.reachable import unreachable
from pipeline.redact import redacted
from pipeline.settings import TrackingSettings, shown

LOG_TIMEOUT_S = 120.0
MAX_PARAM, MAX_TAG, MAX_KEY = 6000, 5000, 250  # MLflow's limits for a value and a key
MAX_DIGEST = 32  # characters of a data set's digest; a whole SHA-256 is refused, so it is a tag as well
LATER = "run the same command again: finished shards are reused, nothing is computed twice"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataInput:
    """The data set of a run: a name, where it came from, its SHA-256 in hexadecimal."""

    name: str
    source: str
    sha256: str


@dataclass(frozen=True)
class Record:
    """What is logged of one run, ready for MLflow."""

    name: str
    run_key: str
    params: Mapping[str, str]
    metrics: Mapping[str, float]
    tags: Mapping[str, str]
    artifacts: Sequence[str] = ()
    data: DataInput | None = None
    status: str = "FINISHED"
    parent: str | None = None
    started_ms: int = field(default_factory=lambda: time.time_ns() // 1_000_000)


class Tracker(Protocol):
    """Where runs are logged; `warnings` says what went wrong, for the run's own list."""

    warnings: list[str]

    def prepare(self) -> None:
        """Begin what takes long, in the background; call it when the workers have their work."""
        ...

    def log_run(
        self,
        name: str,
        params: Mapping[str, Any],
        metrics: Mapping[str, float | int | None],
        tags: Mapping[str, Any],
        artifacts: Sequence[Path] = (),
        data: DataInput | None = None,
        *,
        complete: bool = True,
        started_s: float | None = None,
        parent: str | None = None,
        stays_open: bool = False,
    ) -> str | None:
        """Log one run; never raises.

        Args:
            name: of the run, for people.
            params: the resolved settings, nested as they are.
            metrics: None and what is not finite is left out.
            tags: `run_key` must be among them; runs that carry the same and were left RUNNING, by a driver
                that was killed, are marked KILLED.
            artifacts: small files.
            complete: False marks the run FAILED.
            started_s: when it began, seconds since the epoch.
            parent: MLflow's id of the run that this one is a point of.
            stays_open: it is a parent, RUNNING until `end_run`.

        Returns:
            MLflow's id of the run, None where it was not logged.
        """
        ...

    def end_run(
        self,
        run_id: str,
        metrics: Mapping[str, float | int | None],
        artifacts: Sequence[Path] = (),
        *,
        complete: bool = True,
    ) -> None:
        """End a run that stayed open, with what became known since; never raises."""
        ...

    def close(self) -> None:
        """Let go; without `log_run` nothing was logged."""
        ...


class NoTracker:
    """Logs nothing: `tracking=none`, or a server that does not answer."""

    def __init__(self, *warnings: str) -> None:
        self.warnings = list(warnings)

    def prepare(self) -> None:
        pass

    def log_run(self, *_: Any, **__: Any) -> str | None:
        return None

    def end_run(self, *_: Any, **__: Any) -> None:
        pass

    def close(self) -> None:
        pass


def open_tracker(settings: TrackingSettings, results: Path) -> Tracker:
    """The tracker that the settings name; a server is asked once, shortly, whether it is there.

    Args:
        results: `paths.results`; tracking=local keeps `mlflow.db` and `mlartifacts/` in it.
    """
    if settings.kind == "none":
        return NoTracker()
    if settings.kind == "local":
        results = results.absolute()
        return MlflowTracker(
            f"sqlite:///{results / 'mlflow.db'}", settings.experiment, results / "mlartifacts"
        )
    uri = settings.uri or os.environ.get("MLFLOW_TRACKING_URI") or ""
    if problem := unreachable(uri):
        warning = f"MLflow at {shown(uri) or 'no address'}: {problem}; this run is not logged. Later: {LATER}"
        log.warning("%s", warning)
        return NoTracker(warning)
    return MlflowTracker(uri, settings.experiment)


class MlflowTracker:
    """Logs to a tracking URI through a child process.

    Args:
        artifacts: folder for the artifacts of an experiment that is new; None leaves it to the server.
    """

    def __init__(self, uri: str, experiment: str, artifacts: Path | None = None) -> None:
        self.warnings: list[str] = []
        self._target = {
            "uri": uri,
            "experiment": experiment,
            "artifacts": artifacts.as_uri() if artifacts else None,
        }
        self._folder = artifacts.parent if artifacts else None
        self._child: subprocess.Popen[str] | None = None
        self._given_up = False  # what did not answer once is not asked again

    def prepare(self) -> None:
        if self._child is not None or self._given_up:
            return
        try:
            if self._folder is not None:
                self._folder.mkdir(parents=True, exist_ok=True)
            root = str(Path(__file__).resolve().parent.parent)
            path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
            self._child = subprocess.Popen(
                [sys.executable, "-m", "pipeline.tracking"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "PYTHONPATH": path},
            )
            _send(self._child.stdin, self._target)
        except OSError as error:
            self._warn(str(error))

    def log_run(
        self,
        name: str,
        params: Mapping[str, Any],
        metrics: Mapping[str, float | int | None],
        tags: Mapping[str, Any],
        artifacts: Sequence[Path] = (),
        data: DataInput | None = None,
        *,
        complete: bool = True,
        started_s: float | None = None,
        parent: str | None = None,
        stays_open: bool = False,
    ) -> str | None:
        record = Record(
            name=name,
            run_key=str(tags["run_key"]),
            params={key: _cut(value, MAX_PARAM) for key, value in flattened(params).items()},
            metrics=_finite(metrics),
            tags={key: _cut(value, MAX_TAG) for key, value in tags.items() if value is not None},
            artifacts=[str(path) for path in artifacts],
            data=data,
            status="RUNNING" if stays_open else "FINISHED" if complete else "FAILED",
            parent=parent,
            started_ms=int((time.time() if started_s is None else started_s) * 1000),
        )
        said = self._ask({"log": redacted(asdict(record))})
        if parent is None and not stays_open:
            self._dismiss()
        return said.get("run_id")

    def end_run(
        self,
        run_id: str,
        metrics: Mapping[str, float | int | None],
        artifacts: Sequence[Path] = (),
        *,
        complete: bool = True,
    ) -> None:
        status = "FINISHED" if complete else "FAILED"
        paths = [str(path) for path in artifacts]
        self._ask({"end": run_id, "metrics": _finite(metrics), "artifacts": paths, "status": status})
        self._dismiss()

    def _ask(self, message: Mapping[str, Any]) -> dict[str, str]:
        """Send the child a message and wait for its answer; {} where there is none, which costs a warning."""
        self.prepare()
        child = self._child
        if child is None:
            return {}
        try:
            _send(child.stdin, message)
            assert child.stdout is not None, "the child was started with pipes"
            answered, _, _ = select.select([child.stdout], [], [], LOG_TIMEOUT_S)
            answer = child.stdout.readline() if answered else None
        except (OSError, ValueError) as error:  # ValueError: closed meanwhile, after an interrupt
            self._give_up(str(error))
            return {}
        if answer is None:
            self._give_up(f"no answer within {LOG_TIMEOUT_S:.0f} s")
            return {}
        said: dict[str, str] = json.loads(answer) if answer.strip() else {"fatal": "its process ended early"}
        if "fatal" in said:
            self._give_up(said["fatal"])
        elif "error" in said:
            self._warn(said["error"])
        return said

    def _give_up(self, problem: str) -> None:
        self._given_up = True
        self._warn(problem)
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.communicate()

    def _dismiss(self) -> None:
        """Let the child end, and wait for it: it has nothing left to do."""
        child, self._child = self._child, None
        if child is None:
            return
        try:
            child.communicate(timeout=LOG_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.communicate()

    def close(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            # Not killed: it may be in the middle of creating the database. It ends when its input does.
            threading.Thread(target=child.communicate, daemon=True).start()

    def _warn(self, problem: str) -> None:
        warning = (
            f"MLflow at {shown(self._target['uri'] or '')}: {problem}; this run is not logged. Later: {LATER}"
        )
        self.warnings.append(warning)
        log.warning("%s", warning)


def flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as `group.key`: text, as MLflow's parameters are."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = "null" if value is None else str(value)
    return flat


def _finite(metrics: Mapping[str, float | int | None]) -> dict[str, float]:
    return {key: float(x) for key, x in metrics.items() if x is not None and math.isfinite(x)}


def _cut(value: Any, length: int) -> str:
    text = str(value)
    return text if len(text) <= length else text[: length - 3] + "..."


def _send(stream: IO[str] | None, message: Mapping[str, Any]) -> None:
    assert stream is not None, "the child was started with pipes"
    stream.write(json.dumps(message) + "\n")
    stream.flush()


def _log(client: Any, experiment: str, record: dict[str, Any]) -> str:
    """One MLflow run in as few requests as it takes; returns its id."""
    from mlflow.entities import Dataset, DatasetInput, InputTag, Param, RunTag

    orphans = f"attributes.status = 'RUNNING' AND tags.run_key = '{record['run_key']}'"
    for orphan in client.search_runs([experiment], orphans):
        client.set_terminated(orphan.info.run_id, "KILLED")
    run = client.create_run(experiment, start_time=record["started_ms"], run_name=record["name"])
    run_id = str(run.info.run_id)
    data = record["data"]
    tags = record["tags"] | ({"data.sha256": data["sha256"]} if data else {})
    tags |= {"mlflow.parentRunId": record["parent"]} if record["parent"] else {}
    try:
        client.log_batch(
            run_id,
            metrics=_metrics(record["metrics"]),
            params=[Param(key[:MAX_KEY], value) for key, value in record["params"].items()],
            tags=[RunTag(key[:MAX_KEY], value) for key, value in tags.items()],
        )
        if data:
            source = json.dumps({"uri": data["source"]})
            entity = Dataset(data["name"], data["sha256"][:MAX_DIGEST], "local", source)
            client.log_inputs(run_id, [DatasetInput(entity, [InputTag("mlflow.data.context", "eval")])])
        for artifact in record["artifacts"]:
            client.log_artifact(run_id, artifact)
    except BaseException:
        client.set_terminated(run_id, "FAILED")
        raise
    if record["status"] != "RUNNING":
        client.set_terminated(run_id, record["status"])
    return run_id


def _end(client: Any, message: dict[str, Any]) -> None:
    """End a run that stayed open."""
    client.log_batch(message["end"], metrics=_metrics(message["metrics"]))
    for artifact in message["artifacts"]:
        client.log_artifact(message["end"], artifact)
    client.set_terminated(message["end"], message["status"])


def _metrics(values: Mapping[str, float]) -> list[Any]:
    from mlflow.entities import Metric

    now = time.time_ns() // 1_000_000
    return [Metric(key, value, now, 0) for key, value in values.items()]


def _experiment(client: Any, name: str, artifacts: str | None) -> str:
    found = client.get_experiment_by_name(name)
    if found:
        return str(found.experiment_id)
    kind = {"mlflow.experimentKind": "custom_model_development"}  # opens as runs with metrics, not as traces
    return str(client.create_experiment(name, artifact_location=artifacts, tags=kind))


def _child() -> None:
    """The child process: reads its target, then messages, a line each; writes an answer to each."""
    from pipeline.runtime import setup_logging

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the driver, which closes the pipe
    os.nice(5)  # the workers come first
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever MLflow prints goes to standard error
    target = json.loads(sys.stdin.readline() or "null")
    if target is None:
        return
    os.environ.update(MLFLOW_DISABLE_TELEMETRY="true", DO_NOT_TRACK="true", GIT_PYTHON_REFRESH="quiet")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_CONFIGURE_LOGGING", "false")
    setup_logging()
    try:
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=target["uri"], registry_uri=target["uri"])
        experiment = _experiment(client, target["experiment"], target["artifacts"])
    except Exception as error:
        if sys.stdin.readline():
            _send(answer, {"fatal": _told(error)})
        os._exit(0)
    still_open: list[str] = []
    for line in sys.stdin:
        message = json.loads(line)
        try:
            if "end" in message:
                still_open.remove(message["end"])
                _end(client, message)
                said = {"run_id": message["end"]}
            else:
                said = {"run_id": _log(client, experiment, message["log"])}
                if message["log"]["status"] == "RUNNING":
                    still_open.append(said["run_id"])
        except Exception as error:
            said = {"error": _told(error)}
        with suppress(OSError):  # a driver that is gone: its runs are ended below
            _send(answer, said)
    for run_id in still_open:
        client.set_terminated(run_id, "KILLED")
    os._exit(0)  # everything is written; MLflow's exit handlers would take half a second of the driver's time


def _told(error: Exception) -> str:
    log.debug("MLflow", exc_info=True)
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"


if __name__ == "__main__":
    _child()
