"""The MLflow index of runs. The one door to MLflow.

Parquet is the truth; MLflow is where runs are found and compared, so nothing here may cost a result: a server
that does not answer costs a message. Importing MLflow takes seconds and a fresh SQLite schema several more,
so a process of its own does it while the workers compute (`Tracker.prepare`), and waits for the run on its
standard input. That process also keeps MLflow's memory, its prints and its time-outs out of the driver; it is
the only one that writes.
"""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as NoAnswer
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

from pipeline.settings import TrackingSettings

PROBE_TIMEOUT_S = 2.0
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

        Returns:
            MLflow's id of the run, None where it was not logged.
        """
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
    if problem := _unreachable(uri):
        warning = f"MLflow at {uri or 'no address'}: {problem}; this run is not logged. Later: {LATER}"
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

    def prepare(self) -> None:
        if self._child is not None:
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
    ) -> str | None:
        record = Record(
            name=name,
            run_key=str(tags["run_key"]),
            params={key: _cut(value, MAX_PARAM) for key, value in flattened(params).items()},
            metrics={key: float(x) for key, x in metrics.items() if x is not None and math.isfinite(x)},
            tags={key: _cut(value, MAX_TAG) for key, value in tags.items() if value is not None},
            artifacts=[str(path) for path in artifacts],
            data=data,
            status="FINISHED" if complete else "FAILED",
            started_ms=int((time.time() if started_s is None else started_s) * 1000),
        )
        self.prepare()
        child, self._child = self._child, None
        if child is None:
            return None
        try:
            answer, _ = child.communicate(json.dumps(asdict(record)) + "\n", timeout=LOG_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.communicate()
            self._warn(f"no answer within {LOG_TIMEOUT_S:.0f} s")
            return None
        except OSError as error:
            self._warn(str(error))
            return None
        said: dict[str, str] = json.loads(answer) if answer.strip() else {"error": "its process ended early"}
        if "error" in said:
            self._warn(said["error"])
        return said.get("run_id")

    def close(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            # Not killed: it may be in the middle of creating the database. It ends when its input does.
            threading.Thread(target=child.communicate, daemon=True).start()

    def _warn(self, problem: str) -> None:
        warning = f"MLflow at {self._target['uri']}: {problem}; this run is not logged. Later: {LATER}"
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


def _cut(value: Any, length: int) -> str:
    text = str(value)
    return text if len(text) <= length else text[: length - 3] + "..."


def _unreachable(uri: str) -> str | None:
    """Why a server cannot be reached, or None; bounded even where the name look-up hangs."""
    if not uri.startswith(("http://", "https://")):
        return None if uri else "tracking.uri is not set"

    def ask() -> None:
        try:
            urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=PROBE_TIMEOUT_S).close()
        except urllib.error.HTTPError as error:
            error.close()  # it wants a login, say: something answers, MLflow will see

    pool = ThreadPoolExecutor(1)
    try:
        pool.submit(ask).result(timeout=2 * PROBE_TIMEOUT_S)
    except NoAnswer:
        return "no answer"
    except (OSError, ValueError) as error:
        return f"not reachable ({getattr(error, 'reason', None) or error})"
    finally:
        pool.shutdown(wait=False)
    return None


def _send(stream: IO[str] | None, message: Mapping[str, Any]) -> None:
    assert stream is not None, "the child was started with pipes"
    stream.write(json.dumps(message) + "\n")
    stream.flush()


def _log(client: Any, experiment: str, record: dict[str, Any]) -> str:
    """One MLflow run in as few requests as it takes; returns its id."""
    from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag

    orphans = f"attributes.status = 'RUNNING' AND tags.run_key = '{record['run_key']}'"
    for orphan in client.search_runs([experiment], orphans):
        client.set_terminated(orphan.info.run_id, "KILLED")
    run = client.create_run(experiment, start_time=record["started_ms"], run_name=record["name"])
    run_id = str(run.info.run_id)
    now = time.time_ns() // 1_000_000
    data = record["data"]
    tags = record["tags"] | ({"data.sha256": data["sha256"]} if data else {})
    try:
        client.log_batch(
            run_id,
            metrics=[Metric(key, value, now, 0) for key, value in record["metrics"].items()],
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
    client.set_terminated(run_id, record["status"])
    return run_id


def _experiment(client: Any, name: str, artifacts: str | None) -> str:
    found = client.get_experiment_by_name(name)
    if found:
        return str(found.experiment_id)
    kind = {"mlflow.experimentKind": "custom_model_development"}  # opens as runs with metrics, not as traces
    return str(client.create_experiment(name, artifact_location=artifacts, tags=kind))


def _child() -> None:
    """The child process: reads its target, then a record, a line each; writes one answer."""
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
        line = sys.stdin.readline()
        if not line:
            return
        said = {"run_id": _log(client, experiment, json.loads(line))}
    except Exception as error:
        log.debug("MLflow", exc_info=True)
        said = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}
    json.dump(said, answer)
    answer.flush()
    os._exit(0)  # everything is written; MLflow's exit handlers would take half a second of the driver's time


if __name__ == "__main__":
    _child()
